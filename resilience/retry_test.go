package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/retrypolicy"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

func TestRepeats(t *testing.T) {
	unavailable, unknown := as(quota.ErrUnavailable), as(quota.ErrIndeterminate)
	take := charge(1)
	refund := withID(quota.Charge{Limit: limit, Key: "k", Op: quota.OpRefund}, "i")
	for _, c := range []struct {
		name   string
		charge quota.Charge
		fails  []error
		calls  int
		want   error // nil: granted
	}{
		{"nothing wrong", withID(take, "i"), nil, 1, nil},
		{"a charge without an id", take, []error{unavailable}, 1, quota.ErrUnavailable},
		{"a charge without an id, unknown", take, []error{unknown}, 1, quota.ErrIndeterminate},
		{"a refund without an id", quota.Charge{Limit: limit, Key: "k", Op: quota.OpRefund}, []error{unavailable}, 1, quota.ErrUnavailable},
		{"unavailable", withID(take, "i"), []error{unavailable, unavailable}, 3, nil},
		{"unknown", withID(take, "i"), []error{unknown}, 2, nil},
		{"a refund with an id", refund, []error{unknown}, 2, nil},
		{"a peek", peek(1), []error{unavailable, unknown}, 3, nil},
		{"too often", withID(take, "i"), []error{unavailable, unavailable, unavailable}, 3, quota.ErrUnavailable},
		{"first unknown, then unavailable", withID(take, "i"), []error{unknown, unavailable, unavailable}, 3, quota.ErrIndeterminate},
		{"first unknown, then refused", withID(take, "i"), []error{unknown, as(quota.ErrMisconfigured)}, 2, quota.ErrIndeterminate},
		{"a peek, first unknown", peek(1), []error{unknown, unavailable, unavailable}, 3, quota.ErrUnavailable},
		{"misconfigured", withID(take, "i"), []error{as(quota.ErrMisconfigured)}, 1, quota.ErrMisconfigured},
		{"invalid", withID(take, "i"), []error{as(quota.ErrInvalid)}, 1, quota.ErrInvalid},
		{"conflict", withID(take, "i"), []error{as(quota.ErrConflict)}, 2, nil},
		{"closed", withID(take, "i"), []error{as(quota.ErrClosed)}, 1, quota.ErrClosed},
		{"rejected", withID(take, "i"), []error{fmt.Errorf("%w: %w", quota.ErrOverloaded, resilience.ErrRejected)}, 1, quota.ErrOverloaded},
	} {
		for name, p := range map[string]resilience.Policy{
			"Retry":         resilience.Retry(nil),
			"RetryFailsafe": resilience.RetryFailsafe(retrypolicy.NewBuilder[result]().WithMaxRetries(2).WithDelay(time.Microsecond).Build(), nil),
		} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
					store := &stub{answer: script(c.fails...), prompt: true}
					d, err := take(wrap(t, store, p, resilience.Timeout(time.Minute, nil)), bg, c.charge)
					if store.called() != c.calls {
						t.Errorf("%d calls, want %d", store.called(), c.calls)
					}
					if !errors.Is(err, c.want) || c.want == nil && d != granted {
						t.Errorf("%v %v, want %v", d, err, c.want)
					}
					if c.want == quota.ErrIndeterminate && errors.Is(err, quota.ErrUnavailable) || c.want == quota.ErrUnavailable && errors.Is(err, quota.ErrIndeterminate) {
						t.Errorf("got %v, which is two errors; want only %v", err, c.want)
					}
				})
			})
		}
	}
}

