package quotahttp

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// Backoff is the limit by which clients of one server hold off together, see [NewTransport]. Its tokens are
// milliseconds: a key from which n tokens are missing may send again in n ms. A program may peek at a key, or
// reset it.
var Backoff = quota.NewLimit("backoff", algorithm.TokenBucket(int64(maxBackoff/time.Millisecond), 1, time.Millisecond))

// maxBackoff is the longest time that a server is believed.
const maxBackoff = 24 * time.Hour

// TransportOptions are the options of [NewTransport]. The zero value, and nil, take the defaults.
type TransportOptions struct {
	// Next sends the requests; nil is http.DefaultTransport.
	Next http.RoundTripper
	// Backoff is the key of those requests that a server's refusal holds off; nil is [Host]. Where a server
	// counts by token, Join(Host, Header("Authorization")) keeps one user's refusal from the others.
	Backoff Key
	// FailOpen sends a request, uncharged, where the store failed. A request for which there is no quota in
	// time is not sent.
	FailOpen bool
	// Error is told each error of the store after which a request was sent all the same: with FailOpen, and
	// where a refusal could not be noted. nil logs as [Options.Error] does.
	Error func(r *http.Request, err error)
}

// Host is the key of the host that a request is sent to, for clients.
func Host(r *http.Request) (string, error) {
	host := r.Host
	if host == "" && r.URL != nil {
		host = r.URL.Host
	}
	return identified(host, false, "host")
}

// NewTransport returns a transport for an http.Client that waits for quota before it sends a request, as
// [quota.Limiter.WaitAll] does: it fails at once where the request's deadline comes before the quota. The
// charges are those of the rules, of which there may be none.
//
// It learns from each answer how long the server refuses such requests: by Retry-After of 403, 429 and 503,
// in seconds or as a date, by RateLimit of the draft, and by the fields of GitHub, OpenAI, Anthropic and
// Draft03 that say that nothing is left. All processes that share the store then hold off requests of that
// key, for up to 24 hours: until the latest time that one of them was told, however many were. The key's
// state is that of limit [Backoff].
//
// It repeats no request, and returns refusals as they are. A retry policy goes around it, such as that of
// failsafehttp.
//
// A request that fails stays charged, for the server may have seen it. A nil limiter or rule is
// [quota.ErrInvalid].
func NewTransport(limiter *quota.Limiter, o *TransportOptions, rules ...Rule) (http.RoundTripper, error) {
	if o == nil {
		o = &TransportOptions{}
	}
	switch {
	case limiter == nil:
		return nil, invalid("limiter is nil; accepted: a limiter")
	case slices.ContainsFunc(rules, func(rule Rule) bool { return rule == nil }):
		return nil, invalid("one of the rules is nil; accepted: rules, such as By(Host, limit)")
	}
	t := &transport{charger: middleware{limiter: limiter, rules: slices.Clone(rules)}, o: *o}
	if t.o.Next == nil {
		t.o.Next = http.DefaultTransport
	}
	if t.o.Backoff == nil {
		t.o.Backoff = Host
	}
	if t.o.Error == nil {
		t.o.Error = new(errorLog).tell
	}
	return t, nil
}

type transport struct {
	charger middleware
	o       TransportOptions
	waiting atomic.Int64 // requests that wait
}

func (t *transport) RoundTrip(r *http.Request) (*http.Response, error) {
	key, err := t.o.Backoff(r)
	if err == nil {
		err = t.wait(r, key)
	}
	if err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, err
	}
	resp, err := t.o.Next.RoundTrip(r)
	if err == nil {
		if d := blockedFor(resp, time.Now()); d > 0 {
			t.holdOff(r, key, d)
		}
	}
	return resp, err
}

// wait charges a request, and returns when it may be sent.
func (t *transport) wait(r *http.Request, key string) error {
	charges, err := t.charger.charges(r)
	if err != nil {
		return err
	}
	err = t.take(r.Context(), charges, quota.Charge{Limit: Backoff, Key: key, Op: quota.OpPeek, Floor: Backoff.Capacity()})
	if err == nil || !t.o.FailOpen || r.Context().Err() != nil || !storeFailed(err) {
		return err
	}
	t.o.Error(r, err)
	return nil
}

// storeFailed tells an error of the store from those of a wait: an invalid request, a deadline that comes
// before the quota, and too many that wait.
func storeFailed(err error) bool {
	switch {
	case errors.Is(err, quota.ErrIndeterminate) || errors.Is(err, quota.ErrUnavailable):
		return true
	case errors.Is(err, quota.ErrInvalid) || errors.Is(err, quota.ErrOverloaded) || errors.Is(err, context.DeadlineExceeded):
		return false
	}
	return true
}

// take takes charges once the peek of the backoff is allowed as well: in one step where that is so at once.
// Requests that wait do so for their own charges first and for the backoff then, for in one list a request
// without quota would hold up all others of its host. While some wait, others do not try to overtake them.
func (t *transport) take(ctx context.Context, charges []quota.Charge, backoff quota.Charge) error {
	limiter := t.charger.limiter
	if t.waiting.Load() == 0 {
		r, err := limiter.ChargeAll(ctx, append(slices.Clone(charges), backoff)...)
		if err != nil || r.Granted {
			return err
		}
	}
	t.waiting.Add(1)
	defer t.waiting.Add(-1)
	var taken quota.Result
	if len(charges) > 0 {
		var err error
		if taken, err = limiter.WaitAll(ctx, charges...); err != nil {
			return err
		}
	}
	_, err := limiter.WaitAll(ctx, backoff)
	if err == nil || len(charges) == 0 {
		return err
	}
	for i := range charges {
		charges[i] = charges[i].Refund(taken.Decisions[i], max(taken.Decisions[i].Charged, 0))
	}
	if _, failed := limiter.ChargeAll(ctx, charges...); failed != nil {
		return errors.Join(err, failed)
	}
	return err
}

// holdOff notes that a server refuses requests of a key. It takes as many of the key's milliseconds as leave
// no more than those before d has passed, and none where fewer are left: so the times that several processes
// were told do not add up.
func (t *transport) holdOff(r *http.Request, key string, d time.Duration) {
	n := int64((d + time.Millisecond - 1) / time.Millisecond)
	c := quota.Charge{Limit: Backoff, Key: key, Op: quota.OpUpTo, Cost: n, Floor: Backoff.Capacity() - n}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), 10*time.Second)
	defer cancel()
	if _, err := t.charger.limiter.ChargeAll(ctx, c); err != nil {
		t.o.Error(r, err)
	}
}
