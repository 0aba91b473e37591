package quota_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// beside has some callers of other processes take single tokens all the time, faster than refill, until stop is called.
func beside(store quota.Store, l *quota.Limit, callers int, take func(*quota.Limiter, context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(bg)
	var all sync.WaitGroup
	for i := range callers {
		other := quota.Must(quota.NewLimiter(store, l, nil))
		all.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				take(other, ctx)
				time.Sleep(time.Duration(40+7*i+n%3) * time.Millisecond)
			}
		})
	}
	return func() { cancel(); all.Wait() }
}

// TestStarvation: a large Wait comes in bounded time beside small Takes and small Waits of other processes.
func TestStarvation(t *testing.T) {
	l := testkit.Bucket("n", 100, 2*time.Second) // 50 a second
	for name, take := range map[string]func(*quota.Limiter, context.Context){
		"takes": func(lim *quota.Limiter, ctx context.Context) { lim.Take(ctx, "k", 1) },
		"waits": func(lim *quota.Limiter, ctx context.Context) { lim.Wait(ctx, "k", 1) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store := local.New()
				lim := newLimiter(t, store, l, nil)
				must[quota.Decision](t)(lim.Take(bg, "k", 100))
				stop := beside(store, l, 4, take)
				time.Sleep(time.Second)
				from := time.Now()
				const most = 2*time.Second + 100*time.Millisecond // all of the bucket, and a token for each of the others
				d, err := lim.Wait(within(t, 12*time.Second), "k", 100)
				if took := time.Since(from); err != nil || took > most {
					t.Errorf("Wait for 100, which are gained in 2s: got %v, %v after %v, want a grant within %v", d, err, took, most)
				}
				if d.Charged != 100 || d.Delay != 0 || d.RetryAfter != 0 {
					t.Errorf("decision: got %v, want 100 charged, and no delay any more", d)
				}
				stop()
			})
		})
	}
}

// Callers that wait in several processes get their turn in the order in which the store charged the first of each.
func TestWaitersOfProcessesTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testkit.Bucket("n", 10, 10*time.Second)
		store := local.New()
		must[quota.Decision](t)(newLimiter(t, store, l, nil).Take(bg, "k", 10))
		var all [3]*waits
		for i := range all {
			all[i] = newWaits(newLimiter(t, store, l, nil))
		}
		for n := range 2 {
			for i, w := range all {
				w.call(bg, fmt.Sprint(n), "k", 5)
				time.Sleep(time.Duration(i) * time.Millisecond)
			}
		}
		for i, w := range all {
			w.end(t)
			for n := range 2 {
				e, want := w.ended[fmt.Sprint(n)], time.Duration(5*(1+i+3*n))*time.Second
				if e.err != nil || e.at > want || e.at < want-10*time.Millisecond {
					t.Errorf("waiter %d of process %d: got %v, want a grant at %v", n, i, e, want)
				}
			}
		}
	})
}

// noting is a store that notes the charges it gets.
type noting struct {
	quota.Store
	mu    sync.Mutex
	asked []quota.Charge
}

func (s *noting) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	s.mu.Lock()
	s.asked = append(s.asked, c)
	s.mu.Unlock()
	return s.Store.Charge(ctx, c)
}

func (s *noting) charges() []quota.Charge {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.asked)
}

func (s *noting) ops() (ops []string) {
	for _, c := range s.charges() {
		ops = append(ops, c.Op.String())
	}
	return ops
}

func TestOnlyTheFirstWaiterTakesAhead(t *testing.T) {
	testkit.EachRule(t, 1, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			s := &noting{Store: local.New()}
			w := newWaits(newLimiter(t, s, l, nil))
			for i := range 3 {
				w.call(bg, fmt.Sprint(i), "k", 1)
			}
			time.Sleep(10 * time.Millisecond)
			want := "[take take]" // of the one that got it, and of the first waiter
			if l.Name() == "tb1" {
				want = "[take take take-ahead]"
			}
			if got := fmt.Sprint(s.ops()); got != want {
				t.Errorf("calls of the store for a granted call and two waiters: got %v, want %v", got, want)
			}
			w.end(t)
		})
	})
}

func TestADeadlineBoundsTakingAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &noting{Store: local.New()}
		lim := newLimiter(t, s, testkit.Bucket("n", 10, 10*time.Second), nil)
		must[quota.Decision](t)(lim.Take(bg, "k", 10))
		must[quota.Decision](t)(lim.Wait(within(t, 5*time.Second), "k", 3))
		must[quota.Decision](t)(lim.Wait(bg, "k", 3))
		var got []time.Duration
		for _, c := range s.charges() {
			if c.Op == quota.OpAhead {
				got = append(got, c.Within)
			}
		}
		if want := []time.Duration{5 * time.Second, quota.Never}; fmt.Sprint(got) != fmt.Sprint(want) {
			t.Errorf("Within of the takes ahead: got %v, want %v", got, want)
		}
	})
}

// What was taken ahead comes back when the context ends, and the next caller has it.
func TestCancelledWaitGivesBackWhatItTookAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, 10*time.Second), nil)
		must[quota.Decision](t)(lim.Take(bg, "k", 10))
		ctx, cancel := context.WithCancel(bg)
		w := newWaits(lim)
		w.call(ctx, "first", "k", 10)
		w.call(bg, "second", "k", 2)
		if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); d.Remaining != -10 || d.RetryAfter != 10*time.Second {
			t.Errorf("peek beside a waiter: got %v, want -10 left for 10s", d)
		}
		time.Sleep(time.Second)
		cancel()
		w.end(t)
		if e := w.ended["first"]; !errors.Is(e.err, context.Canceled) || e.at != time.Second {
			t.Errorf("first waiter: got %v, want context.Canceled at 1s", e)
		}
		if e := w.ended["second"]; e.err != nil || e.at != 2*time.Second {
			t.Errorf("second waiter: got %v, want a grant at 2s", e)
		}
		if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); d.Remaining != 0 {
			t.Errorf("remaining: got %d, want 0: the first gave all back", d.Remaining)
		}
	})
}

// slowAhead is a store that answers a take ahead late.
type slowAhead struct {
	quota.Store
	takes time.Duration
}

func (s *slowAhead) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(context.WithoutCancel(ctx), c)
	if c.Op == quota.OpAhead {
		time.Sleep(s.takes)
	}
	return d, err
}

// A take ahead whose answer comes too late for the deadline is given back at once.
func TestALateTakeAheadIsGivenBack(t *testing.T) {
	for _, takes := range []time.Duration{2 * time.Second, 10 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			s := &slowAhead{local.New(), takes}
			lim := newLimiter(t, s, testkit.Bucket("n", 10, 10*time.Second), nil)
			must[quota.Decision](t)(lim.Take(bg, "k", 10))
			from := time.Now()
			_, err := lim.Wait(within(t, 4*time.Second), "k", 3)
			if took := time.Since(from); !errors.Is(err, context.DeadlineExceeded) || took != takes {
				t.Errorf("answer after %v: got %v after %v, want context.DeadlineExceeded then", takes, err, took)
			}
			if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); d.Remaining != int64(takes/time.Second) {
				t.Errorf("remaining: got %d, want what was gained, %d", d.Remaining, takes/time.Second)
			}
		})
	}
}

// A waiter that took ahead and cannot see the store any more goes at its time.
func TestWaitAheadGoesWithoutTheStore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWaits(newLimiter(t, &noPeek{Store: local.New(), nth: 1}, testkit.Bucket("n", 10, 10*time.Second), nil))
		w.call(bg, "taken", "k", 10)
		w.call(bg, "w", "k", 5)
		w.end(t)
		if e := w.ended["w"]; e.err != nil || e.at != 5*time.Second {
			t.Errorf("waiter: got %v, want a grant at 5s", e)
		}
	})
}

// Where the debt is at its floor, the first waiter asks until there is room.
func TestWaitWithoutRoomForDebt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testkit.Bucket("n", 10, 10*365*24*time.Hour) // fills in ten years, the longest there is: no debt
		lim := newLimiter(t, local.New(), l, nil)
		must[quota.Decision](t)(lim.Take(bg, "k", 10))
		w := newWaits(lim)
		ctx, cancel := context.WithCancel(bg)
		w.call(ctx, "w", "k", 5)
		time.Sleep(time.Hour)
		if d := must[quota.Decision](t)(lim.Peek(bg, "k", 0)); l.Spec().Debt != 0 || d.Remaining != 0 {
			t.Errorf("a bucket without room for debt (%d): got %v, want nothing charged ahead", l.Spec().Debt, d)
		}
		cancel()
		w.end(t)
	})
}

func TestTakeAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 10, 10*time.Second), nil)
		for _, c := range []struct {
			n      int64
			within time.Duration
			want   quota.Decision
		}{
			{11, time.Hour, quota.Decision{Remaining: 10, RetryAfter: quota.Never}},
			{8, 0, quota.Decision{Allowed: true, Charged: 8, Remaining: 2}},
			{5, 3*time.Second - time.Microsecond, quota.Decision{Remaining: 2, RetryAfter: time.Microsecond}},
			{5, 3*time.Second - 1, quota.Decision{Remaining: 2, RetryAfter: time.Microsecond}},
			{5, 3 * time.Second, quota.Decision{Allowed: true, Charged: 5, Remaining: -3, Delay: 3 * time.Second}},
			{0, 2 * time.Second, quota.Decision{Remaining: -3, RetryAfter: time.Second}},
			{0, quota.Never, quota.Decision{Allowed: true, Remaining: -3, Delay: 3 * time.Second}},
			{10, time.Minute, quota.Decision{Allowed: true, Charged: 10, Remaining: -13, Delay: 13 * time.Second}},
		} {
			got := must[quota.Decision](t)(lim.TakeAhead(bg, "k", c.n, c.within)).Bare()
			c.want.Capacity, c.want.At, c.want.ResetAfter = 10, got.At, time.Duration(10-c.want.Remaining)*time.Second
			if got != c.want {
				t.Errorf("%d within %v: got %v, want %v", c.n, c.within, got, c.want)
			}
		}
		d := must[quota.Decision](t)(lim.TakeAhead(bg, "k", 4, time.Minute))
		if want := "charged 4, -17 of 10 left, usable after 17s, whole after 27s"; !strings.Contains(d.String(), want) {
			t.Errorf("String: got %q, want %q in it", d.String(), want)
		}
		if r := must[quota.Decision](t)(lim.Refund(bg, "k", d, 4)); r.Charged != -4 || r.Remaining != -13 {
			t.Errorf("refund of the receipt: got %v, want 4 given back, -13 left", r)
		}
	})
}

func TestTakeAheadRefusals(t *testing.T) {
	testkit.EachRule(t, 10, time.Second, func(t *testing.T, l *quota.Limit) {
		r := &recorder{}
		lim := newLimiter(t, r, l, nil)
		if l.Name() != "tb1" {
			_, err := lim.TakeAhead(bg, "k", 1, time.Second)
			testkit.WantInvalid(t, err, "operation", "take-ahead", l.Name(), "OpTake")
			_, err = lim.ChargeAll(bg, quota.Charge{Key: "k", Op: quota.OpAhead, Cost: 1})
			testkit.WantInvalid(t, err, "operation", "take-ahead", l.Name(), "OpTake")
		}
		_, err := lim.TakeAhead(bg, "k", 1, -1)
		testkit.WantInvalid(t, err, "Within", "-1ns")
		_, err = lim.TakeAhead(bg, "k", -1, 0)
		testkit.WantInvalid(t, err, "cost", "-1")
		_, err = lim.ChargeAll(bg, quota.Charge{Key: "k", Cost: 1, Within: time.Second})
		testkit.WantInvalid(t, err, "Within of a take", "1s", "OpAhead")
		if len(r.calls) > 0 {
			t.Errorf("calls of the store: got %v, want none", r.calls)
		}
	})
	// The limit that LimitFor chose counts.
	window := testkit.LimitOf("w", "fw1", 10, time.Second)
	lim := newLimiter(t, &recorder{}, testkit.Bucket("n", 10, time.Second), &quota.Options{LimitFor: func(string) *quota.Limit { return window }})
	_, err := lim.TakeAhead(bg, "k", 1, time.Second)
	testkit.WantInvalid(t, err, "operation", "take-ahead", "fw1")
}
