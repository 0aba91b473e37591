package clienttest

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// differential: random requests, one to four at a time, make exactly the decisions and states of the Go
// kernels say, with a clock that the test moves and with the server's; each decision is one script call,
// and the server makes the writes of the kernels and no other.
func differential(t *testing.T, l library) {
	server, open := l.single(t)
	for _, injected := range []bool{true, false} {
		t.Run(fmt.Sprintf("injected=%v", injected), func(t *testing.T) {
			server.resetCounts(t)
			r := replay(t, server, open, l.volume(40_000, 400_000), injected, nil)
			counts := server.count(t)
			scripts := counts["evalsha"].calls - counts["evalsha"].failed + counts["eval"].calls
			if int64(scripts) != r.lists.Load()+workers {
				t.Errorf("script calls: got %d, want one for each of %d decisions, and one for each of %d stores that got ready", scripts, r.lists.Load(), workers)
			}
			off := func(calls int, made *atomic.Int64) bool {
				return max(int64(calls)-made.Load(), made.Load()-int64(calls)) > r.unsure.Load()
			}
			if sets := counts["set"].calls; off(sets, &r.sets) {
				t.Errorf("SET: got %d, want the %d writes of the kernels (± %d keys that may have expired before)", sets, r.sets.Load(), r.unsure.Load())
			}
			if dels := counts["del"].calls; off(dels, &r.dels) {
				t.Errorf("DEL: got %d, want the %d keys that the kernels made fresh (± %d that may have expired before)", dels, r.dels.Load(), r.unsure.Load())
			}
			t.Logf("%d lists, %d charges, %d granted; %d SET, %d DEL, %d unsure", r.lists.Load(), r.charges.Load(), r.granted.Load(), r.sets.Load(), r.dels.Load(), r.unsure.Load())
		})
	}
}

// replayed is the account of all workers of a replay.
type replayed struct {
	server                              *data
	injected                            bool
	hide                                func(kind) bool
	lists, charges, granted, sets, dels atomic.Int64
	unsure                              atomic.Int64 // decisions at the very moment at which a key expires
}

// workers is how many make decisions in a replay, each with a store of its own.
const workers = 32

// replay has workers, each with keys and a clock of its own, make so many decisions; hide says whose
// rules' Lua the store does not see.
func replay(t *testing.T, s *data, open func(engine.Options) store, decisions int, injected bool, hide func(kind) bool) *replayed {
	r := &replayed{server: s, injected: injected, hide: hide}
	n := seed(t)
	var wg sync.WaitGroup
	for i := range workers {
		w := &worker{replayed: r, name: fmt.Sprintf("%v.%d", injected, i), rng: rand.New(rand.NewPCG(n, uint64(i))), now: 1_795_427_141_791_724,
			model: map[string]*item{}, limits: map[string]*quota.Limit{}, key: fmt.Sprintf("%v.%d.0/agent", injected, i)}
		o := engine.Options{}
		if injected {
			o.Clock = func() time.Time { return time.UnixMicro(w.now) }
		}
		w.store = open(o)
		wg.Go(func() {
			for step := 0; step < decisions/workers && !t.Failed(); step++ {
				w.step(t)
			}
		})
	}
	wg.Wait()
	return r
}

// A worker replays requests against a model of its keys.
type worker struct {
	*replayed
	name   string
	rng    *rand.Rand
	store  quota.Store
	now    int64
	model  map[string]*item
	limits map[string]*quota.Limit
	last   quota.Decision // one of the last list's
	kind   kind           // of the list, and its key
	key    string
}

// item is the state that the server must hold under a key.
type item struct {
	driver.Item
	left     int64          // at the last decision
	receipts []quota.Micros // when charges were granted
	holds    []quota.Decision
	until    int64 // µs: when the server may drop it, if it keeps the time
}

