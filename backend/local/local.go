// Package local keeps limits in the memory of one process. It is the backend without a server.
//
//	limit := quota.NewLimit("calls", algorithm.TokenBucket(100, 10, time.Second))
//	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
//	d, err := limiter.Take(ctx, "agent-123", 1)
//
// The store is sharded, starts no goroutine, and reads the monotonic clock, so steps of the wall clock do not
// reach it. It decides every list of charges in one step, with any keys.
//
// # Memory
//
// A key of up to 22 bytes takes some 80 bytes with its text, and each 28 bytes more another 32 (a sliding
// window log 16 more for each charge it remembers). A request id takes some 160 bytes. The garbage collector scans only
// the logs of windows. Calls remove keys whose quota is whole again, and ids that may be forgotten, a few at a time, whether
// they are granted or denied. The work of one call is bounded: a table that grows or shrinks does so in small steps.
//
// The number of keys is bounded. When the store is full of keys that still hold consumption, charges to further keys
// fail with [quota.ErrOverloaded] and are not charged. A key that holds consumption is never evicted, so flooding
// the store with keys gains no quota.
//
// No group of keys, see [quota.Group], takes all the room. A group gets a further key only while it has fewer keys than
// the store has room left: a group alone fills half of the store, two groups two thirds, and each leaves room to the
// others for as many keys as it has itself. So a tenant whose users make up keys shuts out new keys of its own only,
// if the tenant is the first segment. A key of one segment is a group of its own: keys that strangers can make up
// without end, such as names at a login, should begin with what they cannot make up, such as the network of their
// address, or live in a store of their own. The bound costs room where all keys are of one group: the store then holds
// half of MaxKeys. Groups are counted by a hash, in 4096 classes, and one in a class with a flooding group shares its bound.
package local

import (
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"math/bits"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Bounds of a store unless Options say otherwise.
const (
	DefaultMaxKeys = 1 << 20
	DefaultMaxIDs  = 1 << 22 // some 14 000 a second
)

// Options configure a Store. The zero value takes the defaults, as New does.
type Options struct {
	// MaxKeys bounds the keys that the store holds; 0 is DefaultMaxKeys. It must not be negative. One group of keys
	// takes half of them at most, see the package documentation.
	MaxKeys int
	// MaxIDs bounds the request ids that the store remembers, each for quota.IDWindow, in the same way; 0 is
	// DefaultMaxIDs. It must not be negative. When there is no room for an id the call is quota.ErrOverloaded, and not
	// charged; ids that are remembered are still repeated, and none is forgotten early. An id that is remembered for
	// longer, because its call ended or renewed a hold, may take its room for up to quota.IDWindow more.
	MaxIDs int
	// Clock tells the time, for tests; nil is the monotonic clock. It may be called concurrently, and is
	// called with a lock held: it must not call the store.
	Clock func() time.Time
}

// Store is a quota.Store in memory. Use New or NewWithOptions to make one. Methods may be called concurrently.
type Store struct {
	shards [shardCount]shard // the first field, because cache lines begin there
	grants [shardCount]grants

	clock func() time.Time
	start time.Time // of the monotonic clock
	epoch quota.Micros
	seed  maphash.Seed
	gate  driver.Gate
	keys  room
	ids   room
}

const shardCount = 256

var (
	_ quota.Store     = (*Store)(nil)
	_ driver.Prompt   = (*Store)(nil)
	_ driver.Measured = (*Store)(nil)
)

// New returns an empty store with the default options.
func New() *Store { return newStore(&Options{}) }

// NewWithOptions returns an empty store. It fails with quota.ErrInvalid where MaxKeys or MaxIDs is negative.
func NewWithOptions(o Options) (*Store, error) {
	switch {
	case o.MaxKeys < 0:
		return nil, fmt.Errorf("local: %w: Options.MaxKeys is %d; accepted: 0 or more", quota.ErrInvalid, o.MaxKeys)
	case o.MaxIDs < 0:
		return nil, fmt.Errorf("local: %w: Options.MaxIDs is %d; accepted: 0 or more", quota.ErrInvalid, o.MaxIDs)
	}
	return newStore(&o), nil
}

func newStore(o *Options) *Store {
	now := time.Now()
	s := &Store{
		clock: o.Clock,
		start: now,
		epoch: quota.Micros(now.UnixMicro()),
		seed:  maphash.MakeSeed(),
	}
	s.keys.most, s.keys.of, s.keys.option = int64(cmp.Or(o.MaxKeys, DefaultMaxKeys)), "keys", "MaxKeys"
	s.ids.most, s.ids.of, s.ids.option = int64(cmp.Or(o.MaxIDs, DefaultMaxIDs)), "request ids", "MaxIDs"
	return s
}

// Close ends the store: later calls of Charge and ChargeAll are quota.ErrClosed. It returns nil, also when called
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
func (s *Store) Len() int { return int(s.keys.used.Load()) }

// Readings tells how many keys and request ids the store holds, how many it removed, and how many charges found no room, see
// driver.Measured.
func (s *Store) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricKeys, Value: s.keys.used.Load()})
	tell(driver.Reading{Metric: driver.MetricMaxKeys, Value: s.keys.most})
	tell(driver.Reading{Metric: driver.MetricIDs, Value: s.ids.used.Load()})
	tell(driver.Reading{Metric: driver.MetricSweptKeys, Value: s.keys.given.Load() + s.ids.given.Load()})
	tell(driver.Reading{Metric: driver.MetricFullCalls, Value: s.keys.refused.Load() + s.ids.refused.Load()})
}

