package conformance

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var atomicityCases = []testCase{
	{rule: s2, name: "longest list", needs: []Feature{Exact}, run: longestList},
	{rule: c6, name: "beyond", needs: []Feature{Exact}, run: beyond},
	{rule: c6, name: "marked", needs: []Feature{Exact}, run: marked},
	{rule: c6, name: "verdicts of parts", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) { verdictsOfParts(t, !t.lacks(Clock)) }},
	{rule: c6, name: "verdicts of parts, own clock", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) { verdictsOfParts(t, false) }},
	{rule: c6, name: "one part", needs: []Feature{Exact}, provisional: "1.1", run: onePart},
	{rule: c6, name: "marked when denied", needs: []Feature{Exact}, provisional: "1.1", run: markedWhenDenied},
	{rule: c6, name: "alternatives", needs: []Feature{Exact}, provisional: "1.1", run: alternativesBeyond},
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
			return quota.Decision{Allowed: d.Allowed, Capacity: 12, Remaining: left}
		}
		d.Capacity = 12
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
				c.Op, c.MadeAt = quota.OpRefund, 1<<53
			case 3:
				c.Cost = 12
			}
			granted = granted && (c.Op != quota.OpTake || c.Cost <= 12-used[c.Key])
			cs = append(cs, c)
		}
		ds, err := h.chargeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot): // and no token is charged
		case transient(err), indeterminate(err), err == nil && substituted(ds):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil:
			t.fatalf("ChargeAll%s:\n%s\n\twant quota.ErrCrossSlot, or decisions", show(cs), answer(nil, err))
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
				t.fatalf("ChargeAll%s:\n%s\nwhere the right answer, but for times and the mark, is\n%s", show(cs), answer(ds, nil), expectation(wants))
			}
		}
		for _, key := range keys {
			if got := t.used(h, l, key); got != used[key] {
				t.fatalf("ChargeAll%s:\n%s\nafterwards:\n\tgot  %d tokens charged to %q\n\twant %d", show(cs), answer(ds, err), got, key, used[key])
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
		ds, err := h.chargeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot): // and no parts are taken
			return
		case transient(err), indeterminate(err), err == nil && substituted(ds):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil || !quota.Granted(ds):
			t.fatalf("ChargeAll of 1 token to each of the keys g0 to g%d:\n%s\n\twant quota.ErrCrossSlot, or a grant", len(cs)-1, answer(ds, err))
		}
		for i, d := range ds {
			if d.Split != ds[0].Split || !d.Split && d.At != ds[0].At {
				t.fatalf("ChargeAll of 1 token to each of the keys g0 to g%d, decisions 0 and %d:\n%s\n\twant quota.ErrCrossSlot, or Split set in every decision of a list that the store does not decide in one step, at one time",
					len(cs)-1, i, answer([]quota.Decision{ds[0], d}, nil))
			}
		}
	})
}

// markedWhenDenied makes lists over as many groups as a list can have, of which the last, the first or a middle charge is
// denied; a debit and a peek are among the others. A store that took them in parts must mark every decision.
func markedWhenDenied(t *trial) {
	h := t.open(Opening{})
	needParts(t, h)
	l := t.named("tokens", goOnly, numbers{limit: 12})
	t.rounds(12, func(round int) {
		var cs []quota.Charge
		for n := range quota.MaxCharges {
			c := quota.Charge{Limit: l, Key: fmt.Sprintf("g%d-%d", n, round), Cost: 1}
			switch n {
			case []int{0, quota.MaxCharges / 2, quota.MaxCharges - 1}[round%3]:
				c.Cost = 13
			case 7:
				c.Op = quota.OpPeek
			case 11:
				c.Op = quota.OpDebit
			}
			cs = append(cs, c)
		}
		ds, err := h.chargeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot):
			return
		case transient(err), indeterminate(err), err == nil && substituted(ds):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil || quota.Granted(ds):
			t.fatalf("ChargeAll of %d keys of as many groups, one of which does not fit:\n%s\n\twant quota.ErrCrossSlot, or a denial", len(cs), answer(ds, err))
		}
		for i, d := range ds {
			if d.Split != ds[0].Split || !d.Split && d.At != ds[0].At {
				t.fatalf("ChargeAll of %d keys of as many groups, one of which does not fit, decisions 1 and %d:\n%s\n\twant quota.ErrCrossSlot, or Split set in every decision of a list that the store does not decide in one step, at one time",
					len(cs), i+1, answer([]quota.Decision{ds[0], d}, nil))
			}
		}
	})
}

