package algorithm

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// slidingWindow estimates the count of the last window's length as the current aligned window's count and a
// share of the previous window's count: the part of that window which a sliding window would still cover,
// rounded up. It admits at most limit·(1 + x) in any window that begins a fraction x into an aligned one, so
// less than twice the limit, and limit where demand is even. (The estimate is Cloudflare's: J. Desgats, "How
// we built rate limiting capable of scaling to millions of domains", 2017.)
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
// counters. It admits at most limit tokens in a window where demand is even, and less than twice the limit in
// any window; a limit of 0 denies every cost above 0. Accepted: limits of 0 to 2^40, windows of whole
// microseconds up to ten years, at most 10^9 tokens a second, and limit × window below 2^51 in some tick;
// else [quota.ErrInvalid].
func SlidingWindow(limit int64, window time.Duration) (quota.Algorithm, error) {
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
		return nil, invalid("limit is %d in %v, which needs numbers of 2^51 or more; accepted: a smaller limit, or a shorter or rounder window",
			limit, window)
	}
	return &slidingWindow{limit: limit, window: w, tick: t, ticks: w / t, most: maxHeld / (w / t) / 2}, nil
}

func (w *slidingWindow) Spec() quota.Spec {
	return quota.Spec{
		Rule: quota.Rule{'s', 'w', '1'}, Unit: w.window, Capacity: w.limit, Debt: w.most - w.limit,
		Params: [6]int64{w.limit, w.most, w.tick, w.ticks},
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
		if int64(r.At) >= c.start {
			next.cur = max(c.cur-r.Cost, 0)
		} else if int64(r.At) >= c.start-c.unit {
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
	elapsed := max(t-c.start, 0) / w.tick
	return c.cur + ceil(c.prev*(w.ticks-elapsed), w.ticks)
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
		at += (w.ticks - room*w.ticks/c.cur) * w.tick
	default: // in this one, when enough of prev has
		at = c.start + (w.ticks-(room-c.cur)*w.ticks/c.prev)*w.tick
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
