package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/bound"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// TestSimulation runs a fleet in virtual time: instances with policies of their own around one primary that
// is refused, frozen, slow, loses replies, flaps and loses its state, on a schedule that a seed makes. After
// each seed it checks what the package promises. FLEETQUOTA_SIM=<seed> runs one seed, with an account of what
// happened.
func TestSimulation(t *testing.T) {
	if s := os.Getenv("FLEETQUOTA_SIM"); s != "" {
		seed, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		sum := simulate(t, seed)
		t.Logf("%+v", sum)
		return
	}
	seeds := sized(300, 10_000)
	if raceEnabled && !testenv.Full() {
		seeds = 10 // a simulation has one goroutine at a time, and ./test runs them without the race detector
	}
	var all simSum
	for seed := range uint64(seeds) {
		all.add(simulate(t, seed))
		if t.Failed() {
			t.Fatalf("replay with FLEETQUOTA_SIM=%d", seed)
		}
	}
	t.Logf("%d seeds: %+v", seeds, all)
	if raceEnabled && !testenv.Full() {
		return
	}
	if all.Fallback == 0 || all.Reconciled == 0 || all.Losses == 0 || all.Restarts == 0 || all.Unknown == 0 || all.Refunded == 0 || all.Opened == 0 || all.None == 0 || all.Ones == 0 || all.Full == 0 || all.Forgot == 0 {
		t.Errorf("got %+v, want every count above 0", all)
	}
}

// simSum counts what happened, so that it is seen to have happened.
type simSum struct {
	Calls, Store, Fallback, Errors, Unknown  int
	Admitted, Reconciled, Refunded           int64
	Losses, Restarts, Opened, Phases, Beyond int
	Full, Forgot                             int // notices that keys had no room
	None, Ones                               int // shares of 0, and of a token where the limit has less for each
}

func (s *simSum) add(o simSum) {
	s.Calls += o.Calls
	s.Store += o.Store
	s.Fallback += o.Fallback
	s.Errors += o.Errors
	s.Unknown += o.Unknown
	s.Admitted += o.Admitted
	s.Reconciled += o.Reconciled
	s.Refunded += o.Refunded
	s.Losses += o.Losses
	s.Restarts += o.Restarts
	s.Opened += o.Opened
	s.Phases += o.Phases
	s.Beyond += o.Beyond
	s.Full += o.Full
	s.Forgot += o.Forgot
	s.None += o.None
	s.Ones += o.Ones
}

// small counts a share of a limit that has less than a token for each instance.
func (s *simSum) small(share, part int64) {
	switch {
	case share == 0:
		s.None++
	case part == 0:
		s.Ones++
	}
}

type simFault int

const (
	simHealthy simFault = iota
	simRefused
	simFrozen
	simSlow
	simReplyLost
	simMixed      // every other call fares well
	simOnlyClaims // reconciliations fare well
	simFaults
)

type simPhase struct {
	from, to time.Duration
	fault    simFault
	mask     int // the instances it befalls
	slow     time.Duration
}

// simKey is a limit and key, and what the fleet got of it.
type simKey struct {
	limit *quota.Limit
	key   string
}

type sim struct {
	t      *testing.T
	seed   uint64
	start  time.Time
	end    time.Duration // of the faults
	last   time.Duration // of the traffic
	phases []simPhase
	t0     time.Duration // the timeout
	delay  time.Duration // of the breakers
	prompt bool
	n      int64
	least  bool // shares are at least one token
	keys   []simKey
	// Workers of an instance make a call each pause or sooner. With many of them calls of one key overlap often.
	workers int
	pause   time.Duration
	// crowded fallbacks have room for 64 keys, and meet many others that use little.
	crowded bool

	// Every limit gains refill tokens each period. Where that is next to nothing, nothing but bursts is admitted,
	// and one too many shows.
	refill int64
	per    time.Duration

	mu        sync.Mutex
	primary   *local.Store
	losses    int
	executed  map[simKey]int64 // charged by calls that are no reconciliations
	instances []*simInstance   // restarted ones included
	sum       simSum
}

// simInstance is one instance from its start to its end.
type simInstance struct {
	*sim
	id    int
	store quota.Store
	rng   *rand.Rand // of its faults
	ended bool
	// charged is what the primary was charged by reconciliations; under sim.mu.
	charged map[simKey]int64

	mu    sync.Mutex
	stats map[simKey]*simStats
}

