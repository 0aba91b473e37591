package quota_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

func TestLimiterOperations(t *testing.T) {
	c := testkit.NewClock()
	lim := newLimiter(t, quota.Must(local.NewWithOptions(local.Options{Clock: c.Time})), testkit.Bucket("n", 10, 10*time.Second), nil)
	ok := must[quota.Decision](t)
	want := func(d quota.Decision, allowed bool, remaining, charged int64, retry, reset time.Duration) {
		t.Helper()
		w := quota.Decision{Allowed: allowed, Capacity: 10, Remaining: remaining, Charged: charged, RetryAfter: retry, ResetAfter: reset, At: c.Micros()}
		if d.Bare() != w {
			t.Fatalf("decision: got %v, want %v", d, w)
		}
	}
	const s = time.Second
	want(ok(lim.Peek(bg, "k", 10)), true, 10, 0, 0, 0)
	receipt := ok(lim.Take(bg, "k", 7))
	want(receipt, true, 3, 7, 0, 7*s)
	want(ok(lim.Take(bg, "k", 4)), false, 3, 0, s, 7*s)
	want(ok(lim.Peek(bg, "k", 4)), false, 3, 0, s, 7*s)
	want(ok(lim.Take(bg, "k", 11)), false, 3, 0, quota.Never, 7*s)
	want(ok(lim.Take(bg, "k", 0)), true, 3, 0, 0, 7*s)
	want(ok(lim.Take(bg, "other", 1)), true, 9, 1, 0, s)
	want(ok(lim.Refund(bg, "k", receipt, 2)), true, 5, -2, 0, 5*s)
	want(ok(lim.Debit(bg, "k", 8)), true, -3, 8, 0, 13*s)
	want(ok(lim.Take(bg, "k", 0)), false, -3, 0, 3*s, 13*s)
	c.Add(4 * s)
	want(ok(lim.Take(bg, "k", 1)), true, 0, 1, 0, 10*s)
	if err := lim.Reset(bg, "k"); err != nil {
		t.Fatal(err)
	}
	receipt = ok(lim.Take(bg, "k", 5))
	want(receipt, true, 5, 5, 0, 5*s)
	want(ok(lim.Settle(bg, "k", receipt, 3)), true, 7, -2, 0, 3*s) // less than estimated
	receipt = ok(lim.Take(bg, "k", 2))
	want(ok(lim.Settle(bg, "k", receipt, 6)), true, 1, 4, 0, 9*s) // more
	receipt = ok(lim.Take(bg, "k", 1))
	want(ok(lim.Settle(bg, "k", receipt, 1)), true, 0, 0, 0, 10*s) // exactly
	want(ok(lim.Settle(bg, "k", ok(lim.Debit(bg, "k", 1)), 100)), true, -100, 99, 0, 110*s)
}

func TestLimiterRefuses(t *testing.T) {
	r := &recorder{}
	lim := newLimiter(t, r, testkit.Bucket("n", 10, time.Second), &quota.Options{LimitFor: func(key string) *quota.Limit {
		t.Errorf("LimitFor: got a call with %q, want none for a refused charge", key)
		return nil
	}})
	receipt := quota.Decision{Allowed: true, Charged: 5, At: 1}
	calls := map[string]func(key string, n int64) error{
		"take":   func(key string, n int64) error { _, err := lim.Take(bg, key, n); return err },
		"peek":   func(key string, n int64) error { _, err := lim.Peek(bg, key, n); return err },
		"debit":  func(key string, n int64) error { _, err := lim.Debit(bg, key, n); return err },
		"wait":   func(key string, n int64) error { _, err := lim.Wait(bg, key, n); return err },
		"refund": func(key string, n int64) error { _, err := lim.Refund(bg, key, receipt, n); return err },
		"settle": func(key string, n int64) error { _, err := lim.Settle(bg, key, receipt, n); return err },
		"reset": func(key string, n int64) error {
			if n < 0 {
				key = ""
			}
			return lim.Reset(bg, key)
		},
	}
	for name, call := range calls {
		testkit.WantInvalid(t, call("", 1), "key", `""`, "1 to 512")
		testkit.WantInvalid(t, call("a//b", 1), "key", "a//b")
		if err := call("k", -1); name != "reset" {
			testkit.WantInvalid(t, err, "-1", "0 or more")
		}
	}
	_, err := lim.Refund(bg, "k", receipt, 6)
	testkit.WantInvalid(t, err, "refund", "6", "Decision.Charged")
	_, err = lim.Refund(bg, "k", quota.Decision{RetryAfter: 1}, 1)
	testkit.WantInvalid(t, err, "receipt", "denial")
	_, err = lim.Settle(bg, "k", quota.Decision{RetryAfter: 1}, 1)
	testkit.WantInvalid(t, err, "receipt", "denial")
	if len(r.calls) > 0 {
		t.Errorf("calls of the store: got %v, want none", r.calls)
	}
}

