package conformance

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
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
	{name: "peek", charge: quota.Charge{Op: quota.OpPeek, Cost: 3}},
	{name: "debit", charge: quota.Charge{Op: quota.OpDebit, Cost: 3}, once: 3, twice: 6},
	{name: "refund", charge: quota.Charge{Op: quota.OpRefund, Cost: 3}, receipt: true, once: -3, twice: -6},
	{name: "settle", charge: quota.Charge{Op: quota.OpDebit, Cost: 2}, receipt: true, once: 2, twice: 4},
	{name: "reset", charge: quota.Charge{Op: quota.OpReset}, once: -inUse, twice: -inUse},
	{name: "take ahead", charge: quota.Charge{Op: quota.OpAhead, Cost: 3, Within: time.Hour}, once: 3, twice: 6},
}

// on returns the operation's charge to a limit and key.
func (o *operation) on(l *quota.Limit, key, id string, at quota.Micros) quota.Charge {
	c := o.charge
	c.Limit, c.Key, c.ID = l, key, id
	if o.receipt {
		c.At = at
	}
	return c
}
