// Package local keeps limits in the memory of one process: the backend that needs nothing installed.
//
//	store := local.New(nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// It is sharded, starts no goroutine, and reads the monotonic clock, so steps of the wall clock do not
// reach it. Every list of charges is decided in one step, whatever its keys.
//
// # Memory
//
// A key of up to 22 bytes takes some 80 bytes with its text, and each 28 bytes more another 32 (a sliding
// window log 16 more for each charge it remembers). The garbage collector scans none of it but the logs. Keys whose quota is whole again are removed as part of ordinary work. The number of keys
// is bounded: when the store is full of keys that still hold consumption, charges to a key it does not
// know fail with [quota.ErrOverloaded] and are not charged. Nothing alive is ever pushed out, so nobody
// gains quota by flooding the store with keys.
package local

import (
	"context"
	"fmt"
	"hash/maphash"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// DefaultMaxKeys is how many keys a store holds unless Options say otherwise.
const DefaultMaxKeys = 1 << 20

// Options change what New makes. The zero value, and nil, take the defaults.
type Options struct {
	// MaxKeys bounds the keys held, and the request ids remembered, each; 0 is DefaultMaxKeys.
	MaxKeys int
	// Clock tells the time; nil is the monotonic clock. It is called with a lock held.
	Clock func() time.Time
}

// Store is a quota.Store in memory.
type Store struct {
	shards [shardCount]shard // first, where cache lines begin

	clock   func() time.Time
	start   time.Time // of the monotonic clock
	epoch   quota.Micros
	maxKeys int64
	seed    maphash.Seed
	gate    driver.Gate
	keys    atomic.Int64 // in all shards
	grants  grants

	reclaiming sync.Mutex
	hand       int  // the shard that reclaim looks at next
	reclaimed  bool // whether it found something the last time
}

const shardCount = 256

var (
	_ quota.Store   = (*Store)(nil)
	_ driver.Prompt = (*Store)(nil)
)

// New returns an empty store. A negative MaxKeys panics.
func New(o *Options) *Store {
	if o == nil {
		o = &Options{}
	}
	if o.MaxKeys < 0 {
		panic(fmt.Sprintf("local: Options.MaxKeys is %d; accepted: 0 or more", o.MaxKeys))
	}
	now := time.Now()
	s := &Store{
		clock:   o.Clock,
		start:   now,
		epoch:   quota.Micros(now.UnixMicro()),
		maxKeys: int64(o.MaxKeys),
		seed:    maphash.MakeSeed(),
	}
	if s.maxKeys == 0 {
		s.maxKeys = DefaultMaxKeys
	}
	return s
}

// Close ends the store; every later call is quota.ErrClosed.
func (s *Store) Close() error {
	s.gate.Close()
	return nil
}

// Prompt says that every call returns by its context's deadline: none of them waits for anything but a lock.
func (s *Store) Prompt() bool { return true }

// Len returns the number of keys held, those that are whole again but not yet removed included.
func (s *Store) Len() int { return int(s.keys.Load()) }

// Take decides one charge.
func (s *Store) Take(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	if err = s.gate.Ready(ctx); err != nil {
		return d, err
	}
	if c.ID != "" {
		var out [1]quota.Decision
		err = s.grants.once([]quota.Charge{c}, out[:], s)
		return out[0], err
	}
	h := driver.Hash(s.seed, &c)
	sh := &s.shards[h%shardCount]
	for try := 0; ; try++ {
		now := s.lock(sh)
		n := sh.find(h, &c)
		var it driver.Item
		sh.load(n, now, &it)
		err = driver.ApplyOne(&c, &it, now, &d)
		full := false
		if err == nil && it.Write {
			if full = !s.room(n, &it); !full {
				s.keep(sh, h, n, &c, &it, &d)
				sh.tidy(now, s)
			}
		}
		sh.mu.Unlock()
		if !full {
			return d, err
		}
		if try > reclaimTries || !s.reclaim(now) {
			return quota.Decision{}, s.full()
		}
	}
}

// TakeAll decides charges all-or-nothing, holding the locks of all their shards.
func (s *Store) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	if cs[0].ID != "" {
		return s.grants.once(cs, out, s)
	}
	return s.takeAll(cs, out)
}

func (s *Store) takeAll(cs []quota.Charge, out []quota.Decision) error {
	var fewHashes [8]uint64
	hashes := fewHashes[:0]
	var set shardSet
	for i := range cs {
		h := driver.Hash(s.seed, &cs[i])
		hashes = append(hashes, h)
		set.add(h % shardCount)
	}
	for try := 0; ; try++ {
		now, full, err := s.tryAll(cs, hashes, &set, out)
		if !full {
			return err
		}
		if try > reclaimTries+len(cs) || !s.reclaim(now) {
			return s.full()
		}
	}
}

