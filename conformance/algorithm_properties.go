package conformance

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// spec checks the spec, and reports whether the search can test the algorithm.
func (p *prober) spec() bool {
	a, spec := p.family[0], p.specs[0]
	p.guard(a9, func() {
		if err := quota.NewLimit("limit", a).Err(); err != nil {
			p.fail(a9, "got: %v; want: a spec that quota.NewLimit takes", err)
		}
		if again := a.Spec(); again != spec {
			p.fail(a9, "got: %+v, and then %+v; want: the same", spec, again)
		}
	})
	reason := ""
	switch {
	case len(p.faults) > 0:
		reason = "the spec is not valid"
	case spec.Unit == 0:
		for _, r := range algorithmRules {
			if r != a9 && r != a15 && r != a18 {
				p.skips[r] = "the rule keeps no state"
			}
		}
		return true
	case spec.Capacity >= exact:
		reason = fmt.Sprintf("the capacity is %d; the search goes up to 2^53", spec.Capacity)
	}
	for _, r := range algorithmRules {
		p.skips[r] = reason
	}
	if reason == "" && spec.TTL == 0 {
		p.skips[a22] = "the algorithm has no holds, says its Spec"
	}
	if reason == "" && !spec.Ahead {
		p.skips[a19] = "the algorithm does not decide OpAhead, says its Spec"
	}
	return reason == ""
}

// stateless checks a rule that keeps no state: it admits costs up to its capacity, and nothing else counts.
func (p *prober) stateless() {
	a, spec := p.family[0], p.specs[0]
	costs := []int64{0, 1, 2, 1 << 32, 1 << 52, math.MaxInt64, spec.Capacity, max(spec.Capacity, spec.Capacity+1)}
	for op := quota.OpTake; op <= quota.OpUpTo; op++ {
		if op == quota.OpAhead && !spec.Ahead {
			continue
		}
		for i, cost := range costs {
			for _, now := range []quota.Micros{0, 1, origin, latest} {
				r := quota.Request{Op: op, Cost: cost, Arg: now / 2}
				if op == quota.OpUpTo {
					r.Arg = quota.Micros(min(cost, 1))
				}
				if op == quota.OpTake || op == quota.OpPeek || op == quota.OpUpTo {
					r.Floor = []int64{0, 1, math.MaxInt64}[i%3]
				}
				want := quota.Verdict{Outcome: quota.Outcome{Allowed: true}, Remaining: spec.Capacity}
				if op.Deniable() && r.Need() > spec.Capacity {
					want.Allowed, want.RetryAfter = false, quota.Forever
				}
				s, v := a.Decide(quota.State{}, r, now)
				if v != want || !s.IsZero() {
					p.fail(a18, "got: %v of %d at %d: %s, and %+v; want: %s, and the zero State", op, cost, now, showVerdict(v), s, showVerdict(want))
				}
				p.seen = append(p.seen, sample{0, quota.State{}, r, now, quota.State{}, want})
			}
		}
	}
	if sharer, ok := a.(driver.Sharer); ok {
		if s, err := sharer.Share(2); err != nil || s.Spec().Rule != spec.Rule || s.Spec().Unit != 0 {
			p.fail(a18, "got: a share of 2: %v; want: one of the same Rule, which keeps no state either", err)
		}
	}
}

// windows compares the windows of the algorithm with the boundaries that the ith has.
func (p *prober) windows(boundaries [][]time.Time, i int) {
	if i >= len(boundaries) || len(boundaries[i]) < 2 {
		if p.skips[a23] == "" {
			p.skips[a23] = "AlgorithmHarness.Boundaries has none for it"
		}
		return
	}
	a, capacity := p.family[0], p.specs[0].Capacity
	begin := quota.Micros(boundaries[i][0].UnixMicro() - 2)
	for _, boundary := range boundaries[i] {
		end := quota.Micros(boundary.UnixMicro())
		for _, now := range []quota.Micros{begin, begin + 1, begin + (end-begin)/2, end - 1} {
			s, v := a.Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: max(capacity, 1)}, now)
			if back := now + v.ResetAfter; back != end || peeked(a, s, 0, end-1).Remaining > 0 {
				p.fail(a23, "got: the capacity that is charged at %v is back at %v; want: until %v", now.Time(), back.Time(), end.Time())
			}
		}
		begin = end
	}
}

