package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/sony/gobreaker/v2"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// breakers are the two breakers, set alike: three failures in a row, one probe after 30 s, given up after 10 s.
var breakers = []struct {
	name string
	make func(notice func(quota.Notice)) resilience.Policy
}{
	{"gobreaker", func(notice func(quota.Notice)) resilience.Policy {
		return resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, FirstDelay: 30 * time.Second, Jitter: -1, ProbeLimit: 10 * time.Second, Notice: notice})
	}},
	{"failsafe", func(notice func(quota.Notice)) resilience.Policy {
		cb := circuitbreaker.NewBuilder[result]().WithFailureThreshold(3).WithSuccessThreshold(1).WithDelay(30 * time.Second).Build()
		return resilience.Failsafe(cb, &resilience.FailsafeOptions{FirstDelay: -1, ProbeLimit: 10 * time.Second, Notice: notice})
	}},
}

// eachBreaker runs a test in a bubble with each breaker around a store.
func eachBreaker(t *testing.T, test func(t *testing.T, b resilience.Policy)) {
	for _, b := range breakers {
		t.Run(b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { test(t, b.make(nil)) })
		})
	}
}

// lostReply is the error of a round trip that several calls shared.
type lostReply struct{ id any }

func (lostReply) Error() string        { return "reply lost" }
func (lostReply) Is(target error) bool { return target == quota.ErrIndeterminate }
func (l lostReply) RoundTrip() any     { return l.id }

// connecting is the error of a call that left while its store connected.
type connecting struct{}

func (connecting) Error() string        { return "still connecting" }
func (connecting) Is(target error) bool { return target == quota.ErrUnavailable }
func (connecting) GettingReady() bool   { return true }

// faults are what can happen to a call, and what it says about the store.
var faults = []struct {
	name   string
	answer func(ctx context.Context, end func()) (quota.Decision, error) // end ends the caller's context
	counts string                                                        // "failed", "healthy" or "unrelated"
}{
	{"grant", says(nil), "healthy"},
	{"denial", func(context.Context, func()) (quota.Decision, error) {
		return quota.Decision{RetryAfter: time.Second}, nil
	}, "healthy"},
	{"ErrUnavailable", says(as(quota.ErrUnavailable)), "failed"},
	{"ErrIndeterminate", says(as(quota.ErrIndeterminate)), "failed"},
	{"ErrOverloaded of the pool", says(as(quota.ErrOverloaded)), "failed"},
	{"ErrOverloaded of a bulkhead", says(fmt.Errorf("%w: %w", quota.ErrOverloaded, resilience.ErrRejected)), "unrelated"},
	{"ErrUnavailable of a store that connects", says(connecting{}), "unrelated"},
	{"ErrInvalid", says(as(quota.ErrInvalid)), "unrelated"},
	{"ErrMisconfigured", says(as(quota.ErrMisconfigured)), "unrelated"},
	{"ErrCrossSlot", says(as(quota.ErrCrossSlot)), "unrelated"},
	{"ErrConflict", says(as(quota.ErrConflict)), "unrelated"},
	{"ErrClosed", says(as(quota.ErrClosed)), "unrelated"},
	{"an error of no class", says(errors.New("what is this")), "failed"},
	{"somebody else's deadline", says(context.DeadlineExceeded), "failed"},
	{"somebody else's deadline, sent", says(fmt.Errorf("%w: %w", quota.ErrIndeterminate, context.DeadlineExceeded)), "failed"},
	{"own context ended", leaves(context.Canceled), "unrelated"},
	{"own context ended, sent", leaves(as(quota.ErrIndeterminate)), "unrelated"},
	{"own context ended, dialling", leaves(as(quota.ErrUnavailable)), "unrelated"},
	{"panic", func(context.Context, func()) (quota.Decision, error) { panic("test") }, "failed"},
	{"Goexit", func(context.Context, func()) (quota.Decision, error) { runtime.Goexit(); return granted, nil }, "failed"},
	{"a reply of its own lost", func(context.Context, func()) (quota.Decision, error) { return quota.Decision{}, lostReply{new(int)} }, "failed"},
	{"a reply lost that has no identity", says(lostReply{}), "failed"},
	{"a reply lost whose identity is no use", says(lostReply{[]int{1}}), "failed"},
}