// tryAll decides and keeps a list, or reports that there is no room for its new keys.
func (s *Store) tryAll(cs []quota.Charge, hashes []uint64, set *shardSet, out []quota.Decision) (now quota.Micros, full bool, err error) {
	var fewItems [8]driver.Item
	var fewSlots [8]int
	items, slots := fewItems[:0], fewSlots[:0]
	set.lock(s)
	defer set.unlock(s)
	now = s.now()
	for i := range set.each {
		s.shards[i].last = now
	}
	for i := range cs {
		sh := &s.shards[hashes[i]%shardCount]
		n := sh.find(hashes[i], &cs[i])
		slots, items = append(slots, n), append(items, driver.Item{})
		sh.load(n, now, &items[i])
	}
	if err := driver.Apply(cs, items, now, out); err != nil {
		return now, false, err
	}
	for i := range items {
		if items[i].Write && !s.room(slots[i], &items[i]) {
			for j := range i {
				if items[j].Write && slots[j] < 0 && !items[j].State.IsZero() {
					s.keys.Add(-1)
				}
			}
			return now, true, nil
		}
	}
	for i := range items {
		if items[i].Write {
			s.keep(&s.shards[hashes[i]%shardCount], hashes[i], slots[i], &cs[i], &items[i], &out[i])
		}
	}
	for i := range set.each {
		s.shards[i].tidy(now, s)
	}
	return now, false, nil
}

// lock locks a shard and returns the time, which does not run behind the order of decisions. The monotonic
// clock takes as long to read as a decision, so it is read before the lock.
func (s *Store) lock(sh *shard) quota.Micros {
	if s.clock != nil {
		sh.mu.Lock()
		return s.now()
	}
	now := s.now()
	// A goroutine that sleeps is woken at the cost of many decisions, so it looks again a few times before. It
	// leaves the lock's cache line alone meanwhile, for as long as whoever has the line decides a dozen times:
	// with a third of that the line goes to and fro, and half of the decisions a second are lost.
	for try := 0; !sh.mu.TryLock(); try++ {
		if try == 5 {
			sh.mu.Lock()
			break
		}
		for range 4000 { // a microsecond
		}
	}
	now = max(now, sh.last)
	sh.last = now
	return now
}

// now returns the time.
func (s *Store) now() quota.Micros {
	if s.clock != nil {
		return quota.Micros(s.clock().UnixMicro())
	}
	return s.epoch + quota.Micros(time.Since(s.start)/time.Microsecond)
}

// room reports whether the item may be kept, and counts it if it is a new key.
func (s *Store) room(n int, it *driver.Item) bool {
	if n >= 0 || it.State.IsZero() {
		return true
	}
	if s.keys.Add(1) > s.maxKeys {
		s.keys.Add(-1)
		return false
	}
	return true
}

// keep stores an item that Apply marked, in slot n or, where n is negative, in a new one.
func (s *Store) keep(sh *shard, h uint64, n int, c *quota.Charge, it *driver.Item, d *quota.Decision) {
	switch {
	case it.State.IsZero():
		if n >= 0 {
			sh.remove(tag(h), uint32(n))
			s.keys.Add(-1)
		}
		return
	case n < 0:
		n = sh.insert(h, c.Key, kind{c.Limit.Handle(), it.Rule, it.State.Unit})
		sh.due += 8 * 8 // two slots or more: faster than keys can come
	default:
		sh.due += 2
	}
	sh.save(n, it, d.At+quota.Micros(d.ResetAfter/time.Microsecond))
}

// reclaimTries is how often a charge that found no room tries again, because others may be faster. A list
// needs room for several keys.
const reclaimTries = 3

// reclaim removes some keys that are whole again from any shards, and reports whether it found one.
func (s *Store) reclaim(now quota.Micros) bool {
	const budget = 4096 // keys looked at, so that a refused charge stays cheap
	if !s.reclaiming.TryLock() {
		// Somebody is at it: what they find, or do not, holds for this charge too.
		s.reclaiming.Lock()
		defer s.reclaiming.Unlock()
		return s.reclaimed
	}
	defer s.reclaiming.Unlock()
	s.reclaimed = false
	for looked, shards := 0, 0; looked < budget && shards < shardCount; shards++ {
		sh := &s.shards[s.hand]
		s.hand = (s.hand + 1) % shardCount
		sh.mu.Lock()
		looked += sh.live
		freed := sh.sweep(len(sh.index), now, s)
		sh.mu.Unlock()
		if freed > 0 {
			s.reclaimed = true
			break
		}
	}
	return s.reclaimed
}

func (s *Store) full() error {
	return fmt.Errorf("local: %w: %d keys hold consumption, which is all that MaxKeys allows", quota.ErrOverloaded, s.maxKeys)
}

// shardSet is a set of shards that are locked together, in ascending order so that no two lists wait
// for each other.
type shardSet [shardCount / 64]uint64

func (b *shardSet) add(i uint64) { b[i/64] |= 1 << (i % 64) }

func (b *shardSet) each(yield func(int) bool) {
	for w, word := range b {
		for ; word != 0; word &= word - 1 {
			if !yield(w*64 + bits.TrailingZeros64(word)) {
				return
			}
		}
	}
}

func (b *shardSet) lock(s *Store) {
	for i := range b.each {
		s.shards[i].mu.Lock()
	}
}

func (b *shardSet) unlock(s *Store) {
	for i := range b.each {
		s.shards[i].mu.Unlock()
	}
}
