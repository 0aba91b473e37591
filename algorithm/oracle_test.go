package algorithm_test

import (
	"math"
	"math/big"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

// An oracle is a rule written a second time, in numbers without bound. The parameters come with each call,
// for a limit may change while in use.
type oracle interface {
	// rebase moves charges that are more than a second ahead of now, and reports whether there were any.
	rebase(r rule, now int64) bool
	// used returns the tokens that count at a time, rounded up, if nothing is charged until then.
	used(r rule, now int64) *big.Int
	// charge charges n tokens and refund gives back up to n, down to the floor and up to the capacity; they
	// report whether that changed anything.
	charge(r rule, n, now int64) bool
	refund(r rule, n, at, now int64) bool
	reset() bool
	// state returns the state that the rule should have stored.
	state(r rule) quota.State
}

func newOracle(k kind) oracle {
	switch k {
	case bucket:
		return &bucketOracle{}
	case sliding:
		return &slidingOracle{}
	case slidingLog:
		return &logOracle{}
	}
	return &fixedOracle{}
}

func integer(n int64) *big.Int { return big.NewInt(n) }

func room(o oracle, r rule, now int64) *big.Int {
	return new(big.Int).Sub(integer(r.limit), o.used(r, now))
}

func fits(o oracle, r rule, cost, now int64) bool {
	return cost <= r.limit && room(o, r, now).Cmp(integer(cost)) >= 0
}

func TestOracle(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		const steps = 100
		for set := range sized(60_000, 2_000_000) / steps {
			walk(t, rng, k, set, steps)
			if t.Failed() {
				return
			}
		}
	})
}

// walk takes random steps in time with random requests, and asks the rule and the oracle about each.
func walk(t *testing.T, rng *rand.Rand, k kind, set, steps int) {
	t.Helper()
	r, o := randomRule(rng, k), newOracle(k)
	var s quota.State
	var v quota.Verdict
	now := int64(base) + rng.Int64N(1e13)
	receipts := []int64{now}
	changes := rng.IntN(3) == 0 // most walks keep their limit
	for step := range steps {
		if changes && rng.IntN(10) == 0 {
			r = randomRule(rng, k)
		}
		now += randomStep(rng, r, v)
		if now > 8e15 || now < 1e15 {
			now = base
		}
		req := randomRequest(rng, r, v, receipts)
		tail := slices.Clone(s.Tail)
		before := s
		var got quota.State
		got, v = r.Decide(s, req, quota.Micros(now))

		rebased := o.rebase(r, now)
		allowed, changed := true, false
		var delay quota.Micros
		switch req.Op {
		case quota.OpTake, quota.OpPeek:
			if allowed = fits(o, r, req.Cost, now); allowed && req.Op == quota.OpTake && req.Cost > 0 {
				changed = o.charge(r, req.Cost, now)
			}
		case quota.OpDebit:
			changed = req.Cost > 0 && o.charge(r, req.Cost, now)
		case quota.OpRefund:
			changed = req.Cost > 0 && o.refund(r, req.Cost, int64(req.Arg), now)
		case quota.OpReset:
			changed = o.reset()
		case quota.OpAhead:
			b := o.(*bucketOracle)
			if delay, allowed = b.ahead(r, req.Cost, now, req.Arg); allowed && req.Cost > 0 {
				changed = o.charge(r, req.Cost, now)
			}
		}
		fail := func(format string, args ...any) {
			t.Errorf("set %d step %d: limit %d refill %d period %dµs tick %dµs: %v of %d (at %d) at %d on %+v gives %+v, %+v",
				set, step, r.limit, r.refill, r.period, r.tick, req.Op, req.Cost, req.Arg, now, before, v, got)
			t.Errorf(format, args...)
		}
		if want := o.state(r); v.Write && !sameState(got, want) {
			fail("state: got %+v, want %+v", got, want)
		}
		left := room(o, r, now)
		switch {
		case v.Allowed != allowed:
			fail("allowed: got %v, want %v", v.Allowed, allowed)
		case v.Write != (changed || rebased):
			fail("write: got %v, want %v", v.Write, changed || rebased)
		case !v.Write && !slices.Equal(tail, before.Tail), !slices.Equal(tail, s.Tail):
			fail("tail of the argument: got %v, want it unchanged, %v", s.Tail, tail)
		case left.Cmp(integer(v.Remaining)) != 0:
			fail("remaining: got %d, want %v", v.Remaining, left)
		case allowed && v.RetryAfter != delay:
			fail("retry after: got %v, want %v", v.RetryAfter, delay)
		case !allowed && req.Op == quota.OpAhead && req.Cost <= r.limit:
			b, after := o.(*bucketOracle), v.RetryAfter
			if _, early := b.ahead(r, req.Cost, now+int64(after)-1, req.Arg); early || after <= 0 {
				fail("retry after: got %v, want no time at which the request fits before", after)
			}
			if _, late := b.ahead(r, req.Cost, now+int64(after), req.Arg); !late {
				fail("retry after: got %v, want a time at which the request fits", after)
			}
		case !allowed && req.Cost > r.limit && v.RetryAfter != quota.Forever:
			fail("retry after: got %v, want Forever", v.RetryAfter)
		case !allowed && req.Cost <= r.limit && req.Op != quota.OpAhead && !tight(o, r, req.Cost, now, v.RetryAfter):
			fail("retry after: got %v, want the first time at which the request fits", v.RetryAfter)
		case !freshAt(o, r, now, int64(v.ResetAfter)):
			fail("reset after: got %v, want the first time at which the state is as fresh", v.ResetAfter)
		}
		if t.Failed() {
			return
		}
		if v.Write {
			s = got
		}
		if v.Allowed && (req.Op == quota.OpTake || req.Op == quota.OpDebit || req.Op == quota.OpAhead) {
			receipts = append(receipts, now)
		}
	}
}

