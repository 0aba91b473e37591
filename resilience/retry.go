package resilience

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The defaults of [RetryOptions].
const (
	DefaultAttempts = 3
	DefaultBackoff  = 2 * time.Millisecond
)

// RetryOptions change the policy that [Retry] makes. The zero value, and nil, take the defaults.
type RetryOptions struct {
	// Attempts is how many attempts a decision may take, the first included; 0 is DefaultAttempts.
	Attempts int
	// Backoff is the longest pause before the second attempt; it doubles with each further one. Pauses are
	// random, from 0 up. 0 is DefaultBackoff.
	Backoff time.Duration
	// Budget is how long the attempts and pauses may take together. 0 is the time of the Timeout inside, so
	// that retries delay no decision beyond it; a longer budget leaves room for attempts that timed out.
	Budget time.Duration
}

// Retry returns the policy that a peek, or a charge with a request id, is tried again where the store was
// unavailable, other processes changed the key too often, or the outcome is unknown. Every other charge is sent once: without an id the store cannot tell
// a repeat from a second charge. Charges that may be repeated must carry one.
//
// If one attempt had an unknown outcome and the last one failed, the error is quota.ErrIndeterminate,
// whatever the error of the last one. Other errors are not tried again and pass: a misconfigured store stays
// misconfigured, and repeats would add to an overload. No attempt begins once the caller's context has ended.
//
// A request id guards against two grants, not against a grant that comes late: where an attempt was given up
// and the next one is denied, the first may yet be charged.
//
// Negative numbers, and a stack without a [Timeout] inside, are refused by Wrap.
func Retry(o *RetryOptions) Policy {
	if o == nil {
		o = &RetryOptions{}
	}
	return retryPolicy(*o)
}

type retryPolicy RetryOptions

func (retryPolicy) kind() kind { return kindRetry }

func (p retryPolicy) wrap(inner quota.Store, _ bool) (quota.Store, error) {
	o := RetryOptions(p)
	if o.Attempts < 0 || o.Backoff < 0 || o.Budget < 0 {
		return nil, invalid(fmt.Sprintf("RetryOptions are %d attempts, a backoff of %v and a budget of %v", o.Attempts, o.Backoff, o.Budget), "0 or more")
	}
	timeout, err := timeoutInside(inner, kindRetry)
	if err != nil {
		return nil, err
	}
	if o.Attempts == 0 {
		o.Attempts = DefaultAttempts
	}
	if o.Backoff == 0 {
		o.Backoff = DefaultBackoff
	}
	if o.Budget == 0 {
		o.Budget = timeout
	}
	return &retry{layer: layer{inner: inner, of: kindRetry}, o: o, base: time.Now()}, nil
}

// timeoutInside returns the time of the timeout inside, which every attempt needs.
func timeoutInside(inner quota.Store, k kind) (time.Duration, error) {
	t, ok := driver.Find[bounded](inner)
	if !ok {
		return 0, invalid(fmt.Sprintf("there is no timeout inside the %s", k), order+", because no other policy ends an attempt")
	}
	return t.bound(), nil
}

type retry struct {
	layer
	o       RetryOptions
	base    time.Time
	repeats atomic.Int64
}

// Readings tells the attempts after the first.
func (s *retry) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricRetries, Value: s.repeats.Load()})
}

func (s *retry) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	if c.ID == "" && c.Op != quota.OpPeek {
		return s.inner.Charge(ctx, c)
	}
	err = s.do(ctx, c.Op == quota.OpPeek, func(ctx context.Context) (err error) {
		d, err = s.inner.Charge(ctx, c)
		return err
	})
	return d, err
}

func (s *retry) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if !repeatable(cs) {
		return s.inner.ChargeAll(ctx, cs, out)
	}
	return s.do(ctx, driver.OnlyPeeks(cs), func(ctx context.Context) error { return s.inner.ChargeAll(ctx, cs, out) })
}

func (s *retry) do(ctx context.Context, peeks bool, attempt func(context.Context) error) error {
	d := &deadline{Context: ctx, at: after(s.base, s.o.Budget)}
	defer d.release()
	unknown := false
	for n := 1; ; n++ {
		err := attempt(d)
		if err != nil {
			err, _ = timedOut(ctx, d, s.o.Budget, err)
		}
		unknown = unknown || errors.Is(err, quota.ErrIndeterminate)
		if err == nil || n == s.o.Attempts || !s.pause(d, n, err) {
			return afterAttempts(unknown && !peeks, err)
		}
		s.repeats.Add(1)
	}
}

// pause waits before the attempt after the nth, and reports whether that attempt may be made.
func (s *retry) pause(d *deadline, n int, err error) bool {
	if !errors.Is(err, quota.ErrUnavailable) && !errors.Is(err, quota.ErrIndeterminate) && !errors.Is(err, quota.ErrConflict) {
		return false
	}
	most := s.o.Backoff << min(n-1, 10)
	wait := rand.N(most) + 1
	if time.Until(d.at) <= wait || d.Err() != nil {
		return false
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return d.Err() == nil
	case <-d.Done():
		return false
	}
}

// afterAttempts returns the error of a call whose last attempt ended in err. If unknown is set an earlier
// attempt may have been charged.
func afterAttempts(unknown bool, err error) error {
	if err == nil || !unknown || errors.Is(err, quota.ErrIndeterminate) {
		return err
	}
	return fmt.Errorf("resilience: %w: an earlier attempt may have been charged; the last one: %v", quota.ErrIndeterminate, err)
}
