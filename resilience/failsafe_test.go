package resilience_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/failsafe-go/failsafe-go/adaptivelimiter"
	"github.com/failsafe-go/failsafe-go/adaptivethrottler"
	"github.com/failsafe-go/failsafe-go/budget"
	"github.com/failsafe-go/failsafe-go/bulkhead"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"
	"github.com/failsafe-go/failsafe-go/fallback"
	"github.com/failsafe-go/failsafe-go/hedgepolicy"
	"github.com/failsafe-go/failsafe-go/ratelimiter"
	"github.com/failsafe-go/failsafe-go/retrypolicy"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// TestFailsafeSees: a policy is asked about what says something of the store, and sees nothing else.
func TestFailsafeSees(t *testing.T) {
	for _, f := range faults {
		if f.name == "panic" || f.name == "Goexit" {
			continue
		}
		var asked []error
		var results []result
		p := retrypolicy.NewBuilder[result]().HandleIf(func(r result, err error) bool {
			asked, results = append(asked, err), append(results, r)
			return false
		}).Build()
		r := newRig(t, resilience.Failsafe(custom{p}, nil))
		_, err := r.call(f.answer)
		if strings.HasPrefix(f.name, "own context") { // then it is asked about nothing
			asked = append(asked, nil)
		}
		if len(asked) != 1 || (asked[0] != nil) != (f.counts == "failed") {
			t.Errorf("%s: the policy saw the errors %v, want one only where the fault counts as failed (%s)", f.name, asked, f.counts)
		}
		if f.counts == "healthy" && (len(results[0].Decisions) != 1 || results[0].Granted != (f.name == "grant")) {
			t.Errorf("%s: the policy saw the results %+v, want one decision", f.name, results)
		}
		if want := (f.counts != "healthy"); (err != nil) != want {
			t.Errorf("%s: the caller got %v, want an error: %v", f.name, err, want)
		}
	}
}

// TestFailsafeAny runs every kind of policy around a store that is well, one that fails and one that panics.
func TestFailsafeAny(t *testing.T) {
	for name, p := range map[string]fsp{
		"bulkhead":           bulkhead.New[result](1),
		"rate limiter":       ratelimiter.NewBursty[result](1000, time.Minute),
		"adaptive limiter":   adaptivelimiter.NewWithDefaults[result](),
		"adaptive throttler": adaptivethrottler.NewWithDefaults[result](),
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
				store := &stub{}
				s := wrap(t, store, resilience.Failsafe(p, nil))
				for range 3 {
					if d, err := take(s, bg, charge(1)); !errors.Is(err, adaptivethrottler.ErrExceeded) && (err != nil || d != granted) {
						t.Fatalf("got %+v, %v; want %+v", d, err, granted)
					}
					cause := as(quota.ErrMisconfigured)
					store.answer = script(cause)
					if _, err := take(s, bg, charge(1)); err != cause {
						t.Errorf("got %v, want %v", err, cause)
					}
					store.answer = script(as(quota.ErrIndeterminate))
					if _, err := take(s, bg, charge(1)); !errors.Is(err, quota.ErrIndeterminate) {
						t.Errorf("got %v, want ErrIndeterminate", err)
					}
					store.answer = nil
					for range 50 { // a throttler refuses after failures
						if _, err := take(s, bg, charge(1)); err != nil && (name != "adaptive throttler" || !errors.Is(err, resilience.ErrRejected)) {
							t.Errorf("a store that is well: got %v, want a grant", err)
						}
					}
					func() {
						defer func() {
							if v, ok := recover().(*resilience.Panic); !ok || v.Value != "test" {
								t.Errorf("recovered: got %v, want a *Panic of \"test\"", v)
							}
						}()
						store.answer = func(context.Context, quota.Charge) (quota.Decision, error) { panic("test") }
						take(s, bg, charge(1))
					}()
					store.answer = nil
				}
				ended, cancel := context.WithCancel(bg)
				cancel()
				if _, err := take(s, ended, charge(1)); err != context.Canceled {
					t.Errorf("with an ended context: got %v, want %v", err, context.Canceled)
				}
			})
		})
	}
	s := wrap(t, &stub{}, resilience.Failsafe(ratelimiter.NewBursty[result](2, time.Hour), nil))
	s.Charge(bg, charge(1))
	s.Charge(bg, charge(1))
	_, err := s.Charge(bg, charge(1))
	wantErr(t, err, quota.ErrOverloaded, resilience.ErrRejected, ratelimiter.ErrExceeded)
}

