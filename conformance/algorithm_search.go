package conformance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const (
	origin = 1_800_000_000_000_000 // in 2027, and a multiple of every decimal tick
	latest = 4_000_000_000_000_000 // the end of walks, in 2096
	second = 1_000_000
	exact  = 1 << 53
)

// prober searches for inputs for which an algorithm breaks a rule.
type prober struct {
	// family are algorithms of one Rule: each must decide on the states of the others. The first is tested.
	family []quota.Algorithm
	specs  []quota.Spec
	equal  []quota.Algorithm // other algorithms whose specs equal the first's
	seed   uint64
	rng    *rand.Rand
	scale  quota.Micros // the time in which the first recovers
	faults map[*rule]string
	skips  map[*rule]string
	seen   []sample // decisions made during the search
	walks  int
}

// sample is one decision.
type sample struct {
	by     int
	state  quota.State
	req    quota.Request
	now    quota.Micros
	answer quota.State
	v      quota.Verdict
}

// newProber returns a prober of one of the algorithms; the others belong to the family if they have the same Rule.
func newProber(all []quota.Algorithm, i int, seed uint64) *prober {
	p := &prober{seed: seed, rng: rand.New(rand.NewPCG(seed, uint64(i))), faults: map[*rule]string{}, skips: map[*rule]string{}, walks: 700}
	if full() {
		p.walks *= 10
	}
	p.add(all[i])
	p.guard(a8, func() {
		own := p.specs[0]
		for j, a := range all {
			switch spec := a.Spec(); {
			case j == i || spec.Rule != own.Rule:
			case spec == own:
				p.equal = append(p.equal, a)
			default:
				p.add(a)
			}
		}
		if s, ok := all[i].(driver.Sharer); ok {
			for _, n := range []int64{2, 7} {
				if a, err := s.Share(n); err == nil && a != nil && a.Spec().Rule == own.Rule && a.Spec() != own {
					p.add(a)
				}
			}
		}
	})
	return p
}

func (p *prober) add(a quota.Algorithm) {
	var spec quota.Spec
	p.guard(a8, func() { spec = a.Spec() })
	p.family, p.specs = append(p.family, a), append(p.specs, spec)
}

func (p *prober) name() string { return p.specs[0].Rule.String() }

// fail records that a rule is broken. The first fault of a rule counts.
func (p *prober) fail(r *rule, format string, args ...any) {
	if p.faults[r] == "" {
		p.faults[r] = fmt.Sprintf(format, args...)
	}
}

// guard runs f and records a panic as a failure of the rule.
func (p *prober) guard(r *rule, f func()) {
	defer func() {
		if v := recover(); v != nil {
			p.fail(r, "panic: %v\n%s", v, debug.Stack())
		}
	}()
	f()
}

// search tests every rule but A15, the Lua text.
func (p *prober) search() {
	if !p.spec() {
		return
	}
	if p.specs[0].Unit == 0 {
		p.guard(a18, p.stateless)
		return
	}
	p.guard(a8, func() {
		_, v := p.family[0].Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: max(p.specs[0].Capacity, 1)}, origin)
		p.scale = min(max(v.ResetAfter, 1), latest-origin)
	})
	for _, t := range p.plain() {
		p.try(t)
	}
	for range p.walks {
		p.walk()
	}
	for _, f := range []func(){p.changes, p.undo, p.hostile, p.concurrent, p.long, p.share, p.forecast} {
		p.guard(a8, f)
	}
}

// move is one step of a trace: a request, to an algorithm of the family, at a time.
type move struct {
	by  int
	req quota.Request
	now quota.Micros
}

// situation is the result of a trace, as a store that keeps the state would see it.
type situation struct {
	p           *prober
	state       quota.State
	head        quota.Micros // the state was written at this time at the latest
	mixed, back bool         // whether several algorithms wrote the state, and whether the clock stepped back
	charged     []quota.Micros
	holds       []hold

	// The last move, and its answer.
	move
	before quota.State
	ahead  bool // whether the state may have been more than a second ahead of the move
	answer quota.State
	v      quota.Verdict
	faults map[*rule]string
}

