package quota_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// watch returns options with an observer that notes the calls.
func watch(calls *[]quota.Call) *quota.Options {
	return &quota.Options{Observers: []func(context.Context, *quota.Call){func(_ context.Context, c *quota.Call) { *calls = append(*calls, *c.Clone()) }}}
}

// Each call is told once, with its charges, its outcome and its time.
func TestObserver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls []quota.Call
		const takes = 30 * time.Millisecond
		store := newSlow(local.New(), takes)
		n, m := testkit.Bucket("n", 5, time.Hour), testkit.Bucket("m", 9, time.Hour)
		lim := newLimiter(t, store, n, watch(&calls))
		ok := must[quota.Decision](t)
		one := func(c quota.Charge, d quota.Decision) quota.Call {
			c.Limit = n
			return quota.Call{Charges: []quota.Charge{c}, Decisions: []quota.Decision{d}, Granted: d.Allowed, Took: takes}
		}
		var want []quota.Call
		note := func(c quota.Call) { want = append(want, c) }

		taken := ok(lim.Take(bg, "k", 4))
		note(one(quota.Charge{Key: "k", Cost: 4}, taken))
		note(one(quota.Charge{Key: "k", Cost: 2}, ok(lim.Take(bg, "k", 2))))
		note(one(quota.Charge{Key: "k", Op: quota.OpPeek, Cost: 1}, ok(lim.Peek(bg, "k", 1))))
		note(one(quota.Charge{Key: "k", Op: quota.OpDebit, Cost: 3}, ok(lim.Debit(bg, "k", 3))))
		ahead := ok(lim.TakeAhead(bg, "k", 1, 24*time.Hour))
		note(one(quota.Charge{Key: "k", Op: quota.OpAhead, Cost: 1, Within: 24 * time.Hour}, ahead))
		note(one(quota.Charge{Key: "k"}.Refund(ahead, 1), ok(lim.Refund(bg, "k", ahead, 1))))
		note(one(quota.Charge{Key: "k"}.Settle(taken, 1), ok(lim.Settle(bg, "k", taken, 1))))
		again := one(quota.Charge{Key: "k"}.Settle(taken, 1), ok(lim.Settle(bg, "k", taken, 1)))
		again.Took = 0 // the limiter remembers it
		note(again)
		if err := lim.Reset(bg, "k"); err != nil {
			t.Fatal(err)
		}
		note(one(quota.Charge{Key: "k", Op: quota.OpReset}, calls[len(calls)-1].Decisions[0]))
		for i, cost := range []int64{10, 1} {
			r := must[quota.Result](t)(lim.ChargeAll(bg, quota.Charge{Key: "x", Cost: 2}, quota.Charge{Limit: m, Key: "y", Cost: cost}))
			c := quota.Call{Charges: []quota.Charge{{Limit: n, Key: "x", Cost: 2}, {Limit: m, Key: "y", Cost: cost}}, Decisions: slices.Clone(r.Decisions), Granted: i == 1, Decider: 1 - i, Took: takes}
			note(c)
			clear(r.Decisions) // a clone's are its own
		}
		store.err = quota.ErrUnavailable
		lim.Take(bg, "k", 1)
		note(quota.Call{Charges: []quota.Charge{{Limit: n, Key: "k", Cost: 1}}, Err: store.err, Took: takes})
		lim.ChargeAll(bg, quota.Charge{Key: "x", Cost: 2}, quota.Charge{Key: "y", Cost: 2})
		note(quota.Call{Charges: []quota.Charge{{Limit: n, Key: "x", Cost: 2}, {Limit: n, Key: "y", Cost: 2}}, Err: store.err, Took: takes})

		if len(calls) != len(want) {
			t.Fatalf("calls: got %d, %+v, want %d", len(calls), calls, len(want))
		}
		for i := range calls {
			if !reflect.DeepEqual(calls[i], want[i]) {
				t.Errorf("call %d: got %+v, want %+v", i, calls[i], want[i])
			}
		}
		if got := calls[0].Decisions[0].Source; got != quota.FromFallback {
			t.Errorf("source of the first call: got %v, want %v", got, quota.FromFallback)
		}
	})
}

