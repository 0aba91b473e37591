package local

import (
	"math/rand/v2"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// shard is a hash table: an open-addressed index of slot numbers over slots that never move while in use.
// Neither index nor slots hold a pointer, so the garbage collector does not look into them.
type shard struct {
	// The first cache line, which every charge writes.
	mu    sync.Mutex
	last  quota.Micros       // of the latest decision, by the monotonic clock
	index []uint64           // 32 bits of hash and a slot number plus one; 0 is empty
	due   int                // places that sweep has to look at, in eighths
	kept  int                // charges that were stored
	tails map[uint32][]int64 // State.Tail of the slots that have one

	// The second cache line, which most charges only read.
	kinds  kinds
	slots  slab[slot]
	pieces slab[piece]
	live   int // slots in use
	hand   int // the place in the index that sweep looks at next
	_      [40]byte
}

// slot holds the state of a limit and key, in one cache line unless the key is long.
type slot struct {
	a, b, c int64
	expires quota.Micros // from then on the state equals a fresh one
	kind    uint32
	next    uint32 // the number of the key's next piece, plus one; 0 is none
	size    uint16 // of the key in bytes; 0 is a free slot
	text    [22]byte
}

// piece is a further part of the text of a long key.
type piece struct {
	next uint32 // the number of the next piece, plus one; 0 is none
	text [28]byte
}

// tag is the half of a hash that the index keeps; the other half chose the shard.
func tag(h uint64) uint64 { return h >> 32 }

// find returns the slot of a limit and key, or -1.
func (sh *shard) find(h uint64, c *quota.Charge) int {
	if len(sh.index) == 0 {
		return -1
	}
	mask := uint64(len(sh.index) - 1)
	limit := c.Limit.Handle()
	for i := tag(h) & mask; ; i = (i + 1) & mask {
		e := sh.index[i]
		if e == 0 {
			return -1
		}
		if e>>32 == tag(h) {
			n := uint32(e) - 1
			if sl := sh.slots.at(n); int(sl.size) == len(c.Key) && sh.kinds[sl.kind].limit == limit && sh.holds(sl, c.Key) {
				return int(n)
			}
		}
	}
}

// holds reports whether the key of a slot is key; both must have the same length.
func (sh *shard) holds(sl *slot, key string) bool {
	if len(key) <= len(sl.text) {
		return string(sl.text[:len(key)]) == key
	}
	if string(sl.text[:]) != key[:len(sl.text)] {
		return false
	}
	key = key[len(sl.text):]
	for at := sl.next; at != 0; {
		r := sh.pieces.at(at - 1)
		n := min(len(key), len(r.text))
		if string(r.text[:n]) != key[:n] {
			return false
		}
		key, at = key[n:], r.next
	}
	return true
}

// load fills a zero Item with the state of slot n, unless n is negative or the state equals a fresh one by now.
func (sh *shard) load(n int, now quota.Micros, it *driver.Item) {
	if n < 0 {
		return
	}
	sl := sh.slots.at(uint32(n))
	if sl.expires <= now {
		return
	}
	k := &sh.kinds[sl.kind]
	it.Rule = k.rule
	it.State.Unit, it.State.A, it.State.B, it.State.C = k.unit, sl.a, sl.b, sl.c
	if sh.tails != nil {
		it.State.Tail = sh.tails[uint32(n)]
	}
}

// save stores an item in slot n.
func (sh *shard) save(n int, it *driver.Item, expires quota.Micros) {
	sl := sh.slots.at(uint32(n))
	if k := sh.kinds[sl.kind]; k.rule != it.Rule || k.unit != it.State.Unit {
		sh.kinds.drop(sl.kind)
		sl.kind = sh.kinds.add(kind{k.limit, it.Rule, it.State.Unit})
	}
	sl.a, sl.b, sl.c = it.State.A, it.State.B, it.State.C
	sl.expires = expires
	if it.State.Tail != nil {
		if sh.tails == nil {
			sh.tails = make(map[uint32][]int64)
		}
		sh.tails[uint32(n)] = it.State.Tail
	} else if sh.tails != nil {
		delete(sh.tails, uint32(n))
	}
}

// insert makes a slot for a key, which must not have one.
func (sh *shard) insert(h uint64, key string, k kind) int {
	if 4*(sh.live+1) > 3*len(sh.index) {
		sh.resize(max(16, 2*len(sh.index)))
	}
	n := sh.slots.take()
	sl := sh.slots.at(n)
	*sl = slot{kind: sh.kinds.add(k), size: uint16(len(key))}
	key = key[copy(sl.text[:], key):]
	for at := &sl.next; len(key) > 0; {
		next := sh.pieces.take()
		*at = next + 1
		r := sh.pieces.at(next)
		key = key[copy(r.text[:], key):]
		r.next, at = 0, &r.next
	}
	sh.live++
	sh.link(tag(h), n)
	return int(n)
}

func (sh *shard) link(tag uint64, n uint32) {
	mask := uint64(len(sh.index) - 1)
	i := tag & mask
	for sh.index[i] != 0 {
		i = (i + 1) & mask
	}
	sh.index[i] = tag<<32 | uint64(n+1)
}

// remove frees slot n, whose hash has this tag.
func (sh *shard) remove(tag uint64, n uint32) {
	mask := uint64(len(sh.index) - 1)
	i := tag & mask
	for uint32(sh.index[i]) != n+1 {
		i = (i + 1) & mask
	}
	// Close the gap: move back each entry of the run that may stand there (Knuth, TAOCP 6.4, algorithm R).
	for j := (i + 1) & mask; sh.index[j] != 0; j = (j + 1) & mask {
		if home := sh.index[j] >> 32 & mask; (j-home)&mask >= (j-i)&mask {
			sh.index[i] = sh.index[j]
			i = j
		}
	}
	sh.index[i] = 0
	delete(sh.tails, n)
	sl := sh.slots.at(n)
	sh.kinds.drop(sl.kind)
	for at := sl.next; at != 0; at = sh.pieces.at(at - 1).next {
		sh.pieces.give(at - 1)
	}
	*sl = slot{}
	sh.slots.give(n)
	sh.live--
}

// resize gives the index another size, a power of two.
func (sh *shard) resize(size int) {
	old := sh.index
	sh.index = make([]uint64, size)
	for _, e := range old {
		if e != 0 {
			sh.link(e>>32, uint32(e)-1)
		}
	}
}

// tidy sweeps as many places as the charges since the last tidy made due: several at a time, so that the
// processor waits for their cache lines together.
func (sh *shard) tidy(now quota.Micros, s *Store) {
	if sh.due >= 8*8 {
		sh.sweep(sh.due/8, now, s)
		sh.due = 0
	}
	if sh.kept++; sh.kept%32 == 0 {
		sh.tidyAnother(now, s)
	}
}

// tidyAnother sweeps a few places of a random shard, because a shard whose keys are not charged any more does
// not sweep itself. The caller may hold the locks of other shards, so tidyAnother does not wait for that
// shard's lock.
func (sh *shard) tidyAnother(now quota.Micros, s *Store) {
	if other := &s.shards[rand.N(shardCount)]; other.mu.TryLock() {
		other.sweep(8, now, s)
		other.mu.Unlock()
	}
}

// sweep looks at some places of the index, removes the slots whose state equals a fresh one by now, and
// returns their number.
func (sh *shard) sweep(looks int, now quota.Micros, s *Store) (freed int) {
	for ; looks > 0 && sh.live > 0; looks-- {
		if sh.hand++; sh.hand >= len(sh.index) {
			sh.hand = 0
		}
		// A removal may move another entry to this place, which is looked at as well.
		for e := sh.index[sh.hand]; e != 0; e = sh.index[sh.hand] {
			n := uint32(e) - 1
			if sh.slots.at(n).expires > now {
				break
			}
			sh.remove(e>>32, n)
			freed++
		}
	}
	if freed > 0 {
		s.keys.Add(-int64(freed))
		if 8*sh.live < len(sh.index) && len(sh.index) > 16 {
			sh.shrink()
		}
	}
	return freed
}

// shrink moves the slots in use together and frees the rest of the memory.
func (sh *shard) shrink() {
	index, slots, pieces, tails, was := sh.index, sh.slots, sh.pieces, sh.tails, sh.kinds
	sh.index = make([]uint64, max(16, len(index)/4))
	sh.slots, sh.pieces, sh.tails, sh.kinds, sh.hand = slab[slot]{}, slab[piece]{}, nil, nil, 0
	for _, e := range index {
		if e == 0 {
			continue
		}
		from := uint32(e) - 1
		n := sh.slots.take()
		sl := sh.slots.at(n)
		*sl = *slots.at(from)
		sl.kind = sh.kinds.add(was[sl.kind].kind)
		for at := &sl.next; *at != 0; {
			next := sh.pieces.take()
			r := sh.pieces.at(next)
			*r = *pieces.at(*at - 1)
			*at, at = next+1, &r.next
		}
		if t, ok := tails[from]; ok {
			if sh.tails == nil {
				sh.tails = make(map[uint32][]int64)
			}
			sh.tails[n] = t
		}
		sh.link(e>>32, n)
	}
}