func TestNewLimiter(t *testing.T) {
	l, r := testkit.Bucket("n", 10, time.Second), &recorder{}
	_, err := quota.NewLimiter(nil, l, nil)
	testkit.WantInvalid(t, err, "store", "nil", "local.New")
	_, err = quota.NewLimiter(r, nil, nil)
	testkit.WantInvalid(t, err, "limit", "nil", "NewLimit")
	_, err = quota.NewLimiter(r, new(quota.Limit), nil)
	testkit.WantInvalid(t, err, "limit", "NewLimit")
	_, err = quota.NewLimiter(r, l, &quota.Options{MaxWaiters: -1})
	testkit.WantInvalid(t, err, "Options.MaxWaiters", "-1", "0 or more")
}

func TestReceiptTravels(t *testing.T) {
	// Refund and Settle hand the store the time and the source of the charge, and an id derived from the charge's.
	r := &recorder{}
	lim := newLimiter(t, r, testkit.Bucket("n", 10, time.Second), nil)
	d := quota.Decision{Allowed: true, Charged: 5, At: 77, Source: quota.FromFallback}
	must[quota.Decision](t)(lim.Refund(bg, "k", d, 2))
	must[quota.Decision](t)(lim.Settle(bg, "k", d, 1))
	must[quota.Decision](t)(lim.Settle(bg, "k", d, 9))
	charge := quota.Charge{Limit: testkit.Bucket("m", 1, time.Second), Key: "q", Cost: 5, ID: "id"}
	must[quota.Result](t)(lim.ChargeAll(bg, charge.Refund(d, 5)))
	must[quota.Result](t)(lim.ChargeAll(bg, charge.Settle(d, 6)))
	var got []quota.Charge
	for _, c := range r.calls {
		c[0].Limit = nil
		got = append(got, c...)
	}
	const f = quota.FromFallback
	want := []quota.Charge{
		{Key: "k", Cost: 2, Op: quota.OpRefund, MadeAt: 77, From: f}, {Key: "k", Cost: 4, Op: quota.OpRefund, MadeAt: 77, From: f}, {Key: "k", Cost: 4, Op: quota.OpDebit, MadeAt: 77, From: f},
		{Key: "q", Cost: 5, Op: quota.OpRefund, MadeAt: 77, From: f, ID: "id/correction"}, {Key: "q", Cost: 1, Op: quota.OpDebit, MadeAt: 77, From: f, ID: "id/correction"},
	}
	if len(got) != len(want) {
		t.Fatalf("charges at the store: got %v, want %v", got, want)
	}
	for i := range got {
		if got[i] != want[i] {
			t.Errorf("charge %d at the store: got %#v, want %#v", i, got[i], want[i]) // String leaves At and From out
		}
	}
}

