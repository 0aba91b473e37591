// Package previous has the rules whose kernels the release before decided otherwise, as they were: fleets run two
// releases side by side while they roll one out.
package previous

import (
	_ "embed"

	"github.com/fleetquota/fleetquota/quota"
)

const (
	maxHeld = 1<<52 - 1
	ahead   = quota.Micros(1_000_000)
	forever = quota.Forever
)

//go:embed tokenbucket.lua
var tokenBucketLua string

//go:embed slidingwindow.lua
var slidingWindowLua string

// Of returns the previous release's kernel of a token bucket or a sliding window, with the numbers of the present rule.
func Of(present quota.Algorithm) quota.Algorithm {
	spec := present.Spec()
	p := spec.Params
	switch spec.Rule {
	case quota.Rule{'t', 'b', '1'}:
		return &tokenBucket{Algorithm: present, unit: spec.Unit, perTick: p[0], capacity: p[1], most: p[2], tick: p[3], fill: p[4],
			tokens: spec.Capacity, debt: spec.Debt}
	case quota.Rule{'s', 'w', '1'}:
		return &slidingWindow{Algorithm: present, limit: p[0], window: spec.Unit, tick: p[2], ticks: p[3], most: p[1]}
	}
	panic("previous: no previous kernel of rule " + spec.Rule.String())
}

type tokenBucket struct {
	quota.Algorithm
	unit, perTick, capacity, most, tick, fill, tokens, debt int64
}

func (b *tokenBucket) Lua() string { return tokenBucketLua }

type slidingWindow struct {
	quota.Algorithm
	limit, window, tick, ticks, most int64
}

func (w *slidingWindow) Lua() string { return slidingWindowLua }

func (b *tokenBucket) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	// Local variables, not fields of s and of a verdict: the compiler keeps them in registers.
	unit, a, up := s.Unit, s.A, s.B
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
			unit, a, up, write = b.unit, held, last, true
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
	case quota.OpTake, quota.OpPeek:
		if r.Cost > b.tokens {
			allowed, retryAfter = false, forever
		} else if over := deficit + r.Cost*b.unit - b.capacity; over > 0 {
			allowed = false
			retryAfter = quota.Micros(at+ceil(over, b.perTick)*b.tick) - now
		} else if r.Op == quota.OpTake {
			kept += r.Cost * b.unit
		}
	case quota.OpDebit:
		kept = min(kept+min(r.Cost, b.tokens+b.debt)*b.unit, b.most)
	case quota.OpRefund:
		// Once an empty bucket could have filled since the charge, refill has repaid the charge. A bucket of no
		// capacity counts as one of a token.
		if int64(r.Arg) > int64(now)-ceil(max(b.capacity, b.unit), b.perTick)*b.tick {
			kept = max(kept-min(r.Cost, b.tokens+b.debt)*b.unit, 0)
		}
	case quota.OpReset:
		kept = 0
		write = s.Unit != 0
	}
	switch {
	case kept == 0 && (kept != deficit || r.Op == quota.OpReset):
		unit, a, up, write = 0, 0, 0, write || kept != deficit
	case kept != deficit:
		unit, a, up, write = b.unit, kept, at, true
	}
	if kept > 0 {
		resetAfter = quota.Micros(at+ceil(kept, b.perTick)*b.tick) - now
	}
	return quota.State{Unit: unit, A: a, B: up}, quota.Verdict{
		Outcome:   quota.Outcome{Allowed: allowed, Write: write},
		Remaining: floor(b.capacity-kept, b.unit), RetryAfter: retryAfter, ResetAfter: resetAfter,
	}
}

func (b *tokenBucket) convert(deficit, unit int64) int64 {
	return clamp(ceil(deficit, unit), b.tokens+b.debt) * b.unit
}

