package algorithm

import (
	"math"
	"math/bits"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// tokenBucket keeps the deficit: how far the bucket is from full. Over any interval Δ it admits at most
// capacity + rate·(Δ + one tick). (J. Turner, "New directions in communications", IEEE Communications
// Magazine 24(10), 1986; as a virtual schedule: ITU-T I.371, annex A.)
//
// State: A is the deficit in credits, B the time in µs up to which refill is counted, and C the time in µs of
// the charge since which the bucket has not been full, or 0 where an older release wrote the state. One token
// costs unit credits and each tick repays perTick credits: the rate as a reduced fraction, so that refill is
// never rounded.
//
// A take ahead (quota.OpAhead) may use its tokens when refill has repaid the debt, and later charges do not delay it:
// counted at the times of use, the bound is the same; counted when they are charged, it is capacity +
// rate·(Δ + the longest delay).
//
// A refund counts in full unless the bucket has been full since the charge. Until then no refill is lost, and
// so tokens that were charged and given back are as good as tokens that were never charged: in any interval
// that begins where the bucket is full, the charges less the refunds are at most capacity + rate·Δ.
type tokenBucket struct {
	unit     int64 // credits a token
	perTick  int64 // credits repaid a tick
	capacity int64 // credits
	most     int64 // credits: capacity and debt
	tick     int64 // µs
	fill     int64 // ticks that repay most
	tokens   int64 // capacity in tokens
	debt     int64 // most - capacity, in tokens
	refill   int64 // tokens a period, as the program wrote the rate
	period   int64 // µs
}

// TokenBucket returns a bucket of capacity tokens that gains refill tokens each period, continuously: 10.5
// tokens a second is TokenBucket(c, 21, 2*time.Second). A key begins with a full bucket. Over any interval it
// admits at most capacity and the tokens gained in it; a capacity of 0 denies every cost above 0, as [DenyAll]
// does. Accepted: capacities of 0 to 2^52-1, rates up to 10^13 tokens a second, periods of whole microseconds
// up to ten years, and a bucket that fills within ten years; else [quota.ErrInvalid]. A rate that is no simple
// fraction may allow less than 2^52-1; the error says how much.
func TokenBucket(capacity, refill int64, period time.Duration) quota.Algorithm {
	return carry(makeTokenBucket(capacity, refill, period))
}

func makeTokenBucket(capacity, refill int64, period time.Duration) (quota.Algorithm, error) {
	per, err := micros("capacity", capacity, "refill", refill, "period", period)
	if err != nil {
		return nil, err
	}
	return newTokenBucket(capacity, capacity, refill, per)
}

// newTokenBucket returns a bucket that gains refill tokens in per µs, with room for a debt of up to held
// tokens if that is possible. held is at least the capacity.
func newTokenBucket(capacity, held, refill, per int64) (quota.Algorithm, error) {
	// reduce returns the rate in credits at a tick, and how many tokens of capacity and debt the two bounds
	// allow.
	reduce := func(t int64) (unit, perTick, room int64) {
		p := per / t
		g := gcd(refill, p)
		unit, perTick = p/g, refill/g
		room = maxHeld
		if ticks := maxSpan / t; atMost(perTick, ticks, maxHeld) {
			room = perTick * ticks
		}
		return unit, perTick, room / unit
	}
	// A tick without room for debt is chosen only where no coarser tick has that room.
	roomFor := func(want int64) int64 {
		return tick(per, func(t int64) bool {
			_, perTick, room := reduce(t)
			return perTick <= maxHeld && room >= want
		})
	}
	t := roomFor(2 * max(held, 1))
	for _, want := range []int64{max(held, 1), capacity} {
		if t == 0 {
			t = roomFor(want)
		}
	}
	if t == 0 {
		most := int64(0)
		tick(per, func(t int64) bool {
			if _, perTick, room := reduce(t); perTick <= maxHeld {
				most = max(most, room)
			}
			return false
		})
		return nil, invalid("a bucket of %d that gains %d each %v takes over ten years to fill, or needs numbers of 2^52 or more; "+
			"accepted: a capacity of up to %d, a higher rate, or a rounder period", capacity, refill, time.Duration(per)*time.Microsecond, most)
	}
	unit, perTick, room := reduce(t)
	return &tokenBucket{
		unit: unit, perTick: perTick, capacity: capacity * unit, most: room * unit, tick: t,
		fill: ceil(room*unit, perTick), tokens: capacity, debt: room - capacity, refill: refill, period: per,
	}, nil
}

// GCRA returns the generic cell rate algorithm with the given burst and rate. It is the same function as
// [TokenBucket], with the same arguments, under its name in telecommunications (ITU-T I.371): GCRA's
// theoretical arrival time is the time at which the bucket is full again.
func GCRA(burst, rate int64, period time.Duration) quota.Algorithm {
	return TokenBucket(burst, rate, period)
}

func (b *tokenBucket) Spec() quota.Spec {
	return quota.Spec{
		Rule: quota.Rule{'t', 'b', '1'}, Unit: b.unit, Capacity: b.tokens, Debt: b.debt, Ahead: true,
		Window: time.Duration(ceil(b.capacity, b.perTick)*b.tick) * time.Microsecond,
		Params: [8]int64{b.perTick, b.capacity, b.most, b.tick, b.fill},
	}
}

func (b *tokenBucket) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	// Local variables, not fields of s and of a verdict: the compiler keeps them in registers.
	unit, a, up, since := s.Unit, s.A, s.B, s.C
	allowed, write := true, false
	var retryAfter, resetAfter quota.Micros

	floored := int64(now)
	if b.tick > 1 {
		floored -= floored % b.tick
	}
	deficit, at := int64(0), floored // at is the time up to which refill is counted
	if unit != 0 {
		held, last := a, up
		if unit != b.unit {
			held = b.convert(held, unit)
		}
		if quota.Micros(last)-now > ahead {
			last = floored
			unit, a, up, since, write = b.unit, held, last, min(since, last), true
		}
		elapsed := floored - last
		if b.tick > 1 {
			last = ceil(last, b.tick) * b.tick // the state of a rule with another tick may lie between two of ours
			elapsed = (floored - last) / b.tick
		}
		if elapsed < b.fill {
			deficit = max(clamp(held, b.most)-max(elapsed, 0)*b.perTick, 0)
		}
		if deficit > 0 {
			at = max(floored, last)
		}
	}

	kept := deficit
	switch r.Op {
	case quota.OpUpTo:
		r = r.Taking(floor(b.capacity-deficit, b.unit))
		fallthrough
	case quota.OpTake, quota.OpPeek:
		if need := r.Need(); need > b.tokens {
			allowed, retryAfter = false, forever
		} else if over := deficit + need*b.unit - b.capacity; over > 0 {
			allowed = false
			retryAfter = quota.Micros(at+ceil(over, b.perTick)*b.tick) - now
		} else if r.Op == quota.OpTake {
			kept += r.Cost * b.unit
		}
	case quota.OpDebit:
		kept = min(kept+min(r.Cost, b.tokens+b.debt)*b.unit, b.most)
	case quota.OpRefund:
		if since > 0 && int64(r.Arg) >= since || since <= 0 && int64(r.Arg) > b.emptyAt(now) {
			kept = max(kept-min(r.Cost, b.tokens+b.debt)*b.unit, 0)
		}
	case quota.OpReset:
		kept = 0
		write = s.Unit != 0
	case quota.OpAhead:
		if r.Cost > b.tokens {
			allowed, retryAfter = false, forever
			break
		}
		if kept += r.Cost * b.unit; kept > b.capacity {
			retryAfter = quota.Micros(at+ceil(kept-b.capacity, b.perTick)*b.tick) - now
		}
		late := retryAfter - max(r.Arg, 0)
		if kept > b.most {
			late = max(late, quota.Micros(at+ceil(kept-b.most, b.perTick)*b.tick)-now)
		}
		if late > 0 {
			allowed, retryAfter, kept = false, late, deficit
		}
	}
	switch {
	case kept == 0 && (kept != deficit || r.Op == quota.OpReset):
		unit, a, up, since, write = 0, 0, 0, 0, write || kept != deficit
	case kept != deficit:
		unit, a, up, write = b.unit, kept, at, true
		if deficit == 0 || since > int64(now) { // the clock may have gone back
			since = int64(now)
		}
	}
	if kept > 0 {
		resetAfter = quota.Micros(at+ceil(kept, b.perTick)*b.tick) - now
	}
	return quota.State{Unit: unit, A: a, B: up, C: since}, quota.Verdict{
		Outcome:   quota.Outcome{Allowed: allowed, Write: write},
		Remaining: floor(b.capacity-kept, b.unit), RetryAfter: retryAfter, ResetAfter: resetAfter,
	}
}

