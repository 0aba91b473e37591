package quotahttp

import (
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// A Refusal is the reason why a request is answered in its handler's place.
type Refusal struct {
	// Status is 429 where a limit denied the request, 503 where the store failed, and 500 where the request
	// has no key or its charges are not valid.
	Status int
	// Limits are the names of the limits that denied the request.
	Limits []string
	// RetryAfter is the time after which the request fits, or for 503 a second; quota.Never where it cannot
	// fit, and for 500. Where holds of other requests deny it is shorter than the time until they lapse, for those requests
	// end sooner: a sixteenth of the limit's TTL, and a second at least.
	RetryAfter time.Duration
	// Err is nil where a limit denied the request, and the reason otherwise. It is not for the client.
	Err error
}

// ServeHTTP writes the status and a problem of RFC 9457 as JSON: for 429 of the type quota-exceeded of the
// draft, with the member violated-policies, and for 503 of the type temporary-reduced-capacity.
//
//	{"type":"https://iana.org/assignments/http-problem-types#quota-exceeded","title":"Quota exceeded","status":429,"violated-policies":["minute"]}
func (f *Refusal) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	kind, title := "about:blank", http.StatusText(f.Status)
	switch f.Status {
	case http.StatusTooManyRequests:
		kind, title = typeQuotaExceeded, "Quota exceeded"
	case http.StatusServiceUnavailable:
		kind, title = typeReducedCapacity, "Temporarily reduced capacity"
	}
	buffer := problems.Get().(*[]byte)
	b := append(append((*buffer)[:0], `{"type":"`...), kind...) // no text here needs an escape
	b = append(append(append(b, `","title":"`...), title...), `","status":`...)
	b = strconv.AppendInt(b, int64(f.Status), 10)
	for i, name := range f.Limits {
		b = append(b, `","`...)
		if i == 0 {
			b = append(b[:len(b)-3], `,"violated-policies":["`...)
		}
		b = append(b, name...)
	}
	if len(f.Limits) > 0 {
		b = append(b, `"]`...)
	}
	w.Header().Set("Content-Type", "application/problem+json")
	w.WriteHeader(f.Status)
	b = append(b, "}\n"...)
	_, _ = w.Write(b) // the client may have left
	*buffer = b
	problems.Put(buffer)
}

// problems holds buffers for bodies, which no io.Writer keeps.
var problems = sync.Pool{New: func() any { return new([]byte) }}

// denial returns the refusal of a list that was denied.
func denial(charges []quota.Charge, result *quota.Result) *Refusal {
	whole := &struct { // one piece of memory
		Refusal
		name [1]string
	}{Refusal: Refusal{Status: http.StatusTooManyRequests, RetryAfter: result.RetryAfter()}}
	f := &whole.Refusal
	if decider := &result.Decisions[result.Decider]; decider.Source == quota.FromClosed && decider.RetryAfter != quota.Never {
		f.Status = http.StatusServiceUnavailable
		f.Err = fmt.Errorf("quotahttp: %w: a policy denies while the store cannot decide", quota.ErrUnavailable)
		return f
	}
	f.Limits = whole.name[:0]
	longest := time.Duration(0)
	for i := range charges {
		d, name := &result.Decisions[i], charges[i].Limit.Name()
		if d.Allowed || d.Shadow {
			continue
		}
		longest = max(longest, retryAfter(charges[i].Limit, d))
		if !slices.Contains(f.Limits, name) {
			f.Limits = append(f.Limits, name)
		}
	}
	if len(f.Limits) > 0 {
		f.RetryAfter = longest
	}
	return f
}

// wholeSeconds returns the value of Retry-After: whole seconds, rounded up, 1 or more.
func wholeSeconds(d time.Duration) string { return strconv.FormatInt(max(seconds(d), 1), 10) }