func (w *worker) step(t *testing.T) {
	w.tick()
	cs, items := w.request(t)
	before := make([]driver.Item, len(cs))
	for i, it := range items {
		before[i] = it.Item
	}
	got := make([]quota.Decision, len(cs))
	var err error
	if len(cs) == 1 && w.rng.IntN(2) == 0 {
		got[0], err = w.store.Charge(bg, cs[0])
	} else {
		err = w.store.ChargeAll(bg, cs, got)
	}
	if err != nil {
		t.Errorf("%s: got error %v, want none%s\n on %+v", w.name, err, show(cs...), before)
		return
	}
	now := got[0].At
	if w.injected && int64(now) != w.now {
		t.Errorf("time of a decision: got %d, want the clock's %d", now, w.now)
	}
	keys := make([]string, len(cs))
	for i := range cs {
		keys[i] = place(cs[i])
	}
	held, err := w.server.MGet(bg, keys...).Result()
	if err != nil {
		t.Error(err)
		return
	}
	// Near its end a key may be there or not. A swap begins a lifetime later than its decision, and a script
	// reads the time later than the server began its lifetime, by as much as a loaded machine makes of it;
	// expiry checks that it is kept until then.
	var unsure []int
	for i, it := range items {
		switch late := int64(now) - it.until - driver.ExpirySlack.Microseconds(); {
		case w.injected || late < -early:
		case late > 3_000_000:
			before[i] = driver.Item{}
		default:
			unsure = append(unsure, i)
		}
	}
	want, after, diff := w.check(cs, items, before, got, held, now)
	if len(unsure) > 0 {
		w.unsure.Add(1)
	}
	there := slices.Clone(before)
	for gone := 1; diff != "" && gone < 1<<len(unsure); gone++ {
		copy(before, there)
		for bit, i := range unsure {
			if gone>>bit&1 == 1 {
				before[i] = driver.Item{}
			}
		}
		want, after, diff = w.check(cs, items, before, got, held, now)
	}
	if diff != "" {
		t.Errorf("%s at %d:%s\n%s", w.name, now, show(cs...), diff)
	}
	w.lists.Add(1)
	w.charges.Add(int64(len(cs)))
	if quota.Granted(want) {
		w.granted.Add(1)
	}
	for i, it := range items {
		it.Item, it.left = after[i], want[i].Remaining
		if it.Write {
			it.until = int64(now) + want[i].ResetAfter.Microseconds()
			if it.State.IsZero() {
				w.dels.Add(1)
			} else {
				w.sets.Add(1)
			}
		}
		if want[i].Until > 0 {
			it.holds = append(it.holds[max(len(it.holds)-7, 0):], want[i])
		}
		if want[i].Charged > 0 {
			it.receipts = append(it.receipts, now)
			if len(it.receipts) > 8 {
				it.receipts = it.receipts[1:]
			}
		}
	}
	i := w.rng.IntN(len(want))
	w.last, w.key = want[i], cs[i].Key
	for k := range allKinds {
		if kindNames[k] == cs[i].Limit.Name() {
			w.kind = k
		}
	}
}

// early is how long before its end, in µs, a key may be gone on a loaded machine.
const early = 500_000

// check compares decisions, and the states that the server holds now, with those of Go on the items.
func (w *worker) check(cs []quota.Charge, items []*item, before []driver.Item, got []quota.Decision, held []any, now quota.Micros) (want []quota.Decision, after []driver.Item, diff string) {
	want, after = make([]quota.Decision, len(cs)), append(after, before...)
	if err := driver.Apply(cs, after, now, want); err != nil {
		return want, after, err.Error()
	}
	for i, it := range items {
		if got[i] != want[i] {
			diff += fmt.Sprintf(" charge %d: decision\n  got  %+v\n  want %+v\n  on   %+v\n", i, got[i], want[i], before[i])
		}
		text, _ := held[i].(string)
		until := it.until
		if after[i].Write {
			until = int64(now) + want[i].ResetAfter.Microseconds()
		}
		// It may have expired since the decision.
		expired := !w.injected && text == "" && time.Now().UnixMicro() > until+driver.ExpirySlack.Microseconds()-early
		if left := packed(&after[i]); text != left && !expired {
			diff += fmt.Sprintf(" charge %d: state\n  got  %x\n  want %x = %+v\n  on   %+v\n", i, text, left, after[i], before[i])
		}
	}
	return want, after, diff
}

