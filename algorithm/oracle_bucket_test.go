package algorithm_test

import (
	"math/big"

	"github.com/fleetquota/fleetquota/quota"
)

// bucketOracle counts consumed tokens as a fraction, and gives back rate × time at each whole tick.
type bucketOracle struct {
	consumed *big.Rat // nil where nothing was
	unit     *big.Int // the credits in a token when it was stored
	at       int64
	since    int64 // the charge since which the bucket has not been full
}

func down(t, tick int64) int64 { return t - ((t%tick)+tick)%tick }
func up(t, tick int64) int64   { return -down(-t, tick) }

// perTick returns the tokens that one tick refills.
func perTick(r rule) *big.Rat {
	rate := big.NewRat(r.refill, r.period)
	return rate.Mul(rate, new(big.Rat).SetInt64(r.tick))
}

func roundUp(x *big.Rat) *big.Int {
	n, rest := new(big.Int).DivMod(x.Num(), x.Denom(), new(big.Int))
	if rest.Sign() > 0 {
		n.Add(n, integer(1))
	}
	return n
}

func lesser(a, b *big.Rat) *big.Rat {
	if a.Cmp(b) < 0 {
		return a
	}
	return b
}

func floorOf(r rule) *big.Rat {
	n := integer(r.limit)
	return new(big.Rat).SetInt(n.Add(n, integer(r.debt)))
}

// converted returns the consumption in the unit of a rule of these parameters.
func (o *bucketOracle) converted(r rule) *big.Rat {
	if o.unit.Cmp(perTick(r).Denom()) == 0 {
		return o.consumed
	}
	return lesser(new(big.Rat).SetInt(roundUp(o.consumed)), floorOf(r))
}

func (o *bucketOracle) rebase(r rule, now int64) bool {
	if o.consumed == nil || o.at-now <= second {
		return false
	}
	o.consumed, o.unit, o.at = o.converted(r), perTick(r).Denom(), down(now, r.tick)
	o.since = min(o.since, o.at)
	return true
}

func (o *bucketOracle) level(r rule, now int64) (consumed *big.Rat, at int64) {
	floored := down(now, r.tick)
	if o.consumed == nil {
		return new(big.Rat), floored
	}
	consumed, at = new(big.Rat).Set(lesser(o.converted(r), floorOf(r))), up(o.at, r.tick)
	if floored > at {
		gain := new(big.Rat).SetInt64((floored - at) / r.tick)
		consumed.Sub(consumed, gain.Mul(gain, perTick(r)))
		at = floored
	}
	if consumed.Sign() <= 0 {
		return new(big.Rat), floored
	}
	return consumed, at
}

func (o *bucketOracle) used(r rule, now int64) *big.Int {
	consumed, _ := o.level(r, now)
	return roundUp(consumed)
}

func (o *bucketOracle) set(r rule, was, is *big.Rat, at, now int64) bool {
	if was.Cmp(is) == 0 {
		return false
	}
	since := min(o.since, now)
	if was.Sign() == 0 {
		since = now
	}
	*o = bucketOracle{consumed: is, unit: perTick(r).Denom(), at: at, since: since}
	if is.Sign() == 0 {
		*o = bucketOracle{}
	}
	return true
}

func (o *bucketOracle) charge(r rule, n, now int64) bool {
	was, at := o.level(r, now)
	is := new(big.Rat).SetInt64(n)
	return o.set(r, was, lesser(is.Add(is, was), floorOf(r)), at, now)
}

// refund does nothing once the bucket has been full since the charge.
func (o *bucketOracle) refund(r rule, n, paid, now int64) bool {
	was, at := o.level(r, now)
	if paid < o.since {
		return false
	}
	is := new(big.Rat).Sub(was, new(big.Rat).SetInt64(n))
	if is.Sign() < 0 {
		is.SetInt64(0)
	}
	return o.set(r, was, is, at, now)
}

// ahead returns whether n tokens may be charged and used within a time, and when: as soon as no more than the limit is
// consumed, if nothing else is charged.
func (o *bucketOracle) ahead(r rule, n, now int64, within quota.Micros) (delay quota.Micros, allowed bool) {
	was, at := o.level(r, now)
	is := new(big.Rat).SetInt64(n)
	if n > r.limit || is.Add(is, was).Cmp(floorOf(r)) > 0 {
		return 0, false
	}
	if over := is.Sub(is, new(big.Rat).SetInt64(r.limit)); over.Sign() > 0 {
		ticks := roundUp(over.Quo(over, perTick(r))).Int64()
		delay = quota.Micros(at + ticks*r.tick - now)
	}
	return delay, delay <= within
}

func (o *bucketOracle) reset() bool {
	was := o.consumed != nil
	*o = bucketOracle{}
	return was
}

func (o *bucketOracle) state(r rule) quota.State {
	if o.consumed == nil {
		return quota.State{}
	}
	credits := new(big.Rat).Mul(o.consumed, new(big.Rat).SetInt(o.unit))
	if !credits.IsInt() {
		panic("a state that no integer holds")
	}
	return quota.State{Unit: o.unit.Int64(), A: credits.Num().Int64(), B: o.at, C: o.since}
}