// Of two lists of four charges that are granted, and two that are denied, an observer counts two and two.
func TestObserverCountsLists(t *testing.T) {
	var calls []quota.Call
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 2, time.Hour), watch(&calls))
	for range 4 {
		var list []quota.Charge
		for i := range 4 {
			list = append(list, quota.Charge{Key: fmt.Sprint("k/", i), Cost: 1})
		}
		must[quota.Result](t)(lim.ChargeAll(bg, list...))
	}
	granted, charged := 0, int64(0)
	for _, c := range calls {
		if c.Granted {
			granted++
		}
		for _, d := range c.Decisions {
			charged += d.Charged
		}
	}
	if len(calls) != 4 || granted != 2 || charged != 8 {
		t.Errorf("calls: got %d, %d of them granted, %d tokens charged; want 4, 2 and 8", len(calls), granted, charged)
	}
}

// A wait is one call, whose time is that of the store's answers, apart from the time of waiting.
func TestObserverOfWait(t *testing.T) {
	for _, rule := range []string{"tb1", "fw1"} {
		synctest.Test(t, func(t *testing.T) {
			var calls []quota.Call
			const takes = time.Millisecond
			lim := newLimiter(t, newSlow(local.New(), takes), testkit.LimitOf("n", rule, 1, time.Minute), watch(&calls))
			must[quota.Decision](t)(lim.Take(bg, "k", 1))
			start := time.Now()
			d := must[quota.Decision](t)(lim.Wait(bg, "k", 1))
			took := time.Since(start)
			if len(calls) != 2 {
				t.Fatalf("%s: calls: got %+v, want 2", rule, calls)
			}
			c := calls[1]
			if want := (quota.Charge{Limit: calls[0].Charges[0].Limit, Key: "k", Cost: 1}); c.Charges[0] != want || c.Decisions[0] != d || !c.Granted || c.Err != nil || c.Refused {
				t.Errorf("%s: call: got %+v, want the charge %v, granted", rule, c, want)
			}
			if c.Took+c.Waited != took || c.Took < takes || c.Took > 100*takes || c.Waited < 50*time.Second {
				t.Errorf("%s: times of the call: got %v taken and %v waited, want the store's answers and the rest of %v", rule, c.Took, c.Waited, took)
			}

			ctx, cancel := context.WithCancel(bg)
			time.AfterFunc(time.Second, cancel)
			lim.Wait(ctx, "k", 1)
			c = calls[2]
			if !errors.Is(c.Err, context.Canceled) || c.Refused || c.Granted || c.Decisions != nil || c.Waited < time.Second/2 {
				t.Errorf("%s: cancelled wait: got %+v, want context.Canceled, no decisions and a wait", rule, c)
			}
		})
	}
}