// Charge decides one charge. It fails with the context's own error or quota.ErrClosed; with quota.ErrOverloaded
// where there is no room for a new key or request id; with quota.ErrMisconfigured where the key holds another rule's
// state; and with quota.ErrInvalid where the charge's request id was granted to other charges. A call that
// fails is not charged. Nor is one in which the limit's algorithm or the clock panics: the panic goes to the caller, and
// no other call notices.
func (s *Store) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	if err = s.gate.Ready(ctx); err != nil {
		return d, err
	}
	if c.ID != "" {
		cs, out := [1]quota.Charge{c}, [1]quota.Decision{}
		err = s.chargeAll(cs[:], out[:])
		return out[0], err
	}
	h := driver.Hash(s.seed, &c)
	for try := 0; ; try++ {
		now, full, err := s.try(h, &c, nil, &d)
		if full == nil {
			return d, err
		}
		if try > reclaimTries || !s.reclaim(full, now) {
			return quota.Decision{}, full.refusal()
		}
	}
}

// try decides and stores a charge, or returns the room that is full. r is nil unless the charge has a request id, whose room
// it takes.
func (s *Store) try(h uint64, c *quota.Charge, r *request, d *quota.Decision) (now quota.Micros, full *room, err error) {
	sh := &s.shards[h%shardCount]
	now = s.lock(sh)
	defer sh.mu.Unlock() // the clock and the algorithm may panic
	if s.clock != nil {
		now = s.now()
	}
	n := sh.find(h, c.Limit.Handle(), c.Key)
	var it driver.Item
	sh.table.load(n, now, &it)
	if err = driver.ApplyOne(c, &it, now, d); err == nil && (it.Write || r != nil) {
		needs := needs(n, &it)
		if needs && !s.keys.take(s.classOf(c.Key)) {
			return now, &s.keys, nil
		}
		if r != nil && !s.takeRoom(r, d.Allowed || d.Shadow) {
			if needs {
				s.keys.give(s.classOf(c.Key))
			}
			return now, &s.ids, nil
		}
		if it.Write {
			s.keep(sh, h, n, c, &it, d)
		}
	}
	sh.tidy(now, s)
	return now, nil, err
}

// ChargeAll decides charges all-or-nothing, in one step, under the locks of all their shards. It writes the
// decisions to out, which must be as long as cs. It fails as Charge does; then no charge of the list is
// charged.
func (s *Store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	return s.chargeAll(cs, out)
}

func (s *Store) chargeAll(cs []quota.Charge, out []quota.Decision) error {
	var fewHashes [8]uint64
	hashes := fewHashes[:0]
	var set shardSet
	for i := range cs {
		h := driver.Hash(s.seed, &cs[i])
		hashes = append(hashes, h)
		set.add(h % shardCount)
	}
	var few [512]byte
	var r request
	if cs[0].ID != "" {
		r = s.request(few[:0], cs)
	}
	for try := 0; ; try++ {
		var now quota.Micros
		var full *room
		var err error
		if cs[0].ID != "" {
			now, full, err = s.tryOnce(&r, cs, hashes, &set, out)
		} else {
			now, full, err = s.tryAll(cs, hashes, nil, &set, out)
		}
		if full == nil {
			return err
		}
		if try > reclaimTries+len(cs) || !s.reclaim(full, now) {
			return full.refusal()
		}
	}
}

// tryAll decides and stores a list, or returns the room that is full. r is nil unless the list has a request id, whose room
// it takes.
func (s *Store) tryAll(cs []quota.Charge, hashes []uint64, r *request, set *shardSet, out []quota.Decision) (now quota.Micros, full *room, err error) {
	if len(cs) == 1 {
		return s.try(hashes[0], &cs[0], r, &out[0])
	}
	set.lock(s)
	defer set.unlock(s) // the clock and the algorithms may panic
	now = s.now()
	for i := range set.each {
		s.shards[i].last = now
	}
	if full, err = s.decideAll(cs, hashes, r, now, out); full == nil {
		for i := range set.each {
			s.shards[i].tidy(now, s)
		}
	}
	return now, full, err
}