// TestRetryBudget: attempts and pauses together end by the budget, and with the caller's context.
func TestRetryBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := withID(charge(1), "i")
		for range 50 {
			// Attempts that fail fast: the pauses are what takes time.
			store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return granted, as(quota.ErrUnavailable) }}
			s := wrap(t, store, resilience.Retry(&resilience.RetryOptions{Attempts: 1000, Backoff: 10 * ms}), resilience.Timeout(50*ms, nil))
			start := time.Now()
			_, err := s.Charge(bg, c)
			wantErr(t, err, quota.ErrUnavailable)
			if took := time.Since(start); took > 50*ms || store.called() < 2 || store.called() > 40 {
				t.Errorf("attempts: got %d in %v, want 2 to 40 within 50ms", store.called(), took)
			}
		}
		// A pause for which there is no time is not begun.
		store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return granted, as(quota.ErrUnavailable) }}
		s := wrap(t, store, resilience.Retry(&resilience.RetryOptions{Backoff: 10_000 * time.Hour}), resilience.Timeout(50*ms, nil))
		start := time.Now()
		_, err := s.Charge(bg, c)
		wantErr(t, err, quota.ErrUnavailable)
		if took := time.Since(start); took != 0 || store.called() != 1 {
			t.Errorf("attempts: got %d in %v, want 1 at once", store.called(), took)
		}
		// An attempt that hangs takes all of it.
		store = slow(time.Hour, false, true)
		s = wrap(t, store, resilience.Retry(nil), resilience.Timeout(50*ms, nil))
		start = time.Now()
		_, err = s.Charge(bg, c)
		wantErr(t, err, quota.ErrIndeterminate)
		if took := time.Since(start); took != 50*ms || store.called() != 1 {
			t.Errorf("attempts: got %d in %v, want 1 in 50ms", store.called(), took)
		}
		// A budget of its own leaves room for attempts that time out.
		store = slow(time.Hour, false, true)
		s = wrap(t, store, resilience.Retry(&resilience.RetryOptions{Budget: 120 * ms, Backoff: 1}), resilience.Timeout(50*ms, nil))
		start = time.Now()
		_, err = s.Charge(bg, c)
		wantErr(t, err, quota.ErrIndeterminate)
		if took := time.Since(start); took != 120*ms || store.called() != 3 {
			t.Errorf("attempts: got %d in %v, want 3 in 120ms", store.called(), took)
		}
		// Who has left is not tried for again.
		ctx, cancel := context.WithCancel(bg)
		store = &stub{prompt: true, answer: func(context.Context, quota.Charge) (quota.Decision, error) { // prompt: its answer, and not the end of the context, is the timeout's
			cancel()
			return granted, as(quota.ErrUnavailable)
		}}
		s = wrap(t, store, resilience.Retry(nil), resilience.Timeout(50*ms, nil))
		if _, err := s.Charge(ctx, c); !errors.Is(err, quota.ErrUnavailable) || store.called() != 1 {
			t.Errorf("attempts: got %d and %v, want 1 and ErrUnavailable", store.called(), err)
		}
		ctx, cancel = context.WithCancel(bg)
		store = &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
			return granted, as(quota.ErrIndeterminate)
		}}
		s = wrap(t, store, resilience.Retry(&resilience.RetryOptions{Backoff: 40 * ms}), resilience.Timeout(50*ms, nil))
		time.AfterFunc(1, cancel)
		start = time.Now()
		if _, err := s.Charge(ctx, c); !errors.Is(err, quota.ErrIndeterminate) || time.Since(start) > 1 {
			t.Errorf("got %v after %v, want ErrIndeterminate at once", err, time.Since(start))
		}
		time.Sleep(2 * time.Hour)
	})
}

// TestRetryBackoff: pauses are random and grow.
func TestRetryBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var most [3]time.Duration
		seen := map[time.Duration]bool{}
		for range 300 {
			var at []time.Time
			store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
				at = append(at, time.Now())
				return granted, as(quota.ErrUnavailable)
			}}
			s := wrap(t, store, resilience.Retry(&resilience.RetryOptions{Attempts: 4, Backoff: 10 * ms}), resilience.Timeout(time.Second, nil))
			s.Charge(bg, withID(charge(1), "i"))
			for i := range most {
				pause := at[i+1].Sub(at[i])
				seen[pause] = true
				most[i] = max(most[i], pause)
			}
		}
		for i, m := range most {
			if limit := 10 * ms << i; m > limit || m < limit*9/10 {
				t.Errorf("pause %d: got up to %v, want nearly %v", i, m, limit)
			}
		}
		if len(seen) < 800 {
			t.Errorf("different pauses: got %d, want 800 or more", len(seen))
		}
	})
}
