package driver

import (
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// An Item is a store's content for one limit and key: a state, and the rule that left it. The zero Item is a key never
// seen.
type Item struct {
	Rule  quota.Rule
	State quota.State
	// Write is set by Apply: the item changed and must be stored, for at least Decision.ResetAfter; an item whose state
	// is zero must be deleted.
	Write bool
}

// ApplyOne is [Apply] for a single charge, without the copies that a list takes.
func ApplyOne(c *quota.Charge, it *Item, now quota.Micros, d *quota.Decision) error {
	if err := fits(c, it); err != nil {
		return err
	}
	decide(c, it, c.Op, now, d)
	return nil
}

// Apply decides a list of charges on the store's items for them, at one time, all-or-nothing. It updates the items and
// marks those that must be written, and writes a decision for each charge to out; items and out must be as long as
// cs. The list is granted if all decisions are allowed, but those of shadows. A store must call it under its lock, or write
// the marked items only if no item changed in between.
//
// Of alternatives, see [quota.Charge], only the charges of the first that fits are made; a limit and key that is in several
// of them has an item for each charge, of which at most one is marked.
//
// It fails with ErrMisconfigured, and changes nothing, where an item belongs to another rule that the limit's rule does not
// read, see quota.Spec. A limit whose rule keeps no
// state leaves items of any rule as they are. It fails with ErrInvalid where a limit is not valid, see [quota.Limit.Err].
func Apply(cs []quota.Charge, items []Item, now quota.Micros, out []quota.Decision) error {
	for i := range cs {
		if err := fits(&cs[i], &items[i]); err != nil {
			return err
		}
	}
	var few [8]Item
	next := few[:0]
	for i := range cs {
		next = append(next, items[i])
		decide(&cs[i], &next[i], cs[i].Op, now, &out[i])
	}
	from, to := Made(out[:len(cs)])
	copy(items[from:to], next[from:to])
	for i := range cs {
		if from <= i && i < to {
			continue
		}
		allowed, retryAfter := out[i].Allowed, out[i].RetryAfter
		peek := cs[i]
		if peek.Op > quota.OpPeek {
			peek.Held, peek.Until = 0, 0
			peek.Op, peek.Cost, peek.Floor = quota.OpPeek, 0, 0
		}
		// A state ahead of the clock is moved to it where nothing is charged.
		next[i] = items[i]
		decide(&peek, &next[i], quota.OpPeek, now, &out[i])
		out[i].Allowed, out[i].RetryAfter = allowed, retryAfter
		if items[i].Write = false; to == 0 && !again(cs, i) {
			items[i] = next[i]
		}
	}
	return nil
}

// again reports whether charge i is to a limit and key of an alternative before.
func again(cs []quota.Charge, i int) bool {
	for j := 0; cs[i].Alternative > 1 && cs[j].Alternative < cs[i].Alternative; j++ {
		if cs[j].Key == cs[i].Key && cs[j].Limit.Handle() == cs[i].Limit.Handle() {
			return true
		}
	}
	return false
}

// Made returns which charges were made, by the decisions on them: those from one index up to another. They are all charges of
// a granted list, those of the first alternative that fits, or none, where both indexes are 0. Shadows that do not fit were not
// made all the same.
func Made(ds []quota.Decision) (from, to int) {
	for from < len(ds) {
		for to = from + 1; to < len(ds) && ds[to].Alternative == ds[from].Alternative; to++ {
		}
		if quota.Granted(ds[from:to]) {
			return from, to
		}
		from = to
	}
	return 0, 0
}

// decide decides one charge as the operation op, and fills in its decision.
func decide(c *quota.Charge, it *Item, op quota.Op, now quota.Micros, d *quota.Decision) {
	if c.Limit.Spec().Unit == 0 { // the rule keeps no state: that of another rule stays as it is
		it.Write = false
		var none Item
		it = &none
	}
	held := &it.State
	gives := op == quota.OpRefund || op == quota.OpReset
	before := int64(0)
	if gives || op == quota.OpUpTo {
		before = remaining(c, held, now)
	}
	r := quota.Request{Op: op, Cost: c.Cost, Arg: c.MadeAt}
	if c.Op >= quota.OpAhead || c.Floor != 0 { // else the same, without a call on the hottest path there is
		r = c.Request()
		if r.Op = op; op == quota.OpSpend && late(c, now) {
			peek := *c
			peek.Held, peek.Until, peek.Cost = 0, 0, 0
			decide(&peek, it, quota.OpPeek, now, d)
			d.Allowed, d.RetryAfter = false, quota.Never
			return
		}
	}
	s, v := c.Limit.Algorithm().Decide(quota.State{Unit: held.Unit, A: held.A, B: held.B, C: held.C, Tail: held.Tail}, r, now)
	it.Write = v.Write
	if v.Write {
		held.Unit, held.A, held.B, held.C, held.Tail = s.Unit, s.A, s.B, s.C, s.Tail
		it.Rule = c.Limit.Spec().Rule
	}
	// Field by field: the compiler would build a literal aside and copy it, on the hottest path there is.
	d.Allowed, d.Source, d.Split, d.Replayed, d.Shadow, d.Alternative = v.Allowed, quota.FromStore, false, false, c.Shadow, c.Alternative
	d.Capacity = c.Limit.Spec().Capacity
	d.Remaining = v.Remaining
	d.Charged = 0
	d.RetryAfter = v.RetryAfter.Duration()
	d.ResetAfter = v.ResetAfter.Duration()
	d.Delay = 0
	d.Held, d.Until = 0, 0
	d.At = now
	if v.Allowed && (op == quota.OpTake || op == quota.OpDebit || op == quota.OpSpend) {
		d.Charged = c.Cost
	} else if v.Allowed && op == quota.OpAhead {
		d.Charged, d.Delay, d.RetryAfter = c.Cost, d.RetryAfter, 0
	} else if v.Allowed && op >= quota.OpHold { // or to renew, of which the cost is 0
		d.Held, d.Until = c.Cost+c.Held, c.Limit.Spec().Lapse(now)
	} else if gives {
		d.Charged = min(before-v.Remaining, 0)
	} else if v.Allowed && op == quota.OpUpTo {
		if d.Charged = r.Taking(before).Cost; c.Limit.Spec().Unit == 0 { // as much remains as before, whatever the floor
			d.Charged = min(c.Cost, before)
		}
	}
}

// late reports whether a spend comes when a store may have forgotten its request id, and so may have been made before.
func late(c *quota.Charge, now quota.Micros) bool {
	return c.ID != "" && now-c.Until >= quota.Micros(quota.IDWindow/time.Microsecond)
}

// remaining returns the tokens that a state leaves.
func remaining(c *quota.Charge, s *quota.State, now quota.Micros) int64 {
	_, v := c.Limit.Algorithm().Decide(*s, quota.Request{Op: quota.OpPeek}, now)
	return v.Remaining
}

func fits(c *quota.Charge, it *Item) error {
	spec := c.Limit.Spec()
	switch {
	case spec.Unit == 0: // the rule keeps no state, or the limit is not valid
		return c.Limit.Err()
	case it.Rule != spec.Rule && it.Rule != (quota.Rule{}) && it.Rule != spec.Reads:
		return misfit(c, it)
	}
	return nil
}

func misfit(c *quota.Charge, it *Item) error {
	return fmt.Errorf("quota: %w: limit %q holds state of rule %q and is now %q: give the limit another name",
		quota.ErrMisconfigured, c.Limit, it.Rule, c.Limit.Spec().Rule)
}
