package resilience

import (
	"context"
	"errors"
	"reflect"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var (
	// ErrOpen is the error of a call that an open circuit breaker refused. Such an error is
	// quota.ErrUnavailable too, so the call was not charged, and has a method RetryAfter() time.Duration: the
	// time until the next probe, 0 if that is unknown.
	ErrOpen = errors.New("circuit breaker open")
	// ErrRejected is the error of a call that a bulkhead or limiter of this package refused. Such an error is
	// quota.ErrOverloaded too: the call was not sent. Breakers do not count it, because it does not concern
	// the store's health.
	ErrRejected = errors.New("rejected by a policy")
)

// outcome is the verdict of one call on the health of the store.
type outcome uint8

const (
	healthy   outcome = iota // the store answered; a denial is an answer
	unrelated                // the call has no bearing on the store's health
	failed
)

// judge returns the verdict of a call with this context and error. It never infers from the error that the
// caller's context ended: clients return one caller's deadline to another, and policies set deadlines too.
func judge(ctx context.Context, err error) outcome {
	if err == nil {
		return healthy
	}
	if ended(ctx) || errors.Is(err, ErrRejected) || isGettingReady(err) {
		return unrelated
	}
	switch driver.Sentinel(err) {
	case quota.ErrIndeterminate, quota.ErrUnavailable, quota.ErrOverloaded:
		return failed
	case nil: // an error that the contract does not know is no sign of health
		return failed
	}
	return unrelated
}

// isGettingReady reports whether err is of a call that did not wait until its store had connected.
func isGettingReady(err error) bool {
	e, ok := errors.AsType[driver.GettingReady](err)
	return ok && e.GettingReady()
}

// ended reports whether the caller's own context ended. The deadlines that policies outside gave the call are
// left out: where one of them passed, the store was too slow, and the caller still waits.
func ended(ctx context.Context) bool {
	for over(ctx) {
		d, ok := ctx.Value(deadlineKey{}).(*deadline)
		if !ok || !over(d) {
			return true
		}
		ctx = d.Context
	}
	return false
}

// over reports whether a context ended. Its deadline may be seen to pass, by a client's socket for example,
// just before its timer fires.
func over(ctx context.Context) bool {
	if ctx.Err() != nil {
		return true
	}
	end, set := ctx.Deadline()
	return set && !time.Now().Before(end)
}

// ofContext reports whether err is a context's own error: the call was not sent.
func ofContext(err error) bool {
	return (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) && driver.Sentinel(err) == nil
}

// retryAfter returns the time until the next probe of which the error of an open breaker tells, and else 0.
func retryAfter(err error) time.Duration {
	if r, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err); ok {
		return r.RetryAfter()
	}
	return 0
}

// repeatable reports whether a list may be sent twice: it carries a request id, or changes no state.
func repeatable(cs []quota.Charge) bool { return cs[0].ID != "" || driver.OnlyPeeks(cs) }

// answerable reports whether a policy may answer all charges in the store's place: whether they may be denied. An
// answer to a debit, refund or reset, or to the end or renewal of a hold, would hide that it was not carried out.
func answerable(cs []quota.Charge) bool {
	for i := range cs {
		if !cs[i].Op.Deniable() || cs[i].Op == quota.OpRenew {
			return false
		}
	}
	return true
}

// need returns how much must remain of a limit for a charge to be allowed: its cost, or the least of OpUpTo, and the floor.
func need(c *quota.Charge) int64 { r := c.Request(); return r.Need() }

// roundTrips remembers the latest round trips that failed. The zero value is ready to use.
type roundTrips struct {
	mu   sync.Mutex
	last [128]any
	next int
}

// repeated reports whether err belongs to a round trip whose failure is remembered, and remembers it.
func (t *roundTrips) repeated(err error) bool {
	shared, ok := errors.AsType[driver.RoundTripError](err)
	if !ok {
		return false
	}
	id := shared.RoundTrip()
	if id == nil || !reflect.TypeOf(id).Comparable() {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, seen := range t.last {
		if seen == id {
			return true
		}
	}
	t.last[t.next] = id
	t.next = (t.next + 1) % len(t.last)
	return false
}