// alternativesBeyond makes alternatives whose keys the store does not decide in one step by its Atomicity: of one key each, and
// of several groups each. It must refuse them, and charge nothing, or decide them in one step.
func alternativesBeyond(t *trial) {
	h := t.open(Opening{})
	needParts(t, h)
	l := t.named("tokens", goOnly, numbers{limit: 12})
	t.rounds(16, func(round int) {
		var cs []quota.Charge
		for n := range 6 {
			c := quota.Charge{Limit: l, Key: fmt.Sprintf("g%d-%d", n, round), Cost: 1 + t.rng.Int64N(3), Alternative: uint8(n + 1)}
			if round%2 == 0 {
				c.Alternative = uint8(n/2 + 1)
			}
			if t.rng.IntN(3) == 0 {
				c.Cost = 13
			}
			cs = append(cs, c)
		}
		items, want := make([]driver.Item, len(cs)), make([]quota.Decision, len(cs))
		got, err := h.chargeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot): // and no token is charged
		case transient(err), indeterminate(err), err == nil && substituted(got):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil:
			t.fatalf("ChargeAll%s:\n%s\n\twant quota.ErrCrossSlot, or decisions", show(cs), answer(nil, err))
		default:
			if err := driver.Apply(cs, items, got[0].At, want); err != nil {
				t.fatalf("Apply%s: %v", show(cs), err)
			}
			if !slices.Equal(got, want) {
				t.fatalf("ChargeAll%s:\n%s\n\twant quota.ErrCrossSlot, or one step, of which the right answer is\n%s%s", show(cs), answer(got, nil), expectation(want), differing(got, nil, want))
			}
		}
		for i := range cs {
			if used := t.used(h, l, cs[i].Key); used != want[i].Charged {
				t.fatalf("ChargeAll%s:\n%s\nafterwards:\n\tgot  %d tokens charged to %q\n\twant %d", show(cs), answer(got, err), used, cs[i].Key, want[i].Charged)
			}
		}
	})
}

// onePart makes calls that the store decides in one step by its Atomicity, granted and denied, between lists that it takes
// in parts. Split must not be set.
func onePart(t *trial) {
	p := t.player(t.root, !t.lacks(Clock))
	needParts(t, p.first)
	l := t.named("tokens", tokenBucket, numbers{12, 5, time.Second})
	var trace []step
	play := func(cs ...quota.Charge) bool {
		s := step{id: 1 + len(trace), other: t.rng.IntN(2) == 0, list: t.rng.IntN(2) == 0, wait: 40 * time.Millisecond}
		for _, c := range cs {
			c.Limit = l
			s.charges = append(s.charges, charge{Charge: c})
		}
		trace = append(trace, s)
		wrong := p.play(&s)
		if wrong == "" && p.unsure != nil {
			t.skipf("not judged, because the store does not answer: %v", p.unsure)
		}
		for i, d := range p.last {
			if wrong == "" && d.Split {
				wrong = fmt.Sprintf("%s\n\twant no decision marked Split: the keys have one group", answer(p.last[i:i+1], nil))
			}
		}
		if wrong != "" {
			t.refute(trace, wrong, p.clock != nil)
		}
		return wrong == ""
	}
	for round := range 12 {
		// In parts, or refused. The case "verdicts of parts" judges them.
		p.first.chargeAll(bg, quota.Charge{Limit: l, Key: fmt.Sprint("x", round), Cost: 1}, quota.Charge{Limit: l, Key: fmt.Sprint("y", round), Cost: int64(1 + round%3*9)})
		group := fmt.Sprint("g", round%5)
		if !play(quota.Charge{Key: group, Cost: int64(1 + round)}) || !play(quota.Charge{Key: group, Op: quota.OpPeek, Cost: 20}) {
			return
		}
		if driver.AtomicityOf(p.first.store) == driver.OneKey {
			continue
		}
		for _, cost := range []int64{1, 3, 13} {
			if !play(quota.Charge{Key: group, Cost: 1}, quota.Charge{Key: group + "/a", Cost: cost}, quota.Charge{Key: group + "/b", Op: quota.OpDebit, Cost: 1}) {
				return
			}
		}
	}
}

