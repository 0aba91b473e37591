package quota_test

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// TestWaitWakes: quota that this limiter gives back is there for a waiting caller at once.
func TestWaitWakes(t *testing.T) {
	ways := map[string]func(t *testing.T, lim *quota.Limiter, receipt quota.Decision) error{
		"settle": func(t *testing.T, lim *quota.Limiter, receipt quota.Decision) error {
			_, err := lim.Settle(bg, "k", receipt, 10)
			return err
		},
		"refund": func(t *testing.T, lim *quota.Limiter, receipt quota.Decision) error {
			_, err := lim.Refund(bg, "k", receipt, 90)
			return err
		},
		"reset": func(t *testing.T, lim *quota.Limiter, receipt quota.Decision) error { return lim.Reset(bg, "k") },
		"list with a settle": func(t *testing.T, lim *quota.Limiter, receipt quota.Decision) error {
			_, err := lim.ChargeAll(bg, quota.Charge{Key: "other", Cost: 1}, quota.Charge{Key: "k"}.Settle(receipt, 10))
			return err
		},
		"list with a reset": func(t *testing.T, lim *quota.Limiter, receipt quota.Decision) error {
			_, err := lim.ChargeAll(bg, quota.Charge{Key: "other", Cost: 1}, quota.Charge{Key: "k", Op: quota.OpReset})
			return err
		},
	}
	for name, giveBack := range ways {
		t.Run(name, func(t *testing.T) {
			testkit.EachRule(t, 100, 10*time.Second, func(t *testing.T, l *quota.Limit) {
				synctest.Test(t, func(t *testing.T) {
					lim := newLimiter(t, local.New(), l, nil)
					receipt := must[quota.Decision](t)(lim.Take(bg, "k", 100))
					w := newWaits(lim)
					w.call(bg, "first", "k", 50)
					w.call(bg, "second", "k", 40)
					const when = 20 * time.Millisecond
					time.Sleep(when)
					if err := giveBack(t, lim, receipt); err != nil {
						t.Fatal(err)
					}
					w.end(t)
					for _, name := range []string{"first", "second"} {
						if e := w.ended[name]; e.err != nil || e.at != when {
							t.Errorf("%s waiter: got %v, want a grant at %v, when enough came back", name, e, when)
						}
					}
				})
			})
		})
	}
}

// meanwhile is a store in which something else happens after the nth denied take, before its caller learns of it.
type meanwhile struct {
	quota.Store
	denials atomic.Int64
	nth     int64
	happens func()
}

func (s *meanwhile) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(ctx, c)
	if c.Op == quota.OpTake && !d.Allowed && s.denials.Add(1) == s.nth {
		s.happens()
	}
	return d, err
}

// A give-back between a denial and the pause after it is not missed.
func TestWaitWakesBeforeItSleeps(t *testing.T) {
	testkit.EachRule(t, 10, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			s := &meanwhile{Store: local.New(), nth: 1}
			lim := newLimiter(t, s, l, nil)
			receipt := must[quota.Decision](t)(lim.Take(bg, "k", 10))
			s.happens = func() { must[quota.Decision](t)(lim.Refund(bg, "k", receipt, 10)) }
			w := newWaits(lim)
			w.call(bg, "w", "k", 5)
			w.end(t)
			if e := w.ended["w"]; e.err != nil || e.at != 0 {
				t.Errorf("waiter: got %v, want a grant at 0s, when all came back", e)
			}
		})
	})
}

// A refund of a grant that came too late for its caller wakes the next one.
func TestWaitWakesAfterAGoneCaller(t *testing.T) {
	testkit.EachRule(t, 10, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			ctx, cancel := context.WithCancel(bg)
			lim := newLimiter(t, tooLate{local.New(), func() { time.Sleep(time.Second); cancel() }}, l, nil)
			w := newWaits(lim)
			w.call(ctx, "gone", "k", 10)
			w.wg.Go(func() { w.wait(bg, "next", "k", 10) })
			w.wg.Wait()
			if e := w.ended["gone"]; !errors.Is(e.err, context.Canceled) {
				t.Errorf("gone caller: got %v, want context.Canceled", e)
			}
			if e := w.ended["next"]; !errors.Is(e.err, nil) || e.at != 2*time.Second { // its own grant takes a second too
				t.Errorf("next caller: got %v, want a grant at 2s", e)
			}
		})
	})
}

// lateness is how late a waiting caller sees a change that its own limiter did not make.
const lateness = time.Second + time.Millisecond

func TestWaitSeesOtherProcesses(t *testing.T) {
	testkit.EachRule(t, 100, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			store := local.New()
			other := newLimiter(t, store, l, nil)
			receipt := must[quota.Decision](t)(other.Take(bg, "k", 100))
			w := newWaits(newLimiter(t, store, l, nil))
			w.call(bg, "w", "k", 50)
			time.Sleep(100 * time.Millisecond)
			must[quota.Decision](t)(other.Settle(bg, "k", receipt, 10))
			w.end(t)
			if e := w.ended["w"]; e.err != nil || e.at > 100*time.Millisecond+lateness {
				t.Errorf("waiter: got %v, want a grant within %v of 100ms, when another process gave back", e, lateness)
			}
		})
	})
}

