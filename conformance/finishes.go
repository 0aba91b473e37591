package conformance

import (
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// finisher makes a trace of calls on a limit with holds, each by a handle of its own choice.
type finisher struct {
	l     *quota.Limit
	key   string
	trace []step
}

// do adds a call of one charge, whose receipt is that of step of, and returns its step.
func (f *finisher) do(wait time.Duration, id string, op quota.Op, cost int64, of int) int {
	n := len(f.trace)
	f.trace = append(f.trace, step{id: 1 + n, wait: wait, list: n%3 == 0, other: n%2 == 0,
		charges: []charge{{Charge: quota.Charge{Limit: f.l, Key: f.key, Op: op, Cost: cost, ID: id}, receipt: receipt{of, 0}}}})
	return n + 1
}

// twice adds a call under an id, its repeat, and a peek, which shows whether the repeat had an effect.
func (f *finisher) twice(wait time.Duration, id string, op quota.Op, cost int64, of int) int {
	made := f.do(wait, id, op, cost, of)
	f.do(0, id, op, cost, of)
	f.do(0, "", quota.OpPeek, 0, 0)
	return made
}

// finishes has several callers hold tokens until one time, and repeats each call that ends or renews one of the holds, under its id,
// before the hold lapses and after: the repeat neither ends nor moves the hold of another caller, and is not charged again.
func finishes(t *trial) {
	n := numbers{limit: 20, refill: 59_999, period: year}
	if t.lacks(Clock) {
		n.refill = 199
	}
	ttl := ttlOf(n)
	for i, k := range heldKinds {
		f := finisher{l: t.named(fmt.Sprint("finished", i), k, n), key: "g/k"}
		var made []int
		for range 5 {
			made = append(made, f.do(0, "", quota.OpHold, 2, 0))
		}
		f.twice(0, "release", quota.OpSpend, 0, made[0])
		f.twice(0, "settle", quota.OpSpend, 1, made[1])
		renewed := f.twice(ttl/2, "renew", quota.OpRenew, 0, made[2])
		f.twice(0, "end", quota.OpSpend, 1, renewed)
		f.twice(ttl, "late", quota.OpSpend, 2, made[3])
		f.twice(0, "late release", quota.OpSpend, 0, made[4])
		f.twice(0, "late renewal", quota.OpRenew, 0, made[4]) // denied each time
		t.perform(f.trace)
		if t.hasFailed() {
			return
		}
	}
}

// livesOfFinishes repeats calls that end or renew holds when another call could still end them, which is for quota.IDWindow after
// the lapse, and not only for quota.IDWindow after the call.
func livesOfFinishes(t *trial) {
	n := numbers{limit: 20, refill: 59_999, period: year}
	for i, k := range heldKinds {
		f := finisher{l: t.named(fmt.Sprint("finished", i), k, n), key: "g/k"}
		one, two := f.do(0, "", quota.OpHold, 2, 0), f.do(0, "", quota.OpHold, 2, 0)
		f.do(0, "settle", quota.OpSpend, 1, one)
		f.do(0, "renew", quota.OpRenew, 0, two)
		for _, wait := range []time.Duration{ttlOf(n), quota.IDWindow - time.Microsecond} {
			f.do(wait, "settle", quota.OpSpend, 1, one)
			f.do(0, "renew", quota.OpRenew, 0, two)
			f.do(0, "", quota.OpPeek, 0, 0)
		}
		t.perform(f.trace)
		if t.hasFailed() {
			return
		}
	}
}