func (w *slidingWindow) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	t := int64(now)
	var v quota.Verdict
	c := windowCounts{start: t - t%w.window, unit: w.window}
	if !s.IsZero() {
		if quota.Micros(s.A)-now > ahead {
			// Both counts move to the present: else a clock that flaps over a boundary would lose one count
			// each time.
			s.A, s.B, s.C = t-t%s.Unit, min(s.B+s.C, maxHeld), 0
			v.Write = true
		}
		if t < s.A+2*s.Unit {
			c = windowCounts{start: s.A, unit: s.Unit, cur: clamp(s.B, w.most), prev: clamp(s.C, w.most)}
			if t >= s.A+s.Unit {
				c = windowCounts{start: s.A + s.Unit, unit: s.Unit, prev: c.cur}
			}
		}
	}
	used := w.used(c, t)

	v.Allowed = true
	next := c
	switch r.Op {
	case quota.OpTake, quota.OpPeek:
		if r.Cost > w.limit {
			v.Allowed, v.RetryAfter = false, forever
		} else if used+r.Cost > w.limit {
			v.Allowed, v.RetryAfter = false, w.retryAfter(c, w.limit-r.Cost, t)
		} else if r.Op == quota.OpTake {
			next = w.add(c, used, r.Cost, t)
		}
	case quota.OpDebit:
		next = w.add(c, used, max(min(r.Cost, w.most-used), 0), t)
	case quota.OpRefund:
		if int64(r.Arg) >= c.start {
			next.cur = max(c.cur-r.Cost, 0)
		} else if int64(r.Arg) >= c.start-c.unit {
			next.prev = max(c.prev-r.Cost, 0)
		}
	case quota.OpReset:
		next.cur, next.prev = 0, 0
		v.Write = !s.IsZero()
	}
	if next != c || r.Op == quota.OpReset {
		v.Write = v.Write || next != c
		s = quota.State{}
		if next.cur > 0 || next.prev > 0 {
			s = quota.State{Unit: next.unit, A: next.start, B: next.cur, C: next.prev}
		}
	}
	v.Remaining = w.limit - w.used(next, t)
	switch {
	case next.cur > 0:
		v.ResetAfter = quota.Micros(next.start + 2*next.unit - t)
	case next.prev > 0:
		v.ResetAfter = quota.Micros(next.start + next.unit - t)
	}
	return s, v
}

type windowCounts struct {
	start, unit int64 // µs
	cur, prev   int64
}

func (w *slidingWindow) used(c windowCounts, t int64) int64 {
	if c.prev == 0 || c.unit != w.window {
		return c.cur + c.prev
	}
	elapsed := max(t-c.start, 0) / w.tick
	return c.cur + ceil(c.prev*(w.ticks-elapsed), w.ticks)
}

func (w *slidingWindow) add(c windowCounts, used, n, t int64) windowCounts {
	if n <= 0 {
		return c
	}
	if c.unit != w.window {
		start := max(t, c.start)
		c = windowCounts{start: start - start%w.window, unit: w.window, cur: used}
	}
	c.cur += n
	return c
}

func (w *slidingWindow) retryAfter(c windowCounts, room, t int64) quota.Micros {
	at := c.start + c.unit
	switch {
	case c.unit != w.window && c.cur > room:
		at += c.unit
	case c.unit != w.window:
	case c.cur > room: // in the next window, when enough of cur has faded
		at += (w.ticks - room*w.ticks/c.cur) * w.tick
	default: // in this one, when enough of prev has
		at = c.start + (w.ticks-(room-c.cur)*w.ticks/c.prev)*w.tick
	}
	return quota.Micros(at - t)
}

func clamp(n, limit int64) int64 {
	return min(max(n, 0), limit)
}

func ceil(a, b int64) int64 {
	if b == 1 { // as for most rates; the division is the most expensive step here
		return a
	}
	q := a / b
	if q*b < a {
		q++
	}
	return q
}

func floor(a, b int64) int64 {
	q := a / b
	if q*b > a {
		q--
	}
	return q
}