// A waiting caller's limit is chosen anew each time it asks.
func TestWaitSeesARaisedLimit(t *testing.T) {
	for _, name := range []string{"plan", "other"} { // the same limit with other numbers, and another limit
		testkit.EachRule(t, 100, 10*time.Second, func(t *testing.T, l *quota.Limit) {
			synctest.Test(t, func(t *testing.T) {
				small, large := testkit.LimitOf("plan", l.Name(), 100, 10*time.Second), testkit.LimitOf(name, l.Name(), 1000, 10*time.Second)
				var plan atomic.Pointer[quota.Limit]
				plan.Store(small)
				store := newSlow(local.New(), time.Millisecond) // so that grants differ in time
				lim := newLimiter(t, store, small, &quota.Options{LimitFor: func(string) *quota.Limit { return plan.Load() }})
				must[quota.Decision](t)(lim.Take(bg, "k", 100))
				w := newWaits(lim)
				w.call(bg, "first", "k", 50)
				w.call(bg, "second", "k", 50)
				time.Sleep(100 * time.Millisecond)
				plan.Store(large)
				synctest.Wait()
				w.call(bg, "third", "k", 50) // comes under the new limit, and waits its turn
				w.end(t)
				if want := "[first second third]"; fmt.Sprint(w.order) != want {
					t.Errorf("order of the grants: got %v, want %v", w.order, want)
				}
				for _, name := range []string{"first", "second", "third"} {
					if e := w.ended[name]; e.err != nil || e.at > 100*time.Millisecond+lateness+10*time.Millisecond {
						t.Errorf("%s waiter: got %v, want a grant within %v of 100ms, when the limit was raised", name, e, lateness)
					}
				}
				if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); d.Capacity != 1000 || name == "other" && d.Remaining != 850 {
					t.Errorf("the limit after the grants: got %v, want all three charged to the one of 1000", d)
				}
			})
		})
	}
}

// A plan that is switched off, or that has no limit any more, keeps the name of its limit and the state that it had.
func TestWaitSeesAnotherRule(t *testing.T) {
	for name, c := range map[string]struct {
		plan   quota.Algorithm
		admits bool
	}{"unlimited": {algorithm.Unlimited, true}, "switched off": {algorithm.DenyAll, false}} {
		t.Run(name, func(t *testing.T) {
			testkit.EachRule(t, 100, 10*time.Second, func(t *testing.T, l *quota.Limit) {
				synctest.Test(t, func(t *testing.T) {
					var plan atomic.Pointer[quota.Limit]
					plan.Store(l)
					store := local.New()
					lim := newLimiter(t, store, l, &quota.Options{LimitFor: func(string) *quota.Limit { return plan.Load() }})
					must[quota.Decision](t)(lim.Take(bg, "k", 100))
					w := newWaits(lim)
					w.call(bg, "w", "k", 50)
					time.Sleep(100 * time.Millisecond)
					plan.Store(quota.NewLimit(l.Name(), c.plan))
					w.end(t)
					e := w.ended["w"]
					if (e.err == nil) != c.admits || !c.admits && !errors.Is(e.err, quota.ErrInvalid) || e.at > 100*time.Millisecond+lateness {
						t.Errorf("waiter: got %v, want a grant (%v) or ErrInvalid within %v of 100ms, when the plan changed", e, c.admits, lateness)
					}
					if d := must[quota.Decision](t)(newLimiter(t, store, l, nil).Peek(bg, "k", 0)); d.Remaining < 0 {
						t.Errorf("remaining under the old rule: got %d, want what the waiter took ahead given back", d.Remaining)
					}
				})
			})
		})
	}
}

// A late grant goes back to the limit that it was charged to, though the key has another one by then.
func TestCancelledWaitGivesBackToItsLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		before, after := testkit.Bucket("before", 10, time.Hour), testkit.Bucket("after", 10, time.Hour)
		store := local.New()
		ctx, cancel := context.WithCancel(bg)
		var plan atomic.Pointer[quota.Limit]
		plan.Store(before)
		late := tooLate{store, func() { plan.Store(after); cancel() }}
		lim := newLimiter(t, late, before, &quota.Options{LimitFor: func(string) *quota.Limit { return plan.Load() }})
		if _, err := lim.Wait(ctx, "k", 3); !errors.Is(err, context.Canceled) {
			t.Errorf("Wait cancelled while the store grants: got %v, want context.Canceled", err)
		}
		for _, l := range []*quota.Limit{before, after} {
			if d := must[quota.Decision](t)(newLimiter(t, store, l, nil).Peek(bg, "k", 0)); d.Remaining != 10 {
				t.Errorf("remaining of limit %q: got %d, want 10, as the late grant is given back", l.Name(), d.Remaining)
			}
		}
	})
}

// Asking again is bounded: a waiting caller asks about once a second, whether it took ahead or not.
func TestWaitAsksSeldom(t *testing.T) {
	testkit.EachRule(t, 1, time.Hour, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			s := &noting{Store: local.New()}
			lim := newLimiter(t, s, l, nil)
			must[quota.Decision](t)(lim.Take(bg, "k", 1))
			ctx, cancel := context.WithCancel(bg)
			w := newWaits(lim)
			w.call(ctx, "w", "k", 1)
			time.Sleep(100 * time.Second)
			cancel()
			w.end(t)
			if n := len(s.charges()); n < 100*9/10 || n > 250 {
				t.Errorf("calls of the store in 100 s: got %d, want 90 to 250", n)
			}
		})
	})
}
