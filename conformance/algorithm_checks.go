package conformance

import (
	"fmt"
	"math"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// check checks the last move against the rules. Further requests that it makes leave the situation as it is.
func (x *situation) check() {
	x.checkPure()
	x.checkState()
	x.checkVerdict()
	x.checkTraceless()
	x.checkTight()
	x.checkNever()
	switch x.req.Op {
	case quota.OpDebit:
		x.checkDebit()
	case quota.OpRefund:
		x.checkRefund()
	case quota.OpReset:
		x.checkReset()
	}
	x.checkUndo()
	x.checkBack()
	x.checkFresh()
	x.checkFloor()
	x.checkUpTo()
	if x.spec().TTL > 0 && !x.back {
		x.checkHolds()
	}
	if x.spec().Ahead && !(x.mixed && x.back) {
		x.checkAhead()
	}
}

// ask returns the answer to a request on a state, and the state that is kept.
func (x *situation) ask(s quota.State, op quota.Op, cost int64, now quota.Micros) (quota.State, quota.Verdict) {
	next, v := x.algorithm().Decide(s, quota.Request{Op: op, Cost: cost}, now)
	if v.Write {
		return next, v
	}
	return s, v
}

func (x *situation) peek(s quota.State, cost int64, now quota.Micros) quota.Verdict {
	_, v := x.ask(s, quota.OpPeek, cost, now)
	return v
}

// prior returns the tokens that remained before the last move.
func (x *situation) prior() int64 { return x.peek(x.before, 0, x.now).Remaining }

func (x *situation) checkPure() {
	const mark = -987654321987654321
	s := x.before
	given := slices.Clone(s.Tail)
	if n := len(s.Tail); n > 0 {
		// With spare capacity, an append would write behind the list.
		s.Tail = append(slices.Grow(slices.Clone(s.Tail), 4), mark, mark)[:n]
	}
	again, v := x.algorithm().Decide(s, x.req, x.now)
	if !slices.Equal(s.Tail, given) {
		x.fail(a7, "got: State.Tail was %v and is %v", given, s.Tail)
	}
	if n := len(s.Tail); n > 0 && (s.Tail[:n+1][n] != mark || s.Tail[:n+2][n+1] != mark) {
		x.fail(a7, "got: numbers behind State.Tail changed; want: a new slice where the list grows")
	}
	if v != x.v || v.Write && !sameState(again, x.answer) {
		x.fail(a8, "got: %s %+v, and the second time %s %+v; want: the same twice", showVerdict(x.v), x.answer, showVerdict(v), again)
	}
}

func (x *situation) checkState() {
	if !x.v.Write {
		return
	}
	s := &x.answer
	_, scripted := x.algorithm().(driver.Scripted)
	for _, list := range [][]int64{{s.Unit, s.A, s.B, s.C}, s.Tail} {
		for _, n := range list {
			if n > exact || n < -exact {
				x.fail(a10, "got: the state holds %d: %+v; want: numbers within ±2^53", n, *s)
			}
			if scripted && n < 0 {
				x.fail(a10, "got: the state holds %d: %+v; want: no negative number in a state of a driver.Scripted", n, *s)
			}
		}
	}
	if n := len(s.Tail); n > quota.MaxTail {
		x.fail(a10, "got: a list of %d numbers; want: at most %d", n, quota.MaxTail)
	}
	if s.Unit == 0 && (s.A != 0 || s.B != 0 || s.C != 0 || len(s.Tail) > 0) || s.Unit < 0 {
		x.fail(a10, "got: %+v; want: a Unit of at least 1, but in the zero State", *s)
	}
	if s.Unit != 0 && s.Unit != x.spec().Unit && s.Unit != x.before.Unit {
		x.fail(a10, "got: Unit %d; want: Spec.Unit, %d, or the unit of the state before", s.Unit, x.spec().Unit)
	}
}

func (x *situation) checkVerdict() {
	v, capacity, floor := &x.v, x.spec().Capacity, -x.spec().Debt
	if x.spec().TTL > 0 {
		floor -= capacity // which may be held beside the debt
	}
	switch {
	case v.Allowed != (v.RetryAfter == 0) && x.req.Op != quota.OpAhead:
		x.fail(a11, "got: %s; want: RetryAfter 0 where it is allowed, and only there", showVerdict(*v))
	case v.RetryAfter < 0, v.ResetAfter < 0, v.ResetAfter > math.MaxInt64/4, v.RetryAfter > math.MaxInt64/4 && v.RetryAfter != quota.Forever:
		x.fail(a11, "got: %s; want: spans of 0 or more that a clock can reach, or RetryAfter Forever", showVerdict(*v))
		return
	case v.Remaining > capacity:
		x.fail(a11, "got: remaining %d; want: at most the capacity, %d", v.Remaining, capacity)
	case v.Remaining < floor && !x.mixed && !x.back:
		x.fail(a11, "got: remaining %d; want: a debt of at most Spec.Debt, %d", v.Remaining, -floor)
	}
	if fresh := x.peek(quota.State{}, capacity, x.now); fresh != (quota.Verdict{Outcome: quota.Outcome{Allowed: true}, Remaining: capacity}) {
		x.fail(a11, "got: a peek of the capacity on the zero State answers %s; want: allowed, remaining %d", showVerdict(fresh), capacity)
	}
	if x.req.Op == quota.OpTake {
		prior := x.peek(x.before, x.req.Need(), x.now)
		if prior.Allowed != v.Allowed || prior.RetryAfter != v.RetryAfter {
			x.fail(a11, "got: a peek answers %s where a take answers %s; want: the same", showVerdict(prior), showVerdict(*v))
		}
		if want := prior.Remaining - x.req.Cost; v.Allowed && v.Remaining != want {
			x.fail(a11, "got: %d remained and %d were taken, remaining %d; want: %d", prior.Remaining, x.req.Cost, v.Remaining, want)
		}
	}
	// Where the tick of another algorithm rounded a time up, the state may already be moved back.
	if after := x.peek(x.state, 0, x.now); !(x.mixed && x.back) && (after.Remaining != v.Remaining || after.ResetAfter != v.ResetAfter) {
		x.fail(a11, "got: a peek right afterwards answers %s; want: remaining %d, reset after %d", showVerdict(after), v.Remaining, v.ResetAfter)
	}
	for _, cost := range []int64{0, 1, max(v.Remaining, 0), max(v.Remaining, 0) + 1} {
		if got, want := x.peek(x.state, cost, x.now), cost <= v.Remaining; got.Allowed != want {
			x.fail(a11, "got: with %d remaining, %d are %s; want: all remaining tokens can be taken, and no more", v.Remaining, cost, showVerdict(got))
		}
	}
}

func (x *situation) checkTraceless() {
	idle := !x.v.Allowed || x.req.Op == quota.OpPeek || x.req.Op == quota.OpTake && x.req.Cost == 0
	if idle && x.v.Write && !x.ahead {
		x.fail(a3, "got: Write, and %+v instead of %+v; want: no Write", x.answer, x.before)
	}
	if idle || x.req.Cost == 0 && x.req.Op != quota.OpReset && x.req.Op != quota.OpSpend && x.req.Op != quota.OpRenew {
		if prior := x.peek(x.before, 0, x.now); prior.Remaining != x.v.Remaining || prior.ResetAfter != x.v.ResetAfter {
			x.fail(a3, "got: %s, where remaining was %d, reset after %d; want: no difference", showVerdict(x.v), prior.Remaining, prior.ResetAfter)
		}
	}
}

func (x *situation) checkTight() {
	for _, cost := range []int64{x.req.Cost, 1, x.v.Remaining + 1, x.spec().Capacity} {
		if cost < 0 {
			continue
		}
		s, v := x.ask(x.state, quota.OpTake, cost, x.now)
		after := v.RetryAfter
		if v.Allowed || after == quota.Forever || after <= 0 || after > math.MaxInt64/4 {
			continue
		}
		for _, at := range []quota.Micros{1, after / 3, after / 2, after - 1} {
			if early := x.peek(s, cost, x.now+at); at < after && early.Allowed {
				x.fail(a2, "got: %d were denied for %d µs and are allowed %d µs before; want: denied until then", cost, after, after-at)
			}
		}
		if late := x.peek(s, cost, x.now+after); !late.Allowed {
			x.fail(a2, "got: %d were denied for %d µs and are %s when these have passed; want: allowed", cost, after, showVerdict(late))
		}
	}
}

func (x *situation) checkNever() {
	capacity := x.spec().Capacity
	for _, cost := range []int64{capacity, capacity + 1, 1 << 32, 1<<53 + 1, math.MaxInt64} {
		if v := x.peek(x.state, cost, x.now); cost > 0 && (v.RetryAfter == quota.Forever) != (cost > capacity) {
			x.fail(a4, "got: %d of a capacity of %d are %s; want: RetryAfter Forever for a cost above the capacity, and only for such", cost, capacity, showVerdict(v))
		}
	}
}

func (x *situation) checkDebit() {
	if !x.v.Allowed {
		x.fail(a12, "got: a debit is %s; want: allowed", showVerdict(x.v))
		return
	}
	prior := x.prior()
	want := max(prior-min(x.req.Cost, exact), min(prior, -x.spec().Debt))
	if x.spec().TTL > 0 && x.v.Remaining < -x.spec().Debt && x.v.Remaining >= prior-min(x.req.Cost, exact) {
		return // so many tokens are held beside the debt
	}
	if x.v.Remaining != want {
		x.fail(a12, "got: %d remained and %d were debited, remaining %d; want: %d", prior, x.req.Cost, x.v.Remaining, want)
	}
}

func (x *situation) checkRefund() {
	if !x.v.Allowed {
		x.fail(a13, "got: a refund is %s; want: allowed", showVerdict(x.v))
		return
	}
	prior := x.prior()
	if x.v.Remaining < prior || x.v.Remaining-prior > x.req.Cost {
		x.fail(a13, "got: %d remained and %d were refunded, remaining %d; want: up to as many more", prior, x.req.Cost, x.v.Remaining)
	}
	if x.req.Arg == 0 && x.v.Remaining != prior {
		x.fail(a13, "got: a refund of a charge of long ago (time 0) gives %d back; want: 0", x.v.Remaining-prior)
	}
	x.checkMint(x.state)
}

// checkMint takes all remaining tokens, and fails if a token is left afterwards.
func (x *situation) checkMint(s quota.State) {
	s, v := x.ask(s, quota.OpPeek, 0, x.now)
	if v.Remaining > 0 {
		if s, v = x.ask(s, quota.OpTake, v.Remaining, x.now); v.Remaining > 0 || x.peek(s, 1, x.now).Allowed {
			x.fail(a13, "got: after a refund and a take of the remaining tokens, %s; want: none left", showVerdict(v))
		}
	}
}

// checkUndo refunds the charge of the last move: at once, twice, and long after.
func (x *situation) checkUndo() {
	if x.req.Op != quota.OpTake && x.req.Op != quota.OpAhead || !x.v.Allowed || x.req.Cost == 0 || x.mixed || x.back {
		return
	}
	give := quota.Request{Op: quota.OpRefund, Cost: x.req.Cost, Arg: x.now}
	was := x.peek(x.before, 0, x.now)
	s, v := x.algorithm().Decide(x.state, give, x.now)
	if !v.Allowed || v.Remaining != was.Remaining || v.ResetAfter != was.ResetAfter {
		x.fail(a13, "got: refunding the %d that were just taken gives %s; want: as before, remaining %d, reset after %d",
			x.req.Cost, showVerdict(v), was.Remaining, was.ResetAfter)
		return
	}
	if v.Write {
		twice, v := x.algorithm().Decide(s, give, x.now)
		if v.Write {
			s = twice
		}
		x.checkMint(s)
	}
	if capacity := x.spec().Capacity; x.before.IsZero() && x.req.Cost == capacity {
		// By then the key has recovered for certain, and the next charge counts anew.
		recovered := x.now + x.v.ResetAfter
		_, v := x.ask(quota.State{}, quota.OpTake, capacity, recovered)
		late := recovered + v.ResetAfter
		s, v := x.ask(x.state, quota.OpTake, capacity, late)
		_, w := x.algorithm().Decide(s, give, late)
		if w.Remaining != v.Remaining {
			x.fail(a13, "got: a charge of %d µs ago, whose tokens have come back, is refunded and gives %d of a later charge; want: 0",
				late-x.now, w.Remaining-v.Remaining)
		}
	}
}

func (x *situation) checkReset() {
	want := quota.Verdict{Outcome: quota.Outcome{Allowed: true, Write: !x.before.IsZero()}, Remaining: x.spec().Capacity}
	if got := x.v; got.Write != want.Write && x.prior() == want.Remaining {
		want.Write = got.Write // the key was fresh already
	}
	if x.v != want {
		x.fail(a14, "got: a reset answers %s; want: %s", showVerdict(x.v), showVerdict(want))
		return
	}
	if was := x.sameAsFresh(x.now); was != "" {
		x.fail(a14, "%s", was)
	}
}

// checkFloor takes and peeks with floors, in place of a next move.
func (x *situation) checkFloor() {
	left, capacity := x.peek(x.state, 0, x.now).Remaining, x.spec().Capacity
	for _, cost := range []int64{0, 1, max(left, 0)} {
		for _, floor := range []int64{0, 1, max(left-cost, 0), max(left-cost, 0) + 1, max(capacity-cost, 0), capacity + 1, math.MaxInt64} {
			r := quota.Request{Cost: cost, Floor: floor}
			want := x.peek(x.state, r.Need(), x.now)
			s, v := x.algorithm().Decide(x.state, r, x.now)
			want.Write = false // that of denials and peeks is for A3
			v.Write = v.Write && v.Allowed
			r.Op = quota.OpPeek
			_, p := x.algorithm().Decide(x.state, r, x.now)
			if p.Write = false; p != want {
				x.fail(a20, "got: a peek of %d above a floor of %d is %s; want: as a peek of both, %s", cost, floor, showVerdict(p), showVerdict(want))
			}
			as := x.state
			if want.Allowed {
				as, want = x.algorithm().Decide(x.state, quota.Request{Cost: cost}, x.now)
			}
			if v != want || v.Write && !x.ahead && !sameState(s, as) {
				x.fail(a20, "got: %d above a floor of %d, with %d remaining, are %s, and the state is %+v; want: %s, and %+v",
					cost, floor, left, showVerdict(v), s, showVerdict(want), as)
			}
		}
	}
}

// checkUpTo takes up to a number of tokens, in place of a next move.
func (x *situation) checkUpTo() {
	left, capacity := x.peek(x.state, 0, x.now).Remaining, x.spec().Capacity
	for _, most := range []int64{0, 1, max(left, 0), max(left, 0) + 1, capacity + 1, math.MaxInt64} {
		for _, floor := range []int64{0, 1, max(left, 0) + 1} {
			for _, least := range []int64{0, 1, max(left-floor, 0), max(left-floor, 0) + 1, capacity + 1} {
				if least > most {
					continue
				}
				take := quota.Request{Cost: max(min(most, left-floor), least), Floor: floor}
				want, w := x.algorithm().Decide(x.state, take, x.now)
				got, v := x.algorithm().Decide(x.state, quota.Request{Op: quota.OpUpTo, Cost: most, Arg: quota.Micros(least), Floor: floor}, x.now)
				if v != w || v.Write && !sameState(got, want) {
					x.fail(a21, "got: up to %d, at least %d, above a floor of %d, with %d remaining, are %s, and the state is %+v; want: as a take of %d, %s, and %+v",
						most, least, floor, left, showVerdict(v), got, take.Cost, showVerdict(w), want)
				}
			}
		}
	}
}

// checkAhead takes ahead, in place of a next move.
func (x *situation) checkAhead() {
	ahead := func(s quota.State, cost int64, within, now quota.Micros) (quota.State, quota.Verdict) {
		next, v := x.algorithm().Decide(s, quota.Request{Op: quota.OpAhead, Cost: cost, Arg: within}, now)
		if v.Write {
			return next, v
		}
		return s, v
	}
	same := func(s, t quota.State, v, w quota.Verdict) bool {
		v.Write, w.Write = false, false
		return v == w && sameState(s, t)
	}
	capacity, prior := x.spec().Capacity, x.peek(x.state, 0, x.now)
	for _, cost := range []int64{0, 1, max(prior.Remaining, 0) + 1, capacity, capacity + 1} {
		taken, take := x.ask(x.state, quota.OpTake, cost, x.now)
		if s, v := ahead(x.state, cost, 0, x.now); !same(s, taken, v, take) {
			x.fail(a19, "got: %d ahead, with no delay accepted, are %s; want: as for a take, %s", cost, showVerdict(v), showVerdict(take))
		}
		if s, v := ahead(x.state, cost, quota.MaxNumber, x.now); cost > capacity && !same(s, taken, v, take) {
			x.fail(a19, "got: %d ahead of a capacity of %d are %s; want: as for a take, %s", cost, capacity, showVerdict(v), showVerdict(take))
		}
		if cost > capacity {
			continue
		}
		charged, debit := x.ask(x.state, quota.OpDebit, cost, x.now)
		owed := x.peek(charged, 0, x.now).RetryAfter
		if debit.RetryAfter = owed; debit.Remaining == prior.Remaining-cost { // else the debt is at its floor
			for _, within := range []quota.Micros{owed, owed + 1, quota.MaxNumber} {
				if s, v := ahead(x.state, cost, within, x.now); !same(s, charged, v, debit) {
					x.fail(a19, "got: %d ahead, within %d µs, are %s; want: as for a debit, which refill repays after %d µs, %s", cost, within, showVerdict(v), owed, showVerdict(debit))
				}
			}
		}
		for _, within := range []quota.Micros{0, owed / 2, owed - 1, quota.MaxNumber} {
			s, v := ahead(x.state, cost, within, x.now)
			after := v.RetryAfter
			if v.Allowed && within >= 0 && v.Remaining != prior.Remaining-cost { // such as beyond Spec.Debt
				x.fail(a19, "got: %d ahead, within %d µs, with %d remaining, are %s; want: denied, or all of them charged", cost, within, prior.Remaining, showVerdict(v))
			}
			if v.Allowed || within < 0 {
				continue
			}
			if !sameState(s, taken) && !take.Allowed {
				x.fail(a19, "got: %d ahead, within %d µs, are %s, and the state is %+v; want: nothing charged", cost, within, showVerdict(v), s)
			}
			if within == owed-1 && debit.Remaining == prior.Remaining-cost && after != 1 {
				x.fail(a19, "got: %d ahead, which refill repays after %d µs, are, within %d µs, %s; want: retry after 1", cost, owed, within, showVerdict(v))
			}
			if after <= 0 || after > math.MaxInt64/4 {
				x.fail(a19, "got: %d ahead of a capacity of %d, within %d µs, are %s; want: a time after which they are allowed", cost, capacity, within, showVerdict(v))
				continue
			}
			if _, early := ahead(s, cost, within, x.now+after-1); early.Allowed {
				x.fail(a19, "got: %d ahead, within %d µs, were denied for %d µs and are allowed 1 µs before; want: denied until then", cost, within, after)
			}
			if _, late := ahead(s, cost, within, x.now+after); !late.Allowed {
				x.fail(a19, "got: %d ahead, within %d µs, were denied for %d µs and are %s when these have passed; want: allowed", cost, within, after, showVerdict(late))
			}
		}
	}
}

// checkBack steps the clock back.
func (x *situation) checkBack() {
	capacity := x.spec().Capacity
	if x.mixed {
		return
	}
	for _, back := range []quota.Micros{1, 1000, second, second + 1, 60 * second, 3600 * second, 86_400 * second, 365 * 86_400 * second} {
		_, v := x.ask(x.state, quota.OpTake, capacity+1, x.now-back)
		if x.now >= back && v.Remaining > max(x.v.Remaining, -x.spec().Debt) {
			x.fail(a5, "got: %d remain, and %d when the clock is %d µs back; want: no more", x.v.Remaining, v.Remaining, back)
		}
	}
	if !x.before.IsZero() || x.req.Op != quota.OpTake || !x.v.Allowed || x.req.Cost == 0 {
		return
	}
	// There is one charge, so the time of its recovery is known.
	for _, back := range []quota.Micros{second + 1, 10 * second, 3 * x.p.scale, 1e14} {
		then := x.now - back
		if then < 0 || back <= second {
			continue
		}
		s, v := x.ask(x.state, quota.OpTake, capacity+1, then)
		if want := capacity - x.req.Cost; v.Remaining != want {
			x.fail(a5, "got: %d of %d were taken, and %d remain when the clock is %d µs back; want: the consumption unchanged, remaining %d",
				x.req.Cost, capacity, v.Remaining, back, want)
		}
		_, full := x.ask(quota.State{}, quota.OpTake, capacity, then)
		_, next := x.ask(quota.State{}, quota.OpTake, capacity, then+full.ResetAfter)
		// In a rule of aligned windows recovery takes longest from some phase on, but not longer than two in a row.
		wait := full.ResetAfter + second
		if next.ResetAfter != full.ResetAfter {
			wait += next.ResetAfter
		}
		if got := x.peek(s, 0, then+wait); got.Remaining != capacity {
			x.fail(a5, "got: the clock went %d µs back and a denial was given; %d µs later, %s; want: recovered, for that is a second longer than %d tokens take",
				back, wait, showVerdict(got), capacity)
		}
	}
}

func (x *situation) checkFresh() {
	after := x.v.ResetAfter
	if after < 0 || after > math.MaxInt64/4 {
		return
	}
	if after > 0 {
		if v := x.peek(x.state, 0, x.now+after-1); v.Remaining >= x.spec().Capacity {
			x.fail(a1, "got: reset after %d µs, and 1 µs before all %d remain; want: as fresh then, and not before", after, v.Remaining)
		}
	}
	for _, later := range []quota.Micros{0, 1, second, x.p.scale} {
		if was := x.sameAsFresh(x.now + after + later); was != "" {
			x.fail(a1, "reset after %d µs; %d µs later %s", after, later, was)
		}
	}
}

// sameAsFresh returns the difference between the decisions of the state and those of the zero State, or "".
func (x *situation) sameAsFresh(now quota.Micros) (difference string) {
	capacity := x.spec().Capacity
	reqs := []quota.Request{
		{Op: quota.OpPeek, Cost: capacity}, {Cost: 1}, {Cost: capacity}, {Cost: 0}, {Op: quota.OpDebit, Cost: capacity},
		{Op: quota.OpRefund, Cost: capacity}, {Op: quota.OpReset},
	}
	if x.spec().Ahead {
		reqs = append(reqs, quota.Request{Op: quota.OpAhead, Cost: capacity, Arg: x.p.scale})
	}
	for _, at := range x.charged {
		reqs = append(reqs, quota.Request{Op: quota.OpRefund, Cost: capacity, Arg: at})
	}
	for _, r := range reqs {
		kept, a := x.algorithm().Decide(x.state, r, now)
		fresh, b := x.algorithm().Decide(quota.State{}, r, now)
		if !a.Write {
			kept = x.state
		}
		if !b.Write {
			fresh = quota.State{}
		}
		a.Write, b.Write = false, false
		for _, later := range []quota.Micros{-1, 0, a.ResetAfter / 2, a.ResetAfter} {
			if later >= 0 {
				a, b = x.peek(kept, 1, now+later), x.peek(fresh, 1, now+later)
				a.Write, b.Write = false, false
			}
			if a != b {
				return sprintFresh(r, a, b, later)
			}
		}
	}
	return ""
}

func sprintFresh(r quota.Request, got, want quota.Verdict, later quota.Micros) string {
	text := fmt.Sprintf("got: a %v of %d answers %s; want: as the zero State, %s", r.Op, r.Cost, showVerdict(got), showVerdict(want))
	if later >= 0 {
		text = fmt.Sprintf("got: after a %v of %d, %d µs later, a peek answers %s; want: as from the zero State, %s", r.Op, r.Cost, later, showVerdict(got), showVerdict(want))
	}
	return text
}
