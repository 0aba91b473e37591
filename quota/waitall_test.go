package quota_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// callAll starts a WaitAll and returns once the call is in its queues or over.
func (w *waits) callAll(ctx context.Context, name string, list ...quota.Charge) {
	w.wg.Go(func() {
		from := time.Now()
		_, err := w.lim.WaitAll(ctx, list...)
		w.note(name, from, err)
	})
	synctest.Wait()
}

// counting is a store that counts the calls that it gets.
type counting struct {
	quota.Store
	calls atomic.Int64
}

func (s *counting) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	s.calls.Add(1)
	return s.Store.Charge(ctx, c)
}

func (s *counting) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	s.calls.Add(1)
	return s.Store.ChargeAll(ctx, cs, out)
}

// 20 callers of a list, which took 159 tries out of order by ChargeAll and sleeping, are granted in order, with few calls of
// the store, and as soon as both rules admit them.
func TestWaitAllInOrder(t *testing.T) {
	for _, rule := range []string{"bucket", "fixed-from-first"} {
		synctest.Test(t, func(t *testing.T) {
			tokens, calls := quota.Must(algorithm.ParseLimit("tokens: 10 burst 100/s bucket")), quota.Must(algorithm.ParseLimit("calls: 5 burst 50/s bucket"))
			if rule != "bucket" {
				calls = quota.Must(algorithm.ParseLimit("calls: 5/100ms " + rule))
			}
			store := &counting{Store: newSlow(local.New(), time.Microsecond)} // so that grants differ in time
			w := newWaits(newLimiter(t, store, tokens, nil))
			var want []string
			for i := range 20 {
				want = append(want, fmt.Sprint(i))
				w.callAll(bg, fmt.Sprint(i), quota.Charge{Key: "x", Cost: 3}, quota.Charge{Limit: calls, Key: "x", Cost: 1})
				time.Sleep(time.Millisecond)
			}
			w.end(t)
			if !slices.Equal(w.order, want) {
				t.Errorf("%s: order of the grants: got %v, want %v", rule, w.order, want)
			}
			if n := store.calls.Load(); n > 50 {
				t.Errorf("%s: calls of the store for 20 grants: got %d, want at most 50", rule, n)
			}
			// 60 tokens, of which 10 are there at once.
			if at := w.ended["19"].at; at < 500*time.Millisecond || at > 510*time.Millisecond {
				t.Errorf("%s: last grant: got it at %v, want it at 500ms, when the tokens are gained", rule, at)
			}
		})
	}
}

// Lists of the same keys in all orders never wait for each other, and no more is granted than there is.
func TestWaitAllDoesNotDeadlock(t *testing.T) {
	testkit.EachRule(t, 3, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			r := random(t)
			lim := newLimiter(t, newSlow(local.New(), time.Millisecond), l, nil)
			w := newWaits(lim)
			var cancelled atomic.Int64
			const callers = 60
			for i := range callers {
				ctx, cancel := context.WithCancel(bg)
				if r.IntN(4) == 0 {
					time.AfterFunc(time.Duration(r.IntN(5000))*time.Millisecond, cancel)
				}
				t.Cleanup(cancel)
				keys := r.Perm(4)[:1+r.IntN(4)]
				pause := time.Duration(r.IntN(3000)) * time.Millisecond
				w.wg.Go(func() {
					time.Sleep(pause)
					var list []quota.Charge
					for _, k := range keys {
						list = append(list, quota.Charge{Key: fmt.Sprint(k), Cost: 1, Floor: int64(i+k) % 3})
					}
					if len(list) == 1 && i%2 == 0 {
						w.wait(ctx, fmt.Sprint(i), list[0].Key, 1)
						return
					}
					from := time.Now()
					_, err := lim.WaitAll(ctx, list...)
					w.note(fmt.Sprint(i), from, err)
				})
			}
			w.end(t) // a deadlock ends the bubble
			for name, e := range w.ended {
				if errors.Is(e.err, context.Canceled) {
					cancelled.Add(1)
				} else if e.err != nil {
					t.Errorf("caller %s: got %v, want a grant or context.Canceled", name, e)
				}
			}
			if got := len(w.order) + int(cancelled.Load()); got != callers || len(w.order) < callers/2 {
				t.Errorf("callers: got %d granted and %d cancelled, want %d, more than half of them granted", len(w.order), cancelled.Load(), callers)
			}
		})
	})
}

