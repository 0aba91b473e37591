package quota_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// waits runs calls of Wait in a bubble and notes how each ended.
type waits struct {
	lim   *quota.Limiter
	start time.Time
	wg    sync.WaitGroup
	mu    sync.Mutex
	order []string // names of the granted, in the order of their grants
	ended map[string]ended
}

type ended struct {
	err  error
	at   time.Duration // since the start
	took time.Duration
}

func (e ended) String() string {
	if e.err != nil {
		return fmt.Sprintf("%q at %v, after a wait of %v", e.err, e.at, e.took)
	}
	return fmt.Sprintf("a grant at %v, after a wait of %v", e.at, e.took)
}

func newWaits(lim *quota.Limiter) *waits {
	return &waits{lim: lim, start: time.Now(), ended: map[string]ended{}}
}

// call starts a Wait and returns once the call is in its queue or over.
func (w *waits) call(ctx context.Context, name, key string, n int64) {
	w.wg.Go(func() { w.wait(ctx, name, key, n) })
	synctest.Wait()
}

func (w *waits) wait(ctx context.Context, name, key string, n int64) {
	from := time.Now()
	_, err := w.lim.Wait(ctx, key, n)
	w.note(name, from, err)
}

// note notes how a call that began then ended.
func (w *waits) note(name string, from time.Time, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err == nil {
		w.order = append(w.order, name)
	}
	w.ended[name] = ended{err, time.Since(w.start), time.Since(from)}
}

// over reports how a call ended, if it has.
func (w *waits) over(name string) (ended, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	e, ok := w.ended[name]
	return e, ok
}

// outcome describes a call for a failure's text.
func (w *waits) outcome(name string) string {
	if e, ok := w.over(name); ok {
		return e.String()
	}
	return "a call that still waits"
}

// end waits for all calls and fails if the limiter still has a queue or counts a waiter.
func (w *waits) end(t *testing.T) {
	t.Helper()
	w.wg.Wait()
	if keys, waiting := w.lim.Queues(); keys != 0 || waiting != 0 {
		t.Errorf("after all calls: got %d queues and %d waiters, want none", keys, waiting)
	}
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(bg, d)
	t.Cleanup(cancel)
	return ctx
}

// eachRuleWaits runs a test in a bubble that begins at the start of a window, with a limiter on an exhausted key "k".
func eachRuleWaits(t *testing.T, tokens int64, test func(t *testing.T, w *waits)) {
	testkit.EachRule(t, tokens, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			lim := newLimiter(t, local.New(), l, nil)
			must[quota.Decision](t)(lim.Take(bg, "k", tokens))
			test(t, newWaits(lim))
		})
	})
}

func TestWaitersAreServedInOrder(t *testing.T) {
	eachRuleWaits(t, 1, func(t *testing.T, w *waits) {
		var want []string
		for i := range 6 {
			want = append(want, fmt.Sprint(i))
			w.call(bg, fmt.Sprint(i), "k", 1)
		}
		const apart = time.Second
		w.call(bg, "other", "other", 1) // is not held up
		if e, ok := w.over("other"); !ok || e.err != nil || e.at != 0 {
			t.Errorf("Wait on another key: got %s, want a grant at once", w.outcome("other"))
		}
		w.end(t)
		if got := w.order[1:]; !slices.Equal(got, want) {
			t.Errorf("order of the grants: got %v, want %v", got, want)
		}
		for i := 1; i < len(want); i++ {
			if a, b := w.ended[want[i-1]].at, w.ended[want[i]].at; b-a != apart {
				t.Errorf("grants of waiters %d and %d at %v and %v: got %v between them, want %v", i-1, i, a, b, b-a, apart)
			}
		}
	})
}

func TestWaitersOfDifferentCostsKeepTheirOrder(t *testing.T) {
	// A small request behind a large one would fit sooner, and still comes later.
	eachRuleWaits(t, 10, func(t *testing.T, w *waits) {
		w.call(bg, "large", "k", 10)
		w.call(bg, "small", "k", 1)
		w.end(t)
		if want := []string{"large", "small"}; !slices.Equal(w.order, want) {
			t.Errorf("order of the grants: got %v, want %v", w.order, want)
		}
	})
}