// emptyAt returns the latest time at which an empty bucket would have been full by now. A bucket of no capacity
// counts as one of a token. Where it is not known since when the bucket has not been full, refunds of older
// charges do not count.
func (b *tokenBucket) emptyAt(now quota.Micros) int64 {
	return int64(now) - ceil(max(b.capacity, b.unit), b.perTick)*b.tick
}

// convert converts a deficit from another unit: whole tokens exactly, a remainder as one token.
func (b *tokenBucket) convert(deficit, unit int64) int64 {
	return clamp(ceil(deficit, unit), b.tokens+b.debt) * b.unit
}

// Forecast is exact to within one tick, unless a tick refills more than capacity - 1. n tokens are there once
// the deficit is repaid and n - capacity tokens more are gained, or, below the capacity, that many fewer.
func (b *tokenBucket) Forecast(d quota.Decision, n int64) time.Duration {
	if n <= d.Remaining {
		return 0
	}
	if b.tokens == 0 {
		return quota.Never
	}
	beyond, sign := n-b.tokens, int64(1)
	if beyond < 0 {
		beyond, sign = -beyond, -1
	}
	hi, lo := bits.Mul64(uint64(beyond), uint64(b.unit))
	if hi >= uint64(b.perTick) {
		return quota.Never
	}
	ticks, rest := bits.Div64(hi, lo, uint64(b.perTick))
	if ticks > math.MaxInt64/2 {
		return quota.Never
	}
	if rest > 0 && sign < 0 {
		ticks++
	}
	wait := span(int64(ticks), b.tick)
	start := d.ResetAfter
	if start == 0 { // a full bucket counts from the tick before
		start = -span(int64(d.At)%b.tick, 1)
	}
	if sign > 0 && wait > quota.Never-d.ResetAfter {
		return quota.Never
	}
	return max(start+time.Duration(sign)*wait, 0)
}
