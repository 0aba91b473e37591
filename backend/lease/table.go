package lease

import (
	"math/bits"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

// table is a hash table of bounded size. Reading takes no lock: an entry that is removed while it is read still
// points to the entries after it.
type table struct {
	buckets []atomic.Pointer[entry]
	mu      sync.Mutex // held to change the table
	most    int        // entries that the table may have
	live    int        // entries that it has
}

// init makes room for most entries.
func (t *table) init(most int) {
	t.most = most
	t.buckets = make([]atomic.Pointer[entry], max(1, 1<<bits.Len(uint(most-1))/2))
}

func (t *table) bucket(h uint64) *atomic.Pointer[entry] {
	return &t.buckets[h&uint64(len(t.buckets)-1)]
}

// find returns the entry of a limit and key, or nil.
func (t *table) find(h uint64, c *quota.Charge) *entry {
	e := t.bucket(h).Load()
	for e != nil && (e.hash != h || e.key != c.Key || e.limit != c.Limit.Handle()) {
		e = e.next.Load()
	}
	return e
}

// add returns the entry of a limit and key, a new one if need be, or nil if the table is full.
func (t *table) add(h uint64, c *quota.Charge, now int64) *entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	if e := t.find(h, c); e != nil {
		return e
	}
	if t.live >= t.most && !t.evict() {
		return nil
	}
	b := t.bucket(h)
	e := &entry{hash: h, limit: c.Limit.Handle(), key: strings.Clone(c.Key), began: now, touched: true}
	e.next.Store(b.Load())
	b.Store(e)
	t.live++
	return e
}

// evict removes an unused entry, if it finds one within a few buckets. The caller must hold the lock.
func (t *table) evict() bool {
	const looks = 8
	for at, n := rand.N(len(t.buckets)), 0; n < looks; n++ {
		p := &t.buckets[(at+n)%len(t.buckets)]
		for e := p.Load(); e != nil; p, e = &e.next, e.next.Load() {
			if e.retire() {
				t.unlink(p, e)
				return true
			}
		}
	}
	return false
}

// remove takes an entry out if it is unused.
func (t *table) remove(e *entry) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !e.retire() {
		return
	}
	p := t.bucket(e.hash)
	for p.Load() != e {
		p = &p.Load().next
	}
	t.unlink(p, e)
}

// unlink takes out e, to which p points. The caller must hold the lock.
func (t *table) unlink(p *atomic.Pointer[entry], e *entry) {
	p.Store(e.next.Load())
	t.live--
}

// all yields every entry, and perhaps some that are added or removed meanwhile.
func (t *table) all(yield func(*entry) bool) {
	for i := range t.buckets {
		for e := t.buckets[i].Load(); e != nil; e = e.next.Load() {
			if !yield(e) {
				return
			}
		}
	}
}