// simStats is what one instance did with one key.
type simStats struct {
	ok, unknown int64 // taken and debited from the primary; of unknown outcome
	here        int64 // admitted by the fallback, less what was refunded there
	takes       int64 // admitted by takes
	refunds     int64 // asked for
	reconciled  int64 // charged by reconciliations
	claims      map[string]bool
	serving     bool // in the primary's place
	since       time.Time
	served      time.Duration // so long in all
	spans       int64         // so often
}

func (i *simInstance) stat(k simKey) *simStats {
	s := i.stats[k]
	if s == nil {
		s = &simStats{claims: map[string]bool{}}
		i.stats[k] = s
	}
	return s
}

func simulate(t *testing.T, seed uint64) (sum simSum) {
	synctest.Test(t, func(t *testing.T) {
		s := newSim(t, seed)
		s.run()
		s.check()
		sum = s.sum
	})
	return sum
}

func newSim(t *testing.T, seed uint64) *sim {
	rng := rand.New(rand.NewPCG(seed, 1))
	s := &sim{
		t: t, seed: seed, start: time.Now(), n: 2 + rng.Int64N(3), prompt: rng.IntN(2) == 0,
		t0: 50 * time.Millisecond, delay: 300 * time.Millisecond, refill: 5 + rng.Int64N(60), per: time.Second,
		primary: local.New(), executed: map[simKey]int64{},
	}
	if rng.IntN(2) == 0 {
		s.per = time.Hour
	}
	slow := 5 + rng.Int64N(20)
	if rng.IntN(3) == 0 { // often below the number of instances
		slow, s.least = 1+rng.Int64N(4), rng.IntN(2) == 0
	}
	limits := []*quota.Limit{bucket("hot", 10+rng.Int64N(60), s.refill, s.per), bucket("slow", slow, s.refill, s.per)}
	for _, key := range []string{"team/hot", "team/cold", "other/cold"} {
		for _, l := range limits {
			s.keys = append(s.keys, simKey{l, key})
		}
	}
	s.workers, s.pause = 2, 60*time.Millisecond
	if rng.IntN(3) == 0 {
		s.workers, s.pause = 4, 30*time.Millisecond
	}
	s.crowded = rng.IntN(4) == 0
	at := time.Duration(rng.IntN(400)) * time.Millisecond
	flapping := rng.IntN(3) == 0
	for length := time.Duration(2+rng.IntN(4)) * time.Second; at < length; {
		p := simPhase{from: at, fault: simFault(rng.IntN(int(simFaults))), mask: -1, slow: time.Duration(rng.IntN(120)) * time.Millisecond}
		d := time.Duration(20+rng.IntN(1000)) * time.Millisecond
		if flapping {
			d = time.Duration(5+rng.IntN(150)) * time.Millisecond
		}
		if rng.IntN(3) == 0 {
			p.mask = rng.IntN(1 << s.n)
		}
		at += d
		p.to = at
		s.phases = append(s.phases, p)
	}
	s.end = at
	s.last = at + s.t0 + s.delay + 800*time.Millisecond
	return s
}

func (s *sim) since() time.Duration { return time.Since(s.start) }

// phase returns the fault that befalls an instance now.
func (s *sim) phase(instance int) (p simPhase) {
	now := s.since()
	for _, p := range s.phases {
		if now >= p.from && now < p.to && p.mask>>instance&1 == 1 {
			return p
		}
	}
	return p
}

func (s *sim) run() {
	rng := rand.New(rand.NewPCG(s.seed, 2))
	var wg sync.WaitGroup
	current := make([]*simInstance, s.n)
	for id := range current {
		current[id] = s.newInstance(id, 0)
	}
	get := func(id int) *simInstance {
		s.mu.Lock()
		defer s.mu.Unlock()
		return current[id]
	}
	for id := range current {
		for worker := range s.workers {
			wg.Go(func() {
				s.traffic(rand.New(rand.NewPCG(s.seed, uint64(100+10*id+worker))), func() *simInstance { return get(id) })
			})
		}
	}
	if rng.IntN(3) == 0 {
		for range 1 + rng.IntN(2) {
			at := time.Duration(rng.Int64N(int64(s.end))) + 11
			wg.Go(func() {
				time.Sleep(at)
				s.mu.Lock()
				s.losses++
				s.primary = local.New()
				s.mu.Unlock()
			})
		}
	}
	if rng.IntN(3) == 0 {
		at, id := time.Duration(rng.Int64N(int64(s.end)))+13, rng.IntN(int(s.n))
		wg.Go(func() {
			time.Sleep(at)
			fresh := s.newInstance(id, 1)
			s.mu.Lock()
			old := current[id]
			current[id] = fresh
			old.ended = true
			s.sum.Restarts++
			s.mu.Unlock()
			if err := old.store.Close(); err != nil && !strings.Contains(err.Error(), "have not ended") {
				s.t.Error(err)
			}
		})
	}
	wg.Wait()
	// Everything is well: one call for each key reconciles what is owed.
	for _, i := range current {
		for _, k := range s.keys {
			for range 2 {
				if _, err := i.do(quota.Charge{Limit: k.limit, Key: k.key, Op: quota.OpPeek}); err != nil {
					s.t.Errorf("seed %d: a peek after all faults: got %v, want a decision", s.seed, err)
				}
			}
		}
	}
	time.Sleep(2 * time.Second) // whatever is frozen thaws
	synctest.Wait()
	for _, i := range current {
		if err := i.store.Close(); err != nil {
			s.t.Error(err)
		}
	}
	time.Sleep(time.Second)
	synctest.Wait()
}

