package conformance

import (
	"errors"
	"fmt"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var atomicityCases = []testCase{
	{rule: s2, name: "longest list", needs: []Feature{Exact}, run: longestList},
	{rule: c6, name: "beyond", needs: []Feature{Exact}, run: beyond},
	{rule: c6, name: "marked", needs: []Feature{Exact}, run: marked},
}

// longestList charges as many keys as a list can have. Their groups differ if the store decides several groups in one
// step.
func longestList(t *trial) {
	needLists(t)
	format := "g/%d"
	if driver.AtomicityOf(t.open(Opening{}).store) == driver.AnyKeys {
		format = "g%d"
	}
	l := t.named("tokens", tokenBucket, numbers{10, 1, 1e9})
	var trace []step
	for i, fits := range []bool{true, false, true} {
		s := step{id: i + 1}
		for n := range quota.MaxCharges {
			c := quota.Charge{Limit: l, Key: fmt.Sprintf(format, n), Cost: int64(1 + n%3)}
			if !fits && n == quota.MaxCharges-1 {
				c.Cost = 10
			}
			s.charges = append(s.charges, charge{Charge: c})
		}
		trace = append(trace, s)
	}
	t.perform(trace)
}

// needParts skips a case for a store that decides any list in one step.
func needParts(t *trial, h *handle) {
	if driver.AtomicityOf(h.store) == driver.AnyKeys {
		t.excusef("the store decides any keys in one step, says its Atomicity")
	}
}

// beyond makes lists that the store does not decide in one step, one after the other.
func beyond(t *trial) {
	h := t.open(Opening{})
	needParts(t, h)
	keys := []string{"g0/a", "g1/a", "g2/a", "g3/a", "g4/a", "g0/b", "g1/b"}
	if driver.AtomicityOf(h.store) == driver.OneKey {
		keys = append(keys, "g0/c", "g0/d", "g0/e")
	}
	l := t.named("tokens", goOnly, numbers{limit: 12})
	used := map[string]int64{}
	want := func(c quota.Charge, granted bool) (d quota.Decision) {
		left := 12 - used[c.Key]
		d.Allowed = c.Op != quota.OpTake || c.Cost <= left
		if !granted {
			return quota.Decision{Allowed: d.Allowed, Limit: 12, Remaining: left}
		}
		d.Limit = 12
		if c.Op != quota.OpRefund {
			d.Charged = c.Cost
			used[c.Key] += c.Cost
		} else {
			d.Charged = -min(used[c.Key], c.Cost)
			used[c.Key] += d.Charged
		}
		d.Remaining = 12 - used[c.Key]
		return d
	}
	t.rounds(40, func(int) {
		var cs []quota.Charge
		granted := true
		for _, n := range t.rng.Perm(len(keys))[:2+t.rng.IntN(len(keys)-2)] {
			c := quota.Charge{Limit: l, Key: keys[n], Cost: 1 + t.rng.Int64N(3)}
			switch t.rng.IntN(8) {
			case 0:
				c.Op = quota.OpDebit
			case 1, 2:
				c.Op, c.At = quota.OpRefund, 1<<53
			case 3:
				c.Cost = 12
			}
			granted = granted && (c.Op != quota.OpTake || c.Cost <= 12-used[c.Key])
			cs = append(cs, c)
		}
		ds, err := h.takeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot): // and no token is charged
		case transient(err), indeterminate(err), err == nil && substituted(ds):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil:
			t.fatalf("TakeAll%s:\n%s\n\twant quota.ErrCrossSlot, or decisions", show(cs), answer(nil, err))
		default:
			wants := make([]quota.Decision, len(cs))
			for i := range cs {
				wants[i] = want(cs[i], granted)
			}
			got := slices.Clone(ds)
			for i := range got { // parts are decided at different times, and the case marked tests Split
				got[i].At, got[i].RetryAfter, got[i].ResetAfter, got[i].Split = 0, 0, 0, false
			}
			if !slices.Equal(got, wants) {
				t.fatalf("TakeAll%s:\n%s\nwhere the right answer, but for times and the mark, is\n%s", show(cs), answer(ds, nil), expectation(wants))
			}
		}
		for _, key := range keys {
			if got := t.used(h, l, key); got != used[key] {
				t.fatalf("TakeAll%s:\n%s\nafterwards:\n\tgot  %d tokens charged to %q\n\twant %d", show(cs), answer(ds, err), got, key, used[key])
			}
		}
	})
}

// marked makes lists over as many groups as a list can have. A store may hold groups together, by chance or because it
// found all keys on one server, and then decides them in one step, at one time. Otherwise each decision must say that
// the list was taken in parts.
func marked(t *trial) {
	h := t.open(Opening{})
	needParts(t, h)
	l := t.named("tokens", goOnly, numbers{limit: 12})
	t.rounds(10, func(round int) {
		var cs []quota.Charge
		for n := range quota.MaxCharges {
			cs = append(cs, quota.Charge{Limit: l, Key: fmt.Sprintf("g%d-%d", n, round), Cost: 1})
		}
		ds, err := h.takeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot): // and no parts are taken
			return
		case transient(err), indeterminate(err), err == nil && substituted(ds):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil || !quota.Granted(ds):
			t.fatalf("TakeAll of 1 token to each of the keys g0 to g%d:\n%s\n\twant quota.ErrCrossSlot, or a grant", len(cs)-1, answer(ds, err))
		}
		for i, d := range ds {
			if d.Split != ds[0].Split || !d.Split && d.At != ds[0].At {
				t.fatalf("TakeAll of 1 token to each of the keys g0 to g%d, decisions 0 and %d:\n%s\n\twant quota.ErrCrossSlot, or Split set in every decision of a list that the store does not decide in one step, at one time",
					len(cs)-1, i, answer([]quota.Decision{ds[0], d}, nil))
			}
		}
	})
}
