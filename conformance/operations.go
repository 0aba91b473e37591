package conformance

import (
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// operation is a way to ask for one charge, of a key of which inUse tokens are in use and enough tokens are left. The cases
// that concern every call go through all operations: a new one is tested there by its line in the table.
type operation struct {
	name   string
	charge quota.Charge // without limit, key and id
	// receipt says that the charge corrects the one that brought the key to inUse.
	receipt bool
	// once and twice are the tokens that it adds to those in use where it is made once, and where it is made twice.
	once, twice int64
}

// inUse is the number of tokens that are in use of a key before an operation.
const inUse = 8

var operations = []operation{
	{name: "take", charge: quota.Charge{Op: quota.OpTake, Cost: 3}, once: 3, twice: 6},
	{name: "take above a floor", charge: quota.Charge{Op: quota.OpTake, Cost: 3, Floor: 1, FloorOf: 100}, once: 3, twice: 6},
	{name: "take up to", charge: quota.Charge{Op: quota.OpUpTo, Cost: 3, Least: 1}, once: 3, twice: 6},
	{name: "shadow", charge: quota.Charge{Op: quota.OpTake, Cost: 3, Shadow: true}, once: 3, twice: 6},
	{name: "peek", charge: quota.Charge{Op: quota.OpPeek, Cost: 3}},
	{name: "debit", charge: quota.Charge{Op: quota.OpDebit, Cost: 3}, once: 3, twice: 6},
	{name: "refund", charge: quota.Charge{Op: quota.OpRefund, Cost: 3}, receipt: true, once: -3, twice: -6},
	{name: "settle", charge: quota.Charge{Op: quota.OpDebit, Cost: 2}, receipt: true, once: 2, twice: 4},
	{name: "reset", charge: quota.Charge{Op: quota.OpReset}, once: -inUse, twice: -inUse},
	{name: "hold", charge: quota.Charge{Op: quota.OpHold, Cost: 3}, once: 3, twice: 6},
	{name: "spend", charge: quota.Charge{Op: quota.OpSpend, Cost: 3, Held: inUse}, receipt: true, once: 3 - inUse, twice: 6 - inUse},
	{name: "take ahead", charge: quota.Charge{Op: quota.OpAhead, Cost: 3, Within: time.Hour}, once: 3, twice: 6},
}

// on returns the operation's charge to a limit and key. of is the decision on use.
func (o *operation) on(l *quota.Limit, key, id string, of quota.Decision) quota.Charge {
	c := o.charge
	c.Limit, c.Key, c.ID = o.limit(l), key, id
	switch {
	case c.Op == quota.OpSpend:
		c.Until = of.Until
	case o.receipt:
		c.MadeAt = of.At
	}
	return c
}

// use returns the charge that brings a key to inUse.
func (o *operation) use(l *quota.Limit, key string) quota.Charge {
	c := quota.Charge{Limit: o.limit(l), Key: key, Op: quota.OpDebit, Cost: inUse}
	if o.charge.Op == quota.OpSpend {
		c.Op = quota.OpHold
	}
	return c
}

// limit returns a limit, or, of an operation with holds, one of another name whose rule has holds.
func (o *operation) limit(l *quota.Limit) *quota.Limit {
	if !o.charge.Op.Holds() {
		return l
	}
	return quota.NewLimit(l.Name()+"-held", algorithm.Held(l.Algorithm(), time.Hour))
}

// form is a form of a call: the operations of its charges, one for each.
type form struct {
	name   string
	ops    []*operation
	list   bool // by ChargeAll
	id     bool // with a request id
	spread bool // over several groups
}

// forms returns all forms of calls that a store is asked in: each operation alone and in lists, mixed lists up to the
// longest, with a request id and without one, in one group and over several.
func (t *trial) forms(a driver.Atomicity) (all []form) {
	add := func(f form) {
		all = append(all, f)
		if !t.lacks(IDs) {
			f.id, f.name = true, f.name+" with an id"
			all = append(all, f)
		}
	}
	var mixed []*operation
	for i := range operations {
		mixed = append(mixed, &operations[i])
	}
	for _, o := range mixed {
		add(form{name: o.name, ops: []*operation{o}})
		add(form{name: o.name + " in a list of one", ops: []*operation{o}, list: true})
		if a != driver.OneKey {
			add(form{name: o.name + " of two keys", ops: []*operation{o, o}, list: true})
		}
	}
	if a == driver.OneKey {
		return all
	}
	for n := 3; n < quota.MaxCharges; n = 2*n + t.rng.IntN(n) {
		f := form{name: fmt.Sprintf("a list of %d", n), list: true}
		for range n {
			f.ops = append(f.ops, oneOf(t.rng, mixed))
		}
		add(f)
	}
	longest := form{name: "the longest list", list: true}
	for i := range quota.MaxCharges {
		longest.ops = append(longest.ops, mixed[i%len(mixed)])
	}
	add(longest)
	for _, f := range all {
		if !f.id && len(f.ops) > 1 {
			f.spread, f.name = true, f.name+" over several groups"
			all = append(all, f)
		}
	}
	return all
}
