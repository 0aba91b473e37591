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

func (o *logOracle) full(r rule, now int64) bool {
	if len(o.charges) < algorithm.MaxLogEntries {
		return false
	}
	return len(o.entries(r, now)) >= algorithm.MaxLogEntries && o.newest() < now
}

func (o *logOracle) charge(r rule, n, now int64) bool {
	more := least(integer(n), new(big.Int).Sub(mostOf(r), o.used(r, now)))
	if more.Sign() <= 0 {
		return false
	}
	full := o.full(r, now)
	o.charges = o.entries(r, now)
	if len(o.charges) > 0 {
		now = max(now, o.newest())
	}
	if full { // the newest entry takes the charge in, and its time
		o.charges[len(o.charges)-1].at = now
	}
	o.charges = append(o.charges, charged{now, more})
	return true
}

func (o *logOracle) refund(r rule, n, paid, now int64) bool {
	entries := o.entries(r, now)
	i := slices.IndexFunc(entries, func(c charged) bool { return c.at == paid })
	if i < 0 {
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
	o.charges = nil
	return was
}

func (o *logOracle) state(r rule) quota.State {
	var s quota.State
	for _, c := range o.entries(r, math.MinInt64/2) {
		s.Unit = 1
		s.A += c.n.Int64()
		s.Tail = append(s.Tail, c.at, c.n.Int64())
	}
	return s
}