func says(err error) func(context.Context, func()) (quota.Decision, error) {
	return func(context.Context, func()) (quota.Decision, error) {
		if err == nil {
			return granted, nil
		}
		return quota.Decision{}, err
	}
}

func leaves(err error) func(context.Context, func()) (quota.Decision, error) {
	return func(_ context.Context, end func()) (quota.Decision, error) {
		end()
		return quota.Decision{}, err
	}
}

// rig is a breaker around a store whose next answer a test chooses.
type rig struct {
	quota.Store
	inner *stub
	list  bool

	panicked any // what the last call panicked with
}

func newRig(t *testing.T, ps ...resilience.Policy) *rig {
	r := &rig{inner: &stub{}}
	r.Store = wrap(t, r.inner, ps...)
	return r
}

// call makes a call that ends as answer says, whatever that is, and reports whether it reached the store.
func (r *rig) call(answer func(context.Context, func()) (quota.Decision, error)) (reached bool, err error) {
	before := r.inner.called()
	ctx, cancel := context.WithCancel(bg)
	defer cancel()
	r.inner.set(func(ctx context.Context, c quota.Charge) (quota.Decision, error) { return answer(ctx, cancel) })
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() { r.panicked = recover() }()
		if r.list {
			err = r.ChargeAll(ctx, []quota.Charge{charge(1)}, make([]quota.Decision, 1))
		} else {
			_, err = r.Charge(ctx, charge(1))
		}
	}()
	<-done
	return r.inner.called() > before, err
}

func (r *rig) want(t *testing.T, state, when string) {
	t.Helper()
	if s := resilience.BreakerState(r.Store); s != state {
		t.Errorf("%s: the breaker is %s, want %s", when, s, state)
	}
}

// TestBreakerFaults is the table of faults and the states they lead to, for both breakers.
func TestBreakerFaults(t *testing.T) {
	fail := says(as(quota.ErrUnavailable))
	for _, f := range faults {
		for _, list := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/list=%v", f.name, list), func(t *testing.T) {
				eachBreaker(t, func(t *testing.T, b resilience.Policy) {
					// Three in a row, from closed.
					r := newRig(t, b)
					r.list = list
					for range 3 {
						r.want(t, "closed", "so far")
						if r.call(f.answer); (r.panicked != nil) != (f.name == "panic") {
							t.Errorf("panic: got %v, want one only of the fault \"panic\"", r.panicked)
						}
					}
					r.want(t, map[string]string{"failed": "open"}[f.counts]+map[string]string{"healthy": "closed", "unrelated": "closed"}[f.counts], "three in a row")

					// Two failures, then the fault: it counts, or makes the count begin again, or does neither.
					r = newRig(t, b2(t, b))
					r.list = list
					r.call(fail)
					r.call(fail)
					r.call(f.answer)
					if f.counts == "failed" {
						r.want(t, "open", "the third")
					} else {
						r.call(fail)
						r.want(t, map[string]string{"unrelated": "open", "healthy": "closed"}[f.counts], "another failure")
					}

					// As the probe.
					r = newRig(t, b2(t, b))
					r.list = list
					for range 3 {
						r.call(fail)
					}
					if reached, err := r.call(says(nil)); reached || !errors.Is(err, quota.ErrUnavailable) || !errors.Is(err, resilience.ErrOpen) || errors.Is(err, quota.ErrIndeterminate) {
						t.Errorf("a call with an open breaker: got %v (reached the store: %v), want ErrUnavailable and ErrOpen", err, reached)
					}
					time.Sleep(30*time.Second - 1)
					r.want(t, "open", "before the delay is over")
					if reached, _ := r.call(says(nil)); reached {
						t.Error("a call before the delay is over: got a probe, want a refusal")
					}
					time.Sleep(tick)
					r.want(t, "half-open", "when a probe may be made")
					if reached, err := r.call(f.answer); !reached {
						t.Fatalf("a call after the delay: got %v, want a probe", err)
					}
					r.want(t, map[string]string{"failed": "open", "healthy": "closed", "unrelated": "half-open"}[f.counts], "after the probe")
					if f.counts == "unrelated" {
						// The probe said nothing; the next one may be made, and another one after that.
						for range 5 {
							if reached, err := r.call(f.answer); !reached {
								t.Fatalf("a call after a probe without a verdict: got %v, want another probe", err)
							}
						}
						r.call(fail)
						r.want(t, "open", "a failure at last")
						time.Sleep(30 * time.Second)
						r.call(f.answer)
						r.call(says(nil))
						r.want(t, "closed", "a success at last")
					}
				})
			})
		}
	}
}

