package resilience

import (
	"math"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// keyTables is the number of tables over which a fallback spreads its keys.
const keyTables = 64

// keyTable holds the states of the keys with one hash.
//
// Its lock guards the table and all the states in it, whose invariants (see known, debt and share) hold
// whenever it is free. It is never held during a call of a store, and never together with another table's.
type keyTable struct {
	mu    sync.Mutex
	keys  map[limitKey]*keyState
	all   []*keyState // the same states, for the sweep
	sweep int         // the next state to look at for one that can be dropped
	most  int         // how many states the table may hold
	// leftOut is the time since base up to which a key without a state may have used much of its limit.
	leftOut time.Duration
	// settledUpTo is the latest debt.upTo of a state that was dropped.
	settledUpTo quota.Micros
	forgot      bool // a key that had used quota, since that was last told

	owed, owing, reconciled int64 // tokens of all debts, keys with a debt, and tokens of settled debts
}

// owes notes a change of the key's debt, which was before. The caller holds the lock.
func (k *keyState) owes(before int64) {
	k.table.owed += k.debt.owed - before
	switch {
	case before == 0 && k.debt.owed > 0:
		k.table.owing++
	case before > 0 && k.debt.owed == 0:
		k.table.owing--
	}
}

// Readings tells whether the fallback decides, how many calls it decided, the keys that it keeps, and their debts. It tells
// the numbers of its own store too.
func (f *fallback) Readings(tell func(driver.Reading)) {
	var keys, owed, owing, reconciled int64
	for i := range f.tables {
		t := &f.tables[i]
		t.mu.Lock()
		keys, owed, owing, reconciled = keys+int64(len(t.all)), owed+t.owed, owing+t.owing, reconciled+t.reconciled
		t.mu.Unlock()
	}
	tellDegraded(&f.degraded, &f.answered, tell)
	tell(driver.Reading{Metric: driver.MetricFallbackKeys, Value: keys})
	tell(driver.Reading{Metric: driver.MetricMaxFallbackKeys, Value: int64(f.maxKeys())})
	tell(driver.Reading{Metric: driver.MetricOwedTokens, Value: owed})
	tell(driver.Reading{Metric: driver.MetricOwingKeys, Value: owing})
	tell(driver.Reading{Metric: driver.MetricReconciledTokens, Value: reconciled})
	driver.Readings(f.store, func(r driver.Reading) {
		r.Fallback = true
		tell(r)
	})
}

// keyState is all that a fallback keeps of one limit and key: the primary's last word, the debt to it, and
// the share that decides in its place. The table's lock guards it.
type keyState struct {
	id      limitKey
	table   *keyTable
	dropped bool // no longer in the table

	limit *quota.Limit // of the latest admission in the primary's place, nil if there was none
	known known
	debt  debt
	holds *holds // nil if no tokens are held here
	share share
}

// snapshot is the state of a key when the primary was asked.
type snapshot struct {
	table   *keyTable
	key     *keyState // nil if it had none
	version uint32
	owed    int64
	unpaid  bool // the primary must be charged a debt, or told of holds
}

// stateless reports whether the limit's rule keeps no state. Such a limit has no quota to share, and owes none: its
// charges pass by the state of the key, which another rule of the limit's name left there and may need again.
func stateless(l *quota.Limit) bool { return l.Spec().Unit == 0 }

func (f *fallback) table(c *quota.Charge) *keyTable {
	return &f.tables[driver.Hash(f.seed, c)%keyTables]
}

func (f *fallback) snapshot(c *quota.Charge) snapshot {
	s := snapshot{table: f.table(c)}
	if stateless(c.Limit) {
		return s
	}
	s.table.mu.Lock()
	if k := s.table.keys[keyOf(c)]; k != nil {
		s.key, s.version, s.owed, s.unpaid = k, k.known.version, k.debt.owed, k.debt.owed > 0
		if k.holds != nil {
			s.unpaid = s.unpaid || k.untold(c, f.now())
		}
	}
	s.table.mu.Unlock()
	return s
}

// record takes over the primary's decision on a charge, which was asked for after the snapshot. wasReset says
// that the decision reset the key.
func (f *fallback) record(c *quota.Charge, d *quota.Decision, before snapshot, wasReset bool) {
	if !byStore(d) {
		return
	}
	now := f.now()
	f.recovered(now)
	if stateless(c.Limit) {
		return
	}
	d = f.kept(c.Limit, d)
	t, k := before.table, before.key
	t.mu.Lock()
	defer t.mu.Unlock()
	if k != nil && wasReset {
		owed := k.debt.owed
		k.debt.forgive(before.owed)
		k.holds.forget()
		k.owes(owed)
	}
	inOrder := k != nil && !k.dropped && k.known.version == before.version
	if k == nil || k.dropped {
		if k = t.keys[keyOf(c)]; k == nil {
			first := known{}
			first.record(d, now, true)
			weight := first.weight(now)
			if weight == 0 {
				return
			}
			if k = t.add(c, now, weight); k == nil {
				t.forget(&first, now)
			}
			if f.tellForgotten(t); k == nil {
				return
			}
		}
	}
	k.record(d, now, inOrder)
}

// kept returns a decision of the primary with a ResetAfter that lasts as long as the decision matters. A share of one
// token of a smaller part of the limit is empty after a debt, and is full again later than the limit is.
func (f *fallback) kept(l *quota.Limit, d *quota.Decision) *quota.Decision {
	if !f.limits.least || d.Remaining >= 0 {
		return d
	}
	n, b := f.lastCount.Load(), l.Spec().Capacity
	if b == 0 || b >= n {
		return d
	}
	later := *d
	times := (n-1)/b + 1
	if later.ResetAfter = quota.Never; d.ResetAfter <= quota.Never/time.Duration(times) {
		later.ResetAfter = d.ResetAfter * time.Duration(times)
	}
	return &later
}

// record takes over a decision of the primary, which ends the service of the share. The caller holds the
// lock.
func (k *keyState) record(d *quota.Decision, now time.Duration, inOrder bool) {
	k.known.record(d, now, inOrder)
	k.share.suspend(now)
}

// A key that has used no more of its limit than this may be forgotten where there is no room: in an outage it gets the
// share of a new one, and the bound holds. littleUse is so little that no other key is looked for.
const (
	wholeUse  = 1 << 9 // the product with a limit of 2^53 has 62 bits
	smallUse  = wholeUse / 2
	littleUse = wholeUse / 16
	mustKeep  = math.MaxInt64 // the weight of a state that must be kept
)

// add returns a new state for a key, or nil if there is no room. A full table forgets the state with the least weight
// of some, if it is less than that of the new one. For a key that must be kept no key is forgotten that has used much. The caller holds the lock.
func (t *keyTable) add(c *quota.Charge, now time.Duration, weight int64) *keyState {
	// For each state that is added, two are looked at, so that those that can be dropped are.
	look, full := 2, len(t.all) >= t.most
	least, at := weight, -1
	if full && weight > littleUse {
		look = 32
	}
	if weight == mustKeep {
		least = smallUse + 1
	}
	for i := 0; i < look && len(t.all) > 0; i++ {
		t.sweep %= len(t.all)
		w := t.all[t.sweep].weight(now)
		if w == 0 {
			t.drop(t.sweep)
			if i > 0 {
				break
			}
			continue
		}
		if w < least {
			least, at = w, t.sweep
		}
		t.sweep++
		if full && least <= littleUse {
			break
		}
	}
	if len(t.all) >= t.most {
		if at < 0 {
			return nil
		}
		t.forget(&t.all[at].known, now)
		t.drop(at)
	}
	k := &keyState{id: keyOf(c), table: t, debt: debt{from: t.settledUpTo, upTo: t.settledUpTo}}
	k.id.key = strings.Clone(k.id.key) // not the request that it may be cut from
	t.keys[k.id] = k
	t.all = append(t.all, k)
	return k
}

// drop removes the state at an index of all. The caller holds the lock.
func (t *keyTable) drop(i int) {
	k, last := t.all[i], len(t.all)-1
	k.dropped = true
	t.settledUpTo = max(t.settledUpTo, k.debt.upTo)
	delete(t.keys, k.id)
	t.all[i], t.all[last] = t.all[last], nil
	t.all = t.all[:last]
}

// forget notes that the table has no state of a key of which the primary said this. The caller holds the lock.
func (t *keyTable) forget(k *known, now time.Duration) {
	t.forgot = true
	if k.weight(now) > smallUse {
		t.leftOut = max(t.leftOut, k.whole)
	}
}

// weight returns the weight of a state: 0 if a new one would say the same, mustKeep if the key owes quota or holds tokens or a call is
// using it. The caller holds the lock.
func (k *keyState) weight(now time.Duration) int64 {
	if k.debt.owed > 0 || k.share.inFlight > 0 || k.holds != nil && k.holding(k.limit, now) != nil {
		return mustKeep
	}
	return k.known.weight(now)
}
