package lease

import (
	"math/bits"
	"sync"
	"sync/atomic"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// entry is the state of one limit and key: its lease, and the figures from which the next chunk is sized.
type entry struct {
	hash  uint64
	limit unique.Handle[string]
	key   string
	next  atomic.Pointer[entry] // in its bucket
	lease atomic.Pointer[chunk] // changed under mu

	mu        sync.Mutex // never held during a request
	request   *request   // the request for a chunk that is in flight, or nil
	refunding int        // chunks that are being given back
	dead      bool       // not in the table any more
	touched   bool       // asked for since the last call of tend

	// Tokens spent lately, as a sliding window: cur since began, prev in the window before. They include counted
	// tokens of the present lease.
	began, cur, prev, counted int64

	known   int64 // tokens that the store had left at the time knownAt
	knownAt int64 // 0: no decision of the store is known

	seen  *chunk // the lease at the last call of tend, and the tokens that it had left
	level int64
}

// retire marks the entry as removed, unless it is in use or removed already. The caller must hold the table's
// lock.
func (e *entry) retire() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.dead || e.touched || e.request != nil || e.refunding > 0 || e.lease.Load() != nil {
		return false
	}
	e.dead = true
	return true
}

// note accounts for a decision of the store below on a charge that was not paid by the lease.
func (e *entry) note(d *quota.Decision, spent, now, window int64) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.learn(d, now)
	e.spent(spent, now, window)
}

// learn records how many tokens the store has left. The caller must hold the lock.
func (e *entry) learn(d *quota.Decision, now int64) { e.known, e.knownAt = d.Remaining, max(now, 1) }

// spent counts n tokens as spent now. The caller must hold the lock.
func (e *entry) spent(n, now, window int64) {
	switch passed := now - e.began; {
	case passed >= 2*window:
		e.began, e.cur, e.prev = now, 0, 0
	case passed >= window:
		e.began, e.cur, e.prev = e.began+window, 0, e.cur
	}
	e.cur += n
}

// tally counts the tokens spent out of the lease since the last tally. The caller must hold the lock.
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

// A chunk is at most 1/part of the tokens that the store has left, divided by the number of instances. A process
// holds at most two chunks of a key, so all processes together hold no more than a quarter of the capacity.
const part = 8

// nextSize returns the size of the next chunk in tokens; 0 is no chunk. The caller must hold the lock.
func (e *entry) nextSize(l *quota.Limit, instances, now, window int64) int64 {
	e.tally(now, window)
	if e.knownAt == 0 || e.refunding > 0 {
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

// A refund is the tokens of a chunk that are to be given back.
type refund struct {
	entry *entry
	chunk *chunk
	n     int64
	from  quota.Source // of the decision that charged the chunk
}

// release ends the lease, and appends a refund of the tokens that it had left.
func (e *entry) release(refunds []refund) []refund {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.lease.Load(); k != nil {
		e.lease.Store(nil)
		refunds = e.appendRefund(refunds, k, k.close(), quota.FromStore)
	}
	return refunds
}

// appendRefund appends a refund of n tokens of a chunk, if n is above 0. The caller must hold the lock.
func (e *entry) appendRefund(refunds []refund, k *chunk, n int64, from quota.Source) []refund {
	if n > 0 {
		e.refunding++
		refunds = append(refunds, refund{e, k, n, from})
	}
	return refunds
}

// refunded notes that a refund was given back, or lost.
func (e *entry) refunded() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.refunding--
}

// drop ends the lease for a reset of the key, and appends a refund of the tokens that it had left, even if there are
// none: the end of the refund tells whether tokens taken out of the lease may be given back.
func (e *entry) drop(refunds []refund) []refund {
	e.mu.Lock()
	defer e.mu.Unlock()
	if k := e.lease.Load(); k != nil {
		e.lease.Store(nil)
		e.refunding++
		refunds = append(refunds, refund{e, k, k.close(), quota.FromStore})
	}
	return refunds
}

// restore puts back n tokens that were taken out of a chunk. If the chunk has ended it returns a refund instead.
func (e *entry) restore(k *chunk, n int64) (left int64, refunds []refund) {
	left, ok := k.put(n)
	switch {
	case ok:
		return left, nil
	case left == worthlessChunk:
		return 0, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	return 0, e.appendRefund(nil, k, n, quota.FromStore)
}