// b2 returns a breaker like b with state of its own: a failsafe-go breaker has its state in itself.
func b2(t *testing.T, b resilience.Policy) resilience.Policy {
	for _, c := range breakers {
		if strings.HasSuffix(t.Name(), c.name) {
			return c.make(nil)
		}
	}
	return b
}

// TestBreakerSharedRoundTrip: one lost reply counts once, whoever shared it and whatever came between.
func TestBreakerSharedRoundTrip(t *testing.T) {
	eachBreaker(t, func(t *testing.T, b resilience.Policy) {
		r := newRig(t, b)
		one, two := new(int), new(int)
		for range 64 {
			r.call(says(fmt.Errorf("wrapped: %w", lostReply{one})))
		}
		r.want(t, "closed", "one reply, 64 calls")
		r.call(says(lostReply{two}))
		r.call(says(lostReply{one}))
		r.want(t, "closed", "two replies")
		r.call(says(lostReply{new(int)}))
		r.want(t, "open", "three replies")
	})
}

// TestBreakerOneProbe: of many calls that come while the breaker is half-open, one reaches the store.
func TestBreakerOneProbe(t *testing.T) {
	eachBreaker(t, func(t *testing.T, b resilience.Policy) {
		r := newRig(t, b)
		for range 3 {
			r.call(says(as(quota.ErrUnavailable)))
		}
		time.Sleep(30 * time.Second)
		before := r.inner.called()
		r.inner.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
			time.Sleep(time.Second)
			return granted, nil
		}
		var wg sync.WaitGroup
		for range 50 {
			wg.Go(func() {
				if _, err := r.Charge(bg, charge(1)); err != nil {
					wantErr(t, err, quota.ErrUnavailable, resilience.ErrOpen)
				}
			})
		}
		wg.Wait()
		if n := r.inner.called() - before; n != 1 {
			t.Errorf("probes: got %d, want 1", n)
		}
		r.want(t, "closed", "after the probe")
	})
}

// TestBreakerHangingProbe: a probe that does not return is given up, and what it says later is ignored.
func TestBreakerHangingProbe(t *testing.T) {
	eachBreaker(t, func(t *testing.T, b resilience.Policy) {
		r := newRig(t, b)
		fail := says(as(quota.ErrUnavailable))
		for range 3 {
			r.call(fail)
		}
		// Half-open for long, without a probe that hangs: that is no reason.
		time.Sleep(30 * time.Second)
		r.call(leaves(context.Canceled))
		time.Sleep(time.Minute)
		hang := func(d time.Duration, err error) {
			r.inner.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
				time.Sleep(d)
				return granted, err
			}
			go r.Charge(bg, charge(1))
			synctest.Wait()
		}
		for _, late := range []error{nil, as(quota.ErrUnavailable)} {
			hang(20*time.Second, late)
			time.Sleep(10*time.Second - 1)
			if reached, _ := r.call(fail); reached {
				t.Fatal("a call while a probe is in flight: got a second probe, want a refusal")
			}
			r.want(t, "half-open", "within the limit")
			time.Sleep(tick)
			if reached, _ := r.call(fail); reached {
				t.Fatal("the call that gives a probe up: got a second probe, want a refusal")
			}
			r.want(t, "open", "given up")
			time.Sleep(15 * time.Second) // the probe returns meanwhile
			r.want(t, "open", "its result is late")
			time.Sleep(15 * time.Second)
		}
		if reached, _ := r.call(says(nil)); !reached {
			t.Error("a call after the delay: got a refusal, want a probe")
		}
		r.want(t, "closed", "in the end")
		for range 3 {
			r.want(t, "closed", "counting anew")
			r.call(fail)
		}
		r.want(t, "open", "three failures")
	})
}

