package lease

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const (
	// DefaultLifetime is how long leased quota may be spent unless Options say otherwise.
	DefaultLifetime = time.Second
	// DefaultMaxKeys is how many keys a store watches unless Options say otherwise.
	DefaultMaxKeys = 1 << 16
)

// Options configure a Store. Instances is required; other fields that are zero take the defaults.
type Options struct {
	// Instances reports how many processes lease from the store below now, this one included. It is called
	// for each chunk, concurrently, and must not block; a result below 1 counts as 1. Where it reports fewer
	// than there are, chunks are too large: the last tokens are shared less fairly, and a give-back may
	// exceed the quota that the bucket would have kept.
	Instances func() int64
	// Lifetime is how long leased quota may be spent, from 1ms to 1h; 0 is DefaultLifetime. A request for a
	// chunk, and Close, take at most half of it, and giving back a tenth.
	Lifetime time.Duration
	// MaxKeys bounds the keys that are watched and leased, up to 2^30; 0 is DefaultMaxKeys. A key takes some
	// 250 bytes beside its own text. Charges to keys beyond the bound go to the store below as they are.
	MaxKeys int
	// Limits are the limits to lease, known by their names. A limit that is no token bucket is refused. nil
	// leases every token bucket that is charged.
	Limits []*quota.Limit
	// Clock tells the time, for tests; nil is the monotonic clock. It is called concurrently and must not
	// step back.
	Clock func() time.Time
}

// Store is a quota.Store that leases from another. Use New to make one. Methods may be called concurrently.
type Store struct {
	inner     quota.Store
	instances func() int64
	clock     func() time.Time
	base      time.Time
	limits    map[unique.Handle[string]]bool // nil: all
	seed      maphash.Seed
	table     table

	// In ns. Times in this package are ns since base.
	lifetime, window, patience, backPatience int64

	hits                          hits
	chunks, chunkTokens, returned atomic.Int64

	gate driver.Gate
	stop chan struct{} // closed by Close

	mu      sync.Mutex
	running int           // goroutines of this store
	ended   chan struct{} // closed when the store is closed and no goroutine runs
}

var (
	_ quota.Store     = (*Store)(nil)
	_ driver.Graded   = (*Store)(nil)
	_ driver.Prompt   = (*Store)(nil)
	_ driver.Measured = (*Store)(nil)
)

// bucketRule is the rule of algorithm.TokenBucket, the only one whose tokens can be leased.
var bucketRule = quota.Rule{'t', 'b', '1'}

// New returns a store that leases from store, and owns store: Close closes both. It starts a goroutine, which
// Close ends. It fails with quota.ErrInvalid where store or Options.Instances is nil, an option is out of its
// range, or one of Options.Limits is neither a token bucket nor a rule that keeps no state.
func New(store quota.Store, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case store == nil:
		return nil, invalid("the store is nil", "a store")
	case o.Instances == nil:
		return nil, invalid("Options.Instances is nil", "a function that reports how many processes lease")
	case o.Lifetime != 0 && (o.Lifetime < time.Millisecond || o.Lifetime > time.Hour):
		return nil, invalid(fmt.Sprintf("Options.Lifetime is %v", o.Lifetime), "1ms to 1h, or 0")
	case o.MaxKeys < 0 || o.MaxKeys > 1<<30:
		return nil, invalid(fmt.Sprintf("Options.MaxKeys is %d", o.MaxKeys), "0 to 2^30")
	}
	s := &Store{
		inner: store, instances: o.Instances, clock: o.Clock, base: time.Now(), seed: maphash.MakeSeed(),
		lifetime: int64(o.Lifetime), stop: make(chan struct{}), ended: make(chan struct{}),
	}
	if s.clock != nil {
		s.base = s.clock()
	}
	if s.lifetime == 0 {
		s.lifetime = int64(DefaultLifetime)
	}
	s.window, s.patience, s.backPatience = s.lifetime/4, s.lifetime/2, s.lifetime/10
	if o.Limits != nil {
		s.limits = make(map[unique.Handle[string]]bool)
	}
	for i, l := range o.Limits {
		switch {
		case l.Err() != nil:
			return nil, fmt.Errorf("lease: Options.Limits[%d]: %w", i, l.Err())
		case l.Spec().Rule != bucketRule && l.Spec().Unit != 0:
			return nil, invalid(fmt.Sprintf("limit %q has the rule %q", l.Name(), l.Spec().Rule),
				"token buckets and GCRA, because tokens of a window are worthless in the next: a chunk would be spent twice or lost")
		}
		s.limits[l.Handle()] = true
	}
	most := o.MaxKeys
	if most == 0 {
		most = DefaultMaxKeys
	}
	s.table.init(most)
	s.start(s.keep)
	return s, nil
}