// hold is a hold that was made or renewed: its tokens, and when it lapses.
type hold struct {
	tokens int64
	until  quota.Micros
}

func (x *situation) algorithm() quota.Algorithm { return x.p.family[x.by] }
func (x *situation) spec() *quota.Spec          { return &x.p.specs[x.by] }

func (x *situation) fail(r *rule, format string, args ...any) {
	if x.faults == nil {
		x.faults = map[*rule]string{}
	}
	if x.faults[r] == "" {
		x.faults[r] = fmt.Sprintf(format, args...)
	}
}

// do makes a move.
func (x *situation) do(m move) {
	x.mixed = x.mixed || m.by != 0
	if x.now > m.now {
		x.back = true
	}
	x.move, x.before = m, x.state
	// The tick of another algorithm may have rounded the state's time up.
	x.ahead = !x.state.IsZero() && (x.head-m.now > second || x.mixed && x.back)
	x.answer, x.v = x.algorithm().Decide(x.state, m.req, m.now)
	if x.v.Write {
		x.state = x.answer
		x.head = max(min(x.head, m.now+second), m.now)
	}
	if x.v.Allowed && m.req.Op != quota.OpPeek {
		x.charged = append(x.charged, m.now)
	}
	switch {
	case x.v.Allowed && m.req.Op == quota.OpHold:
		x.holds = append(x.holds, hold{m.req.Cost, x.spec().Lapse(m.now)})
	case x.v.Allowed && m.req.Op == quota.OpRenew:
		x.holds = append(x.holds, hold{m.req.Floor, x.spec().Lapse(m.now)})
	}
}

// guard runs f and records a panic as a fault.
func (x *situation) guard(f func()) {
	defer func() {
		if v := recover(); v != nil {
			x.fail(a8, "panic: %v\n%s", v, debug.Stack())
		}
	}()
	f()
}

// replay makes the moves of a trace and checks the last.
func (p *prober) replay(trace []move) (x *situation) {
	x = &situation{p: p}
	x.guard(func() {
		for _, m := range trace {
			x.do(m)
		}
		x.check()
	})
	return x
}

// try checks each move of a trace.
func (p *prober) try(trace []move) {
	for i := range trace {
		p.learn(p.replay(trace[:i+1]), trace[:i+1])
	}
}

// learn records the faults of a situation, each with the shortest trace that shows it.
func (p *prober) learn(x *situation, trace []move) {
	for r := range x.faults {
		if p.faults[r] == "" {
			short, text := p.shrink(trace, r, x.faults[r])
			p.fail(r, "%s\n%s", text, p.show(short))
		}
	}
}

// walk makes random moves. Each takes the answer to the move before it into account.
func (p *prober) walk() {
	x := &situation{p: p}
	var trace []move
	now := quota.Micros(origin + p.rng.Int64N(1e13))
	if p.rng.IntN(4) == 0 {
		now = origin
	}
	change := len(p.family) > 1 && p.rng.IntN(3) == 0
	back := p.rng.IntN(3) == 0
	for range 3 + p.rng.IntN(8) {
		m := move{now: now}
		if change && p.rng.IntN(3) == 0 {
			m.by = p.rng.IntN(len(p.family))
		}
		m.req = p.request(x, m.by)
		trace = append(trace, m)
		x.guard(func() {
			x.do(m)
			x.check()
		})
		p.note(x)
		if len(x.faults) > 0 {
			p.learn(x, trace)
			return
		}
		if now += p.forward(x); back && p.rng.IntN(3) == 0 {
			now -= quota.Micros([]int64{1, p.rng.Int64N(second), second, second + 1, p.rng.Int64N(2*int64(p.scale) + 1), p.rng.Int64N(1e13)}[p.rng.IntN(6)])
		}
		if now > latest || now < 0 {
			return
		}
	}
}