// TestBreakerStale: calls that began before the breaker opened say nothing about the probes.
func TestBreakerStale(t *testing.T) {
	for _, late := range []error{nil, as(quota.ErrUnavailable), as(quota.ErrInvalid)} {
		eachBreaker(t, func(t *testing.T, b resilience.Policy) {
			r := newRig(t, b)
			fail := says(as(quota.ErrUnavailable))
			slowly := func(d time.Duration, err error) {
				r.inner.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
					time.Sleep(d)
					return granted, err
				}
				go r.Charge(bg, charge(1))
				synctest.Wait()
			}
			slowly(31*time.Second, late) // ends while half-open
			slowly(33*time.Second, late) // ends when closed again
			for range 3 {
				r.call(fail)
			}
			time.Sleep(30 * time.Second)
			slowly(2*time.Second, nil) // the probe
			time.Sleep(1500 * ms)
			r.want(t, "half-open", "a stale result")
			if reached, _ := r.call(fail); reached {
				t.Error("a call after a stale result: got a second probe, want a refusal")
			}
			time.Sleep(time.Second)
			r.want(t, "closed", "the probe succeeded")
			r.call(fail)
			r.call(fail)
			time.Sleep(time.Second)
			if late == nil || !errors.Is(late, quota.ErrUnavailable) {
				r.call(fail)
				r.want(t, "open", "a stale result began the count again")
			} else {
				r.want(t, "closed", "a stale failure counted")
			}
		})
	}
}

// TestBreakerOverlap: a success counts when it comes, whenever its call began.
func TestBreakerOverlap(t *testing.T) {
	eachBreaker(t, func(t *testing.T, b resilience.Policy) {
		r := newRig(t, b)
		fail := says(as(quota.ErrUnavailable))
		for range 2 {
			r.inner.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
				time.Sleep(time.Second)
				return granted, nil
			}
			go r.Charge(bg, charge(1))
			synctest.Wait()
			r.call(fail)
			r.call(fail)
			time.Sleep(2 * time.Second)
			r.call(fail)
			r.call(fail)
			r.want(t, "closed", "a success between two failures and two")
			r.call(says(nil))
		}
		for range 3 {
			r.want(t, "closed", "up to three")
			r.call(fail)
		}
		r.want(t, "open", "three in a row")
	})
}

// TestBreakerStaleProbe: a call that began before the breaker opened brings no probe forward.
func TestBreakerStaleProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail := says(as(quota.ErrUnavailable))
		for n := range 20 {
			r := newRig(t, resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, FirstDelay: 10 * time.Second, Delay: 10 * time.Second, Jitter: 0.9}))
			if n%2 == 0 {
				r.call(fail) // so that the success that comes late would count
			}
			late := make(chan error)
			r.inner.answer = func(context.Context, quota.Charge) (quota.Decision, error) { return granted, <-late }
			go r.Charge(bg, charge(1))
			synctest.Wait()
			for range 3 {
				r.call(fail)
			}
			_, err := r.call(fail)
			var after interface{ RetryAfter() time.Duration }
			if !errors.As(err, &after) {
				t.Fatal(err)
			}
			time.Sleep(after.RetryAfter() - 1)
			late <- []error{nil, as(quota.ErrUnavailable)}[n/2%2]
			synctest.Wait()
			r.want(t, "open", "before the delay is over")
			if reached, _ := r.call(fail); reached {
				t.Fatal("a call before the delay is over: got a probe, want a refusal")
			}
			time.Sleep(tick)
			if reached, _ := r.call(says(nil)); !reached {
				t.Fatal("a call after the delay: got a refusal, want a probe")
			}
			r.want(t, "closed", "after the probe")
		}
	})
}

