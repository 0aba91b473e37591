package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
)

// Stats counts the work of a store of [NewCAS] or [NewTransactional] since it was made.
type Stats struct {
	Calls    int64 // of Charge and ChargeAll that were decided or failed
	Attempts int64 // transactions, or loads with the swap that followed: fewer than Calls where calls went together
	Lost     int64 // attempts that another process overtook
}

// A StatsReporter is a Store that counts its work.
type StatsReporter interface {
	// Stats returns the counts. It does no I/O.
	Stats() Stats
}

// store is the Store of both adapters.
type store struct {
	transactor Transactor
	closer     io.Closer // of what the author gave; may be nil
	lister     KeyLister // the same
	prompt     bool
	atomicity  Atomicity
	split      bool
	attempts   int
	gate       Gate
	origin     string       // of the store's attempts
	attempted  atomic.Int64 // attempts that had something to write

	stats struct{ calls, attempts, lost atomic.Int64 }

	// mu guards the fields below, and those of batches that say so. It is never held while a function of the author's runs.
	// Whenever it is free:
	//
	//   - A key is in last while a batch that has the key waits or is in flight. last has the latest such batch.
	//   - A batch in flight has no other batch with one of its keys in flight beside it.
	//   - A batch waits while it has others before it, all of which wait or are in flight: the end of one of them sends it.
	//   - If the store is closed, no batch waits.
	mu      sync.Mutex
	ending  bool // Close was called
	closed  bool
	last    map[string]*batch
	queue   map[*batch]struct{} // the batches that wait
	running sync.WaitGroup      // batches that waited
	backs   sync.WaitGroup      // refunds of lists that were split
}

// healthy is a store whose author's type can be asked how its servers are.
type healthy struct {
	*store
	reporter HealthReporter
	seen     atomic.Pointer[Health] // the last
}

func newStore(t Transactor, given any, o *Options) (quota.Store, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case o.Attempts < 0:
		return nil, fmt.Errorf("quota: %w: Options.Attempts is %d; accepted: 0 or more", quota.ErrInvalid, o.Attempts)
	case o.Atomicity > OneKey:
		return nil, fmt.Errorf("quota: %w: Options.Atomicity is %d; accepted: AnyKeys, OneGroup or OneKey", quota.ErrInvalid, o.Atomicity)
	}
	s := &store{transactor: t, atomicity: o.Atomicity, split: o.Split, attempts: o.Attempts, last: map[string]*batch{}, queue: map[*batch]struct{}{}}
	if s.attempts == 0 {
		s.attempts = 16
	}
	s.origin = strconv.FormatUint(rand.Uint64(), 36) + "-"
	s.closer, _ = given.(io.Closer)
	s.lister, _ = given.(KeyLister)
	if p, ok := given.(Prompt); ok {
		s.prompt = p.Prompt()
	}
	if h, ok := given.(HealthReporter); ok {
		return &healthy{store: s, reporter: h}, nil
	}
	return s, nil
}

// Atomicity says how far the store decides several keys in one step.
func (s *store) Atomicity() Atomicity { return s.atomicity }

// Prompt reports whether the author's type declares that it returns by the deadline.
func (s *store) Prompt() bool { return s.prompt }

// Stats returns the store's counts.
func (s *store) Stats() Stats {
	return Stats{Calls: s.stats.calls.Load(), Attempts: s.stats.attempts.Load(), Lost: s.stats.lost.Load()}
}

// Health asks the author's type.
func (h *healthy) Health(ctx context.Context) (Health, error) {
	if err := h.gate.Ready(ctx); err != nil {
		return Health{}, err
	}
	health, err := h.reporter.Health(ctx)
	if err != nil {
		return Health{}, ofRead(ctx, err)
	}
	h.seen.Store(&health)
	return health, nil
}

// Readings tells the store's counts.
func (s *store) Readings(tell func(Reading)) {
	stats := s.Stats()
	tell(Reading{Metric: MetricBatches, Value: stats.Attempts})
	tell(Reading{Metric: MetricBatchedCalls, Value: stats.Calls})
	tell(Reading{Metric: MetricOvertaken, Value: stats.Lost})
}

// Readings tells the store's counts, and the numbers of the last Health.
func (h *healthy) Readings(tell func(Reading)) {
	h.store.Readings(tell)
	h.seen.Load().Readings(tell)
}

func (s *store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if err := s.gate.Ready(ctx); err != nil {
		return quota.Decision{}, err
	}
	one := &struct {
		charge   [1]quota.Charge
		decision [1]quota.Decision
	}{charge: [1]quota.Charge{c}}
	k := &call{cs: one.charge[:], out: one.decision[:]}
	done, err := s.alone(ctx, k)
	if !done {
		err = s.together(ctx, k)
	}
	if err != nil {
		return quota.Decision{}, err
	}
	return one.decision[0], nil
}

func (s *store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	return s.list(ctx, cs, out)
}

// list decides a list, also of a call that came before Close.
func (s *store) list(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.split && cs[0].Alternative == 0 && s.crosses(cs) {
		return (&splitter{store: s, cs: cs, out: out}).take(ctx)
	}
	k := &call{cs: cs, out: out}
	done, err := s.alone(ctx, k)
	if !done {
		k = k.owned()
		if err = s.together(ctx, k); err == nil {
			copy(out, k.out)
		}
	}
	return err
}

