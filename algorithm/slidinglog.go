package algorithm

import (
	"sort"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// MaxLogEntries is how many charges a sliding window log remembers: it admits at most so many charges in one
// window, at any cost. Charges made in the same microsecond are one entry.
const MaxLogEntries = quota.MaxTail / 2

// slidingLog remembers each charge until it has left the window: it admits at most limit in any half-open
// interval of a window's length, exactly.
//
// State: Unit is 1, A the sum of the costs, Tail the entries, oldest first, each a time in µs and a cost.
type slidingLog struct {
	limit  int64
	window int64 // µs
}

// SlidingWindowLog returns a rule of limit tokens in any window, exactly. It keeps an entry of 16 bytes for
// each charge, so it also admits at most [MaxLogEntries] charges in a window; a debit beyond that joins the
// newest entry. It accepts the numbers that [FixedWindow] accepts; else [quota.ErrInvalid].
func SlidingWindowLog(limit int64, window time.Duration) (quota.Algorithm, error) {
	w, err := windowMicros(limit, window)
	if err != nil {
		return nil, err
	}
	return &slidingLog{limit: limit, window: w}, nil
}

func (l *slidingLog) Spec() quota.Spec {
	return quota.Spec{
		Rule: quota.Rule{'s', 'l', '1'}, Unit: 1, Capacity: l.limit, Debt: maxHeld - l.limit,
		Params: [6]int64{l.limit, l.window, maxHeld, MaxLogEntries},
	}
}

func (l *slidingLog) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	var v quota.Verdict
	t := int64(now)
	log := s.Tail[:len(s.Tail)&^1]
	if n := len(log); n > 0 && quota.Micros(log[n-2])-now > ahead {
		log = shift(log, t-log[n-2])
		s.Tail, v.Write = log, true
	}
	sum := s.A
	if n := len(log); n > 0 && t-log[n-2] >= l.window {
		log = nil
	}
	for len(log) > 0 && t-log[0] >= l.window {
		sum -= log[1]
		log = log[2:]
	}
	sum = clamp(sum, maxHeld)
	if len(log) == 0 {
		sum = 0
	}

	v.Allowed = true
	next, total := log, sum
	switch r.Op {
	case quota.OpTake, quota.OpPeek:
		if r.Cost > l.limit {
			v.Allowed, v.RetryAfter = false, forever
		} else if after := l.retryAfter(log, sum+r.Cost-l.limit, r.Cost > 0, t); after > 0 {
			v.Allowed, v.RetryAfter = false, after
		} else if r.Op == quota.OpTake && r.Cost > 0 {
			next, total = add(log, t, r.Cost), sum+r.Cost
		}
	case quota.OpDebit:
		if n := min(r.Cost, maxHeld-sum); n > 0 {
			next, total = add(log, t, n), sum+n
		}
	case quota.OpRefund:
		next, total = take(log, sum, int64(r.At), r.Cost)
	case quota.OpReset:
		next, total = nil, 0
		v.Write = !s.IsZero()
	}
	if total != sum || r.Op == quota.OpReset {
		v.Write = v.Write || total != sum
		s = quota.State{}
		if len(next) > 0 {
			s = quota.State{Unit: 1, A: total, Tail: next}
		}
	}
	if v.Remaining = l.limit - total; full(next, t) {
		v.Remaining = min(v.Remaining, 0)
	}
	if n := len(next); n > 0 {
		v.ResetAfter = quota.Micros(next[n-2] + l.window - t)
	}
	return s, v
}

// full reports whether a charge at t would need an entry more than there may be.
func full(log []int64, t int64) bool {
	return len(log) >= 2*MaxLogEntries && log[len(log)-2] < t
}

// retryAfter returns the time until entries of over tokens have left and, if entry is true, one more entry fits.
func (l *slidingLog) retryAfter(log []int64, over int64, entry bool, t int64) quota.Micros {
	last := -2
	if entry && full(log, t) {
		last, over = 0, over-log[1]
	}
	for over > 0 && last+2 < len(log) {
		last += 2
		over -= log[last+1]
	}
	if last < 0 {
		return 0
	}
	return quota.Micros(log[last] + l.window - t)
}

// add returns a copy of log with n tokens more at t, or at the newest entry's time if that is later.
func add(log []int64, t, n int64) []int64 {
	out := make([]int64, len(log), len(log)+2)
	copy(out, log)
	switch i := len(out) - 2; {
	case i >= 0 && out[i] >= t:
		out[i+1] += n
	case full(out, t):
		out[i], out[i+1] = t, out[i+1]+n
	default:
		out = append(out, t, n)
	}
	return out
}

// take returns a copy of log with up to n tokens less in the entry made at the time at, and the new sum.
func take(log []int64, sum, at, n int64) ([]int64, int64) {
	i := 2 * sort.Search(len(log)/2, func(i int) bool { return log[2*i] >= at })
	if i >= len(log) || log[i] != at || n == 0 {
		return log, sum
	}
	out := append([]int64(nil), log...)
	if n < out[i+1] {
		out[i+1] -= n
		return out, max(sum-n, 0)
	}
	sum -= out[i+1]
	return append(out[:i], out[i+2:]...), max(sum, 0)
}

// shift returns a copy of log with every time moved by d.
func shift(log []int64, d int64) []int64 {
	out := append([]int64(nil), log...)
	for i := 0; i < len(out); i += 2 {
		out[i] += d
	}
	return out
}

// MaxTail says that there are two numbers for each token, up to MaxLogEntries.
func (l *slidingLog) MaxTail() int { return int(2 * min(l.limit, MaxLogEntries)) }

// Forecast counts the windows that must pass, because each admits at most one limit. For up to one limit it
// is exact: tokens that waiting callers take in the meantime do not leave the window before the forecast's
// end.
func (l *slidingLog) Forecast(d quota.Decision, n int64) time.Duration {
	if n <= l.limit {
		return d.RetryAfter
	}
	if l.limit == 0 {
		return quota.Never
	}
	return later(0, (n-1)/l.limit, l.window)
}