// TestBreakerPanics: a panic goes on as it is, and Goexit exits.
func TestBreakerPanics(t *testing.T) {
	eachBreaker(t, func(t *testing.T, b resilience.Policy) {
		cause := errors.New("cause")
		store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { panic(cause) }}
		s := wrap(t, store, b)
		for range 2 {
			func() {
				defer func() {
					if v := recover(); v != cause {
						t.Errorf("recovered: got %v, want %v", v, cause)
					}
				}()
				s.Charge(bg, charge(1))
			}()
		}
		store.answer = func(context.Context, quota.Charge) (quota.Decision, error) { runtime.Goexit(); return granted, nil }
		deferred, returned := false, false
		done := make(chan struct{})
		go func() {
			defer close(done)
			defer func() { deferred = recover() == nil }()
			s.Charge(bg, charge(1))
			returned = true
		}()
		<-done
		if returned || !deferred {
			t.Errorf("Goexit in the store: got a return (%v) and a clean deferred call (%v), want no return and a clean one", returned, deferred)
		}
		if s := resilience.BreakerState(s); s != "open" {
			t.Errorf("the breaker after Goexit: got %s, want open", s)
		}
	})
}

// TestBreakerNotices: each change of state is told once, in order, outside any lock, and a slow or a
// reentrant receiver holds up nothing.
func TestBreakerNotices(t *testing.T) {
	for _, b := range breakers {
		t.Run(b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n notices
				var r *rig
				r = newRig(t, b.make(func(x quota.Notice) {
					r.Charge(bg, peek(1)) // would deadlock under gobreaker's lock
					time.Sleep(time.Second)
					n.add(x)
				}))
				cause := as(quota.ErrUnavailable)
				for range 2 {
					start := time.Now()
					for range 3 {
						r.call(says(cause))
					}
					if time.Since(start) != 0 {
						t.Errorf("calls with a slow receiver of notices took %v, want no delay", time.Since(start))
					}
					time.Sleep(30 * time.Second)
					r.call(says(cause))
					time.Sleep(30 * time.Second)
					r.call(says(nil))
					time.Sleep(10 * time.Second)
				}
				var got []string
				for _, x := range n.take() {
					if x.Name != "breaker" {
						t.Errorf("notice: got %+v, want only \"breaker\"", x)
					}
					for _, state := range []string{"half-open", "open", "closed"} {
						if strings.Contains(x.Text, state) {
							got = append(got, state)
							break
						}
					}
					if b.name == "gobreaker" && strings.Contains(x.Text, "opened") != (x.Err == cause) {
						t.Errorf("notice: got %+v, want the error %v exactly where the breaker opened", x, cause)
					}
				}
				want := []string{"open", "half-open", "open", "half-open", "closed"}
				if want = append(want, want...); !slices.Equal(got, want) {
					t.Errorf("told of %v, want %v", got, want)
				}
			})
		})
	}
}