// A call that is refused before the store is asked is told too, with charges that have a limit.
func TestObserverOfRefusals(t *testing.T) {
	var calls []quota.Call
	r := &recorder{}
	l := testkit.LimitOf("n", "fw1", 5, time.Hour)
	lim := newLimiter(t, r, l, watch(&calls))
	ended, cancel := context.WithCancel(bg)
	cancel()
	long := strings.Repeat("\xff/", 1000)
	denial := quota.Decision{}
	for name, call := range map[string]func() error{
		"Take, no key":             func() error { _, err := lim.Take(bg, "", 1); return err },
		"Take, long key":           func() error { _, err := lim.Take(bg, long, 1); return err },
		"Take, negative":           func() error { _, err := lim.Take(bg, "k", -1); return err },
		"TakeAhead of a window":    func() error { _, err := lim.TakeAhead(bg, "k", 1, time.Second); return err },
		"Refund of a denial":       func() error { _, err := lim.Refund(bg, "k", denial, 1); return err },
		"ChargeAll, empty":         func() error { _, err := lim.ChargeAll(bg); return err },
		"ChargeAll, no key":        func() error { _, err := lim.ChargeAll(bg, quota.Charge{}); return err },
		"ChargeAll, twice":         func() error { _, err := lim.ChargeAll(bg, quota.Charge{Key: "k"}, quota.Charge{Key: "k"}); return err },
		"Wait, too many":           func() error { _, err := lim.Wait(bg, "k", 6); return err },
		"Wait, context ended":      func() error { _, err := lim.Wait(ended, "k", 1); return err },
		"ChargeAll, the zero rule": func() error { _, err := lim.ChargeAll(bg, quota.Charge{Limit: &quota.Limit{}, Key: "k"}); return err },
	} {
		calls = nil
		err := call()
		if len(calls) != 1 {
			t.Errorf("%s: calls: got %+v, want one", name, calls)
			continue
		}
		c := calls[0]
		if err == nil || c.Err != err || !c.Refused || c.Granted || c.Decisions != nil {
			t.Errorf("%s: got %+v, want the error of the call, %v, and Refused", name, c, err)
		}
		for _, x := range c.Charges {
			if x.Limit == nil || x.Op.String() == "unknown" {
				t.Errorf("%s: charge: got limit %v and operation %v, want a limit and an operation", name, x.Limit, x.Op)
			}
		}
	}
	if len(r.calls) > 0 {
		t.Errorf("calls of the store: got %v, want none", r.calls)
	}
}

// Observers are called in their order, with the caller's own context, and are told of the same call.
func TestObserversCompose(t *testing.T) {
	type name struct{}
	var told []string
	var seen []*quota.Call
	observer := func(id string) func(context.Context, *quota.Call) {
		return func(ctx context.Context, c *quota.Call) {
			told, seen = append(told, fmt.Sprint(id, ctx.Value(name{}), ctx.Err())), append(seen, c)
		}
	}
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 5, time.Hour), &quota.Options{Observers: []func(context.Context, *quota.Call){observer("a"), observer("b")}})
	d := must[quota.Decision](t)(lim.Take(bg, "k", 1))
	told, seen = nil, nil
	ctx, cancel := context.WithCancel(context.WithValue(bg, name{}, "-caller-"))
	cancel()
	must[quota.Decision](t)(lim.Refund(ctx, "k", d, 1)) // outlives its context
	if want := []string{"a-caller-context canceled", "b-caller-context canceled"}; !slices.Equal(told, want) {
		t.Errorf("observers told: got %q, want %q", told, want)
	}
	if len(seen) == 2 && seen[0] != seen[1] {
		t.Error("calls of two observers: got two, want one")
	}
	_, err := quota.NewLimiter(local.New(), lim.Limit(), &quota.Options{Observers: []func(context.Context, *quota.Call){observer("a"), nil}})
	testkit.WantInvalid(t, err, "Options.Observers[1]", "nil")
}

// failingRefunds is a store that fails at refunds.
type failingRefunds struct{ quota.Store }

func (s failingRefunds) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if c.Op == quota.OpRefund {
		return quota.Decision{}, quota.ErrUnavailable
	}
	return s.Store.Charge(ctx, c)
}

// A wait whose tokens cannot be given back says that they may stay charged.
func TestCancelledWaitThatCannotGiveBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var calls []quota.Call
		lim := newLimiter(t, failingRefunds{local.New()}, testkit.Bucket("n", 5, time.Hour), watch(&calls))
		must[quota.Decision](t)(lim.Take(bg, "k", 5))
		ctx, cancel := context.WithCancel(bg)
		time.AfterFunc(time.Second, cancel)
		_, err := lim.Wait(ctx, "k", 1) // takes ahead
		if !errors.Is(err, context.Canceled) || !errors.Is(err, quota.ErrUnavailable) || quota.Charged(err) != quota.ChargeUnknown {
			t.Errorf("Wait: got %v (charged: %v), want context.Canceled, with the cause, and that it is unknown", err, quota.Charged(err))
		}
		if got := calls[len(calls)-1].Err; got != err {
			t.Errorf("error that the observer gets: got %v, want the caller's, %v", got, err)
		}
	})
}
