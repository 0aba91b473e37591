package local

import (
	"unique"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// table is a hash table: an open-addressed index of slot numbers over slots that never move while the table is in use.
// Neither index nor slots hold a pointer, so the garbage collector does not look into them.
type table struct {
	kinds  kinds
	tails  map[uint32][]int64 // State.Tail of the slots that have one
	slots  slab[slot]
	pieces slab[piece]
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

// piece is a further part of a long key.
type piece struct {
	next uint32 // the number of the next piece, plus one; 0 is none
	text [28]byte
}

// tag is the half of a hash that the index keeps; the other half chose the shard.
func tag(h uint64) uint64 { return h >> 32 }

// find returns the slot of a limit and key and its place in an index, or -1.
func (t *table) find(index []uint64, h uint64, limit unique.Handle[string], key string) (n int, place uint64) {
	if len(index) == 0 {
		return -1, 0
	}
	mask := uint64(len(index) - 1)
	for i := tag(h) & mask; ; i = (i + 1) & mask {
		e := index[i]
		if e == 0 {
			return -1, 0
		}
		if e>>32 == tag(h) {
			n := uint32(e) - 1
			if sl := t.slots.at(n); int(sl.size) == len(key) && t.kinds.list[sl.kind].limit == limit && t.holds(sl, key) {
				return int(n), i
			}
		}
	}
}

// holds reports whether a slot's key is key, which must have the same length.
func (t *table) holds(sl *slot, key string) bool {
	if len(key) <= len(sl.text) {
		return string(sl.text[:len(key)]) == key
	}
	if string(sl.text[:]) != key[:len(sl.text)] {
		return false
	}
	key = key[len(sl.text):]
	for at := sl.next; len(key) > 0; {
		r := t.pieces.at(at - 1)
		n := min(len(key), len(r.text))
		if string(r.text[:n]) != key[:n] {
			return false
		}
		key, at = key[n:], r.next
	}
	return true
}

// read appends the first n bytes of a slot's key to dst.
func (t *table) read(dst []byte, sl *slot, n int) []byte {
	dst = append(dst, sl.text[:min(n, len(sl.text))]...)
	for at := sl.next; len(dst) < n; {
		r := t.pieces.at(at - 1)
		dst = append(dst, r.text[:min(n-len(dst), len(r.text))]...)
		at = r.next
	}
	return dst
}

// load fills a zero Item with the state of slot n, unless n is negative or the state equals a fresh one by now.
func (t *table) load(n int, now quota.Micros, it *driver.Item) {
	if n < 0 {
		return
	}
	sl := t.slots.at(uint32(n))
	if sl.expires <= now {
		return
	}
	k := &t.kinds.list[sl.kind]
	it.Rule = k.rule
	it.State.Unit, it.State.A, it.State.B, it.State.C = k.unit, sl.a, sl.b, sl.c
	if t.tails != nil {
		it.State.Tail = t.tails[uint32(n)]
	}
}

// add makes a slot for a key.
func (t *table) add(key string, k kind) uint32 {
	n := t.slots.take()
	sl := t.slots.at(n)
	*sl = slot{kind: t.kinds.add(k), size: uint16(len(key))}
	key = key[copy(sl.text[:], key):]
	for at := &sl.next; len(key) > 0; {
		next := t.pieces.take()
		*at = next + 1
		r := t.pieces.at(next)
		key = key[copy(r.text[:], key):]
		r.next, at = 0, &r.next
	}
	return n
}

// adopt copies a slot of another table, with the tail, which leaves that table, and returns its number in this one.
func (t *table) adopt(from *table, number uint32) uint32 {
	n := t.slots.take()
	sl := t.slots.at(n)
	*sl = *from.slots.at(number)
	sl.kind = t.kinds.add(from.kinds.list[sl.kind].kind)
	for at := &sl.next; *at != 0; {
		next := t.pieces.take()
		r := t.pieces.at(next)
		*r = *from.pieces.at(*at - 1)
		*at, at = next+1, &r.next
	}
	if tail, ok := from.tails[number]; ok {
		t.setTail(n, tail)
		delete(from.tails, number)
	}
	return n
}

// free frees slot n, which no index may name.
func (t *table) free(n uint32) {
	delete(t.tails, n)
	sl := t.slots.at(n)
	t.kinds.drop(sl.kind)
	for at := sl.next; at != 0; at = t.pieces.at(at - 1).next {
		t.pieces.give(at - 1)
	}
	*sl = slot{}
	t.slots.give(n)
}

func (t *table) setTail(n uint32, tail []int64) {
	if t.tails == nil {
		t.tails = make(map[uint32][]int64)
	}
	t.tails[n] = tail
}

// entry returns the index entry of slot n.
func entry(tag uint64, n uint32) uint64 { return tag<<32 | uint64(n+1) }

// link adds an entry, whose upper half is its tag, to an index.
func link(index []uint64, e uint64) {
	mask := uint64(len(index) - 1)
	i := e >> 32 & mask
	for index[i] != 0 {
		i = (i + 1) & mask
	}
	index[i] = e
}

// placeOf returns the place of an entry in an index, if it is there.
func placeOf(index []uint64, e uint64) (i uint64, ok bool) {
	mask := uint64(len(index) - 1)
	for i = e >> 32 & mask; len(index) > 0 && index[i] != 0; i = (i + 1) & mask {
		if index[i] == e {
			return i, true
		}
	}
	return 0, false
}

// unlink empties a place of an index.
func unlink(index []uint64, i uint64) {
	mask := uint64(len(index) - 1)
	// Close the gap: move back each entry of the run that may stand there (Knuth, TAOCP 6.4, algorithm R).
	for j := (i + 1) & mask; index[j] != 0; j = (j + 1) & mask {
		if home := index[j] >> 32 & mask; (j-home)&mask >= (j-i)&mask {
			index[i] = index[j]
			i = j
		}
	}
	index[i] = 0
}