func TestLimiterChargeAll(t *testing.T) {
	c := testkit.NewClock()
	agent, team := testkit.Bucket("agent", 5, 5*time.Second), testkit.Bucket("team", 8, 8*time.Second)
	lim := newLimiter(t, quota.Must(local.NewWithOptions(local.Options{Clock: c.Time})), agent, nil)
	list := func(key string, n int64) []quota.Charge {
		return []quota.Charge{{Key: "team-1/" + key, Cost: n}, {Limit: team, Key: "team-1", Cost: n}}
	}
	given := list("a", 4)
	r := must[quota.Result](t)(lim.ChargeAll(bg, given...))
	if !r.Granted || r.Decider != 0 || r.Decisions[0].Remaining != 1 || r.Decisions[1].Remaining != 4 || r.RetryAfter() != 0 {
		t.Fatalf("ChargeAll of 4: got %v, RetryAfter %v, want it granted, decided by charge 0, with 1 and 4 left, RetryAfter 0", r, r.RetryAfter())
	}
	if given[0].Limit != nil {
		t.Errorf("the caller's charge after ChargeAll: got limit %v, want nil as before", given[0].Limit)
	}
	r = must[quota.Result](t)(lim.ChargeAll(bg, list("b", 5)...)) // the team has 4
	if r.Granted || r.Decider != 1 || !r.Decisions[0].Allowed || r.Decisions[0].Remaining != 5 || r.RetryAfter() != time.Second {
		t.Fatalf("ChargeAll of 5: got %v, RetryAfter %v, want it denied by charge 1, charge 0 allowed with 5 left, RetryAfter 1s", r, r.RetryAfter())
	}
	c.Add(r.RetryAfter() - time.Microsecond)
	if r = must[quota.Result](t)(lim.ChargeAll(bg, list("b", 5)...)); r.Granted || r.RetryAfter() != time.Microsecond {
		t.Fatalf("ChargeAll of 5, a microsecond early: got %v, RetryAfter %v, want it denied, RetryAfter 1µs", r, r.RetryAfter())
	}
	c.Add(time.Microsecond)
	if r = must[quota.Result](t)(lim.ChargeAll(bg, list("b", 5)...)); !r.Granted {
		t.Fatalf("ChargeAll of 5 after RetryAfter: got %v, want it granted", r)
	}
	if got := (quota.Result{}).RetryAfter(); got != 0 {
		t.Errorf("RetryAfter of the zero Result: got %v, want 0", got)
	}
}

func TestLimitFor(t *testing.T) {
	plans := map[string]*quota.Limit{"gold": testkit.Bucket("n", 100, time.Second)}
	lim := newLimiter(t, quota.Must(local.NewWithOptions(local.Options{Clock: testkit.NewClock().Time})), testkit.Bucket("n", 2, time.Second), &quota.Options{LimitFor: func(key string) *quota.Limit { return plans[quota.Group(key)] }})
	for key, want := range map[string]int64{"gold/a": 100, "tin/a": 2, "gold": 100} {
		if d := must[quota.Decision](t)(lim.Take(bg, key, 1)); d.Capacity != want {
			t.Errorf("Take on %s: got limit %d, want %d", key, d.Capacity, want)
		}
		if d := must[quota.Decision](t)(lim.Wait(bg, key, 1)); d.Capacity != want {
			t.Errorf("Wait on %s: got limit %d, want %d", key, d.Capacity, want)
		}
		r := must[quota.Result](t)(lim.ChargeAll(bg, quota.Charge{Key: key, Op: quota.OpPeek}))
		if d := r.Decisions[0]; d.Capacity != want || d.Remaining != want-2 {
			t.Errorf("ChargeAll on %s: got %v, want %d of %d left", key, d, want-2, want)
		}
	}
	_, err := lim.Wait(bg, "tin/a", 3)
	testkit.WantInvalid(t, err, "cost", "3", "capacity", "2")
	if d := must[quota.Decision](t)(lim.Wait(bg, "gold/a", 3)); !d.Allowed {
		t.Errorf("Wait for 3 on gold/a: got %v, want it allowed", d)
	}
}

// A limit that NewLimit did not make, such as the zero Limit that a map of limits has for an unknown plan, is refused by
// every door, before the store is asked.
func TestLimitForIsChecked(t *testing.T) {
	r := &recorder{}
	lim := newLimiter(t, r, testkit.Bucket("n", 10, time.Hour), &quota.Options{
		LimitFor: func(string) *quota.Limit { return &quota.Limit{} },
	})
	receipt := quota.Decision{Allowed: true, Charged: 5, At: 1}
	for door, call := range map[string]func() error{
		"Take":      func() error { _, err := lim.Take(bg, "k", 1); return err },
		"Peek":      func() error { _, err := lim.Peek(bg, "k", 1); return err },
		"Debit":     func() error { _, err := lim.Debit(bg, "k", 1); return err },
		"Refund":    func() error { _, err := lim.Refund(bg, "k", receipt, 1); return err },
		"Settle":    func() error { _, err := lim.Settle(bg, "k", receipt, 1); return err },
		"Reset":     func() error { return lim.Reset(bg, "k") },
		"Wait":      func() error { _, err := lim.Wait(bg, "k", 1); return err },
		"ChargeAll": func() error { _, err := lim.ChargeAll(bg, quota.Charge{Key: "k", Cost: 1}); return err },
	} {
		t.Run(door, func(t *testing.T) { testkit.WantInvalid(t, call(), "LimitFor", "zero Limit", "NewLimit") })
	}
	if len(r.calls) > 0 {
		t.Errorf("calls of the store: got %v, want none", r.calls)
	}
}