// TestNoticesBounded: a receiver that hangs costs a bounded queue, and is told what it missed.
func TestNoticesBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		release := make(chan struct{})
		var n notices
		s := wrap(t, &stub{}, resilience.FailOpen(&resilience.FailOptions{Notice: func(x quota.Notice) { <-release; n.add(x) }}))
		inner := s.(interface{ Unwrap() quota.Store }).Unwrap().(*stub)
		for i := range 500 {
			inner.answer = nil
			if i%2 == 0 {
				inner.answer = script(as(quota.ErrUnavailable))
			}
			s.Charge(bg, charge(1))
			synctest.Wait() // the receiver has the first
		}
		close(release)
		synctest.Wait()
		if all := n.take(); len(all) != 1+64+1 || all[65].Name != "notices" || !strings.Contains(all[65].Text, "435 notices") {
			t.Errorf("notices: got %d, the last %+v; want 66, the last of 435 dropped", len(all), all[len(all)-1])
		}
	})
}

// TestBreakerJitter: each opening has a delay of its own, between the least and the most.
func TestBreakerJitter(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := map[time.Duration]bool{}
		least, most := time.Hour, time.Duration(0)
		r := newRig(t, resilience.Breaker(&resilience.BreakerOptions{Failures: 1, FailingFor: -1, FirstDelay: 10 * time.Second, Delay: 10 * time.Second, Jitter: 0.5}))
		fail := says(as(quota.ErrUnavailable))
		r.call(fail)
		for range 300 {
			opened := time.Now()
			var after interface{ RetryAfter() time.Duration }
			_, err := r.call(fail)
			if !errors.As(err, &after) {
				t.Fatal(err)
			}
			delay := after.RetryAfter()
			time.Sleep(delay - 1)
			if reached, _ := r.call(fail); reached {
				t.Fatalf("a probe %v after opening, want none before the %v of the notice", time.Since(opened), delay)
			}
			time.Sleep(tick)
			if reached, _ := r.call(fail); !reached { // opens again
				t.Fatalf("no probe after %v, want one", delay)
			}
			seen[delay] = true
			least, most = min(least, delay), max(most, delay)
		}
		if least < 5*time.Second || most > 10*time.Second || least > 5200*ms || most < 9800*ms || len(seen) < 290 {
			t.Errorf("delays: got %d from %v to %v, want 290 or more from 5s to 10s", len(seen), least, most)
		}
		// The default is a tenth.
		r = newRig(t, resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, FirstDelay: 30 * time.Second}))
		for range 3 {
			r.call(fail)
		}
		_, err := r.call(fail)
		var after interface{ RetryAfter() time.Duration }
		if errors.As(err, &after); after.RetryAfter() < 27*time.Second || after.RetryAfter() > 30*time.Second {
			t.Error(err)
		}
	})
}

func TestBreakerSettings(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fail, ok := says(as(quota.ErrUnavailable)), says(nil)
		r := newRig(t, resilience.Breaker(&resilience.BreakerOptions{Failures: 5, FailingFor: -1, Probes: 2, FirstDelay: time.Second, Delay: time.Second, Jitter: -1}))
		for range 5 {
			r.want(t, "closed", "up to five")
			r.call(fail)
		}
		r.want(t, "open", "five")
		time.Sleep(time.Second)
		r.call(ok)
		r.want(t, "half-open", "one of two probes")
		r.call(ok)
		r.want(t, "closed", "two probes")

		half := func(c gobreaker.Counts) bool { return c.Requests >= 4 && 2*c.TotalFailures >= c.Requests }
		r = newRig(t, resilience.Breaker(&resilience.BreakerOptions{Trip: half, Window: 10 * time.Second, Slice: time.Second}))
		r.call(fail)
		r.call(fail)
		time.Sleep(11 * time.Second)
		r.call(ok)
		r.call(fail)
		r.call(ok)
		r.want(t, "closed", "what is long ago does not count")
		r.call(fail)
		r.want(t, "open", "half of four")

		r = newRig(t, resilience.Breaker(&resilience.BreakerOptions{Trip: half}))
		for _, answer := range []func(context.Context, func()) (quota.Decision, error){ok, ok, ok, fail, fail} {
			r.call(answer)
			r.want(t, "closed", "less than half")
		}
		r.call(fail)
		r.want(t, "open", "half of six")

		if s := resilience.BreakerState(wrap(t, &stub{}, resilience.Bulkhead(1))); s != "" {
			t.Errorf("the breaker of a store without one: got %q, want \"\"", s)
		}
	})
}

