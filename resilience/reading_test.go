package resilience_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/retrypolicy"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// readings returns the readings of a store that are not 0, in one line each.
func readings(s quota.Store) string {
	var lines []string
	for _, r := range backend.Readings(s) {
		if r.Value == 0 {
			continue
		}
		line := fmt.Sprint(r.Metric, " ", r.Value)
		if r.Node != "" {
			line += " of " + r.Node
		}
		if r.Fallback {
			line += " of the fallback's store"
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func wantReadings(t *testing.T, when string, s quota.Store, want ...string) {
	t.Helper()
	if got, want := readings(s), strings.Join(want, "\n"); got != want {
		t.Errorf("readings %s: got\n%s\nwant\n%s", when, got, want)
	}
}

// TestReadings: each policy tells its own part, beside that of the store inside, and counts what happened.
func TestReadings(t *testing.T) {
	down := func(context.Context, quota.Charge) (quota.Decision, error) {
		return quota.Decision{}, as(quota.ErrUnavailable)
	}
	for _, test := range []struct {
		name string
		run  func(t *testing.T)
	}{
		{"bulkhead", func(t *testing.T) {
			in, out := make(chan struct{}), make(chan struct{})
			s := wrap(t, &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
				in <- struct{}{}
				<-out
				return granted, nil
			}}, resilience.Bulkhead(1))
			var calls sync.WaitGroup
			calls.Go(func() { s.Charge(bg, charge(1)) })
			<-in
			s.Charge(bg, charge(1))
			s.ChargeAll(bg, []quota.Charge{charge(1)}, make([]quota.Decision, 1))
			wantReadings(t, "while a call is in flight", s, "bulkhead_calls 1", "bulkhead_max_calls 1", "bulkhead_refused_calls 2")
			close(out)
			calls.Wait()
			wantReadings(t, "afterwards", s, "bulkhead_max_calls 1", "bulkhead_refused_calls 2")
		}},
		{"failsafe bulkhead", func(t *testing.T) {
			s := wrap(t, &stub{}, resilience.Failsafe(bulkhead.New[result](0), nil))
			s.Charge(bg, charge(1))
			wantReadings(t, "after a refusal", s, "bulkhead_refused_calls 1")
		}},
		{"breaker", func(t *testing.T) {
			store := &stub{answer: down}
			s := wrap(t, store, resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, Delay: time.Second, FirstDelay: time.Second, Jitter: -1}))
			wantReadings(t, "at first", s, "breakers_closed 1")
			for range 5 {
				s.Charge(bg, charge(1))
			}
			wantReadings(t, "of an open breaker", s, "breakers_open 1", "breaker_openings 1", "breaker_refused_calls 2")
			time.Sleep(time.Second)
			wantReadings(t, "when a probe may be made", s, "breakers_half_open 1", "breaker_openings 1", "breaker_refused_calls 2")
			s.Charge(bg, charge(1))
			wantReadings(t, "after a probe that failed", s, "breakers_open 1", "breaker_openings 2", "breaker_refused_calls 2")
			time.Sleep(2 * time.Second)
			store.set(nil)
			s.Charge(bg, charge(1))
			wantReadings(t, "after a probe", s, "breakers_closed 1", "breaker_openings 2", "breaker_refused_calls 2")
		}},
		{"failsafe breaker", func(t *testing.T) {
			s := wrap(t, &stub{answer: down}, resilience.Failsafe(circuitbreaker.NewWithDefaults[result](), nil))
			for range 3 {
				s.Charge(bg, charge(1))
			}
			wantReadings(t, "of an open breaker", s, "breakers_open 1", "breaker_openings 1", "breaker_refused_calls 2")
		}},
		{"timeout", func(t *testing.T) {
			out := make(chan struct{})
			s := wrap(t, &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { <-out; return granted, nil }}, resilience.Timeout(time.Second, nil))
			s.Charge(bg, charge(1))
			ctx, cancel := context.WithTimeout(bg, time.Millisecond)
			defer cancel()
			s.Charge(ctx, charge(1)) // the caller's time, and not the policy's
			wantReadings(t, "while two calls hang", s, "timeout_calls 1", "timeout_abandoned_calls 2")
			close(out)
			synctest.Wait()
			wantReadings(t, "afterwards", s, "timeout_calls 1")
		}},
		{"timeout of a store that heeds its deadline", func(t *testing.T) {
			for _, prompt := range []bool{true, false} {
				s := wrap(t, &stub{prompt: prompt, answer: func(ctx context.Context, _ quota.Charge) (quota.Decision, error) {
					<-ctx.Done()
					return quota.Decision{}, ctx.Err()
				}}, resilience.Timeout(time.Second, nil))
				s.Charge(bg, charge(1))
				s.ChargeAll(bg, []quota.Charge{charge(1)}, make([]quota.Decision, 1))
				wantReadings(t, "after two calls", s, "timeout_calls 2")
			}
		}},
		{"retry", func(t *testing.T) {
			for _, retry := range []resilience.Policy{resilience.Retry(nil), resilience.RetryFailsafe(retrypolicy.NewWithDefaults[result](), nil)} {
				s := wrap(t, &stub{prompt: true, answer: script(as(quota.ErrUnavailable), as(quota.ErrUnavailable))}, retry, resilience.Timeout(time.Second, nil))
				s.Charge(bg, withID(charge(1), "id"))
				s.Charge(bg, charge(1))
				wantReadings(t, "after two repeats", s, "retry_attempts 2")
			}
		}},
		{"memory", func(t *testing.T) {
			s := wrap(t, local.New(), resilience.DenialMemory(nil))
			s.Charge(bg, charge(100))
			for range 3 {
				s.Charge(bg, charge(50))
			}
			wantReadings(t, "after a denial and two that were remembered", s, "store_keys 1", "store_max_keys 1048576", "denial_memory_keys 1", "denial_memory_hits 2")
		}},
		{"fail", func(t *testing.T) {
			for _, p := range []resilience.Policy{resilience.FailOpen(nil), resilience.FailClosed(nil)} {
				store := &stub{answer: down}
				s := wrap(t, store, p)
				s.Charge(bg, charge(1))
				s.ChargeAll(bg, []quota.Charge{charge(1), {Limit: limit, Key: "other", Cost: 1}}, make([]quota.Decision, 2))
				s.Charge(bg, quota.Charge{Limit: limit, Key: "k", Op: quota.OpReset}) // not answered
				wantReadings(t, "in an outage", s, "degraded 1", "degraded_calls 2")
				store.set(nil)
				s.Charge(bg, charge(1))
				wantReadings(t, "afterwards", s, "degraded_calls 2")
			}
		}},
		{"fallback", func(t *testing.T) {
			primary := local.New()
			store := &stub{answer: primary.Charge, answerAll: nil}
			s := wrap(t, store, resilience.Fallback(local.New(), resilience.Instances(2), nil))
			s.Charge(bg, charge(10))
			whole := []string{"fallback_max_keys 131072"}
			maxHere := "store_max_keys 1048576 of the fallback's store"
			wantReadings(t, "while the primary decides", s, append([]string{maxHere, "fallback_keys 1"}, whole...)...)
			store.set(down)
			s.Charge(bg, charge(20))
			s.Charge(bg, charge(1000)) // denied
			d, _ := s.Charge(bg, quota.Charge{Limit: limit, Key: "other", Cost: 5})
			s.Charge(bg, quota.Charge{Limit: limit, Key: "other"}.Refund(d, 2))
			wantReadings(t, "in an outage", s, "store_keys 2 of the fallback's store", maxHere, "degraded 1", "degraded_calls 4", "fallback_keys 2",
				whole[0], "fallback_owed_tokens 23", "fallback_owing_keys 2")
			store.set(primary.Charge)
			s.Charge(bg, charge(1))
			time.Sleep(5 * time.Second)
			s.Charge(bg, charge(1))
			wantReadings(t, "after one key was reconciled", s, "store_keys 2 of the fallback's store", maxHere, "degraded_calls 4", "fallback_keys 2",
				whole[0], "fallback_owed_tokens 3", "fallback_owing_keys 1", "fallback_reconciled_tokens 20")
			s.Charge(bg, quota.Charge{Limit: limit, Key: "other", Op: quota.OpReset})
			wantReadings(t, "after the other one was reset", s, "store_keys 2 of the fallback's store", maxHere, "degraded_calls 4", "fallback_keys 2",
				whole[0], "fallback_reconciled_tokens 20")
		}},
		{"standard, with nodes", func(t *testing.T) {
			store := newCluster("b")
			o := &resilience.StandardOptions{InFlight: 7, Breaker: &resilience.BreakerOptions{FailingFor: -1}}
			s, err := resilience.Standard(store, resilience.FailClosed(nil), o)
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for range 4 {
				s.Charge(bg, quota.Charge{Limit: limit, Key: "b/1", Cost: 1})
				s.Charge(bg, quota.Charge{Limit: limit, Key: "a/1", Cost: 1})
			}
			wantReadings(t, "with one node down", s, "breakers_closed 1", "breakers_closed 1 of a", "breakers_open 1 of b", "breaker_openings 1 of b",
				"breaker_refused_calls 1 of b", "bulkhead_max_calls 14", "bulkhead_max_calls 7 of a", "bulkhead_max_calls 7 of b", "degraded_calls 4")
		}},
	} {
		t.Run(test.name, func(t *testing.T) { synctest.Test(t, test.run) })
	}
}

