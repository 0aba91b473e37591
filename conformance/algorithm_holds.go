package conformance

import (
	"github.com/fleetquota/fleetquota/quota"
)

// free reports whether a rule charges nothing for good, so that a spend charges nothing either: a take comes back when a hold
// would.
func (p *prober) free(by int) bool {
	for range 3 {
		now := quota.Micros(origin + p.rng.Int64N(1e12))
		_, v := p.family[by].Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: 1}, now)
		if v.ResetAfter != p.specs[by].Lapse(now)-now {
			return false
		}
	}
	return true
}

// checkHolds holds tokens, in place of a next move, and spends and renews the hold.
func (x *situation) checkHolds() {
	left := x.peek(x.state, 0, x.now).Remaining
	for _, cost := range []int64{0, 1, max(left, 0), max(left, 0) + 1, x.spec().Capacity + 1} {
		for _, floor := range []int64{0, 1} {
			_, want := x.algorithm().Decide(x.state, quota.Request{Cost: cost, Floor: floor}, x.now)
			s, v := x.decide(x.state, quota.Request{Op: quota.OpHold, Cost: cost, Floor: floor}, x.now)
			switch {
			case v.Allowed != want.Allowed || v.RetryAfter != want.RetryAfter:
				x.fail(a22, "got: a hold of %d above a floor of %d, with %d remaining, is %s; want: as a take, %s", cost, floor, left, showVerdict(v), showVerdict(want))
			case v.Allowed && v.Remaining != left-cost:
				x.fail(a22, "got: a hold of %d, with %d remaining, is %s; want: remaining %d", cost, left, showVerdict(v), left-cost)
			case v.Allowed && cost > 0 && floor == 0:
				x.checkLapse(s, cost)
				x.checkSpend(s, cost)
				x.checkRenew(s, cost)
			}
		}
	}
}

// decide returns the answer to a request on a state, and the state that is kept.
func (x *situation) decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	next, v := x.algorithm().Decide(s, r, now)
	if v.Write {
		return next, v
	}
	return s, v
}

// left fails unless at some time a state leaves so many tokens fewer than the situation's own.
func (x *situation) left(s quota.State, fewer int64, now quota.Micros, text string) {
	if got, want := x.peek(s, 0, now).Remaining, x.peek(x.state, 0, now).Remaining-fewer; got != want {
		x.fail(a22, "got: %d remaining %d µs later, %s; want: %d, as without the hold but for %d tokens", got, now-x.now, text, want, fewer)
	}
}

// checkLapse checks that a hold lasts until it lapses and no longer. s is the situation's state with the hold.
func (x *situation) checkLapse(s quota.State, held int64) {
	lapse := x.spec().Lapse(x.now)
	for _, at := range []quota.Micros{x.now, x.now + (lapse-x.now)/2, lapse - 1} {
		x.left(s, held, at, "before a hold lapses")
	}
	for _, at := range []quota.Micros{lapse, lapse + 1, lapse + x.p.scale} {
		x.left(s, 0, at, "when a hold has lapsed")
	}
}

// checkSpend spends a hold: at once, at its last moment, and when it has lapsed, at costs below and above it; by a receipt of
// another time; and by other numbers of the rule.
func (x *situation) checkSpend(s quota.State, held int64) {
	lapse, free := x.spec().Lapse(x.now), x.p.free(x.by)
	for _, at := range []quota.Micros{x.now, lapse - 1, lapse, lapse + 1} {
		for _, cost := range []int64{0, 1, held, held + 1} {
			spent, v := x.decide(s, quota.Request{Op: quota.OpSpend, Cost: cost, Floor: held, Arg: lapse}, at)
			charged := quota.Request{Op: quota.OpDebit, Cost: cost}
			if free {
				charged.Cost = 0
			}
			debited, want := x.decide(x.state, charged, at)
			if !v.Allowed || v.Remaining != want.Remaining || v.RetryAfter != 0 {
				x.fail(a22, "got: %d are spent %d µs after a hold of %d, which lapses after %d: %s; want: allowed, and as a debit without the hold, remaining %d",
					cost, at-x.now, held, lapse-x.now, showVerdict(v), want.Remaining)
				continue
			}
			for _, later := range []quota.Micros{at, at + x.p.scale/3, lapse, lapse + 1} {
				if got, want := x.peek(spent, 0, later), x.peek(debited, 0, later); later >= at && got.Remaining != want.Remaining {
					x.fail(a22, "got: %d of %d are spent after %d µs, and after %d remaining %d; want: as a debit without the hold, %d",
						cost, held, at-x.now, later-x.now, got.Remaining, want.Remaining)
				}
			}
		}
	}
	if _, v := x.decide(s, quota.Request{Op: quota.OpSpend, Floor: held, Arg: lapse + 1}, x.now); !x.mixed && v.Remaining != x.peek(s, 0, x.now).Remaining {
		x.fail(a22, "got: a hold until %d is ended by one until %d: %s; want: nothing given back", lapse, lapse+1, showVerdict(v))
	}
	for i, b := range x.p.family {
		if x.p.specs[i].TTL == 0 {
			continue
		}
		spent, v := b.Decide(s, quota.Request{Op: quota.OpSpend, Floor: held, Arg: lapse}, x.now)
		if !v.Write {
			spent = s
		}
		if got, want := peeked(b, spent, 0, x.now).Remaining, peeked(b, x.state, 0, x.now).Remaining; got != want {
			x.fail(a22, "got: a hold of %d until %d is released by %+v, and remaining %d; want: %d, as without the hold", held, lapse, x.p.specs[i], got, want)
		}
	}
}

// checkRenew renews a hold at its last moment, and when it has lapsed.
func (x *situation) checkRenew(s quota.State, held int64) {
	lapse := x.spec().Lapse(x.now)
	renew := quota.Request{Op: quota.OpRenew, Floor: held, Arg: lapse}
	last := lapse - 1
	next := x.spec().Lapse(last)
	renewed, v := x.decide(s, renew, last)
	if want := x.peek(s, 0, last); !v.Allowed || v.RetryAfter != 0 || v.Remaining != want.Remaining {
		x.fail(a22, "got: a hold of %d, which lapses after %d µs, is renewed 1 µs before: %s; want: allowed, remaining %d", held, lapse-x.now, showVerdict(v), want.Remaining)
		return
	}
	for _, at := range []quota.Micros{lapse, next - 1} {
		x.left(renewed, held, at, "when a hold that was renewed 1 µs before it lapsed has not lapsed")
	}
	x.left(renewed, 0, next, "when a hold that was renewed has lapsed")
	spent, _ := x.decide(renewed, quota.Request{Op: quota.OpSpend, Floor: held, Arg: next}, next-1)
	x.left(spent, 0, next-1, "when a hold that was renewed has been released")
	more := renew
	more.Floor = exact
	for at, r := range map[quota.Micros]quota.Request{lapse: renew, last: more} {
		if after, v := x.decide(s, r, at); v.Allowed || v.RetryAfter != quota.Forever || v.Write && !x.ahead || v.Remaining != x.peek(s, 0, at).Remaining {
			x.fail(a22, "got: %d of a hold of %d, which lapses after %d µs, are renewed after %d: %s, and %+v; want: denied for ever, and nothing changed",
				r.Floor, held, lapse-x.now, at-x.now, showVerdict(v), after)
		}
	}
}