// Unwrap returns the store below, see driver.Wrapper.
func (s *Store) Unwrap() quota.Store { return s.inner }

// Atomicity reports how far the store below decides several keys in one step, see driver.Graded.
func (s *Store) Atomicity() driver.Atomicity {
	return driver.AtomicityOf(s.inner)
}

// Prompt reports whether every call returns by its context's deadline, as the store below does. See
// driver.Prompt.
func (s *Store) Prompt() bool {
	return driver.IsPrompt(s.inner)
}

// Readings tells how many keys are watched, how many charges leases decided, and the chunks and tokens of leases, see
// driver.Measured.
func (s *Store) Readings(tell func(driver.Reading)) {
	s.table.mu.Lock()
	keys := s.table.live
	s.table.mu.Unlock()
	tell(driver.Reading{Metric: driver.MetricLeaseKeys, Value: int64(keys)})
	tell(driver.Reading{Metric: driver.MetricLeaseHits, Value: s.hits.sum()})
	tell(driver.Reading{Metric: driver.MetricChunks, Value: s.chunks.Load()})
	tell(driver.Reading{Metric: driver.MetricChunkTokens, Value: s.chunkTokens.Load()})
	tell(driver.Reading{Metric: driver.MetricReturnedTokens, Value: s.returned.Load()})
}

// hits is a counter whose parts, by hash, are in cache lines of their own: the charges of different keys do not meet in it.
type hits [32]struct {
	n atomic.Int64
	_ [56]byte
}

func (c *hits) add(h uint64) { c[h%uint64(len(c))].n.Add(1) }

func (c *hits) sum() (n int64) {
	for i := range c {
		n += c[i].n.Load()
	}
	return n
}

// Charge decides one charge, in memory if the key's lease holds enough. It fails with the errors of the store
// below; with quota.ErrUnavailable, and without a charge, where a request for a chunk was not sent within
// half a lifetime; and with the context's own error where ctx ends first: the caller alone is then not
// charged.
func (s *Store) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	if err = s.gate.Ready(ctx); err != nil {
		return d, err
	}
	h := driver.Hash(s.seed, &c)
	e := s.table.find(h, &c)
	// A charge with a floor asks the store: only that knows how much is left of the whole. So does a shadow.
	own := c.ID == "" && c.Cost > 0 && c.Floor == 0 && !c.Shadow && c.Alternative == 0
	if e != nil && own {
		if l := e.lease.Load(); l != nil && l.decide(&c, s.now(), &d) {
			s.hits.add(h)
			return d, nil
		}
	}
	switch {
	case c.Op == quota.OpTake && own && s.leases(c.Limit):
		return s.ask(ctx, &c, h, e)
	case resets(&c) && e != nil:
		err = s.reset(ctx, []quota.Charge{c}, func() (bool, error) {
			d, err = s.inner.Charge(ctx, c)
			return d.Allowed, err
		})
		return d, err
	}
	return s.inner.Charge(ctx, c)
}

// ChargeAll has the store below decide a list. If the store denies it, ChargeAll gives back the leases of the
// denied keys and asks once more; of alternatives it does so if none fits. The errors are those of the store below; a list of
// one charge is a Charge.
func (s *Store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) (err error) {
	if err = s.gate.Ready(ctx); err != nil {
		return err
	}
	if len(cs) == 1 {
		out[0], err = s.Charge(ctx, cs[0])
		return err
	}
	for i := range cs {
		if resets(&cs[i]) {
			return s.reset(ctx, cs, func() (bool, error) {
				err := s.list(ctx, cs, out)
				return err == nil && quota.Granted(out), err
			})
		}
	}
	return s.list(ctx, cs, out)
}