// TestFailsafeRepeat: a policy of an unknown kind that repeats gets the first answer again, unless it may repeat.
func TestFailsafeRepeat(t *testing.T) {
	for _, p := range []fsp{
		custom{retrypolicy.NewBuilder[result]().WithMaxRetries(3).WithDelay(1).Build()},
		custom{hedgepolicy.NewBuilderWithDelay[result](ms).WithMaxHedges(3).Build()},
	} {
		synctest.Test(t, func(t *testing.T) {
			var n notices
			store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
				time.Sleep(10 * ms)
				return granted, as(quota.ErrUnavailable)
			}}
			s := wrap(t, store, resilience.Failsafe(p, &resilience.FailsafeOptions{Notice: n.add}), resilience.Timeout(time.Second, nil))
			_, err := s.Charge(bg, charge(1))
			wantErr(t, err, quota.ErrUnavailable)
			synctest.Wait()
			if all := n.take(); store.called() != 1 || len(all) == 0 || all[0].Name != "repeat" {
				t.Errorf("without an id: got %d calls and the notices %+v, want 1 call and \"repeat\"", store.called(), all)
			}
			s.Charge(bg, withID(charge(1), "i"))
			time.Sleep(time.Second)
			if store.called() < 3 {
				t.Errorf("with an id: got %d calls, want 3 or more", store.called())
			}
			s.Close()
		})
	}
}

func TestRetryFailsafe(t *testing.T) {
	// A budget that is used up ends in the last answer.
	p := retrypolicy.NewBuilder[result]().WithMaxRetries(5).WithDelay(1).WithBudget(budget.NewBuilder().WithMaxRate(-1).WithMinConcurrency(0).Build()).Build()
	store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return granted, as(quota.ErrUnavailable) }}
	s := wrap(t, store, resilience.RetryFailsafe(p, nil), resilience.Timeout(time.Minute, nil))
	_, err := s.Charge(bg, withID(charge(1), "i"))
	wantErr(t, err, quota.ErrUnavailable)
	if store.called() != 1 {
		t.Errorf("calls: got %d, want 1", store.called())
	}
	// Conditions on results: denials can be tried again, and the last one is the answer.
	denied := quota.Decision{Capacity: 100, RetryAfter: time.Second}
	store = &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return denied, nil }}
	p = retrypolicy.NewBuilder[result]().HandleIf(func(r result, err error) bool { return err == nil && !r.Granted }).WithMaxRetries(2).WithDelay(1).Build()
	s = wrap(t, store, resilience.RetryFailsafe(p, nil), resilience.Timeout(time.Minute, nil))
	if d, err := s.Charge(bg, withID(charge(1), "i")); err != nil || d != denied || store.called() != 3 {
		t.Errorf("got %+v, %v after %d calls; want %+v after 3", d, err, store.called(), denied)
	}
	// A panic ends it.
	store = &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { panic("test") }}
	s = wrap(t, store, resilience.RetryFailsafe(retrypolicy.NewWithDefaults[result](), nil), resilience.Timeout(time.Minute, nil))
	func() {
		defer func() {
			if p, ok := recover().(*resilience.Panic); !ok || p.Value != "test" || store.called() != 1 {
				t.Errorf("recovered: got %v after %d calls, want a *Panic of \"test\" after 1", p, store.called())
			}
		}()
		s.Charge(bg, withID(charge(1), "i"))
	}()
	// A caller who leaves during a pause: what was is known.
	synctest.Test(t, func(t *testing.T) {
		for _, c := range []error{quota.ErrUnavailable, quota.ErrIndeterminate} {
			store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return granted, as(c) }}
			s := wrap(t, store, resilience.RetryFailsafe(retrypolicy.NewBuilder[result]().WithDelay(time.Hour).Build(), nil), resilience.Timeout(time.Minute, nil))
			ctx, cancel := context.WithTimeout(bg, time.Second)
			defer cancel()
			start := time.Now()
			_, err := s.Charge(ctx, withID(charge(1), "i"))
			wantErr(t, err, c)
			if time.Since(start) != time.Second {
				t.Errorf("the caller left after %v, want 1s", time.Since(start))
			}
		}
	})
}

