package quotahttp_test

import (
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/dunglas/httpsfv"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

func limit(text string) *quota.Limit { return quota.Must(algorithm.ParseLimit(text)) }

// at is the time of the decisions of TestHeaders: 2026-01-01T00:00:00.5Z.
const at quota.Micros = 1767225600_500_000

// TestHeaders: every value is right to the second, in every dialect.
func TestHeaders(t *testing.T) {
	const all = quotahttp.IETF | quotahttp.GitHub | quotahttp.OpenAI | quotahttp.Anthropic | quotahttp.Draft03
	hundred, five := limit("requests: 100/1m sliding"), limit("day: 5000/24h fixed")
	bucket := limit("tokens: 1000 burst 10/s bucket")
	allowed := func(left int64, reset time.Duration) quota.Decision {
		return quota.Decision{Allowed: true, Remaining: left, Charged: 1, ResetAfter: reset, At: at}
	}
	denied := func(left int64, retry, reset time.Duration) quota.Decision {
		return quota.Decision{Remaining: left, RetryAfter: retry, ResetAfter: reset, At: at}
	}
	from := func(d quota.Decision, s quota.Source) quota.Decision {
		d.Source = s
		return d
	}
	shadow := func(d quota.Decision) quota.Decision {
		d.Shadow = true
		return d
	}
	type m = map[string]string
	none := m{"RateLimit": "", "RateLimit-Policy": "", "X-RateLimit-Limit": "", "X-Ratelimit-Limit-Requests": "", "Anthropic-Ratelimit-Requests-Limit": "", "RateLimit-Limit": ""}
	for name, test := range map[string]struct {
		limits    []*quota.Limit
		decisions []quota.Decision
		shadows   bool
		status    int
		fields    m
	}{
		"allowed": {[]*quota.Limit{hundred}, []quota.Decision{allowed(99, 60*time.Second)}, false, 200, m{
			"RateLimit-Policy": `"requests";q=100;w=60`, "RateLimit": `"requests";r=99;t=60`, "Retry-After": "",
			"X-RateLimit-Limit": "100", "X-RateLimit-Remaining": "99", "X-RateLimit-Used": "1", "X-RateLimit-Resource": "requests",
			"X-RateLimit-Reset":          "1767225661", // .5 s and 60 s, rounded up
			"X-Ratelimit-Limit-Requests": "100", "X-Ratelimit-Remaining-Requests": "99", "X-Ratelimit-Reset-Requests": "1m0s",
			"Anthropic-Ratelimit-Requests-Limit": "100", "Anthropic-Ratelimit-Requests-Remaining": "99", "Anthropic-Ratelimit-Requests-Reset": "2026-01-01T00:01:01Z",
			"RateLimit-Limit": "100", "RateLimit-Remaining": "99", "RateLimit-Reset": "60",
		}},
		"denied for a microsecond": {[]*quota.Limit{hundred}, []quota.Decision{denied(0, microsecond, time.Minute)}, false, 429, m{
			"RateLimit": `"requests";r=0;t=1`, "Retry-After": "1", "X-RateLimit-Remaining": "0", "X-RateLimit-Used": "100", "X-RateLimit-Reset": "1767225601",
			"X-Ratelimit-Reset-Requests": "1ms", "Anthropic-Ratelimit-Requests-Reset": "2026-01-01T00:00:01Z", "RateLimit-Reset": "1",
		}},
		"denied for 41.2 s": {[]*quota.Limit{hundred}, []quota.Decision{denied(0, 41200*time.Millisecond, time.Minute)}, false, 429, m{
			"RateLimit": `"requests";r=0;t=42`, "Retry-After": "42", "X-RateLimit-Reset": "1767225642", "X-Ratelimit-Reset-Requests": "41.2s",
			"Anthropic-Ratelimit-Requests-Reset": "2026-01-01T00:00:42Z", "RateLimit-Reset": "42",
		}},
		"denied for 41 s and no more": {[]*quota.Limit{hundred}, []quota.Decision{denied(0, 41*time.Second, time.Minute)}, false, 429, m{
			"RateLimit": `"requests";r=0;t=41`, "Retry-After": "41", "X-RateLimit-Reset": "1767225642", "RateLimit-Reset": "41",
		}},
		"debt": {[]*quota.Limit{bucket}, []quota.Decision{denied(-250, 25100*time.Millisecond, 125*time.Second)}, false, 429, m{
			"RateLimit-Policy": `"tokens";q=1000;w=100`, "RateLimit": `"tokens";r=0;t=26`, "Retry-After": "26",
			"X-RateLimit-Remaining": "0", "X-RateLimit-Used": "1250", "X-Ratelimit-Remaining-Tokens": "0", "X-Ratelimit-Reset-Tokens": "25.1s",
			"Anthropic-Ratelimit-Tokens-Remaining": "0", "RateLimit-Remaining": "0",
		}},
		"never": {[]*quota.Limit{hundred}, []quota.Decision{denied(7, quota.Never, time.Minute)}, false, 429, m{
			"RateLimit": `"requests";r=7`, "Retry-After": "", "X-RateLimit-Reset": "1767225661", "RateLimit-Reset": "60",
		}},
		"a limit of 0": {[]*quota.Limit{limit("requests: deny-all")}, []quota.Decision{denied(0, quota.Never, 0)}, false, 429, m{
			"RateLimit-Policy": `"requests";q=0`, "RateLimit": `"requests";r=0`, "Retry-After": "", "X-RateLimit-Limit": "0",
		}},
		"a bucket that is empty": {[]*quota.Limit{bucket}, []quota.Decision{allowed(0, 100*time.Second)}, false, 200, m{
			"RateLimit": `"tokens";r=0;t=1`, "RateLimit-Reset": "100",
		}},
		"a window that is empty": {[]*quota.Limit{hundred}, []quota.Decision{allowed(0, 100*time.Second)}, false, 200, m{"RateLimit": `"requests";r=0;t=100`}},
		"whole":                  {[]*quota.Limit{bucket}, []quota.Decision{allowed(1000, 0)}, false, 200, m{"RateLimit": `"tokens";r=1000;t=0`, "RateLimit-Reset": "0"}},
		"several": {[]*quota.Limit{five, hundred, bucket}, []quota.Decision{allowed(4000, 10*time.Hour), denied(0, 2*time.Second, time.Minute), denied(1, 5*time.Second, time.Hour)}, false, 429, m{
			"RateLimit-Policy": `"day";q=5000;w=86400, "requests";q=100;w=60, "tokens";q=1000;w=100`,
			"RateLimit":        `"day";r=4000;t=36000, "requests";r=0;t=2, "tokens";r=1;t=5`,
			"Retry-After":      "5", "X-RateLimit-Resource": "tokens", "X-RateLimit-Remaining": "1", "X-Ratelimit-Remaining-Day": "4000", "X-Ratelimit-Remaining-Requests": "0",
			"Anthropic-Ratelimit-Day-Reset": "2026-01-01T10:00:01Z", "RateLimit-Remaining": "1",
		}},
		"several, granted: the smallest share": {[]*quota.Limit{five, hundred}, []quota.Decision{allowed(4000, 10*time.Hour), allowed(10, time.Minute)}, false, 200, m{
			"X-RateLimit-Resource": "requests", "RateLimit-Remaining": "10",
		}},
		"one name twice: the tighter": {[]*quota.Limit{hundred, hundred}, []quota.Decision{allowed(40, time.Minute), allowed(10, time.Second)}, false, 200, m{
			"RateLimit-Policy": `"requests";q=100;w=60`, "RateLimit": `"requests";r=10;t=1`, "X-Ratelimit-Remaining-Requests": "10",
		}},
		"fallback":  {[]*quota.Limit{hundred}, []quota.Decision{from(denied(0, 3*time.Second, 0), quota.FromFallback)}, false, 429, and(none, "Retry-After", "3")},
		"open":      {[]*quota.Limit{hundred}, []quota.Decision{from(allowed(0, 0), quota.FromOpen)}, false, 200, none},
		"closed":    {[]*quota.Limit{hundred}, []quota.Decision{from(denied(0, 1500*time.Millisecond, 0), quota.FromClosed)}, false, 503, and(none, "Retry-After", "2")},
		"memory":    {[]*quota.Limit{hundred}, []quota.Decision{from(denied(0, 3*time.Second, 0), quota.FromMemory)}, false, 429, m{"RateLimit": `"requests";r=0;t=3`}},
		"lease":     {[]*quota.Limit{hundred}, []quota.Decision{from(allowed(5, 3*time.Second), quota.FromLease)}, false, 200, m{"RateLimit": `"requests";r=5;t=3`}},
		"unlimited": {[]*quota.Limit{limit("requests: unlimited")}, []quota.Decision{allowed(1<<62, 0)}, false, 200, none},
		"10^15":     {[]*quota.Limit{limit("requests: 1000000000000000/24h fixed"), hundred}, []quota.Decision{allowed(5, 0), allowed(6, 0)}, false, 200, m{"RateLimit-Policy": `"requests";q=100;w=60`, "RateLimit": `"requests";r=6;t=0`}},
		"10^15-1":   {[]*quota.Limit{limit("requests: 999999999999999/24h fixed")}, []quota.Decision{allowed(999999999999998, 0)}, false, 200, m{"RateLimit-Policy": `"requests";q=999999999999999;w=86400`, "RateLimit": `"requests";r=999999999999998;t=0`}},
		"shadow":    {[]*quota.Limit{hundred}, []quota.Decision{shadow(denied(0, time.Second, 0))}, true, 200, none},
		"w of 1 µs": {[]*quota.Limit{limit("requests: 5/1us fixed")}, []quota.Decision{allowed(4, microsecond)}, false, 200, m{"RateLimit-Policy": `"requests";q=5;w=1`, "RateLimit": `"requests";r=4;t=1`}},
	} {
		t.Run(name, func(t *testing.T) {
			charges := func(*http.Request) (cs []quota.Charge, _ error) {
				for i, l := range test.limits {
					cs = append(cs, quota.Charge{Limit: l, Key: strconv.Itoa(i), Cost: 1, Shadow: test.shadows})
				}
				return cs, nil
			}
			for i := range test.decisions {
				test.decisions[i].Capacity = test.limits[i].Capacity()
			}
			for _, dialects := range []quotahttp.Headers{all, 0, quotahttp.GitHub, quotahttp.OpenAI, quotahttp.Anthropic, quotahttp.Draft03, quotahttp.NoHeaders} {
				var errs errorList
				resp := send(handler(t, &answers{decisions: test.decisions}, &quotahttp.Options{Headers: dialects, Error: errs.tell}, ok, charges))
				wantStatus(t, resp, test.status)
				for field, want := range test.fields {
					if dialectOf(field)&dialects == 0 && field != "Retry-After" && (dialects != 0 || dialectOf(field) != quotahttp.IETF) {
						want = ""
					}
					wantField(t, resp.Header, field, want)
				}
				parseBack(t, resp.Header)
			}
		})
	}
}

// and returns a map with one more entry.
func and(m map[string]string, key, value string) map[string]string {
	more := map[string]string{key: value}
	for k, v := range m {
		more[k] = v
	}
	return more
}

func dialectOf(field string) quotahttp.Headers {
	switch {
	case field == "RateLimit" || field == "RateLimit-Policy":
		return quotahttp.IETF
	case strings.HasPrefix(field, "RateLimit-"):
		return quotahttp.Draft03
	case strings.HasPrefix(field, "Anthropic-"):
		return quotahttp.Anthropic
	case regexp.MustCompile(`^X-Ratelimit-(Limit|Remaining|Reset)-`).MatchString(field):
		return quotahttp.OpenAI
	}
	return quotahttp.GitHub
}

// item is an element of one of the draft's fields, as a parser of this test's own reads it.
var item = regexp.MustCompile(`^"([A-Za-z0-9._-]{1,64})"((?:;[a-z]+=\d{1,15})*)$`)

// parseBack reads the draft's fields by the library and by the test's own parser: both must find the same,
// and the library must write what it read.
func parseBack(t *testing.T, h http.Header) {
	t.Helper()
	for _, field := range []string{"RateLimit", "RateLimit-Policy"} {
		values := h.Values(field)
		list, err := httpsfv.UnmarshalList(values)
		if err != nil {
			t.Errorf("field %s: got %q, which is no list: %v", field, values, err)
			continue
		}
		if again, err := httpsfv.Marshal(list); len(values) > 0 && (err != nil || again != strings.Join(values, ", ")) {
			t.Errorf("field %s: got %q, want the canonical %q, %v", field, values, again, err)
		}
		for i, element := range strings.Split(strings.Join(values, ", "), ", ") {
			if element == "" {
				continue
			}
			found := item.FindStringSubmatch(element)
			if found == nil {
				t.Errorf("element of %s: got %q, want a string with numbers", field, element)
				continue
			}
			parsed := list[i].(httpsfv.Item)
			text := fmt.Sprintf("%q", parsed.Value)
			for _, name := range parsed.Params.Names() {
				n, _ := parsed.Params.Get(name)
				text += fmt.Sprintf(";%s=%d", name, n)
			}
			if text != element {
				t.Errorf("element of %s: got %q from the library, want %q", field, text, element)
			}
		}
	}
}

// Two middlewares, one inside the other, tell of all limits.
func TestHeadersNested(t *testing.T) {
	store := &answers{decisions: []quota.Decision{{Allowed: true, Remaining: 2, Capacity: 3}}}
	h := handler(t, store, nil, handler(t, store, nil, ok, byPeer(minute)).ServeHTTP, byPeer(day))
	resp := send(h)
	wantField(t, resp.Header, "RateLimit-Policy", `"day";q=5;w=86400, "minute";q=3;w=60`)
	wantField(t, resp.Header, "RateLimit", `"day";r=2;t=0, "minute";r=2;t=0`)
	parseBack(t, resp.Header)
}

// Of more fields than one text holds none is lost.
func TestHeadersMany(t *testing.T) {
	var limits []*quota.Limit
	store := &answers{}
	for i := range 60 {
		limits = append(limits, limit(fmt.Sprintf("limit-with-a-long-name-%d: 100/1m fixed", i)))
		store.decisions = append(store.decisions, quota.Decision{Allowed: true, Capacity: 100, Remaining: int64(i)})
	}
	resp := send(handler(t, store, &quotahttp.Options{Headers: quotahttp.IETF | quotahttp.OpenAI | quotahttp.Anthropic}, ok, byPeer(limits...)), with("Origin", "https://example.org"))
	parseBack(t, resp.Header)
	exposed := strings.Join(resp.Header.Values("Access-Control-Expose-Headers"), ", ")
	for i := range 60 {
		for _, form := range []string{"X-Ratelimit-Remaining-Limit-With-A-Long-Name-%d", "Anthropic-Ratelimit-Limit-With-A-Long-Name-%d-Remaining"} {
			name := fmt.Sprintf(form, i)
			wantField(t, resp.Header, name, strconv.Itoa(i))
			if !strings.Contains(exposed+",", name+",") {
				t.Errorf("exposed fields: got %.100q…, want %q among them", exposed, name)
			}
		}
	}
	if n := strings.Count(resp.Header.Get("RateLimit"), ";r="); n != 60 {
		t.Errorf("limits in RateLimit: got %d, want 60", n)
	}
}

// Scripts of another origin may read the fields, and Retry-After where a request is refused.
func TestExpose(t *testing.T) {
	for _, test := range []struct {
		headers quotahttp.Headers
		origin  bool
		err     error
		allowed bool
		want    string
	}{
		{0, false, nil, true, ""},
		{0, true, nil, true, "Ratelimit-Policy, Ratelimit"},
		{0, true, nil, false, "Ratelimit-Policy, Ratelimit, Retry-After"},
		{quotahttp.Draft03, true, nil, true, "Ratelimit-Limit, Ratelimit-Remaining, Ratelimit-Reset"},
		{quotahttp.GitHub, true, nil, true, "X-Ratelimit-Limit, X-Ratelimit-Remaining, X-Ratelimit-Used, X-Ratelimit-Reset, X-Ratelimit-Resource"},
		{quotahttp.NoHeaders, true, nil, true, ""},
		{quotahttp.NoHeaders, true, nil, false, "Retry-After"},
		{0, true, quota.ErrUnavailable, false, "Retry-After"},
	} {
		var errs errorList
		store := &answers{decisions: []quota.Decision{{Allowed: test.allowed, Capacity: 3}}, err: test.err}
		h := handler(t, store, &quotahttp.Options{Headers: test.headers, Error: errs.tell}, ok, byPeer(minute))
		var changes []func(*http.Request)
		if test.origin {
			changes = append(changes, with("Origin", "https://example.org"))
		}
		wantField(t, send(h, changes...).Header, "Access-Control-Expose-Headers", test.want)
	}
}