// tick moves the clock: mostly on, not at all, a little, or to the next event, and now and then back.
func (w *worker) tick() {
	switch retry, reset := w.last.RetryAfter, w.last.ResetAfter; w.rng.IntN(16) {
	case 0, 1, 2:
	case 3: // about as far back as is waited for
		w.now -= []int64{w.rng.Int64N(1_000_000), 999_999, 1_000_000, 1_000_001, 1_000_002}[w.rng.IntN(5)]
	case 4:
		w.now -= w.rng.Int64N(90_000_000_000) * w.rng.Int64N(2)
	case 5, 6:
		if retry < quota.Never {
			w.now += retry.Microseconds() - w.rng.Int64N(2)
		}
	case 7:
		w.now += reset.Microseconds() - w.rng.Int64N(2)
	case 8:
		w.now += w.rng.Int64N(reset.Microseconds() + 1)
	case 9, 10:
		w.now += w.rng.Int64N(1_000_000)
	default:
		w.now += w.rng.Int64N(5_000)
	}
	if lapse := int64(w.last.Until); lapse > w.now && w.rng.IntN(4) == 0 {
		w.now = lapse - w.rng.Int64N(2)
	}
	if w.now < 1_000_000_000_000_000 || w.now > 4_000_000_000_000_000 {
		w.now = 1_795_427_141_791_724
	}
}

// request returns one to four charges, and the items they are on.
func (w *worker) request(t *testing.T) ([]quota.Charge, []*item) {
	n := 1
	if w.rng.IntN(2) == 0 {
		n = 2 + w.rng.IntN(3)
	}
	var cs []quota.Charge
	var items []*item
	for len(cs) < n {
		if len(cs) > 0 || w.rng.IntN(2) == 0 { // else where the clock was moved to
			w.kind, w.key = kind(w.rng.IntN(int(allKinds))), fmt.Sprintf("%s.%d/agent", w.name, w.rng.IntN(3))
		}
		k, name := w.kind, kindNames[w.kind]
		c := quota.Charge{Key: w.key, Op: randomOp(w.rng)}
		if w.limits[name] == nil || w.rng.IntN(40) == 0 {
			a := randomRule(w.rng, k)
			if w.hide != nil && w.hide(k) {
				a = hidden{a}
			}
			w.limits[name] = limitOf(name, a)
		}
		c.Limit = w.limits[name]
		it := w.model[name+c.Key]
		fresh := it == nil
		if fresh {
			it = &item{}
			w.model[name+c.Key] = it
		}
		twice := false
		for _, other := range items {
			twice = twice || other == it
		}
		if twice {
			continue
		}
		c.Cost = randomCost(w.rng, c.Limit.Spec().Capacity, it.left)
		if c.Limit.TTL() > 0 && w.rng.IntN(2) == 0 {
			w.hold(&c, it)
		}
		if c.Op == quota.OpAhead && !c.Limit.Spec().Ahead {
			c.Op = quota.OpTake
		} else if c.Op == quota.OpAhead {
			c.Within = []time.Duration{0, time.Duration(w.rng.Int64N(1e10)), quota.Never}[w.rng.IntN(3)]
		}
		c.Shadow = w.rng.IntN(6) == 0
		if c.Op == quota.OpUpTo {
			c.Least = min(c.Cost, []int64{0, 1, max(it.left, 0), max(it.left, 0) + 1}[w.rng.IntN(4)])
		}
		if (c.Op <= quota.OpPeek || c.Op == quota.OpUpTo || c.Op == quota.OpHold) && w.rng.IntN(4) == 0 {
			switch w.rng.IntN(3) {
			case 0:
				c.Floor = randomCost(w.rng, c.Limit.Spec().Capacity, it.left)
			case 1:
				c.Floor = max(it.left-c.Cost+w.rng.Int64N(3)-1, 0)
			default:
				c.Floor, c.FloorOf = w.rng.Int64N(8), 7
			}
		}
		if c.Op == quota.OpRefund {
			c.MadeAt = max(w.receipt(it, c.Limit.Spec()), 0)
		}
		if w.injected && (c.Limit.TTL() == 0 || c.Limit.Spec().Reads != (quota.Rule{})) && (fresh && w.rng.IntN(2) == 0 || w.rng.IntN(40) == 0) {
			it.Item = w.poke(t, c)
		}
		cs, items = append(cs, c), append(items, it)
	}
	deniable := true
	for i := range cs {
		deniable = deniable && cs[i].Op.Deniable()
	}
	if deniable && w.rng.IntN(2) == 0 {
		for i := range cs {
			cs[i].Alternative = uint8(1 + 2*i/len(cs))
		}
	}
	return cs, items
}

