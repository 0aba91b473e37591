package algorithm_test

import (
	"math/big"

	"github.com/fleetquota/fleetquota/quota"
)

// A charged is one charge in a history, or a refund where it is negative.
type charged struct {
	at int64 // the start of the window it counts in; in a log, its time
	n  *big.Int
}

type history []charged

// between returns the sum of the charges from one time, inclusive, to another, exclusive.
func (h history) between(from, to int64) *big.Int {
	sum := new(big.Int)
	for _, c := range h {
		if c.at >= from && c.at < to {
			sum.Add(sum, c.n)
		}
	}
	return sum
}

func least(a, b *big.Int) *big.Int {
	if a.Cmp(b) < 0 {
		return a
	}
	return b
}

func mostOf(r rule) *big.Int { return new(big.Int).Add(integer(r.limit), integer(r.debt)) }

func aligned(r rule, t int64) int64 {
	if r.kind == first {
		return t
	}
	return down(t-r.offset, r.period) + r.offset
}

// fixedOracle keeps the charges of the present window.
type fixedOracle struct {
	charges history
	window  int64 // 0 where there is none
	start   int64
}

func (o *fixedOracle) rebase(r rule, now int64) bool {
	if o.window == 0 || o.start-now <= second {
		return false
	}
	o.start = now
	if r.kind != first {
		o.start = down(now-r.offset, o.window) + r.offset
	}
	for i := range o.charges {
		o.charges[i].at = o.start
	}
	return true
}

func (o *fixedOracle) used(r rule, now int64) *big.Int {
	if now >= o.start+o.window {
		return integer(0)
	}
	return least(o.charges.between(o.start, o.start+o.window), mostOf(r))
}

// keep stores a sum that differs from the used one.
func (o *fixedOracle) keep(r rule, was, is *big.Int) bool {
	if was.Cmp(is) == 0 {
		return false
	}
	if is.Sign() == 0 {
		*o = fixedOracle{}
		return true
	}
	o.charges = append(o.charges, charged{o.start, new(big.Int).Sub(is, o.charges.between(o.start, o.start+1))})
	return true
}

func (o *fixedOracle) charge(r rule, n, now int64) bool {
	was := o.used(r, now)
	is := least(new(big.Int).Add(was, integer(n)), mostOf(r))
	if was.Cmp(is) == 0 {
		return false
	}
	switch {
	case was.Sign() == 0:
		*o = fixedOracle{window: r.period, start: aligned(r, now)}
	case o.window != r.period: // its count moves into a window of the new length
		start := aligned(r, max(now, o.start))
		*o = fixedOracle{window: r.period, start: start, charges: history{{start, was}}}
	}
	return o.keep(r, was, is)
}

func (o *fixedOracle) refund(r rule, n, paid, now int64) bool {
	was := o.used(r, now)
	if paid < o.start {
		return false
	}
	is := new(big.Int).Sub(was, integer(n))
	if is.Sign() < 0 {
		is.SetInt64(0)
	}
	return o.keep(r, was, is)
}

func (o *fixedOracle) reset() bool {
	was := o.window != 0
	*o = fixedOracle{}
	return was
}

func (o *fixedOracle) state(r rule) quota.State {
	if o.window == 0 {
		return quota.State{}
	}
	return quota.State{Unit: o.window, A: o.start, B: o.charges.between(o.start, o.start+1).Int64()}
}

// slidingOracle keeps the charges of the present window and the one before. Of the latter it counts the largest whole
// number below their sum times the fraction that a sliding window still covers.
type slidingOracle struct {
	charges history
	window  int64 // 0 where there is none
	start   int64 // of the window last charged in
}

func (o *slidingOracle) rebase(r rule, now int64) bool {
	if o.window == 0 || o.start-now <= second {
		return false
	}
	sum := new(big.Int).Add(o.charges.between(o.start, o.start+o.window), o.charges.between(o.start-o.window, o.start))
	o.start = down(now, o.window)
	o.charges = history{{o.start, sum}}
	return true
}

// counts returns the window that now falls into, and the counts in it and the one before.
func (o *slidingOracle) counts(r rule, now int64) (start int64, cur, prev *big.Int) {
	if o.window == 0 || now >= o.start+2*o.window {
		return down(now, r.period), integer(0), integer(0)
	}
	start = o.start
	if now >= start+o.window {
		start += o.window
	}
	return start, least(o.charges.between(start, start+o.window), mostOf(r)),
		least(o.charges.between(start-o.window, start), mostOf(r))
}

func (o *slidingOracle) used(r rule, now int64) *big.Int {
	start, cur, prev := o.counts(r, now)
	return cur.Add(cur, o.covered(r, start, prev, now))
}

// covered returns the tokens of the window before start that count.
func (o *slidingOracle) covered(r rule, start int64, prev *big.Int, now int64) *big.Int {
	if o.window != r.period {
		return prev
	}
	share := big.NewRat(1, 1)
	if now > start {
		share.Sub(share, big.NewRat(up(now-start, r.tick), o.window))
	}
	below := roundUp(share.Mul(share, new(big.Rat).SetInt(prev))) // the first whole number that is not below
	if below.Sign() > 0 {
		below.Sub(below, integer(1))
	}
	return below
}

func (o *slidingOracle) keep(window, start int64, cur, prev *big.Int) bool {
	*o = slidingOracle{window: window, start: start, charges: history{{start - window, prev}, {start, cur}}}
	if cur.Sign() == 0 && prev.Sign() == 0 {
		*o = slidingOracle{}
	}
	return true
}

func (o *slidingOracle) charge(r rule, n, now int64) bool {
	start, cur, prev := o.counts(r, now)
	used := o.used(r, now)
	more := least(integer(n), new(big.Int).Sub(mostOf(r), used))
	if more.Sign() <= 0 {
		return false
	}
	if o.covered(r, start, prev, now).Sign() == 0 {
		prev = integer(0)
	}
	if o.window != r.period && o.window != 0 {
		start, cur, prev = down(max(now, start), r.period), used, integer(0)
	}
	return o.keep(r.period, start, cur.Add(cur, more), prev)
}

func (o *slidingOracle) refund(r rule, n, paid, now int64) bool {
	start, cur, prev := o.counts(r, now)
	from := prev
	switch {
	case paid >= start:
		from = cur
	case paid < start-o.window:
		return false
	}
	if o.covered(r, start, prev, now).Sign() == 0 {
		prev.SetInt64(0)
	}
	back := least(integer(n), from)
	if back.Sign() == 0 {
		return false
	}
	from.Sub(from, back)
	if o.covered(r, start, prev, now).Sign() == 0 {
		prev.SetInt64(0)
	}
	return o.keep(o.window, start, cur, prev)
}

func (o *slidingOracle) reset() bool {
	was := o.window != 0
	*o = slidingOracle{}
	return was
}

func (o *slidingOracle) state(r rule) quota.State {
	if o.window == 0 {
		return quota.State{}
	}
	return quota.State{
		Unit: o.window, A: o.start,
		B: o.charges.between(o.start, o.start+o.window).Int64(),
		C: o.charges.between(o.start-o.window, o.start).Int64(),
	}
}