// Close ends the store, see NewTransactional.
func (s *store) Close() (err error) {
	if !s.gate.Close() {
		return nil
	}
	s.mu.Lock()
	s.ending = true
	s.mu.Unlock()
	s.backs.Wait()
	s.refuse()
	if s.closer != nil {
		err = s.closer.Close()
	}
	s.running.Wait()
	return err
}

// alone decides a call in the caller's goroutine if its keys are free. Otherwise the call must wait.
func (s *store) alone(ctx context.Context, k *call) (done bool, err error) {
	if k.keys, err = s.keys(k.cs, k.own[:0]); err != nil {
		return true, err
	}
	free, err := s.enter(k)
	if !free || err != nil {
		return err != nil, err
	}
	defer s.leave(&k.alone, false)
	s.decide(ctx, &k.alone)
	if k.err != nil {
		return true, k.err
	}
	return true, k.alone.err
}

// together decides a call with others.
func (s *store) together(ctx context.Context, k *call) error {
	if err := s.join(ctx, k); err != nil {
		return err
	}
	return s.wait(ctx, k)
}

// crosses reports whether the database does not decide the charges in one step.
func (s *store) crosses(cs []quota.Charge) bool {
	if s.atomicity == AnyKeys {
		return false
	}
	for i := 1; i < len(cs); i++ {
		if s.atomicity == OneKey || quota.Group(cs[i].Key) != quota.Group(cs[0].Key) {
			return true
		}
	}
	return false
}

// background calls f in a goroutine, for which Close waits before it closes anything; if Close came first, f ends by itself.
func (s *store) background(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ending {
		go f()
	} else {
		s.backs.Go(f)
	}
}

// keys appends the keys of the charges, and as the last one the key of their request id if they carry one.
func (s *store) keys(cs []quota.Charge, keys []string) ([]string, error) {
	if s.crosses(cs) {
		return nil, fmt.Errorf("quota: %w: this store decides fewer keys in one step", quota.ErrCrossSlot)
	}
	var text [128]byte
	for i := range cs {
		if err := cs[i].Limit.Err(); err != nil {
			return nil, err
		}
		keys = append(keys, string(AppendKey(text[:0], cs[i].Limit.Name(), cs[i].Key)))
	}
	if id := cs[0].ID; id != "" {
		if s.atomicity == OneKey {
			return nil, fmt.Errorf("quota: %w: a request id needs a store that decides two keys in one step", quota.ErrCrossSlot)
		}
		keys = append(keys, string(AppendIDKey(text[:0], quota.Group(cs[0].Key), id)))
	}
	return keys, nil
}

// decide makes the transaction of a batch, and sets the batch's error.
func (s *store) decide(ctx context.Context, b *batch) {
	b.err = errEnded // the author's function may end the goroutine
	b.prepare()
	b.err = s.attempt(ctx, b)
	s.stats.calls.Add(int64(len(b.calls)))
	s.stats.attempts.Add(int64(b.attempts))
	s.stats.lost.Add(int64(b.lost))
}

// attempt makes attempts at the transaction of a batch until one is not overtaken.
func (s *store) attempt(ctx context.Context, b *batch) error {
	for pause := time.Duration(0); ; {
		if !s.hasten(ctx, b, pause) {
			return b.conflict(errNoTime)
		}
		if pause > 0 {
			timer := time.NewTimer(pause)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return b.conflict(ctx.Err())
			}
		}
		began := time.Time{}
		if _, bounded := ctx.Deadline(); bounded {
			began = time.Now()
		}
		err := s.transact(ctx, b)
		b.attempts++
		if !errors.Is(err, quota.ErrConflict) || errors.Is(err, quota.ErrIndeterminate) {
			if b.lost > 0 && err != nil && err == ctx.Err() {
				err = b.conflict(err)
			}
			return err
		}
		took := time.Duration(0)
		if !began.IsZero() {
			took = time.Since(began)
		}
		s.lose(b, took)
		if int(b.lost) == s.attempts {
			return b.conflict(err)
		}
		pause = 1 + rand.N(time.Millisecond<<min(b.lost, 6)) // longer and more spread out each time, up to some 64 ms
	}
}

// transact makes one attempt.
func (s *store) transact(ctx context.Context, b *batch) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	b.decided, b.writes = false, false
	defer func() {
		if v := recover(); v != nil {
			err = panics.Error("quota", "the database", v, b.writes)
		}
	}()
	err = s.transactor.Transact(ctx, &b.access, b.decide)
	switch {
	case err == nil && !b.decided:
		return fmt.Errorf("quota: %w: Transact returned nil and did not call decide", quota.ErrMisconfigured)
	case err == nil:
		return nil
	case b.writes:
		err = Classify(err, quota.ErrIndeterminate)
		if end := ctx.Err(); end != nil && errors.Is(err, end) && quota.Charged(err) == quota.NotCharged {
			return end
		}
		return err
	}
	return ofRead(ctx, err)
}

// newAttempt returns a text for Change.Attempt.
func (s *store) newAttempt() string {
	var text [40]byte
	return string(strconv.AppendInt(append(text[:0], s.origin...), s.attempted.Add(1), 36))
}

// ofRead returns the error of a call that wrote nothing: the context's own, unless the call left while the store connected.
func ofRead(ctx context.Context, err error) error {
	if early, ok := errors.AsType[GettingReady](err); ctx.Err() != nil && !(ok && early.GettingReady()) {
		return ctx.Err()
	}
	return Classify(err, quota.ErrUnavailable)
}

var errEnded = panics.Ended("quota")
