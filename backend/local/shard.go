package local

import (
	"math"
	"math/rand/v2"
	"sync"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// shard is a part of the keys, chosen by their hashes. A table changes its size in small steps, which
// sweep takes: until it is done some entries are in the old index.
type shard struct {
	// The first cache line, which every charge writes.
	mu      sync.Mutex
	last    quota.Micros // of the latest decision, by the monotonic clock
	index   []uint64     // 32 bits of hash and a slot number plus one; 0 is empty
	due     int32        // places that sweep has to look at, in eighths
	calls   uint32
	soonest quota.Micros // no state is whole before; 0 is unknown
	seen    quota.Micros // the same, of the places that sweep has looked at in this round over the index

	// The second cache line, which most charges only read, and the third.
	table table
	live  int    // slots in use
	hand  int    // the place in the index that sweep looks at next
	old   *older // nil unless the table changes its size
}

// older is the index that a shard's index replaces, and what else it replaces.
type older struct {
	index []uint64
	place int    // the entries of the places before it are in the new index
	table *table // the slots, if they move together into a new table; else nil
}

// find returns the slot of a limit and key, or -1.
func (sh *shard) find(h uint64, limit unique.Handle[string], key string) int {
	n, _ := sh.table.find(sh.index, h, limit, key)
	if n < 0 && sh.old != nil {
		n = sh.findOld(h, limit, key)
	}
	return n
}

// findOld is find in the old index. It moves the entry that it finds to the new one.
func (sh *shard) findOld(h uint64, limit unique.Handle[string], key string) int {
	t := &sh.table
	if sh.old.table != nil {
		t = sh.old.table
	}
	n, place := t.find(sh.old.index, h, limit, key)
	if n >= 0 {
		n = int(sh.move(place))
	}
	return n
}

// save stores an item in slot n.
func (sh *shard) save(n int, it *driver.Item, expires quota.Micros) {
	t := &sh.table
	sl := t.slots.at(uint32(n))
	if k := t.kinds.list[sl.kind].kind; k.rule != it.Rule || k.unit != it.State.Unit {
		id := t.kinds.add(kind{k.limit, it.Rule, it.State.Unit})
		t.kinds.drop(sl.kind)
		sl.kind = id
	}
	sl.a, sl.b, sl.c = it.State.A, it.State.B, it.State.C
	sh.expire(sl, expires)
	if it.State.Tail != nil {
		t.setTail(uint32(n), it.State.Tail)
	} else if t.tails != nil {
		delete(t.tails, uint32(n))
	}
}

// expire notes when a slot's state is whole.
func (sh *shard) expire(sl *slot, expires quota.Micros) {
	sl.expires = expires
	sh.soonest, sh.seen = min(sh.soonest, expires), min(sh.seen, expires)
}

// insert makes a slot for a key, which the shard must not have.
func (sh *shard) insert(h uint64, key string, k kind) int {
	if 4*(sh.live+1) > 3*len(sh.index) {
		for sh.old != nil { // a list with so many keys in so small an index
			sh.moveOn(len(sh.index))
		}
		sh.resize(max(16, 2*len(sh.index)), nil)
	}
	n := sh.table.add(key, k)
	sh.live++
	link(sh.index, entry(tag(h), n))
	return int(n)
}

// remove frees slot n, whose hash has this tag. The entry must not be in the old index.
func (sh *shard) remove(tag uint64, n uint32, s *Store) {
	i, _ := placeOf(sh.index, entry(tag, n))
	sh.removeAt(i, s)
}

// removeAt frees the slot at a place of the index.
func (sh *shard) removeAt(i uint64, s *Store) {
	n := uint32(sh.index[i]) - 1
	unlink(sh.index, i)
	sl := sh.table.slots.at(n)
	s.keys.give(s.class(&sh.table, sl))
	s.keys.given.Add(1)
	sh.table.free(n)
	sh.live--
	sh.soonest, sh.seen = 0, 0 // unlink may have moved an entry to a place that sweep has looked at
}

// resize gives the index another size, a power of two, and moves the slots of the given table into a new one; nil lets
// them stay. The shard must not be changing its size.
func (sh *shard) resize(size int, slots *table) {
	if sh.live > 0 {
		sh.old = &older{index: sh.index, table: slots}
	}
	sh.index = make([]uint64, size)
	sh.hand, sh.soonest, sh.seen = 0, 0, 0
}

// move moves the entry at a place of the old index to the new one, and returns its slot.
func (sh *shard) move(place uint64) uint32 {
	e := sh.old.index[place]
	unlink(sh.old.index, place)
	n := uint32(e) - 1
	if sh.old.table != nil {
		n = sh.table.adopt(sh.old.table, n)
	}
	link(sh.index, entry(e>>32, n))
	return n
}

// tidy sweeps as many places as the calls since the last tidy made due: several at a time, so that the processor waits
// for their cache lines together. Every call pays, also a denial, so that keys go which are whole again.
func (sh *shard) tidy(now quota.Micros, s *Store) {
	if sh.due += 2; sh.due >= 8*8 {
		sh.sweep(int(sh.due/8), now, s)
		sh.due = 0
	}
	if sh.calls++; sh.calls%32 == 0 {
		sh.tidyAnother(now, s)
	}
}

// tidyAnother sweeps a few places of a random shard, because a shard whose keys are not charged any more does
// not sweep itself, and looks at a few request ids. The caller may hold the locks of other shards, so tidyAnother does not
// wait for a lock.
func (sh *shard) tidyAnother(now quota.Micros, s *Store) {
	n := rand.N(shardCount)
	if other := &s.shards[n]; other.mu.TryLock() {
		other.sweep(8, now, s)
		other.mu.Unlock()
	}
	if ids := &s.grants[n]; ids.mu.TryLock() {
		ids.tidy(8, now, &s.ids)
		ids.mu.Unlock()
	}
}

// sweep looks at some places of the index, or moves the entries of four times as many of the old index, and removes the slots
// whose state equals a fresh one by now: at most one for each place. It reports whether it removed one.
func (sh *shard) sweep(looks int, now quota.Micros, s *Store) (freed bool) {
	if sh.old != nil {
		sh.moveOn(4 * looks) // most of them are empty, and two indexes take more memory than one
		return false
	}
	for removals := looks; looks > 0 && removals > 0 && sh.live > 0; looks-- {
		if sh.hand >= len(sh.index) {
			sh.hand, sh.soonest, sh.seen = 0, sh.seen, math.MaxInt64
		}
		// A removal may move another entry to this place, which is looked at as well.
		for e := sh.index[sh.hand]; e != 0; e = sh.index[sh.hand] {
			expires := sh.table.slots.at(uint32(e) - 1).expires
			if expires > now || removals == 0 {
				sh.seen = min(sh.seen, expires)
				break
			}
			sh.removeAt(uint64(sh.hand), s)
			removals--
			freed = true
		}
		sh.hand++
	}
	if 8*sh.live < len(sh.index) && len(sh.index) > 16 {
		sh.shrink()
	}
	return freed
}

// shrink begins to move the slots in use together, so that the memory of the others is freed. The index becomes half as
// large: it is then so empty that moveOn has done its work before the index has to grow.
func (sh *shard) shrink() {
	t := sh.table
	sh.table = table{}
	size := len(sh.index) / 2
	if sh.live == 0 {
		size = 0
	}
	sh.resize(size, &t)
}

// moveOn moves the entries of some places of the old index.
func (sh *shard) moveOn(looks int) {
	for ; looks > 0; looks-- {
		if sh.old.place == len(sh.old.index) {
			sh.old = nil
			return
		}
		if sh.old.index[sh.old.place] != 0 {
			sh.move(uint64(sh.old.place)) // another entry may come to the place
		} else {
			sh.old.place++
		}
	}
}
