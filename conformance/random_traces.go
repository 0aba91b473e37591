package conformance

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// shape describes random traces.
type shape struct {
	kinds  []kind
	limits int // names of limits in a trace
	keys   int // keys of each
	list   int // the longest list
	steps  int
	traces int
	ops    []quota.Op // an operation is as likely as it is frequent here
	cost   func(rng *rand.Rand, capacity, remaining int64) int64

	big    bool // numbers beyond 2^31
	change bool // limits change while in use
	back   bool // the clock steps back
	expiry bool // the clock goes to about where states end
	ids    bool // calls have request ids
	own    bool // by the store's own clock
	floors bool // takes and peeks have floors
	shadow bool // some charges are shadows
	first  bool // lists are alternatives
}

var anyOps = []quota.Op{
	quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake, quota.OpTake,
	quota.OpPeek, quota.OpPeek, quota.OpDebit, quota.OpDebit, quota.OpRefund, quota.OpRefund, quota.OpRefund, quota.OpReset,
	quota.OpAhead, quota.OpAhead, quota.OpAhead,
}

// accept gives a take ahead a delay that it accepts, and a take of up to so many a least. Of a rule that cannot take ahead it
// makes a take.
func accept(rng *rand.Rand, c *quota.Charge, last quota.Decision) {
	switch {
	case c.Op.Holds() && c.Limit.TTL() == 0:
		c.Op = quota.OpTake
	case c.Op == quota.OpUpTo:
		c.Least = min(c.Cost, oneOf(rng, []int64{0, 1, c.Cost, max(last.Remaining, 0), min(max(last.Remaining, 0), quota.MaxNumber) + 1}))
	case c.Op != quota.OpAhead:
	case !c.Limit.Spec().Ahead:
		c.Op = quota.OpTake
	default:
		c.Within = oneOf(rng, []time.Duration{0, 1, time.Microsecond, last.RetryAfter, last.ResetAfter, time.Duration(rng.Int64N(int64(max(last.ResetAfter, 1)))), time.Second, quota.Never})
	}
}

// keep gives a take, up to or not, or a peek a floor, in tokens or as a part, mostly close to the remaining tokens.
func keep(rng *rand.Rand, c *quota.Charge, left int64) {
	if c.Op != quota.OpTake && c.Op != quota.OpPeek && c.Op != quota.OpUpTo && c.Op != quota.OpHold {
		return
	}
	switch rng.IntN(6) {
	case 0:
	case 1:
		c.Floor = randomCost(rng, c.Limit.Spec().Capacity, left)
	case 2, 3:
		c.FloorOf = uint32(magnitude(rng, 32) - 1)
		c.Floor = rng.Int64N(int64(c.FloorOf) + 1)
	default:
		c.Floor = max(left-c.Cost+rng.Int64N(3)-1, 0)
	}
}

// search plays random traces. It fails the case with the shortest trace found that has a wrong answer.
func (t *trial) search(sh shape) {
	const workers, traces = 4, 16
	if sh.ops == nil {
		sh.ops = anyOps
	}
	if sh.cost == nil {
		sh.cost = randomCost
	}
	injected := !sh.own && !t.lacks(Clock)
	idle := t.named("idle", tokenBucket, numbers{1, 1, time.Second})
	var mu sync.Mutex
	var played, unsure int
	var why error
	t.together(workers, func(w int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), w))
		more := func(n int) bool {
			return n < t.suite.sized(sh.traces)/workers && !t.hasFailed() && (n == 0 || time.Now().Before(t.traced))
		}
		for n := 0; more(n); {
			t.within(func(in *recorder) {
				p := t.player(in, injected)
				for i := 0; i < traces && more(n) && (!injected || p.clock.micros() < 2*epoch); i++ {
					p.begin(fmt.Sprintf("t%d-", n))
					n++
					trace, wrong := t.improvise(p, rng, &sh)
					if wrong != "" {
						t.refute(trace, wrong, injected)
						return
					}
					mu.Lock()
					played++
					if p.unsure != nil {
						unsure++
						why = p.unsure
					}
					mu.Unlock()
					if p.unsure != nil { // wait until the store answers again
						t.ask(p.first, quota.Charge{Limit: idle, Key: "idle", Op: quota.OpPeek})
					}
				}
			})
		}
	})
	if unsure > 1 && 2*unsure > played {
		t.fatalf("%d of %d traces came to no end, because the store does not answer: %v", unsure, played, why)
	}
}