func (s *sim) newInstance(id, generation int) *simInstance {
	i := &simInstance{sim: s, id: id, rng: rand.New(rand.NewPCG(s.seed, uint64(1000+10*id+generation))), stats: map[simKey]*simStats{}, charged: map[simKey]int64{}}
	inner, err := resilience.Wrap(&simLink{i},
		resilience.Breaker(&resilience.BreakerOptions{Delay: s.delay, Notice: func(n quota.Notice) {
			if strings.Contains(n.Text, "opened") {
				s.mu.Lock()
				s.sum.Opened++
				s.mu.Unlock()
			}
		}}),
		resilience.Bulkhead(s.workers),
		resilience.Timeout(s.t0, &resilience.TimeoutOptions{MaxCalls: 20}))
	if err != nil {
		s.t.Fatal(err)
	}
	maxKeys := 0
	if s.crowded {
		maxKeys = 64
	}
	if i.store, err = resilience.Wrap(&simSpy{i, inner}, resilience.Fallback(local.New(), resilience.Instances(s.n), &resilience.FallbackOptions{AtLeastOne: s.least, MaxKeys: maxKeys, Notice: i.notice})); err != nil {
		s.t.Fatal(err)
	}
	s.mu.Lock()
	s.instances = append(s.instances, i)
	s.mu.Unlock()
	return i
}

// notice counts the notices about keys that had no room.
func (i *simInstance) notice(n quota.Notice) {
	i.sim.mu.Lock()
	defer i.sim.mu.Unlock()
	switch {
	case n.Name != "keys":
	case strings.Contains(n.Text, "denies"):
		i.sum.Full++
	default:
		i.sum.Forgot++
	}
}

// simLink is the way from an instance to the primary, with the faults on it.
type simLink struct{ i *simInstance }

func (l *simLink) Prompt() bool { return l.i.prompt }
func (l *simLink) Close() error { return nil }

func (l *simLink) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	out := make([]quota.Decision, 1)
	err := l.ChargeAll(ctx, []quota.Charge{c}, out)
	return out[0], err
}

func (l *simLink) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	s := l.i.sim
	if err := ctx.Err(); err != nil {
		return err
	}
	p := s.phase(l.i.id)
	l.i.mu.Lock()
	fault, chance := p.fault, l.i.rng.IntN(2)
	delay := time.Duration(l.i.rng.IntN(3_000_000)) // up to 3 ms, so that hardly two things happen at once
	l.i.mu.Unlock()
	if fault == simMixed {
		fault = [...]simFault{simHealthy, simReplyLost}[chance]
	}
	if fault == simOnlyClaims && !simClaim(&cs[0]) {
		fault = simRefused
	}
	switch fault {
	case simRefused:
		return as(quota.ErrUnavailable)
	case simSlow:
		delay += p.slow
	case simFrozen:
		delay += p.to - s.since()
	}
	if !s.prompt {
		time.Sleep(delay)
		return l.i.execute(cs, out, fault)
	}
	// A prompt client gives up at the deadline; what it sent is executed all the same.
	cs = append([]quota.Charge(nil), cs...)
	private := make([]quota.Decision, len(cs))
	done := make(chan error, 1)
	go func() {
		time.Sleep(delay)
		done <- l.i.execute(cs, private, fault)
	}()
	select {
	case err := <-done:
		copy(out, private)
		return err
	case <-ctx.Done():
		return fmt.Errorf("%w: %w", quota.ErrIndeterminate, ctx.Err())
	}
}