// TestBreakerMisconfigured: the outermost policy that can reports a misconfigured store, at most once a minute.
func TestBreakerMisconfigured(t *testing.T) {
	for _, b := range breakers {
		t.Run(b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var inner, outer notices
				r := newRig(t, b.make(inner.add))
				wrong := says(as(quota.ErrMisconfigured))
				for range 100 {
					r.call(wrong)
				}
				synctest.Wait()
				if all := inner.take(); len(all) != 1 || all[0].Name != "misconfigured" || !errors.Is(all[0].Err, quota.ErrMisconfigured) {
					t.Errorf("notices of 100 calls: got %+v, want one \"misconfigured\"", all)
				}
				time.Sleep(time.Minute)
				r.call(wrong)
				synctest.Wait()
				if all := inner.take(); len(all) != 1 {
					t.Errorf("notices a minute later: got %+v, want one", all)
				}
				r = newRig(t, resilience.FailClosed(&resilience.FailOptions{Notice: outer.add}), b.make(inner.add))
				_, err := r.call(wrong)
				wantErr(t, err, quota.ErrMisconfigured)
				synctest.Wait()
				if in, out := inner.take(), outer.take(); len(in) != 0 || len(out) != 1 || out[0].Name != "misconfigured" {
					t.Errorf("notices of the breaker and of FailClosed: got %+v and %+v, want one \"misconfigured\" of FailClosed", in, out)
				}
			})
		})
	}
}

// TestBreakerRace hammers both breakers; the race detector watches.
func TestBreakerRace(t *testing.T) {
	policies := []resilience.Policy{
		resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, Delay: ms, ProbeLimit: ms, Notice: func(quota.Notice) {}}),
		resilience.Failsafe(circuitbreaker.NewBuilder[result]().WithFailureThreshold(3).WithSuccessThreshold(1).WithDelay(ms).Build(),
			&resilience.FailsafeOptions{ProbeLimit: ms, Notice: func(quota.Notice) {}}),
	}
	for _, p := range policies {
		var mu sync.Mutex
		r := random(t)
		store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
			mu.Lock()
			n := r.IntN(6)
			mu.Unlock()
			switch n {
			case 0:
				return granted, nil
			case 1:
				return granted, as(quota.ErrInvalid)
			case 2:
				panic("test")
			}
			return granted, as(quota.ErrUnavailable)
		}}
		s := wrap(t, store, p)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				for range sized(5000, 200_000) {
					func() {
						defer func() { recover() }()
						s.Charge(bg, charge(1))
					}()
				}
			})
		}
		wg.Wait()
		mu.Lock()
		store.answer = nil
		mu.Unlock()
		for end := time.Now().Add(5 * time.Second); resilience.BreakerState(s) != "closed" && time.Now().Before(end); {
			s.Charge(bg, charge(1))
		}
		if state := resilience.BreakerState(s); state != "closed" {
			t.Errorf("the breaker of a store that is well: got %s, want closed", state)
		}
	}
}

// late is a context whose deadline has passed before its timer says so.
type late struct{ context.Context }

func (late) Deadline() (time.Time, bool) { return time.Now().Add(-time.Microsecond), true }

// TestBreakerLateTimer: a caller whose deadline has passed says nothing of the store, whichever clock saw it first.
func TestBreakerLateTimer(t *testing.T) {
	eachBreaker(t, func(t *testing.T, b resilience.Policy) {
		s := wrap(t, &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
			return quota.Decision{}, as(quota.ErrIndeterminate)
		}}, b)
		for range 2 * resilience.DefaultFailures {
			s.Charge(late{bg}, charge(1))
		}
		if got := resilience.BreakerState(s); got != "closed" {
			t.Errorf("the breaker: got %s, want closed", got)
		}
	})
}