// taking returns the state and the verdict after a take.
func taking(a quota.Algorithm, s quota.State, cost int64, now quota.Micros) (quota.State, quota.Verdict) {
	next, v := a.Decide(s, quota.Request{Cost: cost}, now)
	if v.Write {
		return next, v
	}
	return s, v
}

// changes has each algorithm of the family decide on the states of each other, at times when no token of the first is
// about to come back.
func (p *prober) changes() {
	if len(p.family) == 1 {
		p.skips[a6] = "there is no other algorithm of this rule; pass one with other numbers"
		return
	}
	for i, from := range p.family {
		for j, to := range p.family {
			if i == 0 || j == 0 {
				p.change(from, to, p.specs[i], p.specs[j])
			}
		}
	}
}

func (p *prober) change(from, to quota.Algorithm, old, spec quota.Spec) {
	peek := func(s quota.State, now quota.Micros) quota.Verdict {
		_, v := to.Decide(s, quota.Request{Op: quota.OpPeek}, now)
		return v
	}
	most := spec.Capacity + spec.Debt
	for _, used := range []int64{1, 2, min(old.Debt, exact)} {
		// A debit, which an algorithm with a capacity of 0 charges too.
		if used > old.Debt {
			continue
		}
		s, _ := from.Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: used}, origin)
		if got, want := peek(s, origin), spec.Capacity-min(used, most); got.Remaining != want {
			p.fail(a6, "got: %d were debited of a capacity of %d; by %+v at the same time remain %d; want: %d", used, old.Capacity, spec, got.Remaining, want)
		}
	}
	for _, used := range p.costs(old.Capacity) {
		start := quota.Micros(origin + p.rng.Int64N(1e9))
		_, v := taking(from, quota.State{}, old.Capacity, start)
		// At a time when the key is fresh, a tick of this algorithm begins, and no tick of another is due before.
		start += v.ResetAfter
		s, _ := taking(from, quota.State{}, used, start)
		if got, want := peek(s, start), spec.Capacity-min(used, most); got.Remaining != want {
			p.fail(a6, "got: %d of %d were taken; by %+v at the same time remain %d; want: %d", used, old.Capacity, spec, got.Remaining, want)
		}
		s, _ = taking(from, s, old.Capacity-used, start)
		_, v = taking(from, s, used, start)
		if v.Allowed || v.RetryAfter > latest || old.Capacity > most {
			continue
		}
		now := start + v.RetryAfter
		s, v = taking(from, s, used, now)
		if got, want := peek(s, now), spec.Capacity-min(old.Capacity-v.Remaining, most); got.Remaining > want {
			p.fail(a6, "got: %d of %d remain after a take of %d, %d µs after one of all; by %+v at the same time remain %d of %d; want: at most %d, the consumption in whole tokens, rounded up",
				v.Remaining, old.Capacity, used, now-start, spec, got.Remaining, spec.Capacity, want)
		}
	}
}

// costs returns costs within a capacity, the smallest first.
func (p *prober) costs(capacity int64) []int64 {
	all := []int64{1, 2, 3, capacity / 3, capacity / 2, capacity - 1, capacity}
	for range 20 {
		all = append(all, 1+p.rng.Int64N(max(capacity, 1)))
	}
	all = slices.DeleteFunc(all, func(n int64) bool { return n < 1 || n > capacity })
	slices.Sort(all)
	return slices.Compact(all)
}

// undo makes a charge that is refunded later, while other clients charge, and beside it all but that charge on a key of its
// own. Unless that key is fresh in between, the refund leaves as many tokens as that key has: also where more time has
// passed than a whole quota takes to come back.
func (p *prober) undo() {
	a, spec := p.family[0], p.specs[0]
	if spec.Capacity < 2 {
		return
	}
	for range p.walks {
		now := quota.Micros(origin + p.rng.Int64N(1e13))
		first := 1 + p.rng.Int64N(spec.Capacity-1)
		without, _ := taking(a, quota.State{}, first, now)
		now += quota.Micros(p.rng.Int64N(int64(p.scale)/8 + 1))
		cost, charged := 1+p.rng.Int64N(max(peeked(a, without, 0, now).Remaining, 1)), now
		with, v := taking(a, without, cost, now)
		var others []string
		for steps := p.rng.IntN(24); v.Allowed && steps > 0; steps-- {
			now += quota.Micros(p.rng.Int64N(int64(p.scale)/4 + 1))
			if peeked(a, without, 0, now).Remaining == spec.Capacity {
				v.Allowed = false // the key is fresh: a refund may count and may not
				break
			}
			n := peeked(a, with, 0, now).Remaining
			if n > 0 && p.rng.IntN(4) == 0 {
				n = 1 + p.rng.Int64N(n)
			}
			if n > 0 {
				with, _ = taking(a, with, n, now)
				without, _ = taking(a, without, n, now)
				others = append(others, fmt.Sprintf("%d after %d µs", n, now-charged))
			}
		}
		if !v.Allowed {
			continue
		}
		_, got := a.Decide(with, quota.Request{Op: quota.OpRefund, Cost: cost, Arg: charged}, now)
		if want := peeked(a, without, 0, now).Remaining; got.Remaining != want {
			p.fail(a13, "got: a take of %d, then one of %d, refunded %d µs later, in between takes of %v: remaining %d; want: %d, as if the second had never been made",
				first, cost, now-charged, others, got.Remaining, want)
			return
		}
	}
}

