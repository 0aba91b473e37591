package driver_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// randomCharge returns a charge of any operation to one of a few keys; its cost is around the limit's capacity.
func randomCharge(r *rand.Rand, limits []*quota.Limit, keys int, now quota.Micros) quota.Charge {
	l := limits[r.IntN(len(limits))]
	c := quota.Charge{Limit: l, Key: fmt.Sprint("g/", r.IntN(keys)), Cost: r.Int64N(l.Spec().Capacity + 2)}
	switch r.IntN(12) {
	case 0:
		c.Op = quota.OpPeek
	case 1:
		c.Op = quota.OpDebit
	case 2, 3:
		c.Op, c.MadeAt = quota.OpRefund, max(now-quota.Micros(r.Int64N(3_000_000)), 0)
	case 4:
		if r.IntN(4) == 0 {
			c.Op = quota.OpReset
		}
	case 5:
		c.Cost = 0
	case 6, 7:
		if l.Spec().Ahead {
			c.Op, c.Within = quota.OpAhead, time.Duration(r.Int64N(int64(2*time.Second)))
		}
	default:
		c.Cost = r.Int64N(l.Spec().Capacity/2 + 1)
	}
	if r.IntN(6) == 0 && c.Op == quota.OpTake {
		c.Op, c.Least = quota.OpUpTo, r.Int64N(c.Cost+1)
	}
	if r.IntN(4) == 0 && c.Op != quota.OpAhead {
		c.Floor, c.FloorOf = r.Int64N(4), uint32(4*r.IntN(2))
	}
	return c
}

// randomList returns charges that Check accepts.
func randomList(r *rand.Rand, limits []*quota.Limit, keys, most int, now quota.Micros) []quota.Charge {
	var cs []quota.Charge
	for range 1 + r.IntN(most) {
		c := randomCharge(r, limits, keys, now)
		c.Shadow = r.IntN(6) == 0
		if !slices.ContainsFunc(cs, func(d quota.Charge) bool { return d.Limit.Handle() == c.Limit.Handle() && d.Key == c.Key }) {
			cs = append(cs, c)
		}
	}
	return cs
}

// someLimits returns limits of every rule, small enough to be exhausted.
func someLimits() []*quota.Limit {
	var ls []*quota.Limit
	for i, rule := range testkit.Rules {
		ls = append(ls, testkit.LimitOf(rule.Name, rule.Name, int64(3+4*i), time.Duration(1+i)*300*time.Millisecond))
	}
	return append(ls, testkit.LimitOf("unit", "tb1", 7, 333*time.Millisecond))
}

// shelf keeps items by limit and key, as the simplest of stores would.
type shelf map[string]driver.Item

func shelfKey(c quota.Charge) string { return c.Limit.Name() + " " + c.Key }

func (s shelf) items(cs []quota.Charge) []driver.Item {
	items := make([]driver.Item, len(cs))
	for i, c := range cs {
		items[i] = s[shelfKey(c)]
	}
	return items
}

func (s shelf) put(cs []quota.Charge, items []driver.Item) {
	for i, it := range items {
		if it.Write {
			it.Write = false
			if s[shelfKey(cs[i])] = it; it.State.IsZero() {
				delete(s, shelfKey(cs[i]))
			}
		}
	}
}

// apply decides and keeps a list.
func (s shelf) apply(cs []quota.Charge, now quota.Micros, out []quota.Decision) error {
	items := s.items(cs)
	if err := driver.Apply(cs, items, now, out); err != nil {
		return err
	}
	s.put(cs, items)
	return nil
}

func TestApplyIsAllOrNothing(t *testing.T) {
	r := random(t)
	limits := someLimits()
	granted, denied := 0, 0
	for range sized(300, 5000) {
		kept, now := shelf{}, testkit.Epoch
		for range 60 {
			now += quota.Micros(r.Int64N(400_000))
			cs := randomList(r, limits, 3, 12, now)
			before := kept.items(cs)
			items := slices.Clone(before)
			out := make([]quota.Decision, len(cs))
			if err := driver.Apply(cs, items, now, out); err != nil {
				t.Fatal(err)
			}
			one := make([]quota.Decision, len(cs)) // each charge alone, on the states before
			after := slices.Clone(before)
			for i := range cs {
				one[i] = mustDecide(t, cs[i], &after[i], now)
			}
			if quota.Granted(one) != quota.Granted(out) {
				t.Fatalf("Apply of %s: got %v, want it granted only if each charge alone is: %v", testkit.Show(cs), out, one)
			}
			if quota.Granted(out) {
				granted++
				if !reflect.DeepEqual(out, one) {
					t.Fatalf("Apply of %s, granted: got %v, want the decisions of each charge alone: %v", testkit.Show(cs), out, one)
				}
				if !reflect.DeepEqual(items, after) {
					t.Fatalf("Apply of %s, granted: got the items %+v, want those of each charge alone: %+v", testkit.Show(cs), items, after)
				}
				kept.put(cs, items)
				continue
			}
			denied++
			if !reflect.DeepEqual(items, before) {
				t.Fatalf("Apply of %s, denied: got the items %+v, want them unchanged: %+v", testkit.Show(cs), items, before)
			}
			for i, c := range cs {
				c.Op = quota.OpPeek
				if c.Least = 0; cs[i].Op != quota.OpTake && cs[i].Op != quota.OpPeek {
					c.Cost, c.Floor = 0, 0
				}
				it := before[i]
				want := mustDecide(t, c, &it, now)
				want.Allowed, want.RetryAfter = one[i].Allowed, one[i].RetryAfter
				if out[i] != want {
					t.Fatalf("Apply of %s, denied: decision %d: got %v, want %v, as if uncharged", testkit.Show(cs), i, out[i], want)
				}
			}
		}
	}
	if granted < 1000 || denied < 1000 {
		t.Errorf("random lists: got %d granted and %d denied, want 1000 of each at least", granted, denied)
	}
}

