package quota_test

import (
	"math"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// A take of up to n takes the tokens that are left, at least the least, and leaves the floor: with every rule.
func TestTakeUpTo(t *testing.T) {
	testkit.EachRule(t, 10, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		clock := testkit.NewClock()
		lim := newLimiter(t, quota.Must(local.NewWithOptions(local.Options{Clock: clock.Time})), l, nil)
		want := func(n, least, charged, left int64) quota.Decision {
			t.Helper()
			d := must[quota.Decision](t)(lim.TakeUpTo(bg, "k", n, least))
			if d.Allowed != (charged >= 0) || d.Charged != max(charged, 0) || d.Remaining != left {
				t.Errorf("up to %d, at least %d: got %v, want %d charged (below 0: denied), %d left", n, least, d, charged, left)
			}
			return d
		}
		want(4, 4, 4, 6)
		above := must[quota.Result](t)(lim.ChargeAll(bg, quota.Charge{Key: "k", Op: quota.OpUpTo, Cost: 9, Least: 1, Floor: 2})).Decisions[0]
		if !above.Allowed || above.Charged != 4 || above.Remaining != 2 {
			t.Errorf("up to 9 above 2: got %v, want 4 charged, 2 left", above)
		}
		d := want(math.MaxInt64, 3, -1, 2)
		if three := must[quota.Decision](t)(lim.Peek(bg, "k", 3)); d.RetryAfter != three.RetryAfter {
			t.Errorf("retry of a least of 3: got %v, want %v, when 3 fit", d.RetryAfter, three.RetryAfter)
		}
		receipt := want(math.MaxInt64, 2, 2, 0)
		want(5, 0, 0, 0)
		want(5, 1, -1, 0)
		if d := want(100, 11, -1, 0); d.RetryAfter != quota.Never {
			t.Errorf("at least 11 of a capacity of 10: got %v, want it denied for ever", d)
		}
		if d := must[quota.Decision](t)(lim.Settle(bg, "k", receipt, 1)); d.Charged != -1 {
			t.Errorf("settling the 2 that were taken to 1: got %v, want 1 back", d)
		}
		must[quota.Decision](t)(lim.Debit(bg, "k", 3))
		want(5, 0, -1, -2) // in debt
	})
}

func TestTakeUpToInLists(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	lim := newLimiter(t, local.New(), l, nil)
	upTo := func(key string, least int64) quota.Charge {
		return quota.Charge{Key: key, Op: quota.OpUpTo, Cost: 20, Least: least}
	}
	r := must[quota.Result](t)(lim.ChargeAll(bg, upTo("a", 1), quota.Charge{Key: "b", Cost: 11}))
	if r.Granted || r.Decisions[0].Charged != 0 || r.Decisions[0].Remaining != 10 || !r.Decisions[0].Allowed {
		t.Errorf("a denied list: got %v, want nothing charged", r)
	}
	r = must[quota.Result](t)(lim.ChargeAll(bg, upTo("a", 1), quota.Charge{Key: "b", Cost: 10}))
	if !r.Granted || r.Decisions[0].Charged != 10 || r.Decisions[0].Remaining != 0 {
		t.Errorf("a granted list: got %v, want 10 charged of the first", r)
	}
	if r = must[quota.Result](t)(lim.ChargeAll(bg, upTo("a", 1), quota.Charge{Key: "c", Cost: 1})); r.Granted || r.Decider != 0 || r.RetryAfter() <= 0 {
		t.Errorf("a list whose least is not there: got %v, want it denied by the first", r)
	}
	// Rules without state.
	for name, c := range map[string]struct {
		rule    quota.Algorithm
		least   int64
		charged int64
	}{"unlimited": {algorithm.Unlimited, 3, 20}, "none": {algorithm.DenyAll, 0, 0}, "none of one": {algorithm.DenyAll, 1, -1}} {
		c0 := upTo("k", c.least)
		c0.Limit = quota.NewLimit("none", c.rule)
		d := must[quota.Result](t)(lim.ChargeAll(bg, c0)).Decisions[0]
		if d.Allowed != (c.charged >= 0) || d.Charged != max(c.charged, 0) {
			t.Errorf("%s: got %v, want %d charged (below 0: denied)", name, d, c.charged)
		}
	}
}

// An id repeats how much was taken, whatever remains now.
func TestTakeUpToRepeats(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	store := local.New()
	c := quota.Charge{Limit: l, Key: "k", Op: quota.OpUpTo, Cost: 20, Least: 1, ID: "x"}
	first := must[quota.Decision](t)(store.Charge(bg, c))
	again := must[quota.Decision](t)(store.Charge(bg, c))
	if first.Charged != 10 || again.Charged != 10 || !again.Replayed {
		t.Errorf("a repeat: got %v after %v, want 10 charged of both", again, first)
	}
	c.Least = 2
	if _, err := store.Charge(bg, c); err == nil {
		t.Error("the id with another least: got nil, want ErrInvalid")
	}
}

func TestLeastIsChecked(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Minute)
	for name, c := range map[string]quota.Charge{
		"negative": {Limit: l, Key: "k", Op: quota.OpUpTo, Cost: 1, Least: -1}, "above the cost": {Limit: l, Key: "k", Op: quota.OpUpTo, Cost: 1, Least: 2},
		"of a take": {Limit: l, Key: "k", Cost: 1, Least: 1},
	} {
		t.Run(name, func(t *testing.T) {
			testkit.WantInvalid(t, quota.Check([]quota.Charge{c}), "Least of a take", "0 to the cost for OpUpTo")
		})
	}
	c := quota.Charge{Limit: l, Key: "k", Op: quota.OpUpTo, Cost: 5, Least: 2, Floor: 3}
	if got, want := c.String(), `take-up-to 5 of n for "k", at least 2, above 3`; got != want {
		t.Errorf("String: got %s, want %s", got, want)
	}
	if r := c.Request(); r.Arg != 2 || r.Floor != 3 || r.Need() != 5 {
		t.Errorf("Request: got %+v, want the least as At, the floor, and that 5 are needed", r)
	}
}
