package conformance

import (
	"fmt"
	"math"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var misfitCases = []testCase{
	{rule: c8, name: "rules", needs: []Feature{Exact}, run: otherRules},
}

// otherRules changes the rule of limits that hold state, in every pair, until a reset.
func otherRules(t *trial) {
	var trace []step
	for i, k := range kinds {
		for j, other := range kinds {
			if k.name == other.name || (k.name == fixedWindow.name || k.name == fromFirst.name) && (other.name == fixedWindow.name || other.name == fromFirst.name) {
				continue
			}
			name := fmt.Sprintf("pair%d.%d", i, j)
			is := t.named(name, k, numbers{10, 1, 10 * 24 * 365 * 60 * 60 * 1e8})
			was := t.named(name, other, numbers{10, 1, 10 * 24 * 365 * 60 * 60 * 1e8})
			good := t.named("good", tokenBucket, numbers{1000, 1, 1e9})
			add := func(list bool, cs ...quota.Charge) {
				s := step{id: 1 + len(trace), list: list}
				for _, c := range cs {
					c.Key = "g/" + c.Key
					s.charges = append(s.charges, charge{Charge: c})
				}
				trace = append(trace, s)
			}
			add(false, quota.Charge{Limit: was, Key: "k", Cost: 3})
			for op := quota.OpTake; op <= quota.OpReset; op++ {
				add(op%2 == 0, quota.Charge{Limit: is, Key: "k", Cost: 1, Op: op})
			}
			if driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey {
				add(true, quota.Charge{Limit: good, Key: "k", Cost: 1}, quota.Charge{Limit: is, Key: "k", Cost: 1})
				add(true, quota.Charge{Limit: is, Key: "k", Cost: 1}, quota.Charge{Limit: good, Key: "k", Cost: 1})
			}
			add(false, quota.Charge{Limit: is, Key: "another", Cost: 2})
			add(false, quota.Charge{Limit: was, Key: "k", Cost: 2})
			add(false, quota.Charge{Limit: was, Key: "k", Op: quota.OpReset})
			add(false, quota.Charge{Limit: is, Key: "k", Cost: 2})
			add(false, quota.Charge{Limit: good, Key: "k", Op: quota.OpPeek})
		}
	}
	t.perform(trace)
}

var stateless = []testCase{
	{rule: c2, name: "no state", needs: []Feature{Exact}, run: rulesWithoutState},
}

// rulesWithoutState changes limits that hold state to rules that keep none, charges by those, and changes back.
func rulesWithoutState(t *trial) {
	var trace []step
	for i, k := range kinds {
		for _, none := range keepNone {
			name := fmt.Sprintf("plan%d.%s", i, none.name)
			n := numbers{10, 1, year}
			own, other, good := t.named(name, k, n), t.named(name, none, n), t.named("good", tokenBucket, numbers{1000, 1, time.Second})
			add := func(list bool, id string, cs ...quota.Charge) {
				s := step{id: 1 + len(trace), list: list}
				for _, c := range cs {
					c.Key, c.ID = "g/"+c.Key, id
					s.charges = append(s.charges, charge{Charge: c})
				}
				trace = append(trace, s)
			}
			peek := func() { add(false, "", quota.Charge{Limit: own, Key: "k", Cost: 8, Op: quota.OpPeek}) }
			add(false, "", quota.Charge{Limit: own, Key: "k", Cost: 3})
			for _, key := range []string{"k", "fresh"} {
				for op := quota.OpTake; op <= quota.OpAhead; op++ {
					for _, cost := range []int64{0, 1, 11, math.MaxInt64} {
						add(op%2 == 0, "", quota.Charge{Limit: other, Key: key, Cost: cost, Op: op})
					}
					peek()
				}
			}
			if driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey {
				for _, cost := range []int64{0, 1} {
					a, b := quota.Charge{Limit: good, Key: "k", Cost: 1}, quota.Charge{Limit: other, Key: "k", Cost: cost}
					add(true, "", a, b)
					add(true, "", b, a)
					if !t.lacks(IDs) {
						id := fmt.Sprint(name, cost)
						add(true, id, a, b)
						add(true, id, a, b)
					}
					peek()
				}
			}
			add(false, "", quota.Charge{Limit: own, Key: "k", Cost: 7})
			add(false, "", quota.Charge{Limit: own, Key: "k", Cost: 1})
			add(false, "", quota.Charge{Limit: own, Key: "fresh", Cost: 10})
		}
	}
	t.perform(trace)
}

// getsHolds changes limits in use to their rule with holds. The consumption stays.
func getsHolds(t *trial) {
	var trace []step
	for i, k := range builtIn {
		name := fmt.Sprintf("plan%d", i)
		n := numbers{10, 10, year}
		was, is := t.named(name, k, n), t.named(name, heldKind(k.name+", held", k.make), n)
		add := func(list bool, c quota.Charge, of int) {
			c.Key = "g/k"
			s := step{id: 1 + len(trace), list: list, charges: []charge{{Charge: c, receipt: receipt{of, 0}}}}
			if list && driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey {
				s.charges = append(s.charges, charge{Charge: quota.Charge{Limit: is, Key: "g/other", Cost: 1}})
			}
			trace = append(trace, s)
		}
		add(false, quota.Charge{Limit: was, Cost: 3}, 0)
		add(i%2 == 0, quota.Charge{Limit: is, Op: quota.OpPeek}, 0)
		add(i%2 == 1, quota.Charge{Limit: is, Op: quota.OpHold, Cost: 4}, 0)
		hold := len(trace)
		add(false, quota.Charge{Limit: is, Cost: 4}, 0)
		add(i%2 == 1, quota.Charge{Limit: is, Op: quota.OpSpend, Cost: 1}, hold)
		add(i%2 == 0, quota.Charge{Limit: is, Cost: 6}, 0)
	}
	t.perform(trace)
}

// heldRepeats grants ids to holds and renewals, and repeats them when the limit has another TTL: the receipt stays, and is good.
func heldRepeats(t *trial) {
	var trace []step
	for i, k := range heldKinds {
		name := fmt.Sprint("plan", i)
		was, is := t.named(name, k, numbers{10, 9, year}), t.named(name, k, numbers{10, 70, year})
		add := func(l *quota.Limit, id string, c quota.Charge, of int) int {
			c.Limit, c.Key, c.ID = l, "g/k", id
			trace = append(trace, step{id: 1 + len(trace), list: i%2 == 0, other: len(trace)%2 == 0, charges: []charge{{Charge: c, receipt: receipt{of, 0}}}})
			return len(trace)
		}
		for n, by := range []*quota.Limit{is, was} {
			hold, renewal := fmt.Sprint("hold", i, n), fmt.Sprint("renewal", i, n)
			add(was, hold, quota.Charge{Op: quota.OpHold, Cost: 4}, 0)
			made := add(is, hold, quota.Charge{Op: quota.OpHold, Cost: 4}, 0)
			add(by, renewal, quota.Charge{Op: quota.OpRenew}, made)
			made = add(was, renewal, quota.Charge{Op: quota.OpRenew}, made)
			add(is, "", quota.Charge{Op: quota.OpSpend, Cost: 1}, made)
			add(was, "", quota.Charge{Op: quota.OpPeek}, 0)
		}
	}
	t.perform(trace)
}