// improvise plays random steps. Each takes the answers to the steps before it into account.
func (t *trial) improvise(p *player, rng *rand.Rand, sh *shape) (trace []step, wrong string) {
	g := &generator{t: t, p: p, rng: rng, shape: sh, grade: driver.AtomicityOf(p.first.store),
		kinds: map[string]kind{}, limits: map[string]*quota.Limit{}, left: map[place]int64{}, said: map[place]quota.Decision{}, receipts: map[place][]receipt{}, holds: map[place][]receipt{}}
	for id := 1; id <= sh.steps; id++ {
		s := g.step(id, trace)
		trace = append(trace, s)
		if wrong = p.play(&s); wrong != "" || p.unsure != nil {
			return trace, wrong
		}
		g.learn(&s)
	}
	return trace, ""
}

// generator makes the steps of a trace.
type generator struct {
	*shape
	t        *trial
	p        *player
	rng      *rand.Rand
	grade    driver.Atomicity
	kinds    map[string]kind
	limits   map[string]*quota.Limit
	left     map[place]int64
	said     map[place]quota.Decision
	receipts map[place][]receipt
	holds    map[place][]receipt
}

func (g *generator) step(id int, before []step) step {
	s := step{id: id, wait: g.wait(), other: g.rng.IntN(2) == 0, list: g.rng.IntN(3) == 0}
	if g.ids && len(before) > 0 && g.rng.IntN(3) == 0 { // a repeat
		if old := oneOf(g.rng, before); old.charges[0].ID != "" {
			s.charges = slices.Clone(old.charges)
			if c := &s.charges[g.rng.IntN(len(s.charges))]; g.rng.IntN(4) == 0 && c.Least == 0 && c.Op != quota.OpRenew {
				c.Cost ^= 1
			}
			return s
		}
	}
	n := 1
	if g.list > 1 && g.grade != driver.OneKey && g.rng.IntN(2) == 0 {
		n = 2 + g.rng.IntN(g.list-1)
	}
	taken := map[place]bool{}
	for tries := 0; len(s.charges) < n && tries < 10*n; tries++ {
		c := g.charge(id)
		if at := placeOf(&c.Charge); !taken[at] {
			taken[at] = true
			s.charges = append(s.charges, c)
		}
	}
	if g.first && g.grade != driver.OneKey {
		s.charges = g.alternatives(id)
	}
	for i := range s.charges {
		s.charges[i].Shadow = g.shadow && g.rng.IntN(3) == 0
	}
	if g.ids && g.rng.IntN(3) > 0 {
		name := fmt.Sprint("r", id)
		for i := range s.charges {
			s.charges[i].ID = name
		}
	}
	return s
}

// alternatives returns the charges of several lists, which may have keys in common.
func (g *generator) alternatives(id int) (all []charge) {
	for a := range 1 + g.rng.IntN(3) {
		taken := map[place]bool{}
		for range 1 + g.rng.IntN(g.list) {
			c := g.charge(id)
			if at := placeOf(&c.Charge); !taken[at] {
				taken[at] = true
				c.Alternative = uint8(a + 1)
				all = append(all, c)
			}
		}
	}
	return all
}

// Keys of one group, and of several.
var (
	grouped = []string{"g", "g/a", "g/b", "g/a/b", "g/c"}
	spread  = []string{"g", "h", "g/a", "i/a", "i/b"}
)

