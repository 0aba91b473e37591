// Package local keeps limits in the memory of one process. It is the backend without a server.
//
//	limit := quota.Must(quota.NewLimit("calls", quota.Must(algorithm.TokenBucket(100, 10, time.Second))))
//	limiter := quota.Must(quota.NewLimiter(local.New(nil), limit, nil))
//	d, err := limiter.Take(ctx, "agent-123", 1)
//
// The store is sharded, starts no goroutine, and reads the monotonic clock, so steps of the wall clock do not
// reach it. It decides every list of charges in one step, with any keys.
//
// # Memory
//
// A key of up to 22 bytes takes some 80 bytes with its text, and each 28 bytes more another 32 (a sliding
// window log 16 more for each charge it remembers). The garbage collector scans only the logs. Charges remove
// keys whose quota is whole again, a few at a time. The number of keys is bounded: when the store is full of
// keys that still hold consumption, charges to further keys fail with [quota.ErrOverloaded] and are not
// charged. A key that holds consumption is never evicted, so flooding the store with keys gains no quota.
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

// Options configure a Store. The zero value, and nil, take the defaults.
type Options struct {
	// MaxKeys bounds the keys that the store holds, and apart from them the request ids that it remembers; 0 is
	// DefaultMaxKeys. It must not be negative.
	MaxKeys int
	// Clock tells the time, for tests; nil is the monotonic clock. It may be called concurrently, and is
	// called with a lock held: it must not call the store.
	Clock func() time.Time
}

// Store is a quota.Store in memory. Use New to make one. Methods may be called concurrently.
type Store struct {
	shards [shardCount]shard // the first field, because cache lines begin there

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
	reclaimed  bool // the last reclaim removed a key
}

const shardCount = 256

var (
	_ quota.Store   = (*Store)(nil)
	_ driver.Prompt = (*Store)(nil)
)

// New returns an empty store. It panics where MaxKeys is negative.
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

// Close ends the store: later calls of Take and TakeAll are quota.ErrClosed. It returns nil, also when called
// again.
func (s *Store) Close() error {
	s.gate.Close()
	return nil
}

// Prompt returns true: every call returns by its context's deadline, because it waits for no more than a
// lock. See driver.Prompt.
func (s *Store) Prompt() bool { return true }

// Len returns the number of keys that the store holds. It counts keys that are whole again until they are
// removed.
func (s *Store) Len() int { return int(s.keys.Load()) }

// Take decides one charge. It fails with the context's own error or quota.ErrClosed; with quota.ErrOverloaded
// where the key is new and the store is full; with quota.ErrMisconfigured where the key holds another rule's
// state; and with quota.ErrInvalid where the charge's request id was granted to other charges. A call that
// fails is not charged.
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

// TakeAll decides charges all-or-nothing, in one step, under the locks of all their shards. It writes the
// decisions to out, which must be as long as cs. It fails as Take does; then no charge of the list is
// charged.
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

// tryAll decides and stores a list, or reports that the store is too full for its new keys.
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

// lock locks a shard and returns the time, which is never before the time of the shard's last decision.
// Reading the monotonic clock takes as long as a decision, so lock reads it before it locks.
func (s *Store) lock(sh *shard) quota.Micros {
	if s.clock != nil {
		sh.mu.Lock()
		return s.now()
	}
	now := s.now()
	// Waking a sleeping goroutine costs as much as many decisions, so a caller tries a few times before it
	// sleeps. Between two tries it leaves the lock's cache line alone, for the time of about a dozen
	// decisions: with a third of that pause the line moves between the processors so often that half of the
	// decisions a second are lost.
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

// room reports whether the store may keep the item, and counts the key if it is new.
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

// reclaimTries is how often a charge tries again when the store is full: another charge may take the room
// that reclaim made. A list needs room for several keys, and tries more often.
const reclaimTries = 3

// reclaim removes some keys that are whole again from any shard, and reports whether it found one.
func (s *Store) reclaim(now quota.Micros) bool {
	const budget = 4096 // keys looked at, so that a refused charge stays cheap
	if !s.reclaiming.TryLock() {
		// Another call reclaims at this moment: its result holds for this charge too.
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
	return fmt.Errorf("local: %w: the store is full: %d keys hold consumption; accepted: charges to these keys, or a larger MaxKeys",
		quota.ErrOverloaded, s.maxKeys)
}

// shardSet is a set of shards that are locked together, in ascending order so that two lists never wait for each
// other.
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