// A list stands in the queues of all of its charges, with callers of Wait before and behind it, and other keys pass.
func TestWaitAllSharesTheQueuesOfWait(t *testing.T) {
	testkit.EachRule(t, 2, time.Second, func(t *testing.T, own *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			other := testkit.LimitOf("other", own.Name(), 2, time.Second)
			lim := newLimiter(t, newSlow(local.New(), time.Microsecond), own, nil)
			must[quota.Decision](t)(lim.Take(bg, "a", 2))
			w := newWaits(lim)
			w.call(bg, "a1", "a", 2)
			w.callAll(bg, "list", quota.Charge{Limit: own, Key: "a", Cost: 2}, quota.Charge{Limit: other, Key: "a", Cost: 1})
			w.call(bg, "a2", "a", 2)
			w.callAll(bg, "other", quota.Charge{Limit: other, Key: "a", Cost: 2}) // behind the list, though it would fit
			w.callAll(bg, "free", quota.Charge{Limit: other, Key: "b", Cost: 2}, quota.Charge{Key: "b", Cost: 2})
			time.Sleep(10 * time.Microsecond)
			if e, ok := w.over("free"); !ok || e.err != nil {
				t.Errorf("list of other keys: got %s, want a grant at once", w.outcome("free"))
			}
			w.end(t)
			place := func(name string) int { return slices.Index(w.order, name) }
			if !(place("a1") < place("list") && place("list") < place("a2") && place("list") < place("other")) {
				t.Errorf("order of the grants: got %v, want a1, the list, and then a2 and other", w.order)
			}
		})
	})
}

// The deadline is known in advance, for each charge of the list and with the queues ahead.
func TestWaitAllRefusesAtOnce(t *testing.T) {
	testkit.EachRule(t, 1, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			lim := newLimiter(t, local.New(), l, nil)
			must[quota.Decision](t)(lim.Take(bg, "k", 1))
			w := newWaits(lim)
			list := []quota.Charge{{Key: "free", Cost: 1}, {Key: "k", Cost: 1}}
			w.callAll(within(t, 900*time.Millisecond), "first", list...)
			if e, ok := w.over("first"); !ok || !errors.Is(e.err, context.DeadlineExceeded) || e.took != 0 {
				t.Errorf("first list, deadline after 900 ms: got %s, want context.DeadlineExceeded at once", w.outcome("first"))
			}
			if d := must[quota.Decision](t)(lim.Peek(bg, "free", 1)); !d.Allowed {
				t.Errorf("the other key of a refused list: got %v, want it whole", d)
			}
			for i := range 4 {
				w.call(bg, fmt.Sprint(i), "k", 1)
			}
			w.callAll(within(t, 3*time.Second), "short", list...)
			if e, ok := w.over("short"); !ok || !errors.Is(e.err, context.DeadlineExceeded) || e.took != 0 {
				t.Errorf("list behind four, deadline after 3 s: got %s, want context.DeadlineExceeded at once", w.outcome("short"))
			}
			w.callAll(within(t, 20*time.Second), "long", list...)
			w.end(t)
			if e := w.ended["long"]; e.err != nil {
				t.Errorf("list behind four, deadline after 20 s: got %v, want a grant", e)
			}
		})
	})
}