// execute is what happens at the primary.
func (i *simInstance) execute(cs []quota.Charge, out []quota.Decision, fault simFault) error {
	s := i.sim
	s.mu.Lock()
	defer s.mu.Unlock()
	var err error
	if len(cs) == 1 {
		out[0], err = s.primary.Charge(context.Background(), cs[0])
	} else {
		err = s.primary.ChargeAll(context.Background(), cs, out)
	}
	if err != nil {
		s.t.Errorf("seed %d: the primary: got %v, want a decision", s.seed, err)
		return err
	}
	for j := range cs {
		k := simKey{cs[j].Limit, cs[j].Key}
		switch {
		case out[j].Replayed:
		case simClaim(&cs[j]):
			i.charged[k] += max(out[j].Charged, 0)
		default:
			s.executed[k] += max(out[j].Charged, 0)
		}
	}
	if fault == simReplyLost {
		return as(quota.ErrIndeterminate)
	}
	return nil
}

// simClaim reports whether a charge is a reconciliation.
func simClaim(c *quota.Charge) bool { return strings.HasPrefix(c.ID, "fallback-") }

// simSpy sees what a fallback asks the policies inside it, and what they answer.
type simSpy struct {
	i *simInstance
	quota.Store
}

func (s *simSpy) Unwrap() quota.Store { return s.Store }

func (s *simSpy) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(ctx, c)
	s.see([]quota.Charge{c}, []quota.Decision{d}, err)
	return d, err
}

func (s *simSpy) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	err := s.Store.ChargeAll(ctx, cs, out)
	s.see(cs, out, err)
	return err
}

func (s *simSpy) see(cs []quota.Charge, ds []quota.Decision, err error) {
	i := s.i
	i.mu.Lock()
	defer i.mu.Unlock()
	for j := range cs {
		c := &cs[j]
		st := i.stat(simKey{c.Limit, c.Key})
		if err != nil {
			if errors.Is(err, quota.ErrIndeterminate) && !simClaim(c) && (c.Op == quota.OpTake || c.Op == quota.OpDebit) {
				st.unknown += c.Cost
			}
			continue
		}
		if st.serving {
			st.serving = false
			st.served += time.Since(st.since)
		}
		if simClaim(c) {
			if st.claims[c.ID] {
				i.t.Errorf("seed %d: reconciliation %s was done twice, want once", i.seed, c.ID)
			}
			st.claims[c.ID] = true
			st.reconciled += c.Cost
		}
	}
}

// do makes a call and keeps its outcome.
func (i *simInstance) do(cs ...quota.Charge) ([]quota.Decision, error) {
	out := make([]quota.Decision, len(cs))
	var err error
	began := time.Now()
	if len(cs) == 1 {
		out[0], err = i.store.Charge(context.Background(), cs[0])
	} else {
		err = i.store.ChargeAll(context.Background(), cs, out)
	}
	took := time.Since(began)
	i.sim.mu.Lock()
	i.sum.Calls++
	ended := i.ended
	switch {
	case err != nil:
		i.sum.Errors++
		if errors.Is(err, quota.ErrIndeterminate) {
			i.sum.Unknown++
		}
	case out[0].Source == quota.FromFallback:
		i.sum.Fallback++
	default:
		i.sum.Store++
	}
	i.sim.mu.Unlock()
	if took > i.t0 {
		i.t.Errorf("seed %d: a decision took %v, want up to %v", i.seed, took, i.t0)
	}
	if err != nil {
		for j := range cs {
			if cs[j].Op == quota.OpRefund {
				i.mu.Lock()
				i.stat(simKey{cs[j].Limit, cs[j].Key}).refunds += cs[j].Cost
				i.mu.Unlock()
				return nil, err
			}
		}
		if (!ended || !strings.Contains(err.Error(), "closed")) && !(i.crowded && errors.Is(err, quota.ErrOverloaded)) {
			i.t.Errorf("seed %d: got %v, want a decision", i.seed, err)
		}
		return nil, err
	}
	after := began.Sub(i.start) - i.end
	if after > i.t0+i.delay+2*i.pause && !ended && out[0].Source != quota.FromStore {
		i.t.Errorf("seed %d: a decision %v after the faults: got one of the %v, want the store's", i.seed, after, out[0].Source)
	}
	granted := quota.Granted(out)
	i.mu.Lock()
	defer i.mu.Unlock()
	for j := range cs {
		c, d := &cs[j], &out[j]
		st := i.stat(simKey{c.Limit, c.Key})
		if d.Source == quota.FromFallback && !st.serving {
			st.serving, st.since = true, time.Now()
			st.spans++
		}
		if !granted || d.Replayed {
			continue
		}
		switch {
		case c.Op == quota.OpRefund:
			st.refunds += c.Cost
			if d.Source == quota.FromFallback {
				st.here -= c.Cost
			}
		case d.Source == quota.FromFallback:
			st.here += d.Charged
		default:
			st.ok += d.Charged
		}
		if c.Op == quota.OpTake {
			st.takes += d.Charged
		}
	}
	return out, nil
}

