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
	"github.com/fleetquota/fleetquota/quota/driver"
)

// DefaultMemoryKeys is MemoryOptions.MaxKeys unless options say otherwise.
const DefaultMemoryKeys = 1 << 16

// MemoryOptions change the policy that [DenialMemory] makes. The zero value, and nil, take the defaults.
type MemoryOptions struct {
	// Keys bounds the keys remembered, rounded up to a multiple of 64; 0 is DefaultMemoryKeys. Above it, a
	// new denial takes the place of another one.
	MaxKeys int
}

// DenialMemory returns the policy that a key known to be exhausted is denied without asking the store: it
// spares a store that is under attack. Such a decision is [quota.FromMemory]: the store's earlier denial,
// with the rest of its RetryAfter.
//
// A denial is remembered until its RetryAfter has passed, counted from before the request was sent, and never
// longer. It answers a single take, also of up to so many, without a request id, of the same limit with the same numbers, if its cost and
// floor together are at least those of the denied one and at most the capacity: a denial of callers with a floor never
// denies those without. The rule must deny every higher cost when it denies a
// lower one, as all rules of package algorithm do. Peeks, lists, charges with an id and all other operations
// go to the store. A denial is forgotten when a refund, reset or debit of this process on its key returns,
// when the key admits as high a cost and floor, or when the key is charged under other numbers.
//
// It cannot see a give-back of another process, nor a give-back of this process that the store carries out
// after its caller gave up, nor that the key was last charged under other numbers, by whose rule the store
// may forget the key sooner. In these cases it denies requests that the store would admit, until the
// remembered RetryAfter has passed. Therefore no preset includes it.
//
// It remembers nothing of limits with holds, see quota.OpHold: such a denial ends whenever a hold does, and its RetryAfter is
// the time until one lapses.
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

func (p memoryPolicy) wrap(inner quota.Store, _ bool) (quota.Store, error) {
	if p.MaxKeys < 0 {
		return nil, invalid(fmt.Sprintf("MemoryOptions.MaxKeys is %d", p.MaxKeys), "0 or more")
	}
	if p.MaxKeys == 0 {
		p.MaxKeys = DefaultMemoryKeys
	}
	m := &memory{
		layer: layer{inner: inner, of: kindMemory}, base: time.Now(), seed: maphash.MakeSeed(),
		most: (p.MaxKeys + memoryShards - 1) / memoryShards,
	}
	for i := range m.shards {
		m.shards[i].denials = make(map[limitKey]denial)
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
	denials map[limitKey]denial
	hits    int64
	// giveBacks counts the give-backs that returned: a denial of a request sent before one of them is not
	// remembered.
	giveBacks uint64
}

// limitKey is a key of a limit.
type limitKey struct {
	limit unique.Handle[string]
	key   string
}

// denial is a denial that the store made.
type denial struct {
	spec     quota.Spec
	need     int64         // cost and floor
	sent     time.Duration // since base: before the request was sent
	decision quota.Decision
}

// Readings tells how many denials are remembered, and how many calls they answered.
func (m *memory) Readings(tell func(driver.Reading)) {
	denials, hits := 0, int64(0)
	for i := range m.shards {
		s := &m.shards[i]
		s.mu.Lock()
		denials += len(s.denials)
		hits += s.hits
		s.mu.Unlock()
	}
	tell(driver.Reading{Metric: driver.MetricDenialKeys, Value: int64(denials)})
	tell(driver.Reading{Metric: driver.MetricDenialHits, Value: hits})
}

func (m *memory) shard(c *quota.Charge) *memoryShard {
	return &m.shards[driver.Hash(m.seed, c)%memoryShards]
}

func keyOf(c *quota.Charge) limitKey { return limitKey{c.Limit.Handle(), c.Key} }

func (m *memory) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	if givesBack(c.Op) {
		defer m.forget(&c)
		return m.inner.Charge(ctx, c)
	}
	if c.Limit.TTL() > 0 {
		return m.inner.Charge(ctx, c)
	}
	sent, giveBacks, known := m.recall(&c, &d)
	if known {
		if err := m.orClosed(ctx.Err()); err != nil {
			return quota.Decision{}, err
		}
		return d, nil
	}
	d, err = m.inner.Charge(ctx, c)
	if err == nil {
		m.remember(&c, &d, sent, giveBacks)
	}
	return d, err
}

