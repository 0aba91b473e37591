package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/circuitbreaker"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// retryAfter returns the time until the next probe of which an open breaker's error tells.
func retryAfter(t *testing.T, err error) time.Duration {
	t.Helper()
	open, ok := errors.AsType[interface {
		error
		RetryAfter() time.Duration
	}](err)
	if !ok {
		t.Fatalf("the error: got %v, want one of an open breaker", err)
	}
	return open.RetryAfter()
}

// wantOpening checks that an opening that its error tells takes at most d, and at least nine tenths of d, and
// waits until it is over.
func (r *rig) wantOpening(t *testing.T, d time.Duration, when string) {
	t.Helper()
	reached, err := r.call(says(nil))
	if reached {
		t.Fatalf("%s: got a closed breaker, want an opening of %v", when, d)
	}
	got := retryAfter(t, err)
	if got > d || got < d*9/10 {
		t.Errorf("%s: got an opening of %v, want from %v to %v", when, got, d*9/10, d)
	}
	time.Sleep(got - 1)
	r.want(t, "open", when)
	time.Sleep(tick)
	r.want(t, "half-open", when)
}

// TestBreakerGrows: the first opening is short, each further one takes twice as long, and a store that has
// been well for long meets the first again.
func TestBreakerGrows(t *testing.T) {
	for _, b := range []struct {
		name string
		make func() resilience.Policy
	}{
		{"gobreaker", func() resilience.Policy { return resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1}) }},
		{"failsafe", func() resilience.Policy {
			cb := circuitbreaker.NewBuilder[result]().WithFailureThreshold(3).WithDelay(30 * time.Second).Build()
			return resilience.Failsafe(cb, nil)
		}},
	} {
		t.Run(b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				fail := says(as(quota.ErrUnavailable))
				r := newRig(t, b.make())
				open := func() {
					for range 3 {
						r.want(t, "closed", "up to three")
						r.call(fail)
					}
				}
				probe := func(answer func(context.Context, func()) (quota.Decision, error)) {
					t.Helper()
					if reached, err := r.call(answer); !reached {
						t.Fatalf("a call after the opening: got %v, want a probe", err)
					}
				}
				well := func() {
					probe(says(nil))
					for resilience.BreakerState(r.Store) == "half-open" {
						probe(says(nil))
					}
				}
				open()
				for d := resilience.DefaultFirstDelay; d < resilience.DefaultDelay; d *= 2 {
					r.wantOpening(t, d, "while probes fail")
					probe(fail)
				}
				r.wantOpening(t, resilience.DefaultDelay, "the longest")
				probe(fail)
				r.wantOpening(t, resilience.DefaultDelay, "the longest again")
				well()
				r.want(t, "closed", "after a good probe")

				time.Sleep(54*time.Second - 1) // less than twice 27 s, which is the least that the last opening took
				open()
				r.wantOpening(t, resilience.DefaultDelay, "soon after an opening")
				well()
				time.Sleep(60 * time.Second)
				open()
				r.wantOpening(t, resilience.DefaultFirstDelay, "long after an opening")
				well()
				time.Sleep(400 * ms)
				open()
				r.wantOpening(t, 2*resilience.DefaultFirstDelay, "soon after the first opening")
				well()
			})
		})
	}
}

// TestFailsafeDelays: a delay of the failsafe-go breaker that is shorter than ours wins, and a negative
// FirstDelay leaves the delay and the thresholds of its probes to it.
func TestFailsafeDelays(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := says(as(quota.ErrUnavailable))
		builder := circuitbreaker.NewBuilder[result]().WithFailureThreshold(3).WithDelay(100 * ms)
		r := newRig(t, resilience.Failsafe(builder.Build(), nil))
		for range 3 {
			r.call(fail)
		}
		for range 3 {
			r.wantOpening(t, 100*ms, "a short delay")
			r.call(fail)
		}

		r = newRig(t, resilience.Failsafe(builder.Build(), &resilience.FailsafeOptions{FirstDelay: -1}))
		for range 3 {
			r.call(fail)
		}
		for range 3 {
			r.want(t, "open", "the breaker's own delay")
			time.Sleep(100 * ms)
			for range 3 { // its threshold of three failures
				r.want(t, "half-open", "the breaker's own thresholds")
				r.call(fail)
			}
		}
	})
}