// number returns a random integer, often near a boundary.
func number(rng *rand.Rand) int64 {
	edges := []int64{0, 1, 2, second, 1 << 31, 1 << 32, 1 << 52, exact, 1 << 62, math.MaxInt64, origin}
	n := edges[rng.IntN(len(edges))]
	switch rng.IntN(6) {
	case 0:
		n = int64(rng.Uint64())
	case 1:
		n += rng.Int64N(3) - 1
	case 2:
		n = -n
	case 3:
		n = math.MinInt64 + rng.Int64N(3)
	case 4:
		n = origin + rng.Int64N(1e12)
	}
	return n
}

// hostile decides on states and requests that no store has.
func (p *prober) hostile() {
	a, rng := p.family[0], p.rng
	for range 10 * p.walks {
		s := quota.State{Unit: number(rng), A: number(rng), B: number(rng), C: number(rng)}
		if rng.IntN(3) == 0 {
			s.Unit = p.specs[0].Unit
		}
		for range rng.IntN(6) * rng.IntN(2) {
			s.Tail = append(s.Tail, number(rng))
		}
		if len(p.seen) > 0 && rng.IntN(3) == 0 {
			s = p.seen[rng.IntN(len(p.seen))].state
		}
		r := quota.Request{Op: quota.Op(rng.IntN(11)), Cost: number(rng) & math.MaxInt64, Arg: quota.Micros(number(rng)), Floor: number(rng) & math.MaxInt64 * int64(rng.IntN(2))}
		now := quota.Micros(number(rng))
		given := slices.Clone(s.Tail)
		var last any
		func() {
			defer func() { last = recover() }()
			next, v := a.Decide(s, r, now)
			if !slices.Equal(given, s.Tail) {
				p.fail(a7, "got: State.Tail was %v and is %v\nafter %v of %d (charged at %d) at %d", given, s.Tail, r.Op, r.Cost, r.Arg, now)
			}
			if again, w := a.Decide(s, r, now); v != w || v.Write && !sameState(next, again) {
				p.fail(a8, "got: %v of %d at %d on %+v gives %s, and the second time %s", r.Op, r.Cost, now, s, showVerdict(v), showVerdict(w))
			}
		}()
		if last != nil {
			p.fail(a8, "got: panic: %v; want: an answer to any input\n%v of %d (charged at %d) at %d on %+v", last, r.Op, r.Cost, r.Arg, now, s)
		}
	}
}

