package quotahttp

import (
	"context"
	"errors"
	"io"
	"net/http"
	"slices"
	"sync"
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
	// Error is told each error of the store after which a request was sent all the same: with FailOpen,
	// where a refusal could not be noted, and where holds could not be ended at once. nil logs as [Options.Error] does.
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
// Where a limit has holds, such as algorithm.Concurrency of the streams that are open at once, the charges are reserved
// ([quota.Limiter.AcquireAll]) from before the request is sent until its answer is over: its body is closed or read to its
// end, or the request's context ends, or the request fails. Then slots come back, and other charges are settled with
// their cost. So bodies must be closed, as for any http.Client; a process that dies keeps nothing for longer than the limit's TTL.
//
//	streams := quota.NewLimit("streams", algorithm.Concurrency(100, time.Minute)) // of all processes together
//	transport, err := quotahttp.NewTransport(limiter, nil, quotahttp.By(quotahttp.Host, streams))
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
	var held *quota.Reservation
	key, err := t.o.Backoff(r)
	if err == nil {
		held, err = t.wait(r, key)
	}
	if err != nil {
		if r.Body != nil {
			r.Body.Close()
		}
		return nil, err
	}
	end := t.ending(r, held)
	answered := false
	defer func() {
		if !answered { // it failed, or the next transport panics
			end()
		}
	}()
	resp, err := t.o.Next.RoundTrip(r)
	if err != nil {
		return resp, err
	}
	if d := blockedFor(resp, time.Now()); d > 0 {
		t.holdOff(r, key, d)
	}
	if answered = held != nil && resp.Body != nil && resp.Body != http.NoBody; answered {
		resp.Body = heldUntilRead(r.Context(), resp.Body, end)
	}
	return resp, nil
}

// ending returns a function that ends a request's reservation, once. The charges are settled with their cost.
func (t *transport) ending(r *http.Request, held *quota.Reservation) func() {
	if held == nil {
		return func() {}
	}
	return sync.OnceFunc(func() {
		if err := held.Settle(r.Context()); err != nil { // it outlives the context
			t.o.Error(r, err)
		}
	})
}

// heldBody is the body of an answer whose request holds tokens until it is over.
type heldBody struct {
	io.ReadCloser
	end  func()
	stop func() bool // of waiting for the end of the context
}

// heldUntilRead returns a body that calls end when it is closed, or read to its end, or the context ends. A body that can be
// written to, of a protocol to which the server switched, can be still.
func heldUntilRead(ctx context.Context, body io.ReadCloser, end func()) io.ReadCloser {
	b := &heldBody{body, end, context.AfterFunc(ctx, end)}
	if w, ok := body.(io.Writer); ok {
		return &struct {
			*heldBody
			io.Writer
		}{b, w}
	}
	return b
}

func (b *heldBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if err != nil {
		b.over()
	}
	return n, err
}

func (b *heldBody) Close() error {
	defer b.over()
	return b.ReadCloser.Close()
}

func (b *heldBody) over() {
	b.stop()
	b.end()
}

// wait charges a request, and returns when it may be sent, with what it holds or nil.
func (t *transport) wait(r *http.Request, key string) (*quota.Reservation, error) {
	charges, err := t.charger.charges(r)
	if err != nil {
		return nil, err
	}
	held, err := t.take(r.Context(), charges, quota.Charge{Limit: Backoff, Key: key, Op: quota.OpPeek, Floor: Backoff.Capacity()})
	if err == nil || !t.o.FailOpen || r.Context().Err() != nil || !storeFailed(err) {
		return held, err
	}
	t.o.Error(r, err)
	return nil, nil
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
// without quota would hold up all others of its host. While some wait, others do not try to overtake them. Charges are reserved
// where a limit has holds.
func (t *transport) take(ctx context.Context, charges []quota.Charge, backoff quota.Charge) (*quota.Reservation, error) {
	if holds(charges) {
		return t.reserve(ctx, charges, backoff)
	}
	return nil, t.takeAll(ctx, charges, backoff)
}

// reserve is take for charges of which some are held. A request that waits holds none of them while its server refuses.
func (t *transport) reserve(ctx context.Context, charges []quota.Charge, backoff quota.Charge) (*quota.Reservation, error) {
	limiter := t.charger.limiter
	if t.waiting.Load() == 0 {
		r, err := limiter.Reserve(ctx, append(slices.Clone(charges), backoff)...)
		if err != nil || r.Granted {
			return r, err
		}
	}
	t.waiting.Add(1)
	defer t.waiting.Add(-1)
	for {
		if _, err := limiter.WaitAll(ctx, backoff); err != nil {
			return nil, err
		}
		r, err := limiter.AcquireAll(ctx, charges...)
		if err != nil {
			return nil, err
		}
		still, err := limiter.ChargeAll(ctx, backoff)
		if err == nil && still.Granted {
			return r, nil
		}
		if err = errors.Join(err, r.Release(ctx)); err != nil {
			return nil, err
		}
	}
}

func (t *transport) takeAll(ctx context.Context, charges []quota.Charge, backoff quota.Charge) error {
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