func tight(o oracle, r rule, cost, now int64, after quota.Micros) bool {
	return after > 0 && after < quota.Forever &&
		fits(o, r, cost, now+int64(after)) && !fits(o, r, cost, now+int64(after)-1)
}

func freshAt(o oracle, r rule, now, after int64) bool {
	if after < 0 || o.used(r, now+after).Sign() != 0 {
		return false
	}
	return after == 0 || o.used(r, now+after-1).Sign() > 0
}

func randomStep(rng *rand.Rand, r rule, v quota.Verdict) int64 {
	switch rng.IntN(16) {
	case 0:
		return -rng.Int64N(second)
	case 1:
		return -second - rng.Int64N(3)
	case 2:
		return -rng.Int64N(3*r.period + 3*second)
	case 3:
		return rng.Int64N(20 * year.Microseconds())
	default:
		return forward(rng, r, v)
	}
}

func randomRequest(rng *rand.Rand, r rule, v quota.Verdict, receipts []int64) quota.Request {
	req := quota.Request{Cost: randomCost(rng, r, v.Remaining)}
	switch n := rng.IntN(20); {
	case n < 4 && r.kind == bucket:
		req.Op = quota.OpAhead
		req.Arg = [...]quota.Micros{0, min(v.RetryAfter, quota.MaxNumber), quota.Micros(rng.Int64N(2*r.period + 1)), quota.Micros(forward(rng, r, v)), quota.MaxNumber}[rng.IntN(5)]
	case n < 11:
	case n < 13:
		req.Op = quota.OpPeek
	case n < 15:
		req.Op = quota.OpDebit
	case n < 19:
		req.Op = quota.OpRefund
		switch rng.IntN(6) {
		case 0:
			req.Arg = [...]quota.Micros{0, math.MinInt64, math.MaxInt64}[rng.IntN(3)]
		case 1:
			req.Arg = quota.Micros(receipts[len(receipts)-1] + rng.Int64N(7) - 3)
		default:
			back := min(len(receipts), 1+rng.IntN(4))
			req.Arg = quota.Micros(receipts[len(receipts)-back])
		}
	default:
		req.Op = quota.OpReset
	}
	return req
}