func TestWaitRefusesAtOnce(t *testing.T) {
	eachRuleWaits(t, 1, func(t *testing.T, w *waits) {
		for i := range 5 {
			w.call(bg, fmt.Sprint(i), "k", 1)
		}
		w.call(within(t, 3*time.Second), "sixth", "k", 1)
		if e, ok := w.over("sixth"); !ok || !errors.Is(e.err, context.DeadlineExceeded) || e.took != 0 {
			t.Errorf("sixth waiter, deadline after 3 s: got %s, want context.DeadlineExceeded at once", w.outcome("sixth"))
		}
		w.call(within(t, 20*time.Second), "seventh", "k", 1)
		if e, ok := w.over("seventh"); ok {
			t.Errorf("waiter behind the fifth, deadline after 20 s: got %v, want a call that still waits", e)
		}
		w.end(t)
		if len(w.order) != 6 {
			t.Errorf("granted waiters: got %v, want 6", w.order)
		}
	})
}

func TestFirstWaiterIsRefusedAtOnce(t *testing.T) {
	eachRuleWaits(t, 4, func(t *testing.T, w *waits) {
		w.call(within(t, 100*time.Millisecond), "first", "k", 4)
		if e, ok := w.over("first"); !ok || !errors.Is(e.err, context.DeadlineExceeded) || e.took != 0 {
			t.Errorf("first waiter, deadline after 100 ms: got %s, want context.DeadlineExceeded at once", w.outcome("first"))
		}
		w.end(t)
	})
}

// arrival is one waiter of a history of one key, for TestWaitForecast.
type arrival struct {
	at       time.Duration
	cost     int64
	deadline time.Duration // after the arrival; 0 is none
}

func (a arrival) String() string {
	text := fmt.Sprintf("{cost %d at %v", a.cost, a.at)
	if a.deadline > 0 {
		text += fmt.Sprintf(", deadline after %v", a.deadline)
	}
	return text + "}"
}

// play runs a history in a bubble.
func play(t *testing.T, l *quota.Limit, arrivals []arrival) (w *waits) {
	synctest.Test(t, func(t *testing.T) {
		w = newWaits(newLimiter(t, local.New(), l, nil))
		for i, a := range arrivals {
			w.wg.Go(func() {
				time.Sleep(a.at)
				ctx := bg
				if a.deadline > 0 {
					ctx = within(t, a.deadline)
				}
				w.wait(ctx, fmt.Sprint(i), "k", a.cost)
			})
		}
		w.end(t)
	})
	return w
}

// TestWaitForecast plays random histories. A waiter that was refused is played again without its deadline: if its quota
// then comes in time, the refusal was wrong. Where the forecast is exact, no waiter waits only to be refused.
func TestWaitForecast(t *testing.T) {
	for _, tokens := range []int64{1, 3, 10} {
		testkit.EachRule(t, tokens, time.Second, func(t *testing.T, l *quota.Limit) {
			r := random(t)
			exact := l.Name() == "tb1" || tokens == 1 && (l.Name() == "fw1" || l.Name() == "ff1") // costs need not fill a window
			refused, judged := 0, 0
			for range sized(12, 200) {
				arrivals := make([]arrival, 12)
				at := time.Duration(0)
				for i := range arrivals {
					at += time.Duration(1+r.IntN(300_000)) * time.Microsecond // no arrival is at the instant of a grant
					arrivals[i] = arrival{at: at, cost: 1 + r.Int64N(tokens)}
					if r.IntN(2) == 0 {
						arrivals[i].deadline = time.Duration(r.IntN(4000))*time.Millisecond + 501*time.Microsecond
					}
				}
				w := play(t, l, arrivals)
				for i, a := range arrivals {
					e := w.ended[fmt.Sprint(i)]
					if e.err == nil {
						continue
					}
					if !errors.Is(e.err, context.DeadlineExceeded) {
						t.Fatalf("waiter %d: got %v, want a grant or context.DeadlineExceeded; arrivals: %v", i, e, arrivals)
					}
					refused++
					if e.took > 0 && exact {
						t.Fatalf("waiter %d: got %v, want the refusal at once; arrivals: %v", i, e, arrivals)
					}
					if slices.ContainsFunc(arrivals[:i], func(b arrival) bool {
						e := w.ended[fmt.Sprint(slices.Index(arrivals, b))]
						return e.err != nil && e.at > a.at
					}) {
						continue // a waiter ahead gave up later; the forecast had to count it in
					}
					judged++
					patient := slices.Clone(arrivals)
					patient[i].deadline = 0
					if g := play(t, l, patient).ended[fmt.Sprint(i)]; g.took <= a.deadline {
						t.Fatalf("waiter %d: got %v, want a grant, as without its deadline, after %v; arrivals: %v", i, e, g.took, arrivals)
					}
				}
			}
			if judged < refused/4 || refused == 0 {
				t.Errorf("refusals that could be judged: got %d of %d, want a quarter at least, of 1 or more", judged, refused)
			}
		})
	}
}