func (g *generator) charge(id int) charge {
	keys := grouped
	if g.grade == driver.AnyKeys && !g.ids {
		keys = spread
	}
	name := fmt.Sprint("limit", g.rng.IntN(g.shape.limits))
	l := g.limits[name]
	if l == nil {
		g.kinds[name] = oneOf(g.rng, g.shape.kinds)
	}
	if l == nil || g.change && g.rng.IntN(6) == 0 {
		k := g.kinds[name]
		if g.change && g.rng.IntN(4) == 0 {
			k = oneOf(g.rng, keepNone)
		}
		l = g.t.named(name, k, k.randomNumbers(g.rng, g.big))
		g.limits[name] = l
	}
	c := charge{Charge: quota.Charge{Limit: l, Key: keys[g.rng.IntN(min(g.keys, len(keys)))], Op: oneOf(g.rng, g.ops)}}
	at := placeOf(&c.Charge)
	left, known := g.left[at]
	if !known {
		left = l.Spec().Capacity
	}
	c.Cost = g.cost(g.rng, l.Spec().Capacity, left)
	accept(g.rng, &c.Charge, g.said[at])
	if g.floors {
		keep(g.rng, &c.Charge, left)
	}
	if c.Op == quota.OpRefund {
		if made := g.receipts[at]; len(made) > 0 && g.rng.IntN(4) > 0 {
			c.receipt = oneOf(g.rng, made)
		} else if c.MadeAt = oneOf(g.rng, []quota.Micros{0, 1, 1<<53 - 1, 1 << 53}); g.p.clock != nil && g.rng.IntN(2) == 0 {
			c.MadeAt = max(g.p.clock.micros()-quota.Micros(g.rng.Int64N(10_000_000)), 0)
		}
	}
	if c.Op == quota.OpSpend || c.Op == quota.OpRenew {
		if c.Op == quota.OpRenew {
			c.Cost = 0
		}
		if made := g.holds[at]; len(made) > 0 && g.rng.IntN(8) > 0 {
			c.receipt = made[len(made)-1-g.rng.IntN(min(len(made), 4))]
		} else {
			c.Held, c.Until = g.rng.Int64N(4), oneOf(g.rng, []quota.Micros{1, 1<<53 - 1, 1 << 53})
		}
	}
	return c
}

// wait returns a wait that keeps the clock within the times that states can hold.
func (g *generator) wait() time.Duration {
	w := g.anyWait()
	if g.p.clock != nil && g.p.clock.micros() > 2*epoch {
		w = min(w, time.Minute)
	}
	return w
}

// anyWait returns a wait that is mostly short, or ends when tokens come back, and is sometimes long, or negative.
func (g *generator) anyWait() time.Duration {
	var last quota.Decision
	if len(g.p.last) > 0 {
		last = oneOf(g.rng, g.p.last)
	}
	retry, reset := last.RetryAfter, last.ResetAfter
	edge := time.Duration(g.rng.IntN(2)) * time.Microsecond
	if g.p.clock == nil { // real time
		switch {
		case g.rng.IntN(20) == 0 && retry < 20*time.Millisecond:
			return retry
		case g.rng.IntN(40) == 0:
			return time.Duration(g.rng.IntN(3)) * time.Millisecond
		}
		return 0
	}
	if g.expiry && g.rng.IntN(2) == 0 && reset != quota.Never {
		return max(reset-time.Duration(g.rng.IntN(3))*time.Microsecond, 0)
	}
	if g.ids && g.rng.IntN(12) == 0 {
		return quota.IDWindow - time.Duration(g.rng.IntN(3))*time.Microsecond
	}
	if now := g.p.clock.micros(); last.Until > now && g.rng.IntN(3) == 0 {
		return min(time.Duration(last.Until-now)*time.Microsecond, 1000*time.Hour) - edge
	}
	n := g.rng.IntN(16)
	if g.back && n < 3 {
		switch n {
		case 0: // around a second, the most by which a clock that steps back may delay a key
			return -oneOf(g.rng, []time.Duration{time.Duration(g.rng.IntN(1e9)), 999_999 * time.Microsecond, time.Second, 1_000_001 * time.Microsecond, 1_000_002 * time.Microsecond})
		case 1:
			return -time.Duration(g.rng.Int64N(int64(25 * time.Hour)))
		}
		return -min(reset, 1000*time.Hour)
	}
	switch n {
	case 3, 4:
		if retry != quota.Never {
			return max(retry-edge, 0)
		}
	case 5:
		if reset != quota.Never {
			return max(reset-edge, 0)
		}
	case 6:
		if reset != quota.Never {
			return time.Duration(g.rng.Int64N(int64(reset) + 1))
		}
	case 7, 8:
		return time.Duration(g.rng.IntN(1e9))
	case 9, 10, 11, 12:
		return time.Duration(g.rng.IntN(5e6))
	}
	return 0
}

func (g *generator) learn(s *step) {
	for i, d := range g.p.last {
		at := placeOf(&s.charges[i].Charge)
		g.left[at], g.said[at] = d.Remaining, d
		if d.Charged > 0 {
			g.receipts[at] = append(g.receipts[at], receipt{s.id, i})
		}
		if d.Until > 0 {
			g.holds[at] = append(g.holds[at], receipt{s.id, i})
		}
	}
}
