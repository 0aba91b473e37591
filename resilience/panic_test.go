package resilience_test

import (
	"context"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/retrypolicy"
	"github.com/sony/gobreaker/v2"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// bomb panics at the place where it is set.
type bomb struct{ place atomic.Value }

func (b *bomb) set(place string) { b.place.Store(place) }
func (b *bomb) at(place string) bool {
	p, _ := b.place.Load().(string)
	return p == place
}
func (b *bomb) pass(place string) {
	if b.at(place) {
		panic("test: a panic in " + place)
	}
}

// explosive is a store that panics, and else, while a bomb is set elsewhere, fails: policies are at work then.
type explosive struct {
	quota.Store
	bomb   *bomb
	prompt bool
}

func (s *explosive) Prompt() bool { return s.prompt }

func (s *explosive) do(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.bomb.at("the store, late") {
		time.Sleep(200 * ms)
	}
	s.bomb.pass("the store")
	s.bomb.pass("the store, late")
	if s.bomb.at("Goexit") {
		runtime.Goexit()
	}
	if !s.bomb.at("") {
		return as(quota.ErrUnavailable)
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func (s *explosive) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.do(ctx, []quota.Charge{c}, out[:])
	return out[0], err
}

func (s *explosive) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.do(ctx, cs, out)
}

// explosiveNodes names a node for each key.
type explosiveNodes struct{ *explosive }

func (s explosiveNodes) Node(c quota.Charge) string { s.bomb.pass("Node"); return c.Key }
func (s explosiveNodes) Refresh(context.Context) error {
	s.bomb.pass("Refresh")
	return nil
}

// explosiveRule is a token bucket that panics.
type explosiveRule struct {
	quota.Algorithm
	bomb *bomb
}

func (r explosiveRule) Decide(s quota.State, q quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	r.bomb.pass("the rule")
	return r.Algorithm.Decide(s, q, now)
}

func (r explosiveRule) Share(n int64) (quota.Algorithm, error) {
	r.bomb.pass("Share")
	a, err := r.Algorithm.(driver.Sharer).Share(n)
	if err != nil {
		return nil, err
	}
	return explosiveRule{a, r.bomb}, nil
}

// TestPanics has code of others panic, or end its goroutine, wherever a policy calls it. No policy leaves a lock, a slot,
// a probe, a waiting call or a goroutine behind, and none ends the process: afterwards the store decides again, and Close
// returns. All policies allow one call, or one probe, at a time.
func TestPanics(t *testing.T) {
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	defer slog.SetDefault(old)
	wrapped := func(ps ...func(b *bomb, tell func(quota.Notice)) resilience.Policy) func(*explosive, func(quota.Notice)) (quota.Store, error) {
		return func(s *explosive, tell func(quota.Notice)) (quota.Store, error) {
			var all []resilience.Policy
			for _, p := range ps {
				all = append(all, p(s.bomb, tell))
			}
			return resilience.Wrap(s, all...)
		}
	}
	timeout := func(_ *bomb, tell func(quota.Notice)) resilience.Policy {
		return resilience.Timeout(100*ms, &resilience.TimeoutOptions{MaxCalls: 1, Notice: tell})
	}
	fallback := func(b *bomb, tell func(quota.Notice)) resilience.Policy {
		here := &stub{prompt: true}
		inner := local.New()
		here.answer = func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
			b.pass("the fallback's store")
			return inner.Charge(ctx, c)
		}
		here.answerAll = func(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			b.pass("the fallback's store")
			return inner.ChargeAll(ctx, cs, out)
		}
		return resilience.Fallback(here, func() int64 { b.pass("instances"); return 2 }, &resilience.FallbackOptions{Notice: tell})
	}
	breaker := func(_ *bomb, tell func(quota.Notice)) resilience.Policy {
		return resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, Notice: tell})
	}
	places := []string{"the store", "the store, late", "Goexit", "notices", "Goexit in notices", "the rule", "Share", "instances", "the fallback's store", "Trip", "Node", "Refresh"}
	for name, make := range map[string]func(*explosive, func(quota.Notice)) (quota.Store, error){
		"Timeout": wrapped(timeout),
		"Breaker": wrapped(breaker),
		"Breaker with Trip": wrapped(func(b *bomb, tell func(quota.Notice)) resilience.Policy {
			return resilience.Breaker(&resilience.BreakerOptions{Notice: tell, Trip: func(n gobreaker.Counts) bool {
				b.pass("Trip")
				return n.ConsecutiveFailures >= 2
			}})
		}),
		"Bulkhead":     wrapped(func(*bomb, func(quota.Notice)) resilience.Policy { return resilience.Bulkhead(1) }),
		"Retry":        wrapped(func(*bomb, func(quota.Notice)) resilience.Policy { return resilience.Retry(nil) }, timeout),
		"DenialMemory": wrapped(func(*bomb, func(quota.Notice)) resilience.Policy { return resilience.DenialMemory(nil) }),
		"FailOpen": wrapped(func(_ *bomb, tell func(quota.Notice)) resilience.Policy {
			return resilience.FailOpen(&resilience.FailOptions{Notice: tell})
		}),
		"Fallback":                         wrapped(fallback),
		"Fallback around Breaker, Timeout": wrapped(fallback, breaker, timeout),
		"Failsafe breaker": wrapped(func(_ *bomb, tell func(quota.Notice)) resilience.Policy {
			cb := circuitbreaker.NewBuilder[result]().WithFailureThreshold(2).WithDelay(time.Second).Build()
			return resilience.Failsafe(cb, &resilience.FailsafeOptions{Notice: tell})
		}),
		"Failsafe bulkhead": wrapped(func(*bomb, func(quota.Notice)) resilience.Policy {
			return resilience.Failsafe(bulkhead.New[result](1), nil)
		}, timeout),
		"RetryFailsafe": wrapped(func(b *bomb, tell func(quota.Notice)) resilience.Policy {
			p := retrypolicy.NewBuilder[result]().WithMaxRetries(2).HandleIf(func(result, error) bool { b.pass("Trip"); return true })
			return resilience.RetryFailsafe(p.Build(), &resilience.FailsafeOptions{Notice: tell})
		}, timeout),
		"HedgeFailsafe": wrapped(func(_ *bomb, tell func(quota.Notice)) resilience.Policy {
			return resilience.HedgeFailsafe(hedgepolicy.NewWithDelay[result](20*ms), &resilience.FailsafeOptions{Notice: tell})
		}, func(*bomb, func(quota.Notice)) resilience.Policy {
			return resilience.Timeout(100*ms, &resilience.TimeoutOptions{MaxCalls: 2})
		}),
		"Standard by node": func(s *explosive, tell func(quota.Notice)) (quota.Store, error) {
			return resilience.Standard(explosiveNodes{s}, fallback(s.bomb, tell), &resilience.StandardOptions{Timeout: 100 * ms, InFlight: 1, Notice: tell})
		},
	} {
		for _, place := range places {
			if place == "Goexit" && strings.Contains(name, "Failsafe") && name != "Failsafe breaker" {
				continue // see Failsafe
			}
			for _, told := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s, panic in %s, notices %v", name, place, told), func(t *testing.T) {
					synctest.Test(t, func(t *testing.T) { testPanics(t, make, place, told) })
				})
			}
		}
	}
}

