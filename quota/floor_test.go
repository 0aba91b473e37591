package quota_test

import (
	"context"
	"errors"
	"math"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// A floor in tokens and as a part of the capacity, in the numbers that a rule gets.
func TestFloorOfRequest(t *testing.T) {
	of := func(capacity int64) *quota.Limit { return testkit.Bucket("n", capacity, time.Minute) }
	unlimited := quota.NewLimit("n", algorithm.Unlimited)
	for _, c := range []struct {
		charge quota.Charge
		share  *quota.Limit // nil: the charge as it is
		want   int64
	}{
		{charge: quota.Charge{Limit: of(100), Floor: 20}, want: 20},
		{charge: quota.Charge{Limit: of(100), Floor: 200}, want: 200},
		{charge: quota.Charge{Limit: of(100), Floor: 20, FloorOf: 100}, want: 20},
		{charge: quota.Charge{Limit: of(25), Floor: 20, FloorOf: 100}, want: 5},
		{charge: quota.Charge{Limit: of(24), Floor: 20, FloorOf: 100}, want: 5},
		{charge: quota.Charge{Limit: of(1), Floor: 1, FloorOf: math.MaxUint32}, want: 1},
		{charge: quota.Charge{Limit: of(1 << 40), Floor: 1, FloorOf: 1}, want: 1 << 40},
		{charge: quota.Charge{Limit: of(1 << 40), Floor: math.MaxUint32, FloorOf: math.MaxUint32}, want: 1 << 40},
		{charge: quota.Charge{Limit: unlimited, Floor: 1, FloorOf: 2}, want: 1 << 62},
		{charge: quota.Charge{Limit: of(100), Floor: 20, Op: quota.OpPeek}, want: 20},
		{charge: quota.Charge{Limit: of(100), Floor: 20, Op: quota.OpDebit}, want: 0},
		{charge: quota.Charge{Limit: of(100), Floor: 20, Op: quota.OpRefund}, want: 0},
		{charge: quota.Charge{Limit: of(100), Floor: 20, Op: quota.OpReset}, want: 0},
		{charge: quota.Charge{Limit: of(100), Floor: 20}, share: of(25), want: 5},
		{charge: quota.Charge{Limit: of(100), Floor: 20, FloorOf: 100}, share: of(25), want: 5},
		{charge: quota.Charge{Limit: of(100), Floor: 1}, share: of(25), want: 1},
		{charge: quota.Charge{Limit: of(100), Floor: 20}, share: of(200), want: 40},
		{charge: quota.Charge{Limit: of(100), Floor: 101}, share: of(25), want: 101},
		{charge: quota.Charge{Limit: of(1 << 45), Floor: 1 << 44}, share: of(1 << 40), want: 1 << 39},
	} {
		charge := c.charge
		if c.share != nil {
			charge = charge.OnShare(c.share)
		}
		if got := charge.Request().Floor; got != c.want {
			t.Errorf("floor of %v on a share %v: got %d, want %d", c.charge, c.share, got, c.want)
		}
	}
	if got := (quota.Request{Cost: math.MaxInt64, Floor: 1}).Need(); got != math.MaxInt64 {
		t.Errorf("sum of the largest cost and a floor: got %d, want the largest number", got)
	}
}

// Paid callers take the last token, free ones stop at the floor: with every rule, and whatever the order.
func TestFloor(t *testing.T) {
	testkit.EachRule(t, 10, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		clock := testkit.NewClock()
		lim := newLimiter(t, quota.Must(local.NewWithOptions(local.Options{Clock: clock.Time})), l, nil)
		ask := func(c quota.Charge) quota.Decision {
			t.Helper()
			return must[quota.Result](t)(lim.ChargeAll(bg, c)).Decisions[0]
		}
		free := func(op quota.Op, n int64) quota.Charge {
			return quota.Charge{Key: "k", Cost: n, Op: op, Floor: 2, FloorOf: 10}
		}
		if d := ask(free(quota.OpTake, 9)); d.Allowed || d.RetryAfter != quota.Never || d.Charged != 0 {
			t.Errorf("9 above 2 of a capacity of 10: got %v, want it denied for ever", d)
		}
		if d := ask(quota.Charge{Key: "k", Cost: 1, Floor: math.MaxInt64}); d.Allowed || d.RetryAfter != quota.Never {
			t.Errorf("1 above the largest floor: got %v, want it denied for ever", d)
		}
		if d := ask(free(quota.OpTake, 7)); !d.Allowed || d.Charged != 7 || d.Remaining != 3 {
			t.Errorf("7 above 2: got %v, want 7 charged, 3 left", d)
		}
		if d := ask(free(quota.OpTake, 1)); !d.Allowed || d.Remaining != 2 {
			t.Errorf("1 more above 2: got %v, want it allowed, 2 left", d)
		}
		for _, op := range []quota.Op{quota.OpPeek, quota.OpTake} {
			d := ask(free(op, 1))
			both := ask(quota.Charge{Key: "k", Cost: 3, Op: quota.OpPeek})
			if d.Allowed || d.Charged != 0 || d.Remaining != 2 || d.RetryAfter != both.RetryAfter {
				t.Errorf("%s of 1 at the floor: got %v, want it denied, 2 left, and to retry when 3 fit, after %v", op, d, both.RetryAfter)
			}
		}
		if d := ask(free(quota.OpTake, 0)); !d.Allowed {
			t.Errorf("0 at the floor: got %v, want it allowed", d)
		}
		receipt := ask(quota.Charge{Key: "k", Cost: 2})
		if !receipt.Allowed || receipt.Remaining != 0 {
			t.Errorf("paid: got %v, want it to take the last 2", receipt)
		}
		denied := ask(free(quota.OpTake, 0))
		if denied.Allowed {
			t.Errorf("0 below the floor: got %v, want it denied", denied)
		}
		clock.Add(denied.RetryAfter - time.Microsecond)
		if d := ask(free(quota.OpPeek, 0)); d.Allowed {
			t.Errorf("1 µs before RetryAfter: got %v, want it denied", d)
		}
		clock.Add(time.Microsecond)
		if d := ask(free(quota.OpPeek, 0)); !d.Allowed {
			t.Errorf("after RetryAfter: got %v, want it allowed", d)
		}
		// What is corrected has no floor.
		for _, op := range []quota.Op{quota.OpDebit, quota.OpRefund, quota.OpReset} {
			if d := ask(free(op, 3)); !d.Allowed || op == quota.OpDebit && d.Charged != 3 {
				t.Errorf("%s with a floor: got %v, want it made", op, d)
			}
		}
	})
	// A list is denied by a floor, and charges nothing.
	l := testkit.Bucket("n", 10, time.Hour)
	lim := newLimiter(t, local.New(), l, nil)
	r := must[quota.Result](t)(lim.ChargeAll(bg, quota.Charge{Key: "a", Cost: 1}, quota.Charge{Key: "b", Cost: 5, Floor: 6}))
	if r.Granted || r.Decider != 1 || r.RetryAfter() != quota.Never || r.Decisions[0].Remaining != 10 {
		t.Errorf("a list with 5 above 6 of 10: got %v, want it denied for ever, and 10 left of the other key", r)
	}
}

