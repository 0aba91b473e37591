package algorithm

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// slidingWindow counts the current aligned window, and estimates how much of the window before a sliding window
// still covers: less than count × covered part, by up to one token. (The estimate by the covered part is
// Cloudflare's: J. Desgats, "How we built rate limiting capable of scaling to millions of domains", 2017.)
//
// The estimate is the largest whole number below count × covered part. It is the highest that never denies a
// caller who takes one token at a time at an even pace within the limit n. Proof: take number k of a window
// comes at φ + k·w/n with 0 <= φ < w/n, where the window before has n takes, or fewer at a slower pace. Covered
// are n·(1 - φ/w) - k of them, so the estimate is at most n - k - 1, and with k in the current window there is
// room for one. At φ = 0 any higher estimate denies it.
//
// Bound: in a window that begins a fraction x into an aligned one, of which the rest admitted p <= n, the next
// aligned window admits at most n - (p·(1 - x) - 1) up to the fraction x, and at most n: in all at most
// n·(1 + x) + 1, and at most 2·n. A fresh key is no exception. (x counts up to the next whole tick.)
//
// State: Unit is the window in µs, A the current window's start, B its count, C the count before.
type slidingWindow struct {
	limit  int64
	window int64 // µs
	tick   int64 // µs
	ticks  int64 // window in ticks
	most   int64 // the largest count
}

// SlidingWindow returns a rule of limit tokens in a window that slides with time, approximated by two
// counters. A caller who takes one token at a time at an even pace of up to limit tokens in a window is never
// denied; at an even pace of several tokens at a time up to one take in a window is. It admits at most limit
// tokens in an aligned window, and at most twice the limit in any other, also from a fresh key, namely where
// little was taken before and all of it just before the boundary. Where costs or bursts must be counted exactly
// take [SlidingWindowLog] or [TokenBucket]. A limit of 0 denies every cost above 0, as
// [DenyAll] does. Accepted: limits of 0 to 2^51-1, windows of whole microseconds up to ten years, at most 10^13 tokens a
// second, and limit × window below 2^51 in some tick; else [quota.ErrInvalid], and the error says how much is
// accepted.
func SlidingWindow(limit int64, window time.Duration) quota.Algorithm {
	return carry(makeSlidingWindow(limit, window))
}

func makeSlidingWindow(limit int64, window time.Duration) (quota.Algorithm, error) {
	w, err := windowMicros(limit, window)
	if err != nil {
		return nil, err
	}
	roomFor := func(n int64) int64 {
		return tick(w, func(t int64) bool { return atMost(n, w/t, maxHeld/2) })
	}
	t := roomFor(2 * limit)
	if t == 0 {
		t = roomFor(limit)
	}
	if t == 0 {
		coarsest := int64(1)
		for coarsest <= w/10 && w%(10*coarsest) == 0 {
			coarsest *= 10
		}
		return nil, invalid("limit is %d in %v, which needs numbers of 2^51 or more; accepted: a limit of up to %d, or a shorter or rounder window",
			limit, window, maxHeld/2/(w/coarsest))
	}
	return &slidingWindow{limit: limit, window: w, tick: t, ticks: w / t, most: maxHeld / (w / t) / 2}, nil
}

func (w *slidingWindow) Spec() quota.Spec {
	return quota.Spec{
		Rule: quota.Rule{'s', 'w', '1'}, Unit: w.window, Capacity: w.limit, Debt: w.most - w.limit,
		Window: time.Duration(w.window) * time.Microsecond,
		Params: [8]int64{w.limit, w.most, w.tick, w.ticks},
	}
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
	c = w.faded(c, t)
	used := w.used(c, t)

	v.Allowed = true
	next := c
	switch r.Op {
	case quota.OpUpTo:
		r = r.Taking(w.limit - used)
		fallthrough
	case quota.OpTake, quota.OpPeek:
		if need := r.Need(); need > w.limit {
			v.Allowed, v.RetryAfter = false, forever
		} else if used+need > w.limit {
			v.Allowed, v.RetryAfter = false, w.retryAfter(c, w.limit-need, t)
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
			next = w.faded(next, t)
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
	if next.cur > 0 || next.prev > 0 {
		v.ResetAfter = w.retryAfter(next, 0, t)
	}
	return s, v
}

// windowCounts are a state's counts in the aligned window that the decision falls into.
type windowCounts struct {
	start, unit int64 // µs
	cur, prev   int64
}

// used returns the tokens that count at t. Counts of windows of another length count in full.
func (w *slidingWindow) used(c windowCounts, t int64) int64 {
	if c.prev == 0 || c.unit != w.window {
		return c.cur + c.prev
	}
	return c.cur + w.covered(c, t)
}

// covered returns how many tokens of the window before count at t.
func (w *slidingWindow) covered(c windowCounts, t int64) int64 {
	return max(ceil(c.prev*(w.ticks-ceil(max(t-c.start, 0), w.tick)), w.ticks)-1, 0)
}

// faded returns the counts without those of the window before, once none of them counts any more.
func (w *slidingWindow) faded(c windowCounts, t int64) windowCounts {
	if c.unit == w.window && w.covered(c, t) == 0 {
		c.prev = 0
	}
	return c
}

// fades returns the earliest time at which at most room tokens of a count that a window had count, of which
// the next window starts at start.
func (w *slidingWindow) fades(count, room, start int64) int64 {
	passed := w.ticks - min((room+1)*w.ticks/count, w.ticks) // ticks of which the last has at least begun
	if passed == 0 {
		return start
	}
	return start + (passed-1)*w.tick + 1
}

// add charges n tokens. Counts of windows of another length move into a window of our length.
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

// retryAfter returns the time from t until at most room tokens count; at t more do.
func (w *slidingWindow) retryAfter(c windowCounts, room, t int64) quota.Micros {
	at := c.start + c.unit
	switch {
	case c.unit != w.window && c.cur > room:
		at += c.unit
	case c.unit != w.window:
	case c.cur > room: // in the next window, when enough of cur has faded
		at = w.fades(c.cur, room, at)
	default: // in this one, when enough of prev has
		at = w.fades(c.prev, room-c.cur, c.start)
	}
	return quota.Micros(at - t)
}

// Forecast counts the boundaries that must pass, because an aligned window admits at most one limit. Tokens
// that waiting callers take in the meantime count in full until the next boundary.
func (w *slidingWindow) Forecast(d quota.Decision, n int64) time.Duration {
	boundary := time.Duration(w.window-int64(d.At)%w.window) * time.Microsecond
	if n <= w.limit {
		return min(d.RetryAfter, boundary)
	}
	if w.limit == 0 {
		return quota.Never
	}
	return later(boundary, (n-1)/w.limit-1, w.window)
}