// lateReply is a store whose first grant takes effect at once and is reported later.
type lateReply struct {
	quota.Store
	once  sync.Once
	takes time.Duration
}

func (s *lateReply) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	d, err = s.Store.Charge(ctx, c)
	if c.Op == quota.OpTake && d.Allowed {
		s.once.Do(func() { time.Sleep(s.takes) })
	}
	return d, err
}

func TestForecastCountsAGrantUnderWayOnce(t *testing.T) {
	// The first waiter's token is gone from the bucket while its reply is under way: it is no longer ahead in the queue.
	testkit.EachRule(t, 1, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			w := newWaits(newLimiter(t, &lateReply{Store: local.New(), takes: 500 * time.Millisecond}, l, nil))
			w.call(bg, "first", "k", 1)
			time.Sleep(100 * time.Millisecond)
			const deadline = 1700 * time.Millisecond
			w.call(within(t, deadline), "second", "k", 1)
			w.end(t)
			if e := w.ended["second"]; e.err != nil || e.at > deadline {
				t.Errorf("second waiter: got %v, want a grant by %v", e, deadline)
			}
		})
	})
}

func TestForecastOfAWindowThatForgets(t *testing.T) {
	// At 0.3 s 8 of 10 count: 6 of the window before and 2 of this one. The first waiter's 3 fit as soon as more than 0.4 s have
	// passed. The second's 6 fit at once in the next window, where 4 of the 5 of this window count; had all 9 been taken
	// at once, it would have been later.
	synctest.Test(t, func(t *testing.T) {
		lim := newLimiter(t, local.New(), testkit.LimitOf("n", "sw1", 10, time.Second), nil)
		must[quota.Decision](t)(lim.Take(bg, "k", 10))
		time.Sleep(time.Second)
		must[quota.Decision](t)(lim.Debit(bg, "k", 2))
		time.Sleep(300 * time.Millisecond)
		w := newWaits(lim)
		w.call(bg, "first", "k", 3)
		w.call(within(t, 1050*time.Millisecond), "second", "k", 6)
		w.end(t)
		if e := w.ended["first"]; e.err != nil || e.at != 100*time.Millisecond {
			t.Errorf("first waiter: got %v, want a grant at 100ms", e)
		}
		if e := w.ended["second"]; e.err != nil || e.at != 700*time.Millisecond {
			t.Errorf("second waiter: got %v, want a grant at 700ms", e)
		}
	})
}