// TestBreakerFailingFor: failures open the breaker once no call has succeeded for one whole timeout since the
// first of them.
func TestBreakerFailingFor(t *testing.T) {
	fail, ok := says(as(quota.ErrUnavailable)), says(nil)
	for _, c := range []struct {
		name     string
		policies []resilience.Policy
		want     time.Duration
	}{
		{"alone", []resilience.Policy{resilience.Breaker(nil)}, resilience.DefaultFailingFor},
		{"with a timeout inside", []resilience.Policy{resilience.Breaker(nil), resilience.Timeout(80*ms, nil)}, 80 * ms},
		{"set", []resilience.Policy{resilience.Breaker(&resilience.BreakerOptions{FailingFor: time.Second}), resilience.Timeout(80*ms, nil)}, time.Second},
		{"none", []resilience.Policy{resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1}), resilience.Timeout(80*ms, nil)}, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, c.policies...)
				for range 2 {
					// Many failures at a time, then a success, any number of times.
					for range 3 {
						for range 20 {
							if c.want > 0 {
								r.call(fail)
							}
						}
						time.Sleep(max(c.want-1, 0))
						r.call(ok)
						r.want(t, "closed", "after a success")
					}
					// At least three, however long it takes.
					r.call(fail)
					time.Sleep(time.Minute)
					r.call(fail)
					r.want(t, "closed", "two failures")
					r.call(ok)
				}
				for range 3 {
					r.want(t, "closed", "up to three")
					r.call(fail)
				}
				if c.want > 0 {
					time.Sleep(c.want - 1)
					r.call(fail)
					r.want(t, "closed", "within the time")
					time.Sleep(time.Nanosecond)
					r.want(t, "closed", "before a failure after the time")
					r.call(fail)
				}
				r.want(t, "open", "after the time")
			})
		})
	}
}

// stall is a store that answers no call between two times, whatever the calls' contexts say, and then answers
// them all.
type stall struct {
	stub
	from, to time.Time
}

func newStall(after, d time.Duration) *stall {
	s := &stall{from: time.Now().Add(after)}
	s.to = s.from.Add(d)
	s.answer = func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
		time.Sleep(ms)
		if now := time.Now(); now.After(s.from) && now.Before(s.to) {
			time.Sleep(time.Until(s.to))
		}
		return granted, nil
	}
	return s
}

// TestStall: a stall of the store ends with the store's: within a second of its end every call is decided by
// the store again.
func TestStall(t *testing.T) {
	for _, d := range []time.Duration{100 * ms, 700 * ms, 1200 * ms, 3 * time.Second} {
		for _, answer := range []string{"FailWithError", "Fallback"} {
			t.Run(fmt.Sprint(d, answer), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					store := newStall(2*time.Second, d)
					var policy resilience.Policy = resilience.FailWithError()
					if answer == "Fallback" {
						policy = resilience.Fallback(newServer(), resilience.Instances(4), nil)
					}
					s, err := resilience.Standard(store, policy, nil)
					if err != nil {
						t.Fatal(err)
					}
					var mu sync.Mutex
					var last time.Time
					begin := time.Now()
					var wg sync.WaitGroup
					for range 16 {
						wg.Go(func() {
							for time.Since(begin) < 36*time.Second {
								d, err := s.Charge(bg, charge(1))
								mu.Lock()
								if err != nil || d.Source != quota.FromStore {
									last = time.Now()
								}
								mu.Unlock()
								time.Sleep(20 * ms)
							}
						})
					}
					wg.Wait()
					if late := last.Sub(store.to); late > time.Second && !last.IsZero() {
						t.Errorf("the last call that the store did not decide: got one %v after the stall of %v, want within 1s", late, d)
					}
					if resilience.BreakerState(s) != "closed" {
						t.Errorf("the breaker in the end: got %s, want closed", resilience.BreakerState(s))
					}
					if err := s.Close(); err != nil {
						t.Error(err)
					}
				})
			})
		}
	}
}