// slow is a store whose decisions take a while and have the fallback as their source.
type slow struct {
	quota.Store
	takes atomic.Int64 // a time.Duration
	err   error
}

func newSlow(s quota.Store, takes time.Duration) *slow {
	slow := &slow{Store: s}
	slow.takes.Store(int64(takes))
	return slow
}

func (s *slow) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	time.Sleep(time.Duration(s.takes.Load())) // a bubble's time
	if s.err != nil {
		return quota.Decision{}, s.err
	}
	d, err := s.Store.Charge(ctx, c)
	d.Source = quota.FromFallback
	return d, err
}

func (s *slow) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	time.Sleep(time.Duration(s.takes.Load()))
	if s.err != nil {
		return s.err
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func TestErrorsPassThrough(t *testing.T) {
	for _, cause := range []error{quota.ErrUnavailable, quota.ErrIndeterminate, context.Canceled} {
		lim := newLimiter(t, &slow{err: cause}, testkit.Bucket("n", 5, time.Hour), nil)
		if d, err := lim.Take(bg, "k", 1); !errors.Is(err, cause) || d != (quota.Decision{}) {
			t.Errorf("Take: got %+v, %v, want the zero Decision and %v", d, err, cause)
		}
		if r, err := lim.ChargeAll(bg, quota.Charge{Key: "k"}); !errors.Is(err, cause) || r.Decisions != nil || r.Granted {
			t.Errorf("ChargeAll: got %v, %v, want no decisions and %v", r, err, cause)
		}
		if _, err := lim.Wait(bg, "k", 1); !errors.Is(err, cause) {
			t.Errorf("Wait: got %v, want %v", err, cause)
		}
	}
}

type closer struct {
	recorder
	closed atomic.Int32
}

func (c *closer) Close() error { c.closed.Add(1); return nil }

func TestLimiterCloses(t *testing.T) {
	c := &closer{}
	lim := newLimiter(t, c, testkit.Bucket("n", 1, time.Second), nil)
	if got := lim.Store(); got != c {
		t.Errorf("Store: got %v, want the store that the limiter was made with", got)
	}
	if err := lim.Close(); err != nil || c.closed.Load() != 1 {
		t.Errorf("Close: got %v, the store closed %d times, want nil and once", err, c.closed.Load())
	}
}

func TestTakeDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	observe := func(context.Context, *quota.Call) {}
	for option, c := range map[string]struct {
		o    *quota.Options
		most float64
	}{
		"no option":     {nil, 0},
		"LimitFor":      {&quota.Options{LimitFor: func(string) *quota.Limit { return nil }}, 0},
		"observers":     {&quota.Options{Observers: []func(context.Context, *quota.Call){observe, observe}}, 0},
		"both of these": {&quota.Options{LimitFor: func(string) *quota.Limit { return nil }, Observers: []func(context.Context, *quota.Call){observe}}, 0},
	} {
		for _, rule := range []string{"tb1", "sw1", "fw1", "ff1"} {
			lim := newLimiter(t, local.New(), testkit.LimitOf("n", rule, 500, time.Hour), c.o)
			for name, call := range map[string]func(){
				"Take":   func() { lim.Take(bg, "team/agent", 1) }, // granted, then denied
				"Peek":   func() { lim.Peek(bg, "team/agent", 1) },
				"denial": func() { lim.Take(bg, "team/agent", 501) },
				"Debit":  func() { lim.Debit(bg, "team/agent", 1) },
			} {
				if n := testing.AllocsPerRun(1000, call); n > c.most {
					t.Errorf("allocations by %s of %s with %s: got %v, want at most %v", name, rule, option, n, c.most)
				}
			}
		}
	}
}

// A list allocates no more with an observer than without.
func TestAnObservedListDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	allocations := func(o *quota.Options) float64 {
		lim := newLimiter(t, local.New(), testkit.Bucket("n", 500, time.Hour), o)
		list := []quota.Charge{{Key: "team/a", Cost: 1}, {Key: "team/b", Cost: 1}, {Key: "team/c", Cost: 1}}
		return testing.AllocsPerRun(1000, func() { lim.ChargeAll(bg, list...) })
	}
	without := allocations(nil)
	with := allocations(&quota.Options{Observers: []func(context.Context, *quota.Call){func(context.Context, *quota.Call) {}}})
	if with > without {
		t.Errorf("allocations by an observed ChargeAll: got %v, want the %v without an observer", with, without)
	}
}
