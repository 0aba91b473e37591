package resilience_test

import (
	"context"
	"strings"
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

func (nothing) Charge(context.Context, quota.Charge) (quota.Decision, error) { return partly, nil }

func (nothing) ChargeAll(_ context.Context, _ []quota.Charge, out []quota.Decision) error {
	for i := range out {
		out[i] = partly
	}
	return nil
}

// partly is granted with something used, so that a fallback keeps account of it.
var partly = quota.Decision{Allowed: true, Capacity: 100, Remaining: 99, Charged: 1, ResetAfter: time.Second, At: 1}

var benchLimit = bucket("tokens", 1<<30, 1e9, time.Second)

// stacks are what is measured. The preset around a prompt store may cost 300 ns and one allocation.
func stacks(tb testing.TB) []stack {
	standard := func(s quota.Store, fallback resilience.Policy) quota.Store {
		s, err := resilience.Standard(s, fallback, nil)
		if err != nil {
			tb.Fatal(err)
		}
		return s
	}
	preset := func(s quota.Store) quota.Store { return standard(s, resilience.FailClosed(nil)) }
	share := func() resilience.Policy { return resilience.Fallback(local.New(), resilience.Instances(4), nil) }
	return []stack{
		{"bare", nothing{true}, 0},
		{"preset", preset(nothing{true}), 1},
		{"preset+fallback", standard(nothing{true}, share()), 1},
		{"preset+memory", wrap(tb, nothing{true}, resilience.FailClosed(nil), resilience.DenialMemory(nil), resilience.Breaker(nil), resilience.Bulkhead(256), resilience.Timeout(time.Second, nil)), 1},
		{"timeout", wrap(tb, nothing{true}, resilience.Timeout(time.Second, nil)), 1},
		{"breaker", wrap(tb, nothing{true}, resilience.Breaker(nil)), 0},
		{"bulkhead", wrap(tb, nothing{true}, resilience.Bulkhead(256)), 0},
		{"fallback", wrap(tb, nothing{true}, share()), 0},
		{"failclosed", wrap(tb, nothing{true}, resilience.FailClosed(nil)), 0},
		{"memory", wrap(tb, nothing{true}, resilience.DenialMemory(nil)), 0},
		{"handoff", wrap(tb, nothing{false}, resilience.Timeout(time.Second, nil)), -1},
		{"preset-handoff", preset(nothing{false}), -1},
		{"local", local.New(), 0},
		{"preset-local", preset(local.New()), 1},
		{"preset+fallback-local", standard(local.New(), share()), 1},
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
				if d, err := s.store.Charge(bg, c); err != nil || !d.Allowed {
					b.Fatal(d, err)
				}
			}
		})
	}
}

// BenchmarkOpen is a decision while the breaker is open.
func BenchmarkOpen(b *testing.B) {
	for name, fallback := range map[string]resilience.Policy{
		"failclosed": resilience.FailClosed(nil),
		"fallback":   resilience.Fallback(local.New(), resilience.Instances(4), nil),
	} {
		b.Run(name, func(b *testing.B) {
			s := wrap(b, &stub{answer: script(as(quota.ErrUnavailable))}, fallback, resilience.Breaker(&resilience.BreakerOptions{Failures: 1, FailingFor: -1}))
			c := quota.Charge{Limit: benchLimit, Key: "agent-0000042", Cost: 1}
			s.Charge(bg, c)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Charge(bg, c); err != nil {
					b.Fatal(err)
				}
			}
		})
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
			if n := testing.AllocsPerRun(200, func() { s.store.Charge(ctx, c) }); n > s.allocs {
				t.Errorf("%s: %v allocations a decision, want up to %v", s.name, n, s.allocs)
			}
			cs, out := []quota.Charge{c}, make([]quota.Decision, 1)
			if strings.HasSuffix(s.name, "local") {
				continue
			}
			if n := testing.AllocsPerRun(200, func() { s.store.ChargeAll(ctx, cs, out) }); n > s.allocs {
				t.Errorf("%s: %v allocations a list, want up to %v", s.name, n, s.allocs)
			}
		}
	}
}
