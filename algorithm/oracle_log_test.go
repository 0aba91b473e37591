package algorithm_test

import (
	"math"
	"math/big"
	"slices"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// logOracle keeps each charge on its own, in the order of time.
type logOracle struct {
	charges history
	joined  int64 // charges up to this time were joined
}

func (o *logOracle) newest() int64 { return o.charges[len(o.charges)-1].at }

func (o *logOracle) rebase(r rule, now int64) bool {
	if len(o.charges) == 0 || o.newest()-now <= second {
		return false
	}
	by := now - o.newest()
	for i := range o.charges {
		o.charges[i].at += by
	}
	if o.joined > 0 {
		o.joined = max(o.joined+by, 0)
	}
	return true
}

func (o *logOracle) used(r rule, now int64) *big.Int {
	return o.charges.between(now-r.period+1, math.MaxInt64)
}

// entries returns the charges that count at a time, those of one time as one.
func (o *logOracle) entries(r rule, now int64) history {
	var out history
	for _, c := range o.charges {
		switch n := len(out); {
		case c.at <= now-r.period:
		case n > 0 && out[n-1].at == c.at:
			out[n-1].n = new(big.Int).Add(out[n-1].n, c.n)
		default:
			out = append(out, c)
		}
	}
	return out
}

func (o *logOracle) charge(r rule, n, now int64) bool {
	more := least(integer(n), new(big.Int).Sub(mostOf(r), o.used(r, now)))
	if more.Sign() <= 0 {
		return false
	}
	o.charges = o.entries(r, now)
	if len(o.charges) > 0 {
		now = max(now, o.newest())
	}
	if len(o.charges) >= algorithm.MaxLogEntries && o.newest() < now {
		o.joined = o.newest()
		for i := len(o.charges) - 2; i >= 0; i-- { // each takes the time of the latest in its step
			if later := o.charges[i+1].at; later/step(r) == o.charges[i].at/step(r) {
				o.charges[i].at = later
			}
		}
	}
	o.charges = append(o.charges, charged{now, more})
	return true
}

// step returns the time within which a full log joins charges: a 2047th of the window, rounded up.
func step(r rule) int64 { return (r.period + 2046) / 2047 }

func (o *logOracle) refund(r rule, n, paid, now int64) bool {
	entries := o.entries(r, now)
	i := slices.IndexFunc(entries, func(c charged) bool { return c.at >= paid })
	if i < 0 || entries[i].at != paid && (paid > o.joined || paid/step(r) != entries[i].at/step(r)) {
		return false
	}
	o.charges = entries
	if integer(n).Cmp(entries[i].n) >= 0 {
		o.charges = slices.Delete(entries, i, i+1)
		return true
	}
	entries[i].n = new(big.Int).Sub(entries[i].n, integer(n))
	return true
}

func (o *logOracle) reset() bool {
	was := len(o.charges) > 0
	o.charges, o.joined = nil, 0
	return was
}

func (o *logOracle) state(r rule) quota.State {
	var s quota.State
	for _, c := range o.entries(r, math.MinInt64/2) {
		if s.Unit = 1; len(s.Tail) == 0 && c.at > o.joined {
			o.joined = 0
		}
		s.C = o.joined
		s.A += c.n.Int64()
		s.Tail = append(s.Tail, c.at, c.n.Int64())
	}
	return s
}
