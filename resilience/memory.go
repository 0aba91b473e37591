package resilience

import (
	"context"
	"fmt"
	"hash/maphash"
	"strings"
	"sync"
	"time"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// DefaultMemoryKeys is MemoryOptions.Keys unless options say otherwise.
const DefaultMemoryKeys = 1 << 16

// MemoryOptions change what [DenialMemory] makes. The zero value, and nil, take the defaults.
type MemoryOptions struct {
	// Keys bounds the keys remembered, rounded up to a multiple of 64; 0 is DefaultMemoryKeys. Above it,
	// others are forgotten.
	Keys int
}

// DenialMemory returns the policy that a key known to be exhausted is denied without asking the store:
// it spares a store that is under attack. Such a decision is [quota.FromMemory] and the store's denial of
// that time, with what is left of its RetryAfter.
//
// A denial is remembered until its RetryAfter has passed, counted from before the request was sent, and
// never longer. It answers a single take without a request id, of the same limit with the same numbers
// and of at least the same cost, up to the capacity; the rule must be such that it denies the more what it denies the less,
// as all of package algorithm do. Peeks, ids, lists and all other operations go to the store. It is forgotten
// when a refund, reset or debit of this process on that key returns, when the key admits as much, or when it
// is charged under other numbers.
//
// Some things it cannot see: what another process gives back, a give-back of this one that the store carries
// out after its caller gave up, and that a key was last charged under other numbers, whose quota the store
// forgets when those say. Then it denies, until the RetryAfter of before has passed, what the store would
// admit. Therefore no preset has it.
//
// Errors of the store pass. A negative number of keys is refused by Wrap.
func DenialMemory(o *MemoryOptions) Policy {
	if o == nil {
		o = &MemoryOptions{}
	}
	return memoryPolicy(*o)
}

type memoryPolicy MemoryOptions

func (memoryPolicy) kind() kind { return kindMemory }

func (p memoryPolicy) wrap(inner quota.Store, _ place) (quota.Store, error) {
	if p.Keys < 0 {
		return nil, invalid(fmt.Sprintf("MemoryOptions.Keys is %d", p.Keys), "0 or more")
	}
	if p.Keys == 0 {
		p.Keys = DefaultMemoryKeys
	}
	m := &memory{layer: layer{inner: inner, of: kindMemory}, base: time.Now(), seed: maphash.MakeSeed(), most: (p.Keys + memoryShards - 1) / memoryShards}
	for i := range m.shards {
		m.shards[i].denials = make(map[memoryKey]denial)
	}
	return m, nil
}

const memoryShards = 64

type memory struct {
	layer
	base   time.Time
	seed   maphash.Seed
	most   int // denials in a shard
	shards [memoryShards]memoryShard
}

type memoryShard struct {
	mu      sync.Mutex
	denials map[memoryKey]denial
	// given counts the give-backs that returned: a denial that was asked for before one of them is not learnt.
	given uint64
}

type memoryKey struct {
	limit unique.Handle[string]
	key   string
}

// denial is a denial that the store made.
type denial struct {
	spec     quota.Spec
	cost     int64
	sent     time.Duration // since base: before the request was sent
	decision quota.Decision
}

func (m *memory) shard(c *quota.Charge) *memoryShard {
	return &m.shards[maphash.String(m.seed, c.Key)%memoryShards]
}

func keyOf(c *quota.Charge) memoryKey { return memoryKey{c.Limit.Handle(), c.Key} }

func (m *memory) Take(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	if givesBack(c.Op) {
		defer m.forget(&c)
		return m.inner.Take(ctx, c)
	}
	sent, given, known := m.ask(&c, &d)
	if known {
		if err := m.unless(ctx.Err()); err != nil {
			return quota.Decision{}, err
		}
		return d, nil
	}
	d, err = m.inner.Take(ctx, c)
	if err == nil {
		m.learn(&c, &d, sent, given)
	}
	return d, err
}

func (m *memory) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var few [8]uint64
	given := few[:0]
	for i := range cs {
		if givesBack(cs[i].Op) {
			defer m.forget(&cs[i])
		}
		given = append(given, m.shard(&cs[i]).count())
	}
	sent := time.Since(m.base)
	if err := m.inner.TakeAll(ctx, cs, out); err != nil {
		return err
	}
	for i := range cs {
		switch {
		case out[i].Split:
			// What one slot granted and another denied was given back.
			m.forget(&cs[i])
		case !givesBack(cs[i].Op):
			m.learn(&cs[i], &out[i], sent, given[i])
		}
	}
	return nil
}

// givesBack reports whether an operation may leave more than it found, or says that this process corrects
// what it took.
func givesBack(op quota.Op) bool {
	return op == quota.OpRefund || op == quota.OpReset || op == quota.OpDebit
}

func (s *memoryShard) count() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.given
}

// ask answers a take from memory, if known; otherwise it returns what learn wants to be told.
func (m *memory) ask(c *quota.Charge, d *quota.Decision) (sent time.Duration, given uint64, known bool) {
	s := m.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	// The clock is read under the lock: after whatever counted in given.
	sent = time.Since(m.base)
	k := keyOf(c)
	n, ok := s.denials[k]
	if !ok {
		return sent, s.given, false
	}
	if *c.Limit.Spec() != n.spec {
		// A charge under other numbers converts the key's state: what the old numbers promised is off.
		delete(s.denials, k)
		return sent, s.given, false
	}
	if c.Op != quota.OpTake || c.ID != "" {
		return sent, s.given, false
	}
	passed := sent - n.sent
	// The store counts whole microseconds: its time of the decision may be one before the request was sent.
	if passed >= n.decision.RetryAfter-time.Microsecond {
		delete(s.denials, k)
		return sent, s.given, false
	}
	if c.Cost < n.cost || c.Cost > n.spec.Capacity {
		return sent, s.given, false
	}
	*d = n.decision
	d.Source, d.Charged = quota.FromMemory, 0
	d.RetryAfter -= passed
	if d.ResetAfter != quota.Never {
		d.ResetAfter = max(d.ResetAfter-passed, d.RetryAfter)
	}
	return sent, s.given, true
}

// learn remembers a denial of the store.
func (m *memory) learn(c *quota.Charge, d *quota.Decision, sent time.Duration, given uint64) {
	if d.Source != quota.FromStore || d.Replayed {
		return
	}
	s := m.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	k := keyOf(c)
	old, ok := s.denials[k]
	switch {
	case d.Allowed:
		// As much as was denied is admitted: somebody gave back. Or the state was converted.
		if ok && (c.Cost >= old.cost || *c.Limit.Spec() != old.spec) {
			delete(s.denials, k)
		}
	case s.given != given, d.RetryAfter == quota.Never, d.RetryAfter <= 0, ok && old.sent > sent:
	default:
		if !ok {
			k.key = strings.Clone(k.key) // not the request that it may be cut from
			if len(s.denials) >= m.most {
				for other := range s.denials {
					delete(s.denials, other)
					break
				}
			}
		}
		s.denials[k] = denial{*c.Limit.Spec(), c.Cost, sent, *d}
	}
}

// forget drops what is known of a charge's key, and what requests under way are about to tell of it.
func (m *memory) forget(c *quota.Charge) {
	s := m.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.given++
	delete(s.denials, keyOf(c))
}
