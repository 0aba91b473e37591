package algorithm

import (
	"math"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// fixedWindow counts in windows that follow each other. It admits at most limit in each window, so up to
// twice the limit in an interval of a window's length: just before a boundary and again just after.
//
// State: Unit is the window in µs, A its start, B the count. A window lasts to its end where the limit has another offset by then.
type fixedWindow struct {
	limit     int64
	window    int64 // µs
	offset    int64 // µs, below window: windows begin so long after whole multiples of window
	fromFirst bool  // a window begins at a first charge
}

// FixedWindow returns a rule of limit tokens in each window. Windows are aligned to the Unix epoch, so a
// window of 24 hours is a day in UTC; [FixedWindowOffset] has windows that begin later, and [Calendar] those of a time zone. In an interval of a window's length that crosses a boundary it may
// admit twice the limit. A limit of 0 denies every cost above 0, as [DenyAll] does. Accepted: limits of 0
// to 2^52-1, windows of whole microseconds up to ten years, at most 10^13 tokens a second; else [quota.ErrInvalid].
func FixedWindow(limit int64, window time.Duration) quota.Algorithm {
	return carry(makeFixedWindow(limit, window))
}

// FixedWindowOffset is [FixedWindow] with windows that begin later by an offset: with a window of an hour and an offset of
// 15 minutes at a quarter past each hour, and with 24 and 8 hours each day at 08:00 UTC. A window that has begun lasts to its
// end where the offset changes. Accepted: the numbers of FixedWindow, and offsets of whole microseconds from 0 to less than the
// window; else [quota.ErrInvalid].
func FixedWindowOffset(limit int64, window, offset time.Duration) quota.Algorithm {
	return carry(makeFixedWindowOffset(limit, window, offset))
}

// FixedWindowFromFirst is [FixedWindow] with windows that begin at a key's first charge and, once over, at
// the next charge after that, so that different keys reset at different times. It accepts the same numbers.
func FixedWindowFromFirst(limit int64, window time.Duration) quota.Algorithm {
	return carry(makeFixedWindowFromFirst(limit, window))
}

func makeFixedWindow(limit int64, window time.Duration) (quota.Algorithm, error) {
	return newFixedWindow(limit, window, 0, false)
}

func makeFixedWindowOffset(limit int64, window, offset time.Duration) (quota.Algorithm, error) {
	return newFixedWindow(limit, window, offset, false)
}

func makeFixedWindowFromFirst(limit int64, window time.Duration) (quota.Algorithm, error) {
	return newFixedWindow(limit, window, 0, true)
}

func newFixedWindow(limit int64, window, offset time.Duration, fromFirst bool) (quota.Algorithm, error) {
	w, err := windowMicros(limit, window)
	if err != nil {
		return nil, err
	}
	if offset < 0 || offset >= window || offset%time.Microsecond != 0 {
		return nil, invalid("offset is %v; accepted: whole microseconds from 0 to less than the window, %v", offset, window)
	}
	return &fixedWindow{limit: limit, window: w, offset: offset.Microseconds(), fromFirst: fromFirst}, nil
}

// windowMicros checks the arguments of the window rules, and returns the window in µs.
func windowMicros(limit int64, window time.Duration) (int64, error) {
	return micros("limit", limit, "limit", max(limit, 1), "window", window)
}

func (f *fixedWindow) Spec() quota.Spec {
	rule, fromFirst := quota.Rule{'f', 'w', '1'}, int64(0)
	if f.fromFirst {
		rule, fromFirst = quota.Rule{'f', 'f', '1'}, 1
	}
	return quota.Spec{
		Rule: rule, Unit: f.window, Capacity: f.limit, Debt: maxHeld - f.limit,
		Window: time.Duration(f.window) * time.Microsecond,
		Params: [8]int64{f.limit, maxHeld, fromFirst, f.offset},
	}
}

func (f *fixedWindow) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	t := int64(now)
	var v quota.Verdict
	start, unit, count := f.start(t), f.window, int64(0)
	if !s.IsZero() {
		if quota.Micros(s.A)-now > ahead {
			s.A, v.Write = t, true
			if !f.fromFirst {
				s.A = f.aligned(t, s.Unit)
			}
		}
		if s.B > 0 && t < s.A+s.Unit {
			start, unit, count = s.A, s.Unit, min(s.B, maxHeld)
		}
	}
	end := start + unit

	kept := inWindow(r, f.limit, count, start, end, t, &v)
	if r.Op == quota.OpReset {
		v.Write = !s.IsZero()
	}
	switch {
	case kept == 0 && (kept != count || r.Op == quota.OpReset):
		s, v.Write = quota.State{}, v.Write || kept != count
	case kept != count:
		if kept > count && unit != f.window {
			// A window of another length is kept until it ends, or until a charge moves its count into one of
			// our length.
			start, unit = f.start(max(t, start)), f.window
			end = start + unit
		}
		s, v.Write = quota.State{Unit: unit, A: start, B: kept}, true
	}
	v.Remaining = f.limit - kept
	if kept > 0 {
		v.ResetAfter = quota.Micros(end - t)
	}
	return s, v
}

// inWindow decides a request at t in a window from start to end that has count tokens, and returns how many it has then.
func inWindow(r quota.Request, limit, count, start, end, t int64, v *quota.Verdict) (kept int64) {
	v.Allowed = true
	kept = count
	switch r.Op {
	case quota.OpUpTo:
		r = r.Taking(limit - count)
		fallthrough
	case quota.OpTake, quota.OpPeek:
		if need := r.Need(); need > limit {
			v.Allowed, v.RetryAfter = false, forever
		} else if count+need > limit {
			v.Allowed, v.RetryAfter = false, quota.Micros(end-t)
		} else if r.Op == quota.OpTake {
			kept += r.Cost
		}
	case quota.OpDebit:
		kept = min(kept+min(r.Cost, maxHeld), maxHeld)
	case quota.OpRefund:
		if int64(r.Arg) >= start {
			kept = max(kept-r.Cost, 0)
		}
	case quota.OpReset:
		kept = 0
	}
	return kept
}

// start returns when the window of a first charge at t begins.
func (f *fixedWindow) start(t int64) int64 {
	if f.fromFirst {
		return t
	}
	return f.aligned(t, f.window)
}

// aligned returns when the window of a length that t lies in begins, but nothing below 0, which Lua's states cannot hold.
func (f *fixedWindow) aligned(t, window int64) int64 {
	rest := (t - f.offset) % window
	if rest < 0 {
		rest += window
	}
	return max(t-rest, 0)
}

// Forecast is exact: tokens beyond the remainder of the present window come at one limit in each window.
func (f *fixedWindow) Forecast(d quota.Decision, n int64) time.Duration {
	more := n - max(d.Remaining, 0)
	if more <= 0 {
		return 0
	}
	if f.limit == 0 {
		return quota.Never
	}
	first := d.ResetAfter
	if first == 0 {
		first = time.Duration(f.start(int64(d.At))+f.window-int64(d.At)) * time.Microsecond
	}
	return later(first, (more-1)/f.limit, f.window)
}

// later returns first and n windows more, or Never.
func later(first time.Duration, n, window int64) time.Duration {
	if !atMost(n, window, math.MaxInt64/2000) {
		return quota.Never
	}
	return first + time.Duration(n*window)*time.Microsecond
}