func TestWaitWithoutAForecaster(t *testing.T) {
	// The queue ahead cannot be counted in; the call's own cost can.
	synctest.Test(t, func(t *testing.T) {
		w := newWaits(newLimiter(t, local.New(), quota.NewLimit("n", unforeseen{testkit.LimitOf("n", "fw1", 1, time.Second).Algorithm()}), nil))
		w.call(bg, "taken", "k", 1)
		w.call(bg, "first", "k", 1)
		w.call(within(t, 500*time.Millisecond), "soon", "k", 1)
		if e, ok := w.over("soon"); !ok || !errors.Is(e.err, context.DeadlineExceeded) {
			t.Errorf("waiter with a deadline after 500 ms: got %s, want context.DeadlineExceeded", w.outcome("soon"))
		}
		w.call(within(t, 1500*time.Millisecond), "later", "k", 1)
		w.end(t)
		if e := w.ended["later"]; !errors.Is(e.err, context.DeadlineExceeded) || e.at != time.Second { // when it became the first
			t.Errorf("waiter with a deadline after 1.5 s: got %v, want context.DeadlineExceeded at 1s", e)
		}
	})
}

// unforeseen hides a rule's Forecast.
type unforeseen struct{ quota.Algorithm }

func TestCancelledWaitLeaves(t *testing.T) {
	eachRuleWaits(t, 1, func(t *testing.T, w *waits) {
		first, stopFirst := context.WithCancel(bg)
		second, stopSecond := context.WithCancel(bg)
		w.call(first, "first", "k", 1)
		w.call(second, "second", "k", 1)
		w.call(bg, "third", "k", 1)
		stopSecond()
		synctest.Wait()
		stopFirst()
		synctest.Wait()
		for _, name := range []string{"first", "second"} {
			if e, ok := w.over(name); !ok || !errors.Is(e.err, context.Canceled) || e.at != 0 {
				t.Errorf("%s waiter, cancelled: got %s, want context.Canceled at 0s", name, w.outcome(name))
			}
		}
		w.end(t)
		if e := w.ended["third"]; e.err != nil || e.at > 2*time.Second {
			t.Errorf("third waiter: got %v, want a grant by 2s", e)
		}
	})
}

// tooLate is a store that grants after the caller's context has ended.
type tooLate struct {
	quota.Store
	end func()
}

func (s tooLate) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if c.Op != quota.OpTake && c.Op != quota.OpHold {
		return s.Store.Charge(ctx, c)
	}
	d, err := s.Store.Charge(context.WithoutCancel(ctx), c)
	if d.Allowed {
		s.end()
	}
	return d, err
}

func TestCancelledWaitGivesBack(t *testing.T) {
	testkit.EachRule(t, 5, time.Hour, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			store := local.New()
			ctx, cancel := context.WithCancel(bg)
			lim := newLimiter(t, tooLate{store, cancel}, l, nil)
			d, err := lim.Wait(ctx, "k", 3)
			if !errors.Is(err, context.Canceled) || d.Allowed {
				t.Errorf("Wait cancelled while the store grants: got %v, %v, want no grant and context.Canceled", d, err)
			}
			lim = newLimiter(t, tooLate{store, func() { time.Sleep(time.Minute) }}, l, nil)
			if d, err = lim.Wait(within(t, time.Second), "k", 3); !errors.Is(err, context.DeadlineExceeded) || d.Allowed {
				t.Errorf("Wait whose grant comes after the deadline: got %v, %v, want no grant and context.DeadlineExceeded", d, err)
			}
			if d := must[quota.Decision](t)(lim.Peek(bg, "k", 5)); d.Remaining != 5 {
				t.Errorf("remaining after both: got %d, want 5, as late grants are given back", d.Remaining)
			}
		})
	})
}

func TestWaitersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := newSlow(local.New(), 0)
		lim := newLimiter(t, store, testkit.Bucket("n", 1, time.Second), &quota.Options{MaxWaiters: 3})
		for _, key := range []string{"a", "b", "c"} {
			must[quota.Decision](t)(lim.Take(bg, key, 1))
		}
		must[quota.Decision](t)(lim.Debit(bg, "b", 5)) // a waiter of b waits for long
		w := newWaits(lim)
		overloaded := func(name, key string) {
			t.Helper()
			w.call(bg, name, key, 1)
			if e, ok := w.over(name); !ok || !errors.Is(e.err, quota.ErrOverloaded) || e.took > 0 {
				t.Errorf("%s: got %s, want ErrOverloaded at once", name, w.outcome(name))
			}
		}
		w.call(bg, "a1", "a", 1)
		w.call(bg, "a2", "a", 1)
		w.call(bg, "b1", "b", 1)
		overloaded("a3", "a")
		if n := lim.Waiting(); n != 3 {
			t.Errorf("waiting calls: got %d, want 3", n)
		}
		overloaded("b2", "b")
		overloaded("c1", "c")
		w.call(bg, "free", "free", 1) // need not wait
		if e, ok := w.over("free"); !ok || e.err != nil {
			t.Errorf("Wait on a free key: got %s, want a grant at once", w.outcome("free"))
		}
		// While a2, promoted, asks, another call takes the place that a1 left, and there is none for one more: a2 keeps its own.
		time.Sleep(990 * time.Millisecond)
		store.takes.Store(int64(200 * time.Millisecond))
		time.Sleep(250 * time.Millisecond)
		if e, ok := w.over("a1"); !ok || e.err != nil {
			t.Fatalf("a1 at 1.24s: got %s, want a grant", w.outcome("a1"))
		}
		w.call(bg, "b3", "b", 1)
		overloaded("b4", "b")
		w.end(t)
		if n := lim.Waiting(); n != 0 {
			t.Errorf("waiting calls at the end: got %d, want 0", n)
		}
		for _, name := range []string{"a2", "b1", "b3"} {
			if e := w.ended[name]; e.err != nil {
				t.Errorf("%s: got %v, want a grant", name, e)
			}
		}
	})
}

func TestWaitRefusesWhatNeverFits(t *testing.T) {
	r := &recorder{}
	lim := newLimiter(t, r, testkit.Bucket("n", 5, time.Second), nil)
	_, err := lim.Wait(bg, "k", 6)
	testkit.WantInvalid(t, err, "cost", "6", "capacity", "5")
	ctx, cancel := context.WithCancel(bg)
	cancel()
	if _, err = lim.Wait(ctx, "k", 1); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait with a cancelled context: got %v, want context.Canceled", err)
	}
	if len(r.calls) > 0 {
		t.Errorf("calls of the store: got %v, want none", r.calls)
	}
	// A quota that is used up for good does not come back, so Wait refuses at once.
	synctest.Test(t, func(t *testing.T) {
		lim := newLimiter(t, local.New(), quota.NewLimit("n", testkit.Counter{Capacity: 2}), nil)
		must[quota.Decision](t)(lim.Wait(bg, "k", 2))
		_, err := lim.Wait(bg, "k", 1)
		testkit.WantInvalid(t, err, "cost", "1")
	})
}

// denier is a store that denies without saying for how long.
type denier struct {
	quota.Store
	calls int
	until time.Time
}

func (s *denier) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.calls++; time.Now().Before(s.until) {
		return quota.Decision{Capacity: 1, Source: quota.FromClosed}, nil
	}
	return s.Store.Charge(ctx, c)
}

func TestWaitDoesNotSpin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &denier{Store: local.New(), until: time.Now().Add(time.Second)}
		must[quota.Decision](t)(newLimiter(t, s, testkit.Bucket("n", 5, time.Second), nil).Wait(bg, "k", 1))
		if s.calls > 2000 {
			t.Errorf("calls of the store in a second of denials: got %d, want 2000 at most", s.calls)
		}
	})
}

func TestWaitForNothing(t *testing.T) {
	// A cost of 0 waits until the key is out of debt.
	synctest.Test(t, func(t *testing.T) {
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 5, 5*time.Second), nil)
		must[quota.Decision](t)(lim.Debit(bg, "k", 7))
		w := newWaits(lim)
		w.call(bg, "w", "k", 0)
		w.end(t)
		if e := w.ended["w"]; e.err != nil || e.at != 2*time.Second {
			t.Errorf("Wait for 0 on a key that is 2 tokens in debt: got %v, want a grant at 2s", e)
		}
	})
}