// A list that has gone gives all of its tokens back, also those that it took ahead, and the next one has them.
func TestCancelledWaitAllGivesBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow, hourly := testkit.Bucket("slow", 10, 100*time.Second), testkit.Bucket("hourly", 10, time.Hour)
		lim := newLimiter(t, local.New(), slow, nil)
		must[quota.Decision](t)(lim.Take(bg, "k", 10))
		list := []quota.Charge{{Key: "k", Cost: 5}, {Limit: hourly, Key: "k", Cost: 5}}
		ctx, cancel := context.WithCancel(bg)
		w := newWaits(lim)
		w.callAll(ctx, "gone", list...)
		w.callAll(bg, "next", quota.Charge{Key: "k", Cost: 1}, quota.Charge{Limit: hourly, Key: "k", Cost: 6})
		if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); d.Remaining != -5 {
			t.Errorf("remaining while the list waits: got %d, want -5: it took ahead", d.Remaining)
		}
		time.Sleep(2 * time.Second)
		cancel()
		w.end(t)
		if e := w.ended["gone"]; !errors.Is(e.err, context.Canceled) || e.at != 2*time.Second {
			t.Errorf("cancelled list: got %v, want context.Canceled at 2s", e)
		}
		if e := w.ended["next"]; e.err != nil || e.at != 10*time.Second {
			t.Errorf("next list: got %v, want a grant at 10s, when its token is gained", e)
		}
		r := must[quota.Result](t)(lim.ChargeAll(bg, quota.Charge{Key: "k", Op: quota.OpPeek}, quota.Charge{Limit: hourly, Key: "k", Op: quota.OpPeek}))
		if r.Decisions[0].Remaining != 0 || r.Decisions[1].Remaining != 4 {
			t.Errorf("remaining: got %v, want 0 and 4: the gone list gave all back", r)
		}
	})
}

// Where tokens come back by this limiter, to any charge of the list, the list is granted at once.
func TestWaitAllWakes(t *testing.T) {
	testkit.EachRule(t, 10, time.Hour, func(t *testing.T, own *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			other := testkit.LimitOf("other", own.Name(), 10, time.Hour)
			lim := newLimiter(t, local.New(), own, nil)
			list := []quota.Charge{{Key: "k", Cost: 10}, {Limit: other, Key: "j", Cost: 10}}
			r := must[quota.Result](t)(lim.ChargeAll(bg, list...))
			w := newWaits(lim)
			w.callAll(bg, "w", list...)
			time.Sleep(time.Millisecond)
			must[quota.Decision](t)(lim.Refund(bg, "k", r.Decisions[0], 10))
			time.Sleep(time.Millisecond)
			must[quota.Result](t)(lim.ChargeAll(bg, list[1].Refund(r.Decisions[1], 10)))
			w.end(t)
			if e := w.ended["w"]; e.err != nil || e.at != 2*time.Millisecond {
				t.Errorf("list: got %v, want a grant at 2ms, when all came back", e)
			}
		})
	})
}

func TestWaitAllResult(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls []quota.Call
		a, b := testkit.Bucket("a", 10, 10*time.Second), testkit.Bucket("b", 10, 20*time.Second)
		lim := newLimiter(t, local.New(), a, watch(&calls))
		list := []quota.Charge{{Key: "k", Cost: 10}, {Limit: b, Key: "k", Cost: 10}, {Key: "peeked", Op: quota.OpPeek, Cost: 1}}
		for i := range 2 {
			start := time.Now()
			r := must[quota.Result](t)(lim.WaitAll(bg, list...))
			if waited := time.Since(start); waited != time.Duration(i)*20*time.Second {
				t.Errorf("list %d: got it after %v, want %v", i, waited, time.Duration(i)*20*time.Second)
			}
			want := list
			for j, d := range r.Decisions {
				if !r.Granted || !d.Allowed || d.Delay != 0 || d.RetryAfter != 0 || d.Charged != []int64{10, 10, 0}[j] {
					t.Errorf("list %d: got %v, want it granted and charged, and no delay any more", i, r)
				}
			}
			c := calls[i]
			want = slices.Clone(list)
			want[0].Limit, want[2].Limit = a, a
			if !c.Granted || !reflect.DeepEqual(c.Charges, want) || !reflect.DeepEqual(c.Decisions, r.Decisions) || c.Decider != r.Decider || c.Waited != time.Since(start) {
				t.Errorf("call that observers see: got %+v, want the list %v and its result", c, want)
			}
			// The decisions are receipts.
			if i == 1 {
				settled := must[quota.Result](t)(lim.ChargeAll(bg, list[1].Settle(r.Decisions[1], 4)))
				if d := settled.Decisions[0]; d.Charged != -6 || d.Remaining != 6 {
					t.Errorf("settle to 4: got %v, want 6 given back, 6 left", d)
				}
			}
		}
		if len(calls) != 3 {
			t.Errorf("calls: got %d, want one for each", len(calls))
		}
	})
}