// verdictsOfParts makes lists that the store does not decide in one step, of rules whose tokens come back, and compares the
// whole decisions with Apply: on a clock of the suite's at its time, else each at its own. A part that was given back in
// between may tell the times of that moment.
func verdictsOfParts(t *trial, injected bool) {
	c := newClock()
	o := Opening{}
	if injected {
		o.Clock = c.time
	}
	h := t.open(o)
	needParts(t, h)
	limits := []*quota.Limit{
		t.named("bucket", tokenBucket, numbers{12, 5, time.Hour}), t.named("window", fixedWindow, numbers{limit: 12, period: 24 * time.Hour}), t.named("tally", goOnly, numbers{limit: 12}),
	}
	keys := []string{"g0/a", "g1/a", "g2/a", "g3", "g4/a"}
	items := map[place]driver.Item{}
	now := func() quota.Micros {
		if o.Clock != nil {
			return c.micros()
		}
		return t.ask(h, quota.Charge{Limit: limits[0], Key: "idle", Op: quota.OpPeek}).At
	}
	t.rounds(60, func(round int) {
		c.add(time.Duration(t.rng.Int64N(int64(40 * time.Minute))))
		var cs []quota.Charge
		for _, n := range t.rng.Perm(len(keys))[:2+t.rng.IntN(len(keys)-1)] {
			c := quota.Charge{Limit: oneOf(t.rng, limits), Key: keys[n], Cost: 1 + t.rng.Int64N(3)}
			switch t.rng.IntN(10) {
			case 0:
				c.Op = quota.OpDebit
			case 1:
				c.Op = quota.OpPeek
			case 2:
				c.Op = quota.OpReset
			case 3, 4:
				c.Cost = 10
			case 5:
				c.Cost = 13
			}
			cs = append(cs, c)
		}
		begun := now()
		got, err := h.chargeAll(bg, cs...)
		switch {
		case errors.Is(err, quota.ErrCrossSlot):
			t.excusef("the store refuses lists that it does not decide in one step")
		case transient(err), indeterminate(err), err == nil && substituted(got):
			t.skipf("not judged, because the store does not answer: %v", err)
		case err != nil:
			t.fatalf("ChargeAll%s:\n%s\n\twant quota.ErrCrossSlot, or decisions", show(cs), answer(nil, err))
		}
		ended := now()
		if begun > ended {
			t.skipf("not judged, because the store's clock stepped back")
		}
		before := make([]driver.Item, len(cs))
		for i := range cs {
			before[i] = items[placeOf(&cs[i])]
		}
		want := make([]quota.Decision, len(cs))
		for i := range cs {
			apply := func(at quota.Micros) (driver.Item, quota.Decision, bool) {
				all, ds := slices.Clone(before), make([]quota.Decision, len(cs))
				if err := driver.Apply(cs, all, at, ds); err != nil {
					t.fatalf("Apply%s: %v", show(cs), err)
				}
				all[i].Write = false
				ds[i].Split = got[i].Split
				return all[i], ds[i], quota.Granted(ds)
			}
			if got[i].At < begun || got[i].At > ended {
				t.fatalf("ChargeAll%s, decision %d:\n%s\n\twant it at a time of the call, %d to %d", show(cs), i+1, answer(got, nil), begun, ended)
			}
			it, d, granted := apply(got[i].At)
			want[i] = d
			if items[placeOf(&cs[i])] = it; granted {
				continue
			}
			_, last, _ := apply(ended)
			if r := got[i].ResetAfter; last.ResetAfter <= r && r <= d.ResetAfter {
				want[i].ResetAfter = r
			}
			if left := got[i].Remaining; d.Remaining <= left && left <= last.Remaining {
				want[i].Remaining = left
			}
		}
		if !slices.Equal(got, want) {
			t.fatalf("ChargeAll%s:\n%s\nwhere the right answer, but for the mark, is\n%s%s", show(cs), answer(got, nil), expectation(want), differing(got, nil, want))
		}
	})
}