func TestFloorIsChecked(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Minute)
	for name, c := range map[string]struct {
		charge quota.Charge
		parts  []string
	}{
		"negative":      {quota.Charge{Limit: l, Key: "k", Floor: -1}, []string{"Floor", "-1", "0 or more"}},
		"ahead":         {quota.Charge{Limit: l, Key: "k", Op: quota.OpAhead, Floor: 1}, []string{"Floor of a take-ahead", "0 for OpAhead"}},
		"more than all": {quota.Charge{Limit: l, Key: "k", Floor: 3, FloorOf: 2}, []string{"Floor", "3", "up to FloorOf, 2"}},
	} {
		t.Run(name, func(t *testing.T) {
			testkit.WantInvalid(t, quota.Check([]quota.Charge{c.charge}), c.parts...)
		})
	}
	for text, c := range map[string]quota.Charge{
		`take 1 of n for "k" above 20`:              {Limit: l, Key: "k", Cost: 1, Floor: 20},
		`take 1 of n for "k" above 20 of 100 parts`: {Limit: l, Key: "k", Cost: 1, Floor: 20, FloorOf: 100},
	} {
		if got := c.String(); got != text {
			t.Errorf("String: got %s, want %s", got, text)
		}
		if err := quota.Check([]quota.Charge{c}); err != nil {
			t.Errorf("Check of %s: got %v, want nil", text, err)
		}
	}
	if r := (quota.Charge{Limit: l, Key: "k", Floor: 5}).Refund(quota.Decision{Allowed: true, Charged: 1}, 1); strings.Contains(r.String(), "above") {
		t.Errorf("refund of a charge with a floor: got %v, want one without", r)
	}
}

