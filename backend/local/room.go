package local

import (
	"bytes"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

// room counts the keys of a store, or its request ids, over all shards, and bounds them. No group takes all the room: a
// group gets a further place only while it has fewer than are free. Groups are counted by classes, into which a hash puts
// them, because a counter for each group would take as much memory as a key.
type room struct {
	most    int64
	of      string // keys or request ids
	option  string // that sets most
	used    atomic.Int64
	given   atomic.Int64 // places of keys and ids that were removed
	refused atomic.Int64 // charges that found no room
	classes [classCount]atomic.Int32

	reclaiming sync.Mutex
	hand       int  // the shard that reclaim looks at next
	reclaimed  bool // the last reclaim made room
}

const classCount = 4096

// take takes a place for a class, and reports whether there was one.
func (r *room) take(class uint64) bool {
	used := r.used.Add(1)
	held := int64(r.classes[class].Add(1))
	// Many groups, such as keys of one segment, put some places in each class, which are no one group's doing.
	const few = 8
	if used > r.most || held > max(r.most-used+1, few+2*r.most/classCount) {
		r.give(class)
		return false
	}
	return true
}

// give gives a place back.
func (r *room) give(class uint64) {
	r.used.Add(-1)
	r.classes[class].Add(-1)
}

// refusal is the error of a charge that found no room.
func (r *room) refusal() error {
	r.refused.Add(1)
	full := fmt.Sprintf("the store is full, with %d %s", r.most, r.of)
	if r.used.Load() < r.most {
		full = fmt.Sprintf("the key's group has as many %s as the store has room left for; it has room for %d", r.of, r.most)
	}
	return fmt.Errorf("local: %w: %s; accepted: %s that it holds, or a larger %s", quota.ErrOverloaded, full, r.of, r.option)
}

// classOf returns the class of a key's group.
func (s *Store) classOf(key string) uint64 {
	return maphash.String(s.seed, quota.Group(key)) % classCount
}

// class returns the class of the group of a slot's text.
func (s *Store) class(t *table, sl *slot) uint64 {
	var all [quota.MaxKey + 1]byte
	text := sl.text[:min(int(sl.size), len(sl.text))]
	i := bytes.IndexByte(text, '/')
	if i < 0 && int(sl.size) > len(text) {
		text = t.read(all[:0], sl, min(int(sl.size), len(all)))
		i = bytes.IndexByte(text, '/')
	}
	if i >= 0 {
		text = text[:i]
	}
	return maphash.Bytes(s.seed, text) % classCount
}