func mustDecide(t *testing.T, c quota.Charge, it *driver.Item, now quota.Micros) quota.Decision {
	t.Helper()
	var d quota.Decision
	if err := driver.ApplyOne(&c, it, now, &d); err != nil {
		t.Fatal(err)
	}
	return d
}

func TestApplyRebasesOnDenial(t *testing.T) {
	// The one write that a denial makes: a state ahead of the clock comes back to it, its consumption unchanged.
	testkit.EachRule(t, 4, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		kept, out := shelf{}, make([]quota.Decision, 2)
		cs := []quota.Charge{{Limit: l, Key: "a", Cost: 4}, {Limit: l, Key: "b", Cost: 1}}
		if err := kept.apply(cs, testkit.Epoch, out); err != nil || !quota.Granted(out) {
			t.Fatalf("Apply on fresh keys: got %v, %v, want both allowed", out, err)
		}
		back := testkit.Epoch - 3_600_000_000
		if err := kept.apply(cs, back, out); err != nil || out[0].Allowed || !out[1].Allowed {
			t.Fatalf("Apply an hour earlier: got %v, %v, want the first denied and the second allowed", out, err)
		}
		if out[0].Remaining != 0 || out[1].Remaining != 3 || out[0].RetryAfter > 20*time.Second {
			t.Errorf("Apply an hour earlier: got %v, want 0 and 3 left, and the first to retry within 20s", out)
		}
	})
}

func TestApplyRefusesAnotherRule(t *testing.T) {
	for i, r := range testkit.Rules {
		mine := testkit.LimitOf("n", r.Name, 5, time.Second)
		theirs := testkit.LimitOf("n", testkit.Rules[(i+1)%len(testkit.Rules)].Name, 5, time.Second)
		fresh := quota.Charge{Limit: testkit.Bucket("fresh", 5, time.Second), Key: "k", Cost: 1}
		var held driver.Item
		mustDecide(t, quota.Charge{Limit: theirs, Key: "k", Cost: 1}, &held, testkit.Epoch)
		held.Write = false
		for _, op := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset, quota.OpAhead} {
			items := []driver.Item{{}, held}
			out := make([]quota.Decision, 2)
			err := driver.Apply([]quota.Charge{fresh, {Limit: mine, Key: "k", Cost: 1, Op: op}}, items, testkit.Epoch, out)
			if !errors.Is(err, quota.ErrMisconfigured) {
				t.Fatalf("Apply of %s by %s on an item of %s: got %v, want ErrMisconfigured", op, r.Name, held.Rule, err)
			}
			if want := []driver.Item{{}, held}; !reflect.DeepEqual(items, want) {
				t.Errorf("items after Apply of %s by %s: got %+v, want them unchanged: %+v", op, r.Name, items, want)
			}
			it := held
			err = driver.ApplyOne(&quota.Charge{Limit: mine, Key: "k", Cost: 1, Op: op}, &it, testkit.Epoch, new(quota.Decision))
			if !errors.Is(err, quota.ErrMisconfigured) {
				t.Errorf("ApplyOne of %s by %s on an item of %s: got %v, want ErrMisconfigured", op, r.Name, held.Rule, err)
			}
			if !reflect.DeepEqual(it, held) {
				t.Errorf("item after ApplyOne of %s by %s: got %+v, want it unchanged: %+v", op, r.Name, it, held)
			}
		}
	}
}

// A rule that keeps no state decides beside the state of any rule, and leaves it, whatever it returns.
func TestApplyBesideAnotherRule(t *testing.T) {
	own := testkit.LimitOf("same", "tb1", 10, time.Minute)
	for _, rule := range []quota.Algorithm{algorithm.Unlimited, algorithm.DenyAll, scribbler{}} {
		none := quota.NewLimit("same", rule)
		it := driver.Item{}
		mustDecide(t, quota.Charge{Limit: own, Key: "k", Cost: 4}, &it, 1e15)
		it.Write = false
		before := it
		for op := quota.OpTake; op <= quota.OpReset; op++ {
			for _, list := range []bool{false, true} {
				c, out := quota.Charge{Limit: none, Key: "k", Cost: 3, Op: op}, make([]quota.Decision, 1)
				items := []driver.Item{it}
				err := driver.Apply([]quota.Charge{c}, items, 1e15+1, out)
				if !list {
					err = driver.ApplyOne(&c, &items[0], 1e15+1, &out[0])
				}
				if err != nil || !reflect.DeepEqual(items[0], before) {
					t.Errorf("%v: got %+v, %v; want the item as it was, %+v", c, items[0], err, before)
				}
				if want := none.Spec().Capacity; out[0].Remaining != want || out[0].Capacity != want {
					t.Errorf("%v: got %+v, want limit and remaining %d", c, out[0], want)
				}
			}
		}
	}
}

// scribbler says that it keeps no state, and returns one.
type scribbler struct{}

func (scribbler) Spec() quota.Spec { return quota.Spec{Rule: quota.Rule{'s'}, Capacity: 5} }

func (scribbler) Decide(s quota.State, _ quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	return quota.State{Unit: 1, A: s.A + 1}, quota.Verdict{Outcome: quota.Outcome{Allowed: true, Write: true}, Remaining: 5}
}