// note keeps a decision: all of the first ones, and a sample of the later ones.
func (p *prober) note(x *situation) {
	const most = 3000
	s := sample{x.by, x.before, x.req, x.now, x.answer, x.v}
	if len(p.seen) < most {
		p.seen = append(p.seen, s)
	} else if i := p.rng.IntN(4 * most); i < most {
		p.seen[i] = s
	}
}

// request returns a random request.
func (p *prober) request(x *situation, by int) quota.Request {
	r := quota.Request{Cost: p.cost(p.specs[by].Capacity, x.v.Remaining)}
	if p.specs[by].TTL > 0 && p.rng.IntN(2) == 0 {
		return p.holding(x, r)
	}
	if p.rng.IntN(6) == 0 {
		rest := max(x.v.Remaining-min(r.Cost, exact), 0)
		r.Floor = []int64{1, rest, rest + 1, p.cost(p.specs[by].Capacity, x.v.Remaining)}[p.rng.IntN(4)]
		if r.Op = []quota.Op{quota.OpTake, quota.OpPeek, quota.OpUpTo}[p.rng.IntN(3)]; r.Op == quota.OpUpTo {
			r.Arg = quota.Micros(min(r.Cost, p.rng.Int64N(4)))
		}
		return r
	}
	switch p.rng.IntN(12) {
	case 0:
		r.Op = quota.OpPeek
	case 1, 2:
		r.Op = quota.OpDebit
	case 3, 4:
		r.Op = quota.OpRefund
		if n := len(x.charged); n > 0 && p.rng.IntN(8) > 0 {
			r.Arg = x.charged[p.rng.IntN(n)]
		}
	case 5:
		if p.rng.IntN(4) == 0 {
			r.Op = quota.OpReset
		}
	case 8:
		r.Op, r.Arg = quota.OpUpTo, quota.Micros(min(r.Cost, []int64{0, 1, max(x.v.Remaining, 0) + 1}[p.rng.IntN(3)]))
	case 6, 7:
		if p.specs[by].Ahead {
			r.Op = quota.OpAhead
			r.Arg = []quota.Micros{0, 1, min(x.v.RetryAfter, quota.MaxNumber), quota.Micros(p.rng.Int64N(int64(p.scale) + 1)), p.scale, quota.MaxNumber}[p.rng.IntN(6)]
		}
	}
	return r
}

// holding returns a random request that makes, ends or renews a hold.
func (p *prober) holding(x *situation, r quota.Request) quota.Request {
	r.Op = []quota.Op{quota.OpHold, quota.OpHold, quota.OpHold, quota.OpSpend, quota.OpSpend, quota.OpRenew}[p.rng.IntN(6)]
	if r.Op == quota.OpHold {
		if p.rng.IntN(6) == 0 {
			r.Floor = max(x.v.Remaining-min(r.Cost, exact), 0) + p.rng.Int64N(2)
		}
		return r
	}
	of := hold{tokens: min(r.Cost, exact), until: origin}
	if n := len(x.holds); n > 0 && p.rng.IntN(10) > 0 {
		of = x.holds[n-1-p.rng.IntN(min(n, 4))]
	}
	if r.Arg, r.Floor = of.until, min(of.tokens, exact); p.rng.IntN(4) == 0 {
		r.Floor += p.rng.Int64N(3) - min(r.Floor, 1)
	}
	if r.Op == quota.OpRenew || p.rng.IntN(2) == 0 {
		r.Cost = 0
	}
	return r
}