func testPanics(t *testing.T, make func(*explosive, func(quota.Notice)) (quota.Store, error), place string, told bool) {
	b := &bomb{}
	b.set("")
	var tell func(quota.Notice)
	if told {
		tell = func(quota.Notice) {
			b.pass("notices")
			if b.at("Goexit in notices") {
				runtime.Goexit()
			}
		}
	}
	s, err := make(&explosive{Store: local.New(), bomb: b}, tell)
	if err != nil {
		t.Fatal(err)
	}
	rule := explosiveRule{algorithm.TokenBucket(1000, 1000, time.Second), b}
	limit := quota.NewLimit("tokens", rule)
	charge := func(key string, op quota.Op) quota.Charge {
		return quota.Charge{Limit: limit, Key: key, Cost: 1, Op: op}
	}
	list := []quota.Charge{charge("a", quota.OpTake), charge("b", quota.OpTake)}
	for _, c := range list {
		if _, err := s.Charge(bg, c); err != nil {
			t.Fatalf("at first: got %v, want a decision", err)
		}
	}
	b.set(place)
	var wg sync.WaitGroup
	for range 4 {
		for _, do := range []func(){
			func() { s.Charge(bg, list[0]) },
			func() { s.Charge(bg, charge("a", quota.OpPeek)) },
			func() { s.ChargeAll(bg, list, []quota.Decision{{}, {}}) },
			func() {
				s.Charge(bg, quota.Charge{Limit: quota.NewLimit("other", rule), Key: "a", Cost: 1})
			},
		} {
			wg.Go(func() {
				defer func() { recover() }()
				do()
			})
			time.Sleep(300 * ms)
		}
		wg.Wait() // no call waits for one that panicked
		time.Sleep(time.Second)
	}
	b.set("")
	time.Sleep(time.Minute)
	for range 3 {
		for _, c := range list {
			if d, err := s.Charge(bg, c); err != nil || d.Source != store {
				t.Errorf("afterwards: got %+v, %v; want a decision of the store", d, err)
			}
		}
		out := []quota.Decision{{}, {}}
		if err := s.ChargeAll(bg, list, out); err != nil || out[0].Source != store {
			t.Errorf("a list afterwards: got %+v, %v; want a decision of the store", out, err)
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("Close: got %v, want nil", err)
	}
}