func TestHedge(t *testing.T) {
	hedge := func(o *resilience.FailsafeOptions) resilience.Policy {
		return resilience.HedgeFailsafe(hedgepolicy.NewBuilderWithDelay[result](10*ms).Build(), o)
	}
	// answers makes a store whose nth call takes a time and ends in an error; calls ignore cancellation.
	type answer struct {
		after time.Duration
		d     quota.Decision
		err   error
	}
	answers := func(as ...answer) *stub {
		var mu sync.Mutex
		n := 0
		return &stub{answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
			mu.Lock()
			a := as[n]
			n++
			mu.Unlock()
			time.Sleep(a.after)
			if a.err != nil && a.err.Error() == "panic" {
				panic("test")
			}
			return a.d, a.err
		}}
	}
	other := granted
	other.Remaining = 7
	down := as(quota.ErrUnavailable)
	synctest.Test(t, func(t *testing.T) {
		var n notices
		for _, c := range []struct {
			name   string
			store  *stub
			charge quota.Charge
			took   time.Duration
			d      quota.Decision
			err    error
			calls  int
		}{
			{"fast", answers(answer{5 * ms, granted, nil}), withID(charge(1), "i"), 5 * ms, granted, nil, 1},
			{"slow", answers(answer{100 * ms, granted, nil}, answer{5 * ms, other, nil}), withID(charge(1), "i"), 15 * ms, other, nil, 2},
			{"slow, the second slower", answers(answer{20 * ms, granted, nil}, answer{50 * ms, other, nil}), withID(charge(1), "i"), 20 * ms, granted, nil, 2},
			{"a peek", answers(answer{100 * ms, granted, nil}, answer{5 * ms, other, nil}), peek(1), 15 * ms, other, nil, 2},
			{"no id", answers(answer{100 * ms, granted, nil}), charge(1), 100 * ms, granted, nil, 1},
			{"the second fails, the first is under way", answers(answer{100 * ms, granted, nil}, answer{5 * ms, other, down}), withID(charge(1), "i"), 15 * ms, other, quota.ErrIndeterminate, 2},
			{"the same of a peek", answers(answer{100 * ms, granted, nil}, answer{5 * ms, other, down}), peek(1), 15 * ms, other, quota.ErrUnavailable, 2},
		} {
			s := wrap(t, c.store, hedge(&resilience.FailsafeOptions{Notice: n.add}), resilience.Timeout(time.Second, nil))
			start := time.Now()
			d, err := s.Charge(bg, c.charge)
			if took := time.Since(start); took != c.took || !errors.Is(err, c.err) || err == nil && d != c.d || c.store.called() != c.calls {
				t.Errorf("%s: got %+v, %v after %v and %d calls; want %+v, %v after %v and %d", c.name, d, err, took, c.store.called(), c.d, c.err, c.took, c.calls)
			}
			if err := s.Close(); err != nil {
				t.Errorf("%s: Close: got %v, want no error", c.name, err)
			}
		}
		synctest.Wait()
		if all := n.take(); len(all) > 0 { // a charge without an id does not reach the policy at all
			t.Errorf("notices: got %+v, want none", all)
		}
		// Lists: the caller's slices are its own as soon as the call returned.
		store := &stub{prompt: true, answerAll: func(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			time.Sleep(20 * ms)
			for i := range out {
				if cs[i].Limit == nil {
					t.Error("the store sees the caller's charges, want copies")
				}
				out[i] = quota.Decision{Allowed: true, Capacity: 1, Remaining: int64(len(cs[i].Key))}
			}
			return nil
		}}
		s := wrap(t, store, hedge(nil), resilience.Timeout(time.Second, nil))
		cs := []quota.Charge{{Limit: limit, Key: "a", ID: "i"}, {Limit: limit, Key: "a/bc", ID: "i"}}
		out := make([]quota.Decision, 2)
		if err := s.ChargeAll(bg, cs, out); err != nil || out[0].Remaining != 1 || out[1].Remaining != 4 {
			t.Errorf("a list: got %+v, %v; want 1 and 4 remaining", out, err)
		}
		cs[0], cs[1], out[0], out[1] = quota.Charge{}, quota.Charge{}, granted, granted
		time.Sleep(time.Second)
		if out[0] != granted || out[1] != granted || store.called() != 2 {
			t.Errorf("the caller's slice after the call: got %+v after %d calls, want it unchanged after 2", out, store.called())
		}
		// Close waits for the attempt that lost.
		store = answers(answer{100 * ms, granted, nil}, answer{5 * ms, other, nil})
		store.prompt = true // or the timeout would do the waiting
		s = wrap(t, store, hedge(nil), resilience.Timeout(time.Second, nil))
		s.Charge(bg, withID(charge(1), "i"))
		start := time.Now()
		if err := s.Close(); err != nil || time.Since(start) != 85*ms {
			t.Errorf("Close: got %v after %v, want no error after 85ms", err, time.Since(start))
		}
		for range 2 {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
		_, err := s.Charge(bg, withID(charge(1), "i"))
		wantErr(t, err, quota.ErrClosed)
		// But not for one that the store never lets go.
		store = answers(answer{time.Hour, granted, nil}, answer{5 * ms, other, nil})
		store.prompt = true
		s = wrap(t, store, hedge(nil), resilience.Timeout(time.Second, nil))
		s.Charge(bg, withID(charge(1), "i"))
		start = time.Now()
		if err := s.Close(); err == nil || !strings.Contains(err.Error(), "1 attempts") || time.Since(start) != time.Second {
			t.Errorf("Close: got %v after %v, want an error of 1 attempt after 1s", err, time.Since(start))
		}
		time.Sleep(time.Hour)
		// A caller who leaves while both are under way.
		store = slow(time.Hour, true, true)
		store.prompt = true
		s = wrap(t, store, hedge(nil), resilience.Timeout(time.Minute, nil))
		ctx, cancel := context.WithTimeout(bg, time.Second)
		_, err = s.Charge(ctx, withID(charge(1), "i"))
		wantErr(t, err, quota.ErrIndeterminate, context.DeadlineExceeded)
		cancel()
		// Panics: of an attempt that is waited for, the caller's; of one that lost, a notice.
		store = answers(answer{5 * ms, granted, errors.New("panic")})
		s = wrap(t, store, hedge(&resilience.FailsafeOptions{Notice: n.add}), resilience.Timeout(time.Second, nil))
		func() {
			defer func() {
				if p, ok := recover().(*resilience.Panic); !ok || p.Value != "test" || !strings.Contains(p.Error(), "TestHedge") {
					t.Errorf("recovered: got %v, want a *Panic of \"test\" with the stack", p)
				}
			}()
			s.Charge(bg, withID(charge(1), "i"))
		}()
		for _, prompt := range []bool{false, true} { // it panics in the timeout's goroutine, or in the hedge's
			store = answers(answer{100 * ms, granted, errors.New("panic")}, answer{5 * ms, other, nil})
			store.prompt = prompt
			s = wrap(t, store, hedge(&resilience.FailsafeOptions{Notice: n.add}), resilience.Timeout(time.Second, &resilience.TimeoutOptions{Notice: n.add}))
			if d, err := s.Charge(bg, withID(charge(1), "i")); err != nil || d != other {
				t.Errorf("got %+v, %v; want %+v", d, err, other)
			}
			time.Sleep(time.Second)
			if all := n.take(); len(all) != 1 || all[0].Name != "panic" {
				t.Errorf("notices: got %+v, want one \"panic\"", all)
			}
		}
	})
}