func (p *prober) cost(capacity, remaining int64) int64 {
	switch p.rng.IntN(14) {
	case 0:
		return 0
	case 1, 2:
		return 1
	case 3:
		return capacity
	case 4:
		return max(capacity, capacity+1)
	case 5:
		return []int64{1 << 31, 1 << 32, 1 << 53, 1 << 62, math.MaxInt64}[p.rng.IntN(5)]
	case 6:
		return max(remaining, 0)
	case 7:
		return max(remaining, 0) + 1
	case 8, 9:
		return 1 + p.rng.Int64N(8)
	default:
		return p.rng.Int64N(max(capacity, 1)) + 1
	}
}

// forward returns a step of the clock: to a time that the answer tells, to a time near it, or to a random time.
func (p *prober) forward(x *situation) quota.Micros {
	v := &x.v
	some := func(n quota.Micros) quota.Micros { return quota.Micros(p.rng.Int64N(int64(max(n, 0)) + 1)) }
	switch p.rng.IntN(10) {
	case 0, 1:
		return 0
	case 2:
		return some(1000)
	case 3:
		if spec := x.spec(); spec.TTL > 0 && p.rng.IntN(2) == 0 {
			return spec.Lapse(x.now) - x.now - some(1)
		}
		return p.scale
	case 4:
		if spec := x.spec(); spec.TTL > 0 && p.rng.IntN(2) == 0 {
			return some(quota.Micros(spec.TTL.Microseconds()) / 3)
		}
		return some(2 * p.scale)
	case 5, 6:
		if v.RetryAfter < latest {
			return max(v.RetryAfter-some(1), 0)
		}
		return 1
	case 7:
		return min(max(v.ResetAfter-some(1), 0), latest)
	case 8:
		return some(p.scale/quota.Micros(max(p.specs[0].Capacity, 1)) + 1)
	default:
		return some(p.scale / 2)
	}
}

// plain returns traces in which many faults show.
func (p *prober) plain() [][]move {
	c := p.specs[0].Capacity
	take := func(n int64, at quota.Micros) move { return move{req: quota.Request{Cost: n}, now: origin + at} }
	op := func(o quota.Op, n int64, at quota.Micros) move {
		return move{req: quota.Request{Op: o, Cost: n, Arg: origin}, now: origin + at}
	}
	traces := [][]move{
		{take(1, 0), take(c, 0), take(c, p.scale)},
		{take(c, 0), take(1, 0), take(1, p.scale/2), take(1, p.scale)},
		{take((c+1)/2, 0), take(c/2, 0), take(c/2, p.scale/3), take(1, p.scale)},
		{take(1, 0), op(quota.OpRefund, 1, 0), op(quota.OpRefund, 1, 0), take(c, 0), take(1, 0)},
		{take(c, 0), op(quota.OpDebit, 1, 0), op(quota.OpDebit, c, 1), op(quota.OpRefund, c, 2), op(quota.OpReset, 0, 3), take(c, 4)},
		{op(quota.OpDebit, math.MaxInt64, 0), op(quota.OpDebit, 1, 1), take(0, 2), op(quota.OpReset, 0, 3)},
	}
	if ttl := quota.Micros(p.specs[0].TTL.Microseconds()); ttl > 0 {
		lapse := p.specs[0].Lapse(origin)
		hold := func(o quota.Op, n, held int64, at quota.Micros) move {
			return move{req: quota.Request{Op: o, Cost: n, Floor: held, Arg: lapse}, now: origin + at}
		}
		traces = append(traces, []move{hold(quota.OpHold, c, 0, 0), take(1, 1), hold(quota.OpSpend, c/2, c, ttl/2), take(c, p.scale)},
			[]move{hold(quota.OpHold, 1, 0, 0), take(1, 1), hold(quota.OpRenew, 0, 1, ttl-1), hold(quota.OpRenew, 0, 1, lapse-origin), take(c, 3*ttl)})
	}
	if p.specs[0].Ahead {
		ahead := func(n int64, within, at quota.Micros) move {
			return move{req: quota.Request{Op: quota.OpAhead, Cost: n, Arg: within}, now: origin + at}
		}
		traces = append(traces, []move{take(c, 0), ahead(1, 0, 1), ahead(1, p.scale, 2), ahead(c, p.scale, 3), ahead(c, quota.MaxNumber, 4), op(quota.OpRefund, c, 5), take(1, p.scale)})
	}
	return traces
}

