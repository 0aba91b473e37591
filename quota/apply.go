package quota

import (
	"fmt"
	"math/bits"
)

// An Item is what a store holds for one charge: whose state it is, and the state. The zero Item is a
// key never seen.
type Item struct {
	Rule  Rule
	State State
	// Write is set by Apply: the item changed and is to be stored, for Decision.ResetAfter at least; an
	// item whose state is zero is to be deleted.
	Write bool
}

// ApplyOne is Apply for a single charge.
func ApplyOne(c *Charge, it *Item, now Micros, d *Decision) error {
	if err := fits(c, it); err != nil {
		return err
	}
	decide(c, it, c.Op, now, d)
	return nil
}

// Apply decides charges on the items a store holds for them, at one time: the all-or-nothing rule,
// written once. It updates items and marks those to be written, and writes a decision for each charge
// to out. The list is granted if all decisions are allowed. A store calls it under its lock, or stores
// the marked items only if no item changed meanwhile.
//
// It fails with ErrMisconfigured, and changes nothing, where an item belongs to another rule.
func Apply(cs []Charge, items []Item, now Micros, out []Decision) error {
	for i := range cs {
		if err := fits(&cs[i], &items[i]); err != nil {
			return err
		}
	}
	var few [8]Item
	next := few[:0]
	granted := true
	for i := range cs {
		next = append(next, items[i])
		decide(&cs[i], &next[i], cs[i].Op, now, &out[i])
		granted = granted && out[i].Allowed
	}
	if granted {
		copy(items, next)
		return nil
	}
	for i := range cs {
		allowed := out[i].Allowed
		peek := cs[i]
		if peek.Op != OpTake && peek.Op != OpPeek {
			peek.Cost = 0
		}
		decide(&peek, &items[i], OpPeek, now, &out[i])
		if allowed {
			out[i].Allowed, out[i].RetryAfter = true, 0
		}
	}
	return nil
}

// decide runs one charge as op and fills in its decision.
func decide(c *Charge, it *Item, op Op, now Micros, d *Decision) {
	held := &it.State
	s, v := c.Limit.algorithm.Decide(
		State{Unit: held.Unit, A: held.A, B: held.B, C: held.C, Tail: held.Tail},
		Request{Op: op, Cost: c.Cost, At: c.At}, now)
	it.Write = v.Write
	if v.Write {
		held.Unit, held.A, held.B, held.C, held.Tail = s.Unit, s.A, s.B, s.C, s.Tail
		it.Rule = c.Limit.spec.Rule
	}
	// Field by field: the compiler would build a literal aside and copy it, on the hottest path there is.
	d.Allowed, d.Source, d.Split, d.Replayed = v.Allowed, FromStore, false, false
	d.Limit = c.Limit.spec.Capacity
	d.Remaining = v.Remaining
	d.Charged = 0
	d.RetryAfter = v.RetryAfter.Duration()
	d.ResetAfter = v.ResetAfter.Duration()
	d.At = now
	if v.Allowed && (op == OpTake || op == OpDebit) {
		d.Charged = c.Cost
	}
}

// Granted reports whether a list with these decisions was granted: all are allowed.
func Granted(ds []Decision) bool {
	for i := range ds {
		if !ds[i].Allowed {
			return false
		}
	}
	return true
}

// Decider returns the index of the decision that settled a list: of a denied list the denial that
// lasts longest, of a granted one the decision that leaves the smallest share of its limit.
func Decider(ds []Decision) int {
	best := 0
	granted := Granted(ds)
	for i := range ds {
		a, b := &ds[i], &ds[best]
		switch {
		case granted:
			// Shares are compared as 128-bit products; a limit is at least 1.
			if less(a.Remaining, b.Limit, b.Remaining, a.Limit) {
				best = i
			}
		case !a.Allowed && (b.Allowed || a.RetryAfter > b.RetryAfter):
			best = i
		}
	}
	return best
}

// less reports whether a*b < c*d, for b and d of at least 1.
func less(a, b, c, d int64) bool {
	if (a < 0) != (c < 0) {
		return a < 0
	}
	neg := a < 0
	if neg {
		a, c = -a, -c
	}
	h1, l1 := bits.Mul64(uint64(a), uint64(b))
	h2, l2 := bits.Mul64(uint64(c), uint64(d))
	if h1 == h2 {
		return l1 != l2 && (l1 < l2) != neg
	}
	return (h1 < h2) != neg
}

func fits(c *Charge, it *Item) error {
	if it.Rule != c.Limit.spec.Rule && it.Rule != (Rule{}) {
		return misfit(c, it)
	}
	return nil
}

func misfit(c *Charge, it *Item) error {
	return fmt.Errorf("quota: %w: limit %q holds state of rule %q and is now %q: give the limit another name",
		ErrMisconfigured, c.Limit.name, it.Rule, c.Limit.spec.Rule)
}