// hold makes a charge one that makes, ends or renews a hold, mostly one of the last.
func (w *worker) hold(c *quota.Charge, it *item) {
	c.Op = []quota.Op{quota.OpHold, quota.OpHold, quota.OpHold, quota.OpSpend, quota.OpSpend, quota.OpRenew}[w.rng.IntN(6)]
	if c.Op == quota.OpHold {
		return
	}
	if c.Held, c.Until = w.rng.Int64N(1<<w.rng.IntN(53)), 1+quota.Micros(w.rng.Int64N(quota.MaxNumber)); len(it.holds) > 0 && w.rng.IntN(8) > 0 {
		of := it.holds[w.rng.IntN(len(it.holds))]
		c.Held, c.Until = of.Held, of.Until
	}
	if c.Op == quota.OpRenew || w.rng.IntN(2) == 0 {
		c.Cost = 0
	}
}

// receipt returns when a charge that is refunded was made: then, or about when it would be too old.
func (w *worker) receipt(it *item, spec *quota.Spec) quota.Micros {
	edge := quota.Micros(w.rng.Int64N(3) - 1)
	switch n := w.rng.IntN(10); {
	case n == 0:
		return 0
	case n == 1:
		return []quota.Micros{1, 1<<53 - 1, 1 << 53}[w.rng.IntN(3)]
	case n == 2:
		age := spec.Unit // the window
		if p := spec.Params; spec.Rule == (quota.Rule{'t', 'b', '1'}) {
			age = (p[1] + p[0] - 1) / p[0] * p[3] // from empty to full
		}
		return quota.Micros(w.now-age) + edge
	case n == 3:
		return quota.Micros(it.State.A-it.State.Unit*w.rng.Int64N(2)) + edge
	case n == 4 || len(it.receipts) == 0:
		return quota.Micros(w.now - w.rng.Int64N(10_000_000))
	default:
		return it.receipts[w.rng.IntN(len(it.receipts))]
	}
}

// poke puts a state under a key that random requests would not leave soon: a log that is nearly full, or
// numbers of any size.
func (w *worker) poke(t *testing.T, c quota.Charge) driver.Item {
	it := driver.Item{Rule: c.Limit.Spec().Rule}
	if c.Limit.TTL() > 0 { // as the rule inside left it
		it.Rule = c.Limit.Spec().Reads
	}
	s := &it.State
	number := func() int64 {
		if w.rng.IntN(8) == 0 {
			return 1<<52 + w.rng.Int64N(1<<52) // more than a kernel leaves
		}
		return magnitude(w.rng, 52) - 1
	}
	if it.Rule != (quota.Rule{'s', 'l', '1'}) {
		s.Unit, s.A, s.B, s.C = magnitude(w.rng, 48), number(), number(), number()
		if w.rng.IntN(2) == 0 {
			s.Unit = c.Limit.Spec().Unit
		}
		if at := w.now + w.rng.Int64N(4_000_000) - 2_000_000; it.Rule == (quota.Rule{'t', 'b', '1'}) {
			s.B = at
		} else {
			s.A = at
		}
	} else if w.rng.IntN(2) == 0 {
		s.Unit = 1
		entries := algorithm.MaxLogEntries - w.rng.IntN(2)
		newest, gap := w.now+w.rng.Int64N(3)-1, int64(1)
		if w.rng.IntN(2) == 0 {
			gap += w.rng.Int64N(c.Limit.Spec().Params[1]/algorithm.MaxLogEntries + 1)
		}
		for i := range entries {
			n := 1 + w.rng.Int64N(3)
			s.A += n
			s.Tail = append(s.Tail, max(newest+int64(1+i-entries)*gap, 0), n)
		}
		if w.rng.IntN(2) == 0 { // as if older entries had been joined
			s.C = s.Tail[2*w.rng.IntN(entries)]
		}
	}
	// UNLINK and APPEND, which the counts of DEL and SET do not see.
	pipe := w.server.Pipeline()
	pipe.Unlink(bg, place(c))
	if s.IsZero() {
		it = driver.Item{}
	} else {
		pipe.Append(bg, place(c), packed(&it))
	}
	if _, err := pipe.Exec(bg); err != nil {
		t.Error(err)
	}
	return it
}

// batches: charges that go together, to the same keys and others, make exactly the decisions and states of
// the Go kernels say of each alone, in order, and take one script call.
func batches(t *testing.T, l library) {
	server, open := l.single(t)
	replayBatches(t, l, server, open, l.volume(40_000, 400_000))
}