// forge is a policy that answers in the store's place.
type forge struct{}

func (forge) ToExecutor(result) any {
	return fallback.NewWithResult(result{Granted: true, Decisions: []quota.Decision{granted}}).ToExecutor(result{})
}

// TestFailsafeNotSent: what a policy refuses before the store is called was not charged.
func TestFailsafeNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hold := make(chan struct{})
		store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { <-hold; return granted, nil }}
		s := wrap(t, store, resilience.Failsafe(bulkhead.NewBuilder[result](1).WithMaxWaitTime(time.Hour).Build(), nil))
		go s.Charge(bg, charge(1))
		synctest.Wait()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if _, err := s.Charge(ctx, charge(1)); err != context.DeadlineExceeded || store.called() != 1 {
			t.Errorf("got %v after %d calls, want %v after 1", err, store.called(), context.DeadlineExceeded)
		}
		close(hold)
		// A circuit breaker that hides in a policy of another kind.
		cb := circuitbreaker.NewBuilder[result]().Build()
		cb.Open()
		s = wrap(t, &stub{}, resilience.Failsafe(custom{cb}, nil))
		_, err := s.Charge(bg, charge(1))
		wantErr(t, err, quota.ErrUnavailable, resilience.ErrOpen, circuitbreaker.ErrOpen)
	})
}

func TestFailsafeForged(t *testing.T) {
	s := wrap(t, &stub{answer: script(as(quota.ErrUnavailable))}, resilience.Failsafe(forge{}, nil))
	_, err := s.Charge(bg, charge(1))
	wantErr(t, err, quota.ErrMisconfigured)
	if d, err := s.Charge(bg, charge(1)); err != nil || d != granted {
		t.Errorf("got %+v, %v; want %+v", d, err, granted)
	}
}
