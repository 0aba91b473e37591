package resilience

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

var (
	// ErrOpen is what a breaker that is open refuses with. Such an error is quota.ErrUnavailable too,
	// so nothing was charged, and tells when to come back with a method RetryAfter() time.Duration (0:
	// unknown).
	ErrOpen = errors.New("circuit breaker open")
	// ErrRejected is what a bulkhead or limiter of this package refuses with. Such an error is
	// quota.ErrOverloaded too: nothing was sent. Breakers do not count it, for it says nothing of the store.
	ErrRejected = errors.New("rejected by a policy")
)

var errClosed = fmt.Errorf("resilience: %w", quota.ErrClosed)

// Shared is an error that several calls got from one round trip, such as the lost reply to a batch.
// A breaker counts one failure for all errors with the same RoundTrip, provided that no more than some
// hundred other round trips failed in between.
type Shared interface {
	error
	// RoundTrip identifies the round trip: a comparable value, such as a pointer to the batch. nil is
	// a round trip of its own.
	RoundTrip() any
}

// outcome is what a call says about the health of the store.
type outcome uint8

const (
	healthy   outcome = iota // the store answered; a denial is an answer
	unrelated                // the call says nothing of the store
	failed
)

// judge tells what a call with this context and error says about the store. It never takes a context's
// end from the error: clients return one caller's deadline to another.
func judge(ctx context.Context, err error) outcome {
	switch {
	case err == nil:
		return healthy
	case ended(ctx), errors.Is(err, ErrRejected):
		return unrelated
	case errors.Is(err, quota.ErrIndeterminate), errors.Is(err, quota.ErrUnavailable), errors.Is(err, quota.ErrOverloaded):
		return failed
	case errors.Is(err, quota.ErrInvalid), errors.Is(err, quota.ErrMisconfigured), errors.Is(err, quota.ErrCrossSlot),
		errors.Is(err, quota.ErrConflict), errors.Is(err, quota.ErrClosed):
		return unrelated
	}
	return failed // an error that the contract does not know: nothing says that the store is well
}

// ended reports whether a context ended. Its deadline may be seen to pass, by a client's socket for example, just
// before its timer says so.
func ended(ctx context.Context) bool {
	if ctx.Err() != nil {
		return true
	}
	end, set := ctx.Deadline()
	return set && !time.Now().Before(end)
}

// classified reports whether err is one of quota's: whether it says if the call was charged.
func classified(err error) bool {
	for _, e := range [...]error{quota.ErrIndeterminate, quota.ErrUnavailable, quota.ErrOverloaded, quota.ErrInvalid,
		quota.ErrMisconfigured, quota.ErrCrossSlot, quota.ErrConflict, quota.ErrClosed} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ofContext reports whether err is a context's own: nothing was sent.
func ofContext(err error) bool {
	return (errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled)) && !classified(err)
}

// repeatable reports whether a list may be sent twice: it carries an id, or only asks.
func repeatable(cs []quota.Charge) bool {
	if cs[0].ID != "" {
		return true
	}
	for i := range cs {
		if cs[i].Op != quota.OpPeek {
			return false
		}
	}
	return true
}

// asking reports whether all charges are takes and peeks: questions that a policy can answer in the
// store's place. A debit, refund or reset is not a question: who answers it has lost it.
func asking(cs []quota.Charge) bool {
	for i := range cs {
		if cs[i].Op != quota.OpTake && cs[i].Op != quota.OpPeek {
			return false
		}
	}
	return true
}

// trips remembers the round trips that failed lately. The zero value is ready to use.
type trips struct {
	mu   sync.Mutex
	last [128]any
	next int
}

// again reports whether err is of a round trip that failed before, and remembers it.
func (t *trips) again(err error) bool {
	shared, ok := errors.AsType[Shared](err)
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
