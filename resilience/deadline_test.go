package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/retrypolicy"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// stacked are all policies, in their order. Those of one place exclude each other.
var stacked = []struct {
	name  string
	place int
	make  func() resilience.Policy
}{
	{"Fallback", 0, func() resilience.Policy {
		return resilience.Fallback(local.New(), resilience.Instances(1), nil)
	}},
	{"FailClosed", 0, func() resilience.Policy { return resilience.FailClosed(nil) }},
	{"FailWithError", 0, func() resilience.Policy { return resilience.FailWithError() }},
	{"DenialMemory", 1, func() resilience.Policy { return resilience.DenialMemory(nil) }},
	{"Breaker", 2, func() resilience.Policy {
		return resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, FirstDelay: time.Hour})
	}},
	{"Failsafe breaker", 2, func() resilience.Policy {
		return resilience.Failsafe(circuitbreaker.NewBuilder[result]().WithFailureThreshold(3).WithDelay(time.Hour).Build(), &resilience.FailsafeOptions{FirstDelay: -1})
	}},
	{"Bulkhead", 3, func() resilience.Policy { return resilience.Bulkhead(100) }},
	{"Failsafe bulkhead", 3, func() resilience.Policy { return resilience.Failsafe(bulkhead.New[result](100), nil) }},
	{"Retry", 4, func() resilience.Policy {
		return resilience.Retry(&resilience.RetryOptions{Budget: 150 * ms, Backoff: 1})
	}},
	{"Retry within the timeout", 4, func() resilience.Policy {
		return resilience.Retry(&resilience.RetryOptions{Budget: 50 * ms, Backoff: 1})
	}},
	{"RetryFailsafe", 4, func() resilience.Policy {
		return resilience.RetryFailsafe(retrypolicy.NewBuilder[result]().WithMaxRetries(1).WithMaxDuration(150*ms).Build(), nil)
	}},
	{"HedgeFailsafe", 5, func() resilience.Policy {
		return resilience.HedgeFailsafe(hedgepolicy.NewWithDelay[result](20*ms), nil)
	}},
	{"Timeout", 6, func() resilience.Policy { return resilience.Timeout(100*ms, nil) }},
}

// TestDeadlinesArePolicies: where a deadline that a policy set passes, no policy inside or outside takes it for
// the caller's end, for each pair of policies around each breaker: the breaker opens, and the caller never gets
// the error of a context. Where the caller's own deadline passes, the breaker stays closed.
func TestDeadlinesArePolicies(t *testing.T) {
	for i, outer := range stacked {
		for _, inner := range stacked[i+1:] {
			for _, breaker := range stacked[4:6] {
				if inner.place == outer.place || breaker.name != outer.name && breaker.place == outer.place || breaker.name != inner.name && breaker.place == inner.place {
					continue
				}
				for _, prompt := range []bool{false, true} {
					t.Run(fmt.Sprintf("%s/%s/%s/prompt=%v", outer.name, inner.name, breaker.name, prompt), func(t *testing.T) {
						synctest.Test(t, func(t *testing.T) {
							testDeadlines(t, prompt, func() (ps []resilience.Policy) {
								for _, p := range stacked {
									if slices.Contains([]string{outer.name, inner.name, breaker.name, "Timeout"}, p.name) {
										ps = append(ps, p.make())
									}
								}
								return ps
							})
						})
					})
				}
			}
		}
	}
}

func testDeadlines(t *testing.T, prompt bool, policies func() []resilience.Policy) {
	// hang is a server that has frozen: a client says "unknown" at its deadline.
	hang := func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
		<-ctx.Done()
		return quota.Decision{}, fmt.Errorf("%w: %w", quota.ErrIndeterminate, ctx.Err())
	}
	// dial is a client that has no connection yet.
	dial := func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
		<-ctx.Done()
		return quota.Decision{}, ctx.Err()
	}
	for name, answer := range map[string]func(context.Context, quota.Charge) (quota.Decision, error){"hang": hang, "dial": dial} {
		for _, own := range []time.Duration{0, time.Hour, 10 * ms} {
			store := &stub{prompt: prompt}
			s := wrap(t, store, policies()...)
			s.Charge(bg, charge(1))
			store.set(answer)
			for n := range 6 {
				ctx, cancel := context.WithCancel(bg)
				if own > 0 {
					ctx, cancel = context.WithTimeout(bg, own)
				}
				_, err := s.Charge(ctx, withID(charge(1), fmt.Sprint(n)))
				// No fallback answers a reset.
				_, reset := s.Charge(ctx, quota.Charge{Limit: limit, Key: "team/agent", Op: quota.OpReset})
				for _, err := range []error{err, reset} {
					switch {
					case own != 10*ms && err != nil && !errors.Is(err, quota.ErrUnavailable) && !errors.Is(err, quota.ErrIndeterminate):
						t.Errorf("%s, the caller waits (%v): got the error %v, want ErrUnavailable or ErrIndeterminate", name, own, err)
					case own == 10*ms && err == nil, own == 10*ms && !errors.Is(err, context.DeadlineExceeded):
						t.Errorf("%s, the caller's deadline passed: got the error %v, want one that says so", name, err)
					}
				}
				cancel()
			}
			want := "open"
			if own == 10*ms {
				want = "closed"
			}
			if got := resilience.BreakerState(s); got != want {
				t.Errorf("%s, own deadline %v: got a breaker that is %s, want %s", name, own, got, want)
			}
			store.set(nil)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestBreakerUnderFallback: a breaker inside a fallback counts the calls for which the key's debt is charged,
// whose deadline is the fallback's, as it counts others.
func TestBreakerUnderFallback(t *testing.T) {
	for _, prompt := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			store := &stub{prompt: prompt, answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
				<-ctx.Done()
				return quota.Decision{}, fmt.Errorf("%w: %w", quota.ErrIndeterminate, ctx.Err())
			}}
			s, err := resilience.Standard(store, resilience.Fallback(local.New(), resilience.Instances(2), nil), nil)
			if err != nil {
				t.Fatal(err)
			}
			for n := range 3 {
				if got := resilience.BreakerState(s); got != "closed" {
					t.Errorf("after %d slow calls: got a breaker that is %s, want closed", n, got)
				}
				if d, err := s.Charge(bg, charge(1)); err != nil || d.Source != quota.FromFallback {
					t.Errorf("call %d: got %+v, %v; want a decision of the fallback", n+1, d, err)
				}
			}
			if got := resilience.BreakerState(s); got != "open" {
				t.Errorf("after 3 slow calls: got a breaker that is %s, want open", got)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