// list has the store below decide a list, and once more with the leases of denied keys.
func (s *Store) list(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.inner.ChargeAll(ctx, cs, out); err != nil || quota.Granted(out) || !s.begin() {
		return err
	}
	var refunds []refund
	for i := range cs {
		if e := s.table.find(driver.Hash(s.seed, &cs[i]), &cs[i]); e != nil && !out[i].Allowed {
			refunds = e.release(refunds)
		}
	}
	given := s.giveBackAndEnd(ctx, refunds)
	if len(refunds) == 0 {
		return nil
	}
	select {
	case <-given:
	case <-ctx.Done():
	}
	return s.inner.ChargeAll(ctx, cs, out)
}

// reset ends the leases of the keys that a list resets, and has ask send the list. If the store did not reset them, it
// gives their tokens back; otherwise they are worthless.
func (s *Store) reset(ctx context.Context, cs []quota.Charge, ask func() (granted bool, err error)) error {
	if !s.begin() {
		return s.gate.Open()
	}
	var refunds []refund
	for i := range cs {
		if resets(&cs[i]) {
			if e := s.table.find(driver.Hash(s.seed, &cs[i]), &cs[i]); e != nil {
				refunds = e.drop(refunds)
			}
		}
	}
	kept := false // remains so if the store panics
	defer func() {
		if !kept {
			for _, r := range refunds {
				r.chunk.left.Store(worthlessChunk)
				r.entry.refunded()
			}
			refunds = nil
		}
		s.giveBackAndEnd(ctx, refunds)
	}()
	granted, err := ask()
	kept = !granted && quota.Charged(err) != quota.ChargeUnknown
	return err
}

// Close gives back the leases, for at most half a lifetime, and closes the store below. Later calls of Charge
// and ChargeAll are quota.ErrClosed. Close reports an error where requests have not ended within half a
// lifetime, and the error of closing the store below. A second call returns nil.
func (s *Store) Close() error {
	s.mu.Lock()
	if !s.gate.Close() {
		s.mu.Unlock()
		return nil
	}
	close(s.stop)
	s.running++ // for the goroutine below
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), time.Duration(s.patience))
	defer cancel()
	// It does not wait for requests in flight: each gives its own chunk back when it ends.
	go func() {
		defer s.end()
		var refunds []refund
		for e := range s.table.all {
			refunds = e.release(refunds)
		}
		s.giveBack(ctx, refunds)
	}()
	var late error
	select {
	case <-s.ended:
	case <-ctx.Done():
		s.mu.Lock()
		if s.running > 0 {
			late = fmt.Errorf("lease: %d requests have not ended within %v", s.running, time.Duration(s.patience))
		}
		s.mu.Unlock()
	}
	return errors.Join(late, s.inner.Close())
}

// start runs f on a goroutine that Close waits for, and reports false if the store is closed.
func (s *Store) start(f func()) bool {
	if !s.begin() {
		return false
	}
	go func() {
		defer s.end()
		f()
	}()
	return true
}

// begin has Close wait until end is called, and reports false if the store is closed.
func (s *Store) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.gate.Open() != nil {
		return false
	}
	s.running++
	return true
}

func (s *Store) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running--; s.running == 0 && s.gate.Open() != nil {
		close(s.ended)
	}
}

func (s *Store) now() int64 {
	if s.clock != nil {
		return int64(s.clock().Sub(s.base))
	}
	return int64(time.Since(s.base))
}

// resets reports whether a charge makes a key fresh. A rule that keeps no state has no fresh key to make.
func resets(c *quota.Charge) bool { return c.Op == quota.OpReset && c.Limit.Spec().Unit != 0 }

// leases reports whether the quota of a limit is leased.
func (s *Store) leases(l *quota.Limit) bool {
	return l.Spec().Rule == bucketRule && (s.limits == nil || s.limits[l.Handle()])
}

func invalid(problem, accepted string) error {
	return fmt.Errorf("lease: %w: %s; accepted: %s", quota.ErrInvalid, problem, accepted)
}