func (s *sim) traffic(rng *rand.Rand, instance func() *simInstance) {
	type receipt struct {
		i *simInstance
		c quota.Charge
		d quota.Decision
	}
	var receipts []receipt
	for s.since() < s.last {
		time.Sleep(time.Duration(1 + rng.Int64N(int64(s.pause))))
		i := instance()
		k := s.keys[rng.IntN(len(s.keys))]
		if rng.IntN(10) < 6 {
			k = s.keys[0]
		}
		c := quota.Charge{Limit: k.limit, Key: k.key, Cost: 1 + rng.Int64N(5)}
		if s.crowded {
			for range 8 {
				i.store.Charge(context.Background(), quota.Charge{Limit: s.keys[0].limit, Key: "other/" + strconv.Itoa(rng.IntN(1000)), Cost: 1})
			}
		}
		cs := []quota.Charge{c}
		switch rng.IntN(12) {
		case 0:
			cs[0].Op = quota.OpPeek
		case 1:
			cs[0].Op = quota.OpDebit
		case 2:
			cs[0].ID = strconv.FormatUint(rng.Uint64(), 36)
		case 3, 4:
			for _, other := range s.keys {
				if other != k && rng.IntN(2) == 0 {
					cs = append(cs, quota.Charge{Limit: other.limit, Key: other.key, Cost: 1 + rng.Int64N(2)})
				}
			}
		case 5, 6:
			if len(receipts) == 0 {
				break
			}
			r := receipts[0]
			receipts = receipts[1:]
			if r.i != i {
				continue
			}
			cs[0] = r.c.Settle(r.d, rng.Int64N(r.d.Charged+2))
		}
		out, err := i.do(cs...)
		if err == nil && quota.Granted(out) && cs[0].Op == quota.OpTake && len(receipts) < 5 && !out[0].Replayed {
			receipts = append(receipts, receipt{i, cs[0], out[0]})
		}
	}
}

func (s *sim) check() {
	s.sum.Losses += s.losses
	s.sum.Phases += len(s.phases)
	for _, k := range s.keys {
		b := k.limit.Spec().Capacity
		share := bound.Rule{Capacity: b, Instances: s.n, AtLeastOne: s.least}.Share()
		s.sum.small(share, b/s.n)
		per := s.per.Microseconds()
		elapsed := s.since().Microseconds() + 1
		var takes, refunds, ok, unknown, spare, bursts int64
		// In tokens × n × µs a period, exactly.
		most := b*s.n*per + s.refill*s.n*elapsed
		for _, i := range s.instances {
			st := i.stat(k)
			if st.serving {
				st.served += time.Since(st.since)
			}
			if share > 0 {
				most += share*s.n*per + s.refill*(st.served.Microseconds()+1+st.spans)
			}
			bursts += share
			takes += st.takes
			refunds += st.refunds
			ok += st.ok
			unknown += st.unknown
			s.sum.Reconciled += st.reconciled
			s.sum.Refunded += st.refunds
			switch {
			case i.ended:
			case st.reconciled == st.here && i.charged[k] == st.here:
			case s.losses > 0 && st.reconciled == st.here && i.charged[k] >= st.here: // the primary forgot ids too
			default:
				s.t.Errorf("seed %d: instance %d: got %d admitted of %s %s, %d reconciled and %d charged, want all equal",
					s.seed, i.id, st.here, k.limit.Name(), k.key, st.reconciled, i.charged[k])
			}
		}
		s.sum.Admitted += takes
		lost := int64(s.losses) * b * s.n * per
		spare = most + lost + refunds*s.n*per - takes*s.n*per
		if spare < 0 {
			s.sum.Beyond++
		}
		if s.losses > 0 {
			spare += int64(s.losses) * bursts * s.n * per
		}
		if spare < 0 {
			s.t.Errorf("seed %d: %d instances admitted %d of %s %s in %v, want %d fewer", s.seed, s.n, takes, k.limit.Name(), k.key, s.since(), -spare/(s.n*per))
		}
		if charged := s.executed[k]; charged < ok || charged > ok+unknown {
			s.t.Errorf("seed %d: the primary charged %d of %s %s, want %d to %d", s.seed, charged, k.limit.Name(), k.key, ok, ok+unknown)
		}
	}
}