// decideAll is tryAll under the locks.
func (s *Store) decideAll(cs []quota.Charge, hashes []uint64, r *request, now quota.Micros, out []quota.Decision) (full *room, err error) {
	var fewItems [8]driver.Item
	var fewSlots [8]int
	items, slots := fewItems[:0], fewSlots[:0]
	for i := range cs {
		sh := &s.shards[hashes[i]%shardCount]
		n := sh.find(hashes[i], cs[i].Limit.Handle(), cs[i].Key)
		slots, items = append(slots, n), append(items, driver.Item{})
		sh.table.load(n, now, &items[i])
	}
	if err := driver.Apply(cs, items, now, out); err != nil {
		return nil, err
	}
	if full = s.takeRooms(cs, items, slots, r, out); full != nil {
		return full, nil
	}
	for i := range items {
		if items[i].Write {
			s.keep(&s.shards[hashes[i]%shardCount], hashes[i], slots[i], &cs[i], &items[i], &out[i])
		}
	}
	return nil, nil
}

// lock locks a shard and returns the time, which is never before the time of the shard's last decision. Reading the
// monotonic clock takes as long as a decision, so lock reads it before it locks. It does not read another clock.
func (s *Store) lock(sh *shard) quota.Micros {
	if s.clock != nil {
		sh.mu.Lock()
		return 0
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

// needs reports whether an item that may be marked, in slot n or in none where n is negative, needs a new slot.
func needs(n int, it *driver.Item) bool { return it.Write && n < 0 && !it.State.IsZero() }

// takeRooms takes the room for the new keys of a list, and for its request id unless r is nil, or returns the one that is
// full.
func (s *Store) takeRooms(cs []quota.Charge, items []driver.Item, slots []int, r *request, out []quota.Decision) (full *room) {
	for i := range items {
		if needs(slots[i], &items[i]) && !s.keys.take(s.classOf(cs[i].Key)) {
			s.giveRooms(cs[:i], items, slots)
			return &s.keys
		}
	}
	if r != nil && !s.takeRoom(r, quota.Granted(out)) {
		s.giveRooms(cs, items, slots)
		return &s.ids
	}
	return nil
}

// giveRooms gives back the room for the new keys of some charges.
func (s *Store) giveRooms(cs []quota.Charge, items []driver.Item, slots []int) {
	for i := range cs {
		if needs(slots[i], &items[i]) {
			s.keys.give(s.classOf(cs[i].Key))
		}
	}
}

// newSlot is how much sweeping a new slot pays for: eight places, faster than slots can come.
const newSlot = 8 * 8

// keep stores an item that Apply marked, in slot n or, where n is negative, in a new one.
func (s *Store) keep(sh *shard, h uint64, n int, c *quota.Charge, it *driver.Item, d *quota.Decision) {
	switch {
	case it.State.IsZero():
		if n >= 0 {
			sh.remove(tag(h), uint32(n), s)
		}
		return
	case n < 0:
		n = sh.insert(h, c.Key, kind{c.Limit.Handle(), it.Rule, it.State.Unit})
		sh.due += newSlot
	}
	sh.save(n, it, d.At+quota.Micros(d.ResetAfter/time.Microsecond))
}

// reclaimTries is how often a charge tries again when there is no room: another charge may take the room
// that reclaim made. A list needs room for several keys, and tries more often.
const reclaimTries = 3

// reclaim makes room: it removes some keys that are whole again from any shard, or some ids that may be forgotten, whichever the
// room is for. It reports whether it found one. It looks at few places, so that a refused charge stays cheap, and at fewer at
// a time, so that no lock is held for long; and at none in shards that are known to have no such key.
func (s *Store) reclaim(r *room, now quota.Micros) bool {
	const places, each = 4096, 512
	if !r.reclaiming.TryLock() {
		// Another call reclaims at this moment: its result holds for this charge too.
		r.reclaiming.Lock()
		defer r.reclaiming.Unlock()
		return r.reclaimed
	}
	defer r.reclaiming.Unlock()
	r.reclaimed = false
	for looked, shards := 0, 0; looked < places && shards < shardCount && !r.reclaimed; shards++ {
		if r == &s.ids {
			t := &s.grants[r.hand]
			t.mu.Lock()
			r.reclaimed = t.tidy(each, now, r)
			t.mu.Unlock()
		} else {
			sh := &s.shards[r.hand]
			sh.mu.Lock()
			if looks := min(len(sh.index), each); sh.soonest <= now && sh.live > 0 {
				looked += looks
				r.reclaimed = sh.sweep(looks, now, s)
			}
			sh.mu.Unlock()
		}
		r.hand = (r.hand + 1) % shardCount
	}
	return r.reclaimed
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