// replayBatches has workers, each with keys and a clock of its own, make batches of so many charges.
func replayBatches(t *testing.T, l library, server *data, open func(engine.Options) store, charges int) {
	const workers = 16
	n := seed(t)
	var wg sync.WaitGroup
	for i := range workers {
		r := &replayed{server: server, injected: true}
		w := &worker{replayed: r, name: fmt.Sprintf("batch.%d", i), rng: rand.New(rand.NewPCG(n, uint64(i))), now: 1_795_427_141_791_724,
			model: map[string]*item{}, limits: map[string]*quota.Limit{}, key: fmt.Sprintf("batch.%d.0/agent", i)}
		store := l.engine(open(engine.Options{Clock: func() time.Time { return time.UnixMicro(w.now) }}))
		// Stores become ready one after the other: a slow server would not answer all attempts at once in their time.
		_, err := store.Charge(bg, quota.Charge{Limit: yearly("ready", 1), Key: w.name, Op: quota.OpPeek})
		ok(t, err)
		wg.Go(func() {
			for range charges / workers / 16 {
				if t.Failed() {
					return
				}
				w.batch(t, store)
			}
		})
	}
	wg.Wait()
}

// batch has random charges, or lists of several, decided together.
func (w *worker) batch(t *testing.T, store *engine.Store) {
	w.tick()
	var calls [][]quota.Charge
	var items [][]*item
	lists := w.rng.IntN(2) == 0
	for want := 1 + w.rng.IntN(24); len(calls) < want; {
		cs, its := w.request(t)
		for range 1 + w.rng.IntN(3)*w.rng.IntN(3) { // the same again
			switch {
			case !lists:
				for i := range cs {
					calls, items = append(calls, cs[i:i+1]), append(items, its[i:i+1])
				}
			case len(cs) > 1:
				calls, items = append(calls, cs), append(items, its)
			}
		}
	}
	// The process's clock is set wrong: charges to a calendar are sent again. That changes the order of lists, so before these the
	// store learns how wrong it is.
	if w.rng.IntN(4) == 0 {
		engine.Skew(store, []time.Duration{0, 100 * 24 * time.Hour, -100 * 24 * time.Hour}[w.rng.IntN(3)])
	}
	if lists {
		take(t, store, quota.Charge{Limit: limitOf("known", algorithm.Calendar(1, algorithm.Daily())), Key: w.name, Op: quota.OpPeek})
	}
	got, errs := engine.Together(bg, store, calls)
	held := map[*item]quota.Charge{}
	for _, i := range order(calls, items) {
		cs := calls[i]
		before, want := make([]driver.Item, len(cs)), make([]quota.Decision, len(cs))
		for j, it := range items[i] {
			before[j] = it.Item
		}
		after := slices.Clone(before)
		err := driver.Apply(cs, after, quota.Micros(w.now), want)
		if err != nil || errs[i] != nil || !slices.Equal(got[i], want) {
			t.Errorf("%s at %d, call %d of %d:%s\n got  %+v, %v\n want %+v, %v\n on   %+v", w.name, w.now, i, len(calls), show(cs...), got[i], errs[i], want, err, before)
			return
		}
		for j, it := range items[i] {
			it.Item, it.left = after[j], want[j].Remaining
			if want[j].Charged > 0 {
				it.receipts = append(it.receipts[max(0, len(it.receipts)-7):], quota.Micros(w.now))
			}
			held[it] = cs[j]
		}
		w.last, w.key = want[0], cs[0].Key
	}
	for it, c := range held {
		if text := w.server.held(t, c); text != packed(&it.Item) {
			t.Errorf("%s at %d: state\n got  %x\n want %x = %+v%s", w.name, w.now, text, packed(&it.Item), it.Item, show(c))
		}
	}
}

// order returns the calls in the order in which a batch decides them: those to a key whose limit had other
// numbers in a call before come after all the others.
func order(calls [][]quota.Charge, items [][]*item) (done []int) {
	rest := make([]int, len(calls))
	for i := range rest {
		rest[i] = i
	}
	for len(rest) > 0 {
		specs := map[*item]*quota.Spec{}
		var later []int
	next:
		for _, i := range rest {
			for j, it := range items[i] {
				if spec := specs[it]; spec != nil && *spec != *calls[i][j].Limit.Spec() {
					later = append(later, i)
					continue next
				}
			}
			for j, it := range items[i] {
				specs[it] = calls[i][j].Limit.Spec()
			}
			done = append(done, i)
		}
		rest = later
	}
	return done
}
