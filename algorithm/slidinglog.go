package algorithm

import (
	"sort"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// MaxLogEntries is how many entries a sliding window log has at most. A charge is an entry; charges made in the same
// microsecond share one. A window of more charges is remembered less finely, see [SlidingWindowLog].
const MaxLogEntries = 4096

// slidingLog remembers each charge until it has left the window: it admits at most limit in any half-open
// interval of a window's length.
//
// A log that is full joins its entries: those made within one step, which is a 2047th of the window, become one, at
// the time of the latest. A window touches at most 2048 steps, so half of the entries are free again. No token leaves
// before its time, so the bound holds; it leaves at most a step late. In steps that are aligned, joining again makes
// no token later.
//
// State: Unit is 1, A the sum of the costs, Tail the entries, oldest first, each a time in µs and a cost. C is the time
// up to which entries were joined, and 0 once those have left.
type slidingLog struct {
	limit  int64
	window int64 // µs
	step   int64 // µs
}

// SlidingWindowLog returns a rule of limit tokens in any window. It keeps an entry of 16 bytes for each charge and is
// exact for up to [MaxLogEntries] charges in a window. Of more charges it joins those that were made within a 2047th
// of the window: it still admits no more than limit, and a token comes back that much late at most. So many charges
// make it slow, and its state takes 64 KiB: where a limit is of thousands of charges in a window, and not of tokens that
// fewer charges cost, take [TokenBucket] or [SlidingWindow]. It accepts the numbers that [FixedWindow] accepts; else
// [quota.ErrInvalid].
func SlidingWindowLog(limit int64, window time.Duration) quota.Algorithm {
	return carry(makeSlidingWindowLog(limit, window))
}

func makeSlidingWindowLog(limit int64, window time.Duration) (quota.Algorithm, error) {
	w, err := windowMicros(limit, window)
	if err != nil {
		return nil, err
	}
	return &slidingLog{limit: limit, window: w, step: ceil(w, MaxLogEntries/2-1)}, nil
}

func (l *slidingLog) Spec() quota.Spec {
	return quota.Spec{
		Rule: quota.Rule{'s', 'l', '1'}, Unit: 1, Capacity: l.limit, Debt: maxHeld - l.limit,
		Window: time.Duration(l.window) * time.Microsecond,
		Params: [8]int64{l.limit, l.window, maxHeld, MaxLogEntries},
	}
}

func (l *slidingLog) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	var v quota.Verdict
	t := int64(now)
	log := s.Tail[:len(s.Tail)&^1]
	if n := len(log); n > 0 && quota.Micros(log[n-2])-now > ahead {
		newest := log[n-2]
		log = shift(log, t-newest)
		if s.C > 0 {
			s.C = max(s.C+t-newest, 0)
		}
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
	next, total, joined := log, sum, s.C
	switch r.Op {
	case quota.OpUpTo:
		r = r.Taking(l.limit - sum)
		fallthrough
	case quota.OpTake, quota.OpPeek:
		if need := r.Need(); need > l.limit {
			v.Allowed, v.RetryAfter = false, forever
		} else if sum+need > l.limit {
			v.Allowed, v.RetryAfter = false, l.retryAfter(log, sum+need-l.limit, t)
		} else if r.Op == quota.OpTake && r.Cost > 0 {
			next, joined = l.add(log, joined, t, r.Cost)
			total = sum + r.Cost
		}
	case quota.OpDebit:
		if n := min(r.Cost, maxHeld-sum); n > 0 {
			next, joined = l.add(log, joined, t, n)
			total = sum + n
		}
	case quota.OpRefund:
		next, total = l.take(log, joined, sum, int64(r.Arg), r.Cost)
	case quota.OpReset:
		next, total = nil, 0
		v.Write = !s.IsZero()
	}
	if total != sum || r.Op == quota.OpReset {
		v.Write = v.Write || total != sum
		s = quota.State{}
		if len(next) > 0 {
			if next[0] > joined {
				joined = 0
			}
			s = quota.State{Unit: 1, A: total, C: joined, Tail: next}
		}
	}
	v.Remaining = l.limit - total
	if n := len(next); n > 0 {
		v.ResetAfter = quota.Micros(next[n-2] + l.window - t)
	}
	return s, v
}

// retryAfter returns the time until entries of over tokens have left.
func (l *slidingLog) retryAfter(log []int64, over, t int64) quota.Micros {
	i := 0
	for over -= log[1]; over > 0 && i+2 < len(log); over -= log[i+1] {
		i += 2
	}
	return quota.Micros(max(log[i]+l.window-t, 1)) // a list out of order, which no rule wrote, may say less
}

// add returns a copy of log with n tokens more at t, or at the newest entry's time if that is later, and the time up to
// which its entries are joined.
func (l *slidingLog) add(log []int64, joined, t, n int64) ([]int64, int64) {
	last := len(log) - 2
	if last >= 0 && log[last] >= t {
		out := append([]int64(nil), log...)
		out[last+1] += n
		return out, joined
	}
	if len(log) < 2*MaxLogEntries {
		return append(append(make([]int64, 0, len(log)+2), log...), t, n), joined
	}
	return append(l.join(log), t, n), log[last]
}

// join returns a copy of log in which the entries of each step are one. It has room for one entry, even where the log
// is no log that add made.
func (l *slidingLog) join(log []int64) []int64 {
	out := make([]int64, 0, MaxLogEntries)
	for i := 0; i < len(log); i += 2 {
		if n := len(out); n > 0 && (out[n-2]/l.step == log[i]/l.step || n == 2*MaxLogEntries-2) {
			out[n-2], out[n-1] = log[i], out[n-1]+log[i+1]
		} else {
			out = append(out, log[i], log[i+1])
		}
	}
	return out
}

// take returns a copy of log with up to n tokens less in the entry of a charge made at the time at, and the new sum.
func (l *slidingLog) take(log []int64, joined, sum, at, n int64) ([]int64, int64) {
	i := 2 * sort.Search(len(log)/2, func(i int) bool { return log[2*i] >= at })
	if i >= len(log) || n == 0 || log[i] != at && (at > joined || log[i]/l.step != at/l.step) {
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