// concurrent repeats the decisions of the search on several goroutines, in another order. The goroutines share the
// lists: where an algorithm writes to a list, the decisions of the others change.
func (p *prober) concurrent() {
	if p.faults[a7] != "" {
		return
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	for g := range 4 {
		order := p.rng.Perm(len(p.seen))
		wg.Go(func() {
			defer func() {
				if v := recover(); v != nil {
					mu.Lock()
					defer mu.Unlock()
					p.fail(a8, "got: panic: %v, in concurrent use", v)
				}
			}()
			for _, i := range order {
				s := &p.seen[i]
				next, v := p.family[s.by].Decide(s.state, s.req, s.now)
				var other quota.Algorithm
				if s.by == 0 && len(p.equal) > 0 {
					other = p.equal[g%len(p.equal)]
				}
				if v == s.v && (!v.Write || sameState(next, s.answer)) && other == nil {
					continue
				}
				mu.Lock()
				if v != s.v || v.Write && !sameState(next, s.answer) {
					p.fail(a8, "got: %v of %d at %d on %+v gave %s, and later, on one of several goroutines, %s; want: the same",
						s.req.Op, s.req.Cost, s.now, s.state, showVerdict(s.v), showVerdict(v))
				} else if next, w := other.Decide(s.state, s.req, s.now); w != v || v.Write && !sameState(next, s.answer) {
					p.fail(a9, "got: %v of %d at %d on %+v gives %s, and by another algorithm with the same spec %s; want: the same",
						s.req.Op, s.req.Cost, s.now, s.state, showVerdict(v), showVerdict(w))
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
}

// long makes more charges than the list of a state may hold.
func (p *prober) long() {
	a := p.family[0]
	s, v := taking(a, quota.State{}, 1, origin)
	if len(s.Tail) == 0 {
		return
	}
	now, remaining := quota.Micros(origin), v.Remaining
	for i := range quota.MaxTail + 100 {
		r := quota.Request{Cost: 1}
		if i%8 == 7 {
			r.Op = quota.OpDebit
		}
		now++
		prior := peeked(a, s, 0, now)
		next, v := a.Decide(s, r, now)
		if prior.Remaining < remaining || prior.Remaining > 0 && (!v.Allowed || v.Remaining != prior.Remaining-1) {
			p.fail(a11, "got: after %d takes and debits of 1, 1 µs apart, remaining %d; 1 µs later %d, and 1 more is %s; want: all remaining tokens can be taken, however many charges that is",
				i+1, remaining, prior.Remaining, showVerdict(v))
		}
		if len(next.Tail) < len(s.Tail) && len(p.seen) > 0 {
			p.seen[p.rng.IntN(len(p.seen))] = sample{0, s, r, now, next, v}
		}
		if remaining = v.Remaining; v.Write {
			s = next
		}
		if len(s.Tail) > quota.MaxTail {
			p.fail(a10, "got: a list of %d numbers after %d takes and debits of 1, 1 µs apart; want: at most %d", len(s.Tail), i+2, quota.MaxTail)
			return
		}
		if i > quota.MaxTail/4 && i%64 == 0 && len(p.seen) > 0 {
			p.seen[p.rng.IntN(len(p.seen))] = sample{0, s, quota.Request{Op: quota.OpPeek, Cost: 1}, now, s, peeked(a, s, 1, now)}
		}
		if v.Allowed {
			continue
		}
		if early := peeked(a, s, 1, now+v.RetryAfter-1); early.Allowed {
			p.fail(a2, "got: after %d takes and debits of 1, 1 µs apart, 1 is denied for %d µs and allowed 1 µs before", i+2, v.RetryAfter)
		}
		if late := peeked(a, s, 1, now+v.RetryAfter); v.RetryAfter != quota.Forever && !late.Allowed {
			p.fail(a2, "got: after %d takes and debits of 1, 1 µs apart, 1 is denied for %d µs and is then %s", i+2, v.RetryAfter, showVerdict(late))
		}
	}
}

func peeked(a quota.Algorithm, s quota.State, cost int64, now quota.Micros) quota.Verdict {
	_, v := a.Decide(s, quota.Request{Op: quota.OpPeek, Cost: cost}, now)
	return v
}

// greedy returns the tokens that a client gets in a span if it takes all remaining tokens as soon as there is one, and
// whether the steps were enough for the span.
func greedy(a quota.Algorithm, span quota.Micros, steps int) (total int64, done bool) {
	var s quota.State
	for now := quota.Micros(origin); steps > 0; steps-- {
		cost := max(peeked(a, s, 0, now).Remaining, 1)
		var v quota.Verdict
		if s, v = taking(a, s, cost, now); v.Allowed {
			total += cost
		}
		wait := max(peeked(a, s, 1, now).RetryAfter, 1)
		if wait > span-(now-origin) {
			return total, true
		}
		now += wait
	}
	return total, false
}

// share compares the tokens that a client gets from n shares with those that it gets from the whole.
func (p *prober) share() {
	a, spec := p.family[0], p.specs[0]
	sharer, ok := a.(driver.Sharer)
	if !ok {
		p.skips[a16] = "the algorithm is no driver.Sharer"
		return
	}
	p.sharesBy(sharer.Share, 0)
	if one, ok := a.(driver.OneSharer); ok {
		p.sharesBy(one.ShareAtLeastOne, min(spec.Capacity, 1))
	}
}

// sharesBy compares with the whole the shares that a function makes, whose capacity is at least the least.
func (p *prober) sharesBy(share func(int64) (quota.Algorithm, error), least int64) {
	a, spec := p.family[0], p.specs[0]
	for _, n := range []int64{math.MinInt64, -1, 0, 1} {
		if s, err := share(n); err != nil || s.Spec() != spec {
			p.fail(a16, "got: a share of %d: %v; want: the whole", n, err)
		}
	}
	for _, n := range []int64{2, 3, 5, 7, 10, 1000, spec.Capacity, spec.Capacity + 1, 1 << 40, 1<<58 + 1, math.MaxInt64} {
		if n < 2 {
			continue
		}
		s, err := share(n)
		if err != nil {
			if !errors.Is(err, quota.ErrInvalid) {
				p.fail(a16, "got: a share of %d fails with %v; want: an algorithm, or quota.ErrInvalid", n, err)
			}
			continue
		}
		own := s.Spec()
		if want := max(spec.Capacity/n, least); own.Rule != spec.Rule || own.Capacity != want {
			p.fail(a16, "got: a share of %d is %+v; want: the rule %v, and capacity %d", n, own, spec.Rule, want)
			continue
		}
		if n > spec.Capacity && p.scale < second {
			continue // the whole may lose tokens that come faster than the clock ticks, where single tokens are not lost
		}
		span := min(6*p.scale, latest-origin)
		const steps = 1500
		part, _ := greedy(s, span, steps)
		whole, done := greedy(a, span, steps)
		slack := spec.Capacity + n
		if done && part > (whole+slack)/n+1 {
			p.fail(a16, "got: %d shares take %d each in %d µs, the whole %d; want: together no more than the whole, and %d for roundings", n, part, span, whole, slack)
		}
	}
}

// forecast compares the forecasts with the times at which queues get their tokens.
func (p *prober) forecast() {
	a, capacity := p.family[0], p.specs[0].Capacity
	f, ok := a.(quota.Forecaster)
	if !ok {
		p.skips[a17] = "the algorithm is no quota.Forecaster"
		return
	}
	for i := range p.walks / 10 {
		x := &situation{p: p}
		now := quota.Micros(origin + p.rng.Int64N(1e13))
		for range i % 6 {
			x.do(move{0, p.request(x, 0), now})
			now += p.forward(x)
		}
		d := func(n int64) quota.Decision {
			v := x.peek(x.state, min(n, capacity), now)
			return quota.Decision{Allowed: v.Allowed, Capacity: capacity, Remaining: v.Remaining, At: now,
				RetryAfter: v.RetryAfter.Duration(), ResetAfter: v.ResetAfter.Duration()}
		}
		last := time.Duration(0)
		for _, n := range append([]int64{0}, append(p.costs(capacity), capacity+1, 3*capacity+1, 1<<60, math.MaxInt64)...) {
			got := f.Forecast(d(n), n)
			if n <= d(n).Remaining && got != 0 {
				p.fail(a17, "got: %v for %d tokens of %d that remain; want: 0", got, n, d(n).Remaining)
			}
			if got < last {
				p.fail(a17, "got: %v for %d tokens, and for fewer %v; want: no less\nof %+v", got, n, last, d(n))
			}
			last = got
		}
		p.queue(x, f, d, now)
	}
}

// queue serves a queue of equal requests, each at its earliest time.
func (p *prober) queue(x *situation, f quota.Forecaster, decision func(int64) quota.Decision, now quota.Micros) {
	capacity := p.specs[0].Capacity
	if capacity == 0 {
		return
	}
	each := []int64{1, capacity, 1 + p.rng.Int64N(capacity)}[p.rng.IntN(3)]
	s, at, total := x.state, now, int64(0)
	for range 20 {
		var v quota.Verdict
		s, v = taking(p.family[0], s, each, at)
		if !v.Allowed {
			if v.RetryAfter > latest-at {
				return
			}
			at += v.RetryAfter
			if s, v = taking(p.family[0], s, each, at); !v.Allowed {
				return // a fault of A2
			}
		}
		total += each
		if got, took := f.Forecast(decision(total), total), (at - now).Duration(); got > took {
			p.fail(a17, "got: %v for %d tokens, which a queue of takes of %d got in %v; want: no more than that\nof %+v", got, total, each, took, decision(total))
		}
	}
}