// Callers that wait with a lower floor go first, whenever they came, and those of one floor in the order in which they came.
func TestWaitAllByFloor(t *testing.T) {
	testkit.EachRule(t, 4, time.Second, func(t *testing.T, l *quota.Limit) {
		synctest.Test(t, func(t *testing.T) {
			lim := newLimiter(t, newSlow(local.New(), time.Microsecond), l, nil) // so that grants differ in time
			must[quota.Decision](t)(lim.Take(bg, "k", 4))
			w := newWaits(lim)
			for _, c := range []struct {
				name  string
				floor int64
			}{{"free1", 2}, {"free2", 2}, {"half", 1}, {"paid1", 0}, {"free3", 2}, {"paid2", 0}, {"paid3", 0}} {
				w.callAll(bg, c.name, quota.Charge{Key: "k", Cost: 1, Floor: c.floor})
			}
			w.end(t)
			if want := []string{"paid1", "paid2", "paid3", "half", "free1", "free2", "free3"}; !slices.Equal(w.order, want) {
				t.Errorf("order of the grants: got %v, want %v", w.order, want)
			}
			if keys, waiting := lim.Queues(); keys != 0 || waiting != 0 {
				t.Errorf("after all calls: got %d queues and %d waiters, want none", keys, waiting)
			}
		})
	})
}

// A caller with a floor takes nothing ahead of refill: others may take what it waits for.
func TestWaitAllAboveFloorTakesNothingAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := testkit.Bucket("n", 10, 10*time.Second)
		lim := newLimiter(t, local.New(), l, nil)
		must[quota.Decision](t)(lim.Take(bg, "k", 7))
		w := newWaits(lim)
		w.callAll(bg, "free", quota.Charge{Key: "k", Cost: 2, Floor: 20, FloorOf: 100})
		if d := must[quota.Decision](t)(lim.Take(bg, "k", 3)); !d.Allowed {
			t.Errorf("the last 3 while a caller waits above a floor: got %v, want them taken", d)
		}
		w.end(t)
		if at := w.ended["free"].at; at != 4*time.Second {
			t.Errorf("2 above 2: got them at %v, want them at 4s, when 4 are gained", at)
		}
		for name, list := range map[string]quota.Charge{"tokens": {Key: "k", Cost: 5, Floor: 6}, "part": {Key: "k", Cost: 10, Floor: 1, FloorOf: 1000}} {
			if _, err := lim.WaitAll(bg, list); !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("more than ever fits above the floor, %s: got %v, want ErrInvalid", name, err)
			}
		}
		ctx := within(t, 3*time.Second)
		if _, err := lim.WaitAll(ctx, quota.Charge{Key: "k", Cost: 6, Floor: 4}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("all above a floor, which come after the deadline: got %v, want it refused", err)
		}
		// A shadow holds up no list, however much it costs.
		if _, err := lim.WaitAll(ctx, quota.Charge{Key: "other", Cost: 1}, quota.Charge{Key: "k", Cost: 100, Shadow: true}); err != nil {
			t.Errorf("a list with a shadow that never fits: got %v, want it granted", err)
		}
	})
}