func TestWaitAllRefusals(t *testing.T) {
	store := &recorder{}
	l := testkit.Bucket("n", 10, time.Second)
	lim := newLimiter(t, store, l, nil)
	for name, c := range map[string]struct {
		list  []quota.Charge
		parts []string
	}{
		"no charge": {nil, []string{"number of charges", "0"}},
		"no key":    {[]quota.Charge{{Cost: 1}}, []string{"key"}},
		"negative":  {[]quota.Charge{{Key: "k", Cost: -1}}, []string{"cost", "-1"}},
		"twice":     {[]quota.Charge{{Key: "k", Cost: 1}, {Limit: testkit.Bucket("n", 5, time.Hour), Key: "k", Cost: 1}}, []string{"second charge", `"k"`}},
		"too much":  {[]quota.Charge{{Key: "a", Cost: 1}, {Key: "b", Cost: 11}}, []string{"cost", "11", "n: 10 burst", "never fits"}},
		"a debit":   {[]quota.Charge{{Key: "a", Cost: 1}, {Key: "b", Cost: 1, Op: quota.OpDebit}}, []string{"operation", "debit", "OpTake or OpPeek"}},
		"ahead":     {[]quota.Charge{{Key: "b", Cost: 1, Op: quota.OpAhead}}, []string{"operation", "take-ahead"}},
		"an id":     {[]quota.Charge{{Key: "a", Cost: 1, ID: "i"}}, []string{"request id", `"i"`, "none"}},
	} {
		_, err := lim.WaitAll(bg, c.list...)
		if err == nil {
			t.Errorf("%s: got nil, want ErrInvalid", name)
			continue
		}
		testkit.WantInvalid(t, err, c.parts...)
	}
	ended, cancel := context.WithCancel(bg)
	cancel()
	if _, err := lim.WaitAll(ended, quota.Charge{Key: "k", Cost: 1}); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitAll with a context that has ended: got %v, want context.Canceled", err)
	}
	if len(store.calls) > 0 {
		t.Errorf("calls of the store: got %v, want none", store.calls)
	}
	if keys, waiting := lim.Queues(); keys != 0 || waiting != 0 {
		t.Errorf("after refusals: got %d queues and %d waiters, want none", keys, waiting)
	}
}

// LimitFor that flips between limits while a list is being put together neither blocks it nor charges a key twice.
func TestWaitAllWhileLimitsChange(t *testing.T) {
	a, b := testkit.Bucket("a", 1000, time.Second), testkit.Bucket("b", 1000, time.Second)
	var n atomic.Int64
	lim := newLimiter(t, local.New(), a, &quota.Options{LimitFor: func(string) *quota.Limit {
		return []*quota.Limit{a, b}[n.Add(1)/3%2]
	}})
	ctx := within(t, 20*time.Second)
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			for range 100 {
				if _, err := lim.WaitAll(ctx, quota.Charge{Key: "k", Cost: 1}, quota.Charge{Limit: b, Key: "k", Cost: 1}); err != nil && !errors.Is(err, quota.ErrInvalid) {
					t.Errorf("WaitAll: got %v, want a grant or ErrInvalid", err)
				}
			}
		})
	}
	all.Wait()
	if keys, waiting := lim.Queues(); keys != 0 || waiting != 0 {
		t.Errorf("after all calls: got %d queues and %d waiters, want none", keys, waiting)
	}
}
