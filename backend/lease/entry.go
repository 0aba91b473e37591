package lease

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// entry is what is kept of one limit and key.
type entry struct {
	hash  uint64
	limit unique.Handle[string]
	key   string
	next  atomic.Pointer[entry] // in its bucket
	lease atomic.Pointer[chunk] // changed under mu

	mu        sync.Mutex // never held during a request
	fetch     *fetch     // the request for a chunk that is under way, or nil
	returning int        // chunks that are being given back
	dead      bool       // not in the table any more
	touched   bool       // since the keeper last came by

	// What was spent lately, as a sliding window: cur since began, prev in the window before. Of the lease, counted
	// tokens are in it already.
	began, cur, prev, counted int64

	known   int64 // what the store had left at the time knownAt
	knownAt int64 // 0: never asked

	seen  *chunk // what the keeper saw, and how much was left of it
	level int64
}

// retire marks the entry as removed, if nobody needs it and nobody has. The caller holds the table's lock.
func (e *entry) retire() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dead || e.touched || e.fetch != nil || e.returning > 0 || e.lease.Load() != nil {
		return false
	}
	e.dead = true
	return true
}

// note keeps account of a decision of the store below on a charge that was not part of the lease.
func (e *entry) note(d *quota.Decision, spent, now, window int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.learn(d, now)
	e.spent(spent, now, window)
}

// learn remembers what the store has left. The caller holds the lock.
func (e *entry) learn(d *quota.Decision, now int64) { e.known, e.knownAt = d.Remaining, max(now, 1) }

// spent counts tokens. The caller holds the lock.
func (e *entry) spent(n, now, window int64) {
	switch passed := now - e.began; {
	case passed >= 2*window:
		e.began, e.cur, e.prev = now, 0, 0
	case passed >= window:
		e.began, e.cur, e.prev = e.began+window, 0, e.cur
	}
	e.cur += n
}

// tally counts what was spent of the lease since the last tally. The caller holds the lock.
func (e *entry) tally(now, window int64) {
	n := int64(0)
	if k := e.lease.Load(); k != nil {
		used := k.size - max(k.left.Load(), 0)
		n = max(used-e.counted, 0)
		e.counted = max(e.counted, used)
		if age := now - k.sent; age > window {
			n = scale(n, window, age)
		}
	}
	e.spent(n, now, window)
}

// A chunk is at most one part in so many of what the store has left, divided by the number of instances. A process
// holds two chunks of a key at most, so all together hold no more than a quarter of the capacity.
const part = 8

// want returns how large the next chunk should be. The caller holds the lock.
func (e *entry) want(l *quota.Limit, instances, now, window int64) int64 {
	e.tally(now, window)
	if e.knownAt == 0 || e.returning > 0 {
		return 0
	}
	demand := e.cur + scale(e.prev, window-min(now-e.began, window), window)
	capacity := l.Spec().Capacity
	has := max(min(e.known+refill(l, now-e.knownAt), capacity), 0)
	return min(demand, has/part/max(instances, 1))
}

// scale returns n·a/b, for 0 ≤ a ≤ b.
func scale(n, a, b int64) int64 {
	hi, lo := bits.Mul64(uint64(n), uint64(a))
	q, _ := bits.Div64(hi, lo, uint64(b))
	return int64(q)
}

// A rest is what is left of a chunk that is on its way back.
type rest struct {
	entry *entry
	chunk *chunk
	n     int64
	from  quota.Source // who decided on the charge
}

// vacate ends the lease and appends what is left of it to rests, which go back.
func (e *entry) vacate(rests []rest) []rest {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.lease.Load(); k != nil {
		e.lease.Store(nil)
		rests = e.yield(k, k.close(), quota.FromStore, rests)
	}
	return rests
}

// yield appends n tokens of a chunk to rests. The caller holds the lock.
func (e *entry) yield(k *chunk, n int64, from quota.Source, rests []rest) []rest {
	if n > 0 {
		e.returning++
		rests = append(rests, rest{e, k, n, from})
	}
	return rests
}

// returned notes that a rest went back, or was lost.
func (e *entry) returned() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.returning--
}

// drop ends the lease; what is left of it is worth nothing.
func (e *entry) drop() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.lease.Load(); k != nil {
		k.close()
		e.lease.Store(nil)
	}
}