// TestReadingsOwed: the tokens owed are those of all keys' debts, whatever calls come at the same time, and each metric that a
// policy tells is one of driver.Metrics.
func TestReadingsOwed(t *testing.T) {
	primary := local.New()
	outage := &stub{answer: primary.Charge}
	s := wrap(t, outage, resilience.Fallback(local.New(), resilience.Instances(1), &resilience.FallbackOptions{CloseWithin: -1}))
	defer s.Close()
	many := bucket("many", 1_000_000, 1, time.Second)
	var admitted [8]int64
	for round := range 20 {
		if round%2 == 0 {
			outage.set(func(context.Context, quota.Charge) (quota.Decision, error) {
				return quota.Decision{}, as(quota.ErrUnavailable)
			})
		} else {
			outage.set(primary.Charge)
		}
		var calls sync.WaitGroup
		for i := range admitted {
			calls.Go(func() {
				for n := range sized(50, 1000) {
					d, err := s.Charge(bg, quota.Charge{Limit: many, Key: fmt.Sprint("key-", (n+i)%16), Cost: int64(n % 7)})
					if err != nil {
						t.Error(err)
					}
					if d.Source == quota.FromFallback {
						admitted[i] += d.Charged
					}
				}
			})
		}
		calls.Wait()
	}
	got := map[driver.Metric]int64{}
	known := slices.Collect(driver.Metrics())
	for _, r := range backend.Readings(s) {
		if !slices.Contains(known, r.Metric) {
			t.Errorf("metric: got %d, want one of driver.Metrics", r.Metric)
		}
		got[r.Metric] += r.Value
	}
	want := int64(0)
	for _, n := range admitted {
		want += n
	}
	if sum := got[driver.MetricOwedTokens] + got[driver.MetricReconciledTokens]; sum != want {
		t.Errorf("tokens owed and reconciled: got %d, want %d, which the fallback admitted", sum, want)
	}
	if owed, keys := resilience.Debts(s); got[driver.MetricOwedTokens] != owed || got[driver.MetricOwingKeys] != keys {
		t.Errorf("debts: got %d tokens of %d keys, want %d of %d", got[driver.MetricOwedTokens], got[driver.MetricOwingKeys], owed, keys)
	}
}