func (m *memory) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var few [8]uint64
	giveBacks := few[:0]
	for i := range cs {
		if givesBack(cs[i].Op) {
			defer m.forget(&cs[i])
		}
		giveBacks = append(giveBacks, m.shard(&cs[i]).count())
	}
	sent := time.Since(m.base)
	if err := m.inner.ChargeAll(ctx, cs, out); err != nil {
		return err
	}
	for i := range cs {
		switch {
		case out[i].Split:
			// The quota that one slot granted was given back when another slot denied.
			m.forget(&cs[i])
		case !givesBack(cs[i].Op) && cs[i].Limit.TTL() == 0:
			m.remember(&cs[i], &out[i], sent, giveBacks[i])
		}
	}
	return nil
}

// givesBack reports whether an operation may raise a key's quota, or is a correction of this process.
func givesBack(op quota.Op) bool {
	return op == quota.OpRefund || op == quota.OpReset || op == quota.OpDebit
}

func (s *memoryShard) count() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.giveBacks
}

// recall answers a take from memory, if known. Otherwise it returns the time and the count of give-backs that
// remember needs.
func (m *memory) recall(c *quota.Charge, d *quota.Decision) (sent time.Duration, giveBacks uint64, known bool) {
	s := m.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	// The clock is read under the lock: after all the give-backs counted.
	sent = time.Since(m.base)
	k := keyOf(c)
	n, ok := s.denials[k]
	if !ok {
		return sent, s.giveBacks, false
	}
	if *c.Limit.Spec() != n.spec {
		// A charge under other numbers converts the key's state: the old denial no longer holds.
		delete(s.denials, k)
		return sent, s.giveBacks, false
	}
	if c.Op != quota.OpTake && c.Op != quota.OpUpTo || c.ID != "" {
		return sent, s.giveBacks, false
	}
	passed := sent - n.sent
	// The store counts whole microseconds: its time of the decision may be one before the request was sent.
	if passed >= n.decision.RetryAfter-time.Microsecond {
		delete(s.denials, k)
		return sent, s.giveBacks, false
	}
	if need := need(c); need < n.need || need > n.spec.Capacity {
		return sent, s.giveBacks, false
	}
	s.hits++
	*d = n.decision
	d.Source, d.Charged, d.Shadow, d.Alternative = quota.FromMemory, 0, c.Shadow, c.Alternative
	d.RetryAfter -= passed
	if d.ResetAfter != quota.Never {
		d.ResetAfter = max(d.ResetAfter-passed, d.RetryAfter)
	}
	return sent, s.giveBacks, true
}

// remember keeps a denial of the store, and forgets one that the decision disproves.
func (m *memory) remember(c *quota.Charge, d *quota.Decision, sent time.Duration, giveBacks uint64) {
	if d.Source != quota.FromStore || d.Replayed || c.Op == quota.OpAhead { // which may be admitted where a take is denied
		return
	}
	s := m.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	k := keyOf(c)
	old, ok := s.denials[k]
	switch {
	case d.Allowed:
		// A cost as high as the denied one is admitted: quota was given back, or the state was converted.
		if ok && (need(c) >= old.need || *c.Limit.Spec() != old.spec) {
			delete(s.denials, k)
		}
	case s.giveBacks != giveBacks, d.RetryAfter == quota.Never, d.RetryAfter <= 0, ok && old.sent > sent:
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
		s.denials[k] = denial{*c.Limit.Spec(), need(c), sent, *d}
	}
}

// forget drops the denial of a charge's key, and those that requests in flight are about to bring.
func (m *memory) forget(c *quota.Charge) {
	s := m.shard(c)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.giveBacks++
	delete(s.denials, keyOf(c))
}