// shrink returns the shortest trace that it finds whose last move breaks the rule, and the fault.
func (p *prober) shrink(trace []move, r *rule, text string) ([]move, string) {
	budget := 3000
	better := func(t []move) bool {
		if budget--; budget < 0 || t == nil {
			return false
		}
		found := p.replay(t).faults[r]
		if found != "" {
			trace, text = t, found
		}
		return found != ""
	}
	for again := true; again && budget > 0; {
		again = false
		for i := len(trace) - 2; i >= 0; i-- {
			again = better(slices.Delete(slices.Clone(trace), i, i+1)) || again
		}
		for i := range trace {
			again = better(sooner(trace, i, 1)) || better(sooner(trace, i, 2)) || again
			for _, cost := range []int64{0, 1, trace[i].req.Cost / 2, trace[i].req.Cost - 1} {
				t := slices.Clone(trace)
				if t[i].req.Cost = cost; cost >= 0 && cost < trace[i].req.Cost && better(t) {
					again = true
					break
				}
			}
		}
	}
	return trace, text
}

// sooner returns a trace in which move i and the moves after it come earlier, by 1/part of the time between move i and
// the move before it. It returns nil if that time is zero.
func sooner(trace []move, i int, part quota.Micros) []move {
	from := quota.Micros(origin)
	if i > 0 {
		from = trace[i-1].now
	}
	gap := (trace[i].now - from) / part
	if gap == 0 {
		return nil
	}
	t := slices.Clone(trace)
	for j := i; j < len(t); j++ {
		t[j].now -= gap
		if t[j].req.Arg >= trace[i].now {
			t[j].req.Arg -= gap
		}
	}
	return t
}

// show returns a trace as text, with the answers.
func (p *prober) show(trace []move) string {
	var b strings.Builder
	fmt.Fprintf(&b, "after, in µs since %d:", int64(origin))
	x := &situation{p: p}
	defer func() { _ = recover() }()
	for _, m := range trace {
		fmt.Fprintf(&b, "\n\tat %d %v of %d", m.now-origin, m.req.Op, m.req.Cost)
		if m.req.Op == quota.OpRefund {
			fmt.Fprintf(&b, " charged at %d", m.req.Arg-origin)
		} else if m.req.Op == quota.OpAhead {
			fmt.Fprintf(&b, " within %d", m.req.Arg)
		} else if m.req.Op == quota.OpUpTo {
			fmt.Fprintf(&b, ", at least %d,", m.req.Arg)
		} else if m.req.Op == quota.OpSpend || m.req.Op == quota.OpRenew {
			fmt.Fprintf(&b, " until %d of the held", m.req.Arg-origin)
		}
		if m.req.Floor > 0 {
			fmt.Fprintf(&b, " above %d", m.req.Floor)
		}
		if m.by > 0 {
			fmt.Fprintf(&b, " by %+v", p.specs[m.by])
		}
		x.do(m)
		fmt.Fprintf(&b, ": %s", showVerdict(x.v))
	}
	return b.String()
}

func showVerdict(v quota.Verdict) string {
	text := "denied"
	if v.Allowed {
		text = "allowed"
	}
	if v.Write {
		text += ", written"
	}
	text += fmt.Sprintf(", remaining %d", v.Remaining)
	if v.RetryAfter == quota.Forever {
		text += ", retry never"
	} else if v.RetryAfter != 0 {
		text += fmt.Sprintf(", retry after %d", v.RetryAfter)
	}
	if v.ResetAfter != 0 {
		text += fmt.Sprintf(", reset after %d", v.ResetAfter)
	}
	return text
}
