package resilience_test

import (
	"context"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// nothing is a store that answers at once and touches nothing, so that what is measured is the policies.
type nothing struct{ prompt bool }

func (n nothing) Prompt() bool { return n.prompt }
func (nothing) Close() error   { return nil }

func (nothing) Take(context.Context, quota.Charge) (quota.Decision, error) { return granted, nil }

func (nothing) TakeAll(_ context.Context, _ []quota.Charge, out []quota.Decision) error {
	for i := range out {
		out[i] = granted
	}
	return nil
}

var benchLimit = bucket("tokens", 1<<30, 1e9, time.Second)

// stacks are what is measured. The preset around a prompt store may cost 300 ns and one allocation.
func stacks(tb testing.TB) []stack {
	preset := func(s quota.Store) quota.Store {
		s, err := resilience.Standard(s, resilience.FailClosed(nil), nil)
		if err != nil {
			tb.Fatal(err)
		}
		return s
	}
	return []stack{
		{"bare", nothing{true}, 0},
		{"preset", preset(nothing{true}), 1},
		{"preset+memory", wrap(tb, nothing{true}, resilience.FailClosed(nil), resilience.DenialMemory(nil), resilience.Breaker(nil), resilience.Bulkhead(256), resilience.Timeout(time.Second, nil)), 1},
		{"timeout", wrap(tb, nothing{true}, resilience.Timeout(time.Second, nil)), 1},
		{"breaker", wrap(tb, nothing{true}, resilience.Breaker(nil)), 0},
		{"bulkhead", wrap(tb, nothing{true}, resilience.Bulkhead(256)), 0},
		{"failclosed", wrap(tb, nothing{true}, resilience.FailClosed(nil)), 0},
		{"memory", wrap(tb, nothing{true}, resilience.DenialMemory(nil)), 0},
		{"handoff", wrap(tb, nothing{false}, resilience.Timeout(time.Second, nil)), -1},
		{"preset-handoff", preset(nothing{false}), -1},
		{"local", local.New(nil), 0},
		{"preset-local", preset(local.New(nil)), 1},
	}
}

type stack struct {
	name   string
	store  quota.Store
	allocs float64 // at most, or negative
}

func BenchmarkPolicies(b *testing.B) {
	c := quota.Charge{Limit: benchLimit, Key: "agent-0000042", Cost: 1}
	for _, s := range stacks(b) {
		b.Run(s.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				if d, err := s.store.Take(bg, c); err != nil || !d.Allowed {
					b.Fatal(d, err)
				}
			}
		})
	}
}

func BenchmarkOpen(b *testing.B) {
	s := wrap(b, &stub{answer: script(as(quota.ErrUnavailable))}, resilience.FailClosed(nil), resilience.Breaker(&resilience.BreakerOptions{Failures: 1}))
	s.Take(bg, charge(1))
	b.ReportAllocs()
	for b.Loop() {
		if d, err := s.Take(bg, charge(1)); err != nil || d.Allowed {
			b.Fatal(d, err)
		}
	}
}

func TestAllocations(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	c := quota.Charge{Limit: benchLimit, Key: "agent-0000042", Cost: 1}
	// Callers have contexts of their own, with a deadline and without.
	cancelled, cancel := context.WithCancel(bg)
	defer cancel()
	late, cancel2 := context.WithTimeout(bg, time.Hour)
	defer cancel2()
	for _, s := range stacks(t) {
		for _, ctx := range []context.Context{bg, cancelled, late} {
			if s.allocs < 0 {
				continue
			}
			if n := testing.AllocsPerRun(200, func() { s.store.Take(ctx, c) }); n > s.allocs {
				t.Errorf("%s: %v allocations a decision, want up to %v", s.name, n, s.allocs)
			}
			cs, out := []quota.Charge{c}, make([]quota.Decision, 1)
			if s.name == "preset-local" || s.name == "local" {
				continue
			}
			if n := testing.AllocsPerRun(200, func() { s.store.TakeAll(ctx, cs, out) }); n > s.allocs {
				t.Errorf("%s: %v allocations a list, want up to %v", s.name, n, s.allocs)
			}
		}
	}
}