func TestWaitUnderLoad(t *testing.T) {
	// Many waiters on few keys, and some give up: each call ends with a grant or its context's error, and no queue is left.
	testkit.EachRule(t, 5, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			r := random(t)
			w := newWaits(newLimiter(t, local.New(), l, nil))
			for i := range sized(300, 1000) {
				key, cost, ctx := fmt.Sprint("k", i%3), 1+r.Int64N(5), bg
				if r.IntN(3) == 0 {
					ctx = within(t, time.Duration(r.Int64N(int64(time.Minute))))
				}
				if r.IntN(4) == 0 {
					c, cancel := context.WithCancel(ctx)
					ctx = c
					time.AfterFunc(time.Duration(r.Int64N(int64(time.Minute))), cancel)
				}
				w.wg.Go(func() { w.wait(ctx, fmt.Sprint(i), key, cost) })
			}
			w.end(t)
			for name, e := range w.ended {
				if e.err != nil && !errors.Is(e.err, context.DeadlineExceeded) && !errors.Is(e.err, context.Canceled) {
					t.Errorf("waiter %s: got %v, want a grant or its context's error", name, e)
				}
			}
		})
	})
}

// noPeek is a store that fails every peek from the nth on.
type noPeek struct {
	quota.Store
	nth, peeks int
}

func (s *noPeek) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if c.Op == quota.OpPeek {
		if s.peeks++; s.peeks >= s.nth {
			return quota.Decision{}, quota.ErrUnavailable
		}
	}
	return s.Store.Charge(ctx, c)
}

// A caller whose place in the queue cannot be forecast gets the store's error at once.
func TestForecastPassesErrorsOn(t *testing.T) {
	for nth := 1; nth <= 2; nth++ {
		synctest.Test(t, func(t *testing.T) {
			// A window without its Forecaster: the second peek asks for the caller's own tokens.
			limit := quota.NewLimit("n", unforeseen{testkit.LimitOf("n", "fw1", 10, 10*time.Second).Algorithm()})
			w := newWaits(newLimiter(t, &noPeek{Store: local.New(), nth: nth}, limit, nil))
			w.call(bg, "taken", "k", 10)
			w.call(bg, "first", "k", 5)
			w.call(within(t, 7*time.Second), "second", "k", 5)
			if e, ok := w.over("second"); !ok || !errors.Is(e.err, quota.ErrUnavailable) || e.took != 0 {
				t.Errorf("peek %d fails: got %s, want ErrUnavailable at once", nth, w.outcome("second"))
			}
			w.end(t)
		})
	}
}

// The tokens of all waiting callers are counted, and a caller with more than can be counted is refused at once.
func TestWaitBehindVeryMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const most, fit = 1<<52 - 1, 1 << 11
		l := quota.NewLimit("bytes", algorithm.TokenBucket(most, most/1000, time.Second))
		lim := newLimiter(t, local.New(), l, &quota.Options{MaxWaiters: 2 * fit})
		must[quota.Decision](t)(lim.Take(bg, "k", most))
		ctx, cancel := context.WithCancel(bg)
		w := newWaits(lim)
		for range fit - 1 {
			w.wg.Go(func() { lim.Wait(ctx, "k", most) })
		}
		synctest.Wait()
		late, stop := context.WithTimeout(ctx, 24*time.Hour) // all of them take 24 days
		defer stop()
		w.call(late, "late", "k", most)
		if e, ok := w.over("late"); !ok || !errors.Is(e.err, context.DeadlineExceeded) || e.took != 0 {
			t.Errorf("caller with a deadline: got %s, want the deadline's error at once", w.outcome("late"))
		}
		w.call(ctx, "last", "k", most)
		if e, ok := w.over("last"); ok {
			t.Errorf("last caller that can be counted: got %v, want it to wait", e)
		}
		w.call(ctx, "one more", "k", most)
		if e, ok := w.over("one more"); !ok || !errors.Is(e.err, quota.ErrOverloaded) {
			t.Errorf("caller beyond what can be counted: got %s, want ErrOverloaded at once", w.outcome("one more"))
		}
		cancel()
		w.end(t)
	})
}
