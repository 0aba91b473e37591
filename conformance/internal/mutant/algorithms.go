// Package mutant has stores and algorithms that are broken on purpose, each in one way. They test the conformance suite:
// each must be failed by the rule that it breaks.
package mutant

import (
	"math"
	"slices"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Algorithm is a broken algorithm.
type Algorithm struct {
	Name string // the fault
	Rule string // the rule of conformance.Algorithm that it breaks
	// Make returns the broken algorithm, and others of its Rule.
	Make func() []quota.Algorithm
}

const second = 1_000_000 // µs

type decide = func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict)

// altered is an algorithm with another Decide.
type altered struct {
	quota.Algorithm
	decide decide
}

func (a altered) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	return a.decide(a.Algorithm, s, r, now)
}

func bucket(capacity int64) quota.Algorithm {
	return quota.Must(algorithm.TokenBucket(capacity, 7, time.Second))
}

func log() quota.Algorithm { return quota.Must(algorithm.SlidingWindowLog(1<<20, time.Second)) }

// bend replaces the Decide of an algorithm.
func bend(a quota.Algorithm, d decide) func() []quota.Algorithm {
	return func() []quota.Algorithm { return []quota.Algorithm{altered{a, d}} }
}

// asked alters the input of Decide.
func asked(f func(s *quota.State, r *quota.Request, now *quota.Micros)) func() []quota.Algorithm {
	return bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
		f(&s, &r, &now)
		return a.Decide(s, r, now)
	})
}

// answered alters the verdict of Decide.
func answered(f func(r quota.Request, v *quota.Verdict)) func() []quota.Algorithm {
	return bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
		next, v := a.Decide(s, r, now)
		f(r, &v)
		return next, v
	})
}

// converting alters states of another unit.
func converting(f func(s *quota.State)) func() []quota.Algorithm {
	return func() []quota.Algorithm {
		other := quota.Must(algorithm.TokenBucket(20, 11, time.Minute))
		return []quota.Algorithm{altered{bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if s.Unit != 0 && s.Unit != a.Spec().Unit {
				f(&s)
			}
			return a.Decide(s, r, now)
		}}, other}
	}
}

// listing alters the list that a charge leaves.
func listing(f func(given []int64, s *quota.State, now quota.Micros)) func() []quota.Algorithm {
	return bend(log(), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
		given := s.Tail
		next, v := a.Decide(s, r, now)
		if (r.Op == quota.OpTake || r.Op == quota.OpDebit) && v.Write && len(next.Tail) > 0 {
			f(given, &next, now)
		}
		return next, v
	})
}

type restless struct {
	quota.Algorithm
	calls *int64
}

func (r restless) Spec() quota.Spec {
	*r.calls++
	s := r.Algorithm.Spec()
	s.Debt -= *r.calls
	return s
}

type scripted struct {
	quota.Algorithm
	lua string
}

func (s scripted) Lua() string { return s.lua }

type sharing struct{ quota.Algorithm }

func (s sharing) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return s, nil
	}
	return algorithm.TokenBucket(s.Spec().Capacity/n, 7, time.Second)
}

type hopeful struct {
	quota.Algorithm
	late time.Duration
}

func (h hopeful) Forecast(d quota.Decision, n int64) time.Duration {
	t := h.Algorithm.(quota.Forecaster).Forecast(d, n)
	if t == 0 || t == quota.Never {
		return t
	}
	return t + h.late
}

// Algorithms returns the broken algorithms.
func Algorithms() []Algorithm {
	var calls atomic.Int64
	return []Algorithm{
		{"ResetAfter is half", "A1", answered(func(_ quota.Request, v *quota.Verdict) { v.ResetAfter /= 2 })},
		{"ResetAfter is a tick too long", "A1", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.ResetAfter > 0 {
				v.ResetAfter++
			}
		})},
		{"RetryAfter is a tick early", "A2", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.RetryAfter > 1 && v.RetryAfter < quota.Forever {
				v.RetryAfter--
			}
		})},
		{"RetryAfter is a tick late", "A2", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.RetryAfter > 0 && v.RetryAfter < quota.Forever {
				v.RetryAfter++
			}
		})},
		{"a denial is charged", "A3", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if !v.Allowed && r.Op == quota.OpTake {
				next, _ = a.Decide(s, quota.Request{Op: quota.OpDebit, Cost: 1}, now)
				v.Write = true
			}
			return next, v
		})},
		{"a peek writes", "A3", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			v.Write = v.Write || r.Op == quota.OpPeek && !s.IsZero()
			return next, v
		})},
		{"a cost above the capacity takes all", "A4", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpTake || r.Op == quota.OpPeek {
				r.Cost = min(r.Cost, 10)
			}
		})},
		{"a cost that can never fit is told to retry in a year", "A4", answered(func(_ quota.Request, v *quota.Verdict) {
			v.RetryAfter = min(v.RetryAfter, 365*24*3600*1e6)
		})},
		{"a cost is cut to 32 bits", "A4", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Cost = int64(uint32(r.Cost)) })},
		{"a clock set back mints", "A5", asked(func(s *quota.State, _ *quota.Request, now *quota.Micros) {
			if quota.Micros(s.B) > *now {
				*s = quota.State{}
			}
		})},
		{"a clock set back starves", "A5", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			late := max(now, quota.Micros(s.B))
			next, v := a.Decide(s, r, late)
			if v.RetryAfter > 0 && v.RetryAfter < quota.Forever {
				v.RetryAfter += late - now
			}
			if v.ResetAfter > 0 {
				v.ResetAfter += late - now
			}
			return next, v
		})},
		{"a state moved to a clock set back is not returned with a denial", "A5", answered(func(_ quota.Request, v *quota.Verdict) { v.Write = v.Write && v.Allowed })},
		{"a change of numbers refills", "A6", converting(func(s *quota.State) { *s = quota.State{} })},
		{"a change of numbers rounds down", "A6", converting(func(s *quota.State) { s.A -= s.A % s.Unit })},
		{"the given list is written to", "A7", listing(func(given []int64, _ *quota.State, _ quota.Micros) {
			if len(given) > 1 {
				given[1]++
			}
		})},
		{"an entry is appended in place", "A7", listing(func(given []int64, s *quota.State, _ quota.Micros) {
			if n := len(given); n > 0 && len(s.Tail) == n+2 {
				s.Tail = append(given, s.Tail[n:]...)
			}
		})},
		{"every third call denies", "A8", answered(func(r quota.Request, v *quota.Verdict) {
			if calls.Add(1)%3 == 0 && r.Op == quota.OpTake && v.Allowed {
				v.Allowed, v.Write, v.RetryAfter = false, false, 1
			}
		})},
		{"the process's clock decides", "A8", asked(func(_ *quota.State, _ *quota.Request, now *quota.Micros) { *now = quota.Micros(time.Now().UnixNano()) })},
		{"panics on a state that it did not write", "A8", asked(func(s *quota.State, _ *quota.Request, _ *quota.Micros) {
			if s.A < 0 {
				panic("negative deficit")
			}
		})},
		{"panics on an unknown operation", "A8", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			_ = [...]string{"", "", "", "", "", "", ""}[r.Op]
		})},
		{"the spec changes", "A9", func() []quota.Algorithm { return []quota.Algorithm{restless{bucket(10), new(int64)}} }},
		{"two of one spec decide differently", "A9", func() []quota.Algorithm {
			return []quota.Algorithm{bucket(10), answered(func(_ quota.Request, v *quota.Verdict) { v.ResetAfter++ })()[0]}
		}},
		{"the state counts nanoseconds, beyond 2^53", "A10", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			s.B /= 1000
			next, v := a.Decide(s, r, now)
			next.B *= 1000
			return next, v
		})},
		{"the list has no end", "A10", listing(func(given []int64, s *quota.State, _ quota.Micros) {
			s.Tail = append(slices.Clone(given), s.Tail[len(s.Tail)-2:]...)
		})},
		{"denies everything", "A11", answered(func(r quota.Request, v *quota.Verdict) {
			if r.Op == quota.OpTake || r.Op == quota.OpPeek {
				*v = quota.Verdict{RetryAfter: max(v.RetryAfter, 1), Remaining: min(v.Remaining, 0)}
			}
		})},
		{"allows everything", "A11", answered(func(_ quota.Request, v *quota.Verdict) { v.Allowed, v.RetryAfter = true, 0 })},
		{"Remaining is one too many", "A11", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.Remaining < 10 {
				v.Remaining++
			}
		})},
		{"Remaining is a percentage", "A11", answered(func(_ quota.Request, v *quota.Verdict) { v.Remaining = v.Remaining * 100 / 10 })},
		{"a take charges one token, whatever its cost", "A11", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpTake && r.Cost <= 10 {
				r.Cost = min(r.Cost, 1)
			}
		})},
		{"consumption is kept in a float32", "A11", bend(bucket(1<<30), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			next.A = int64(float32(next.A))
			return next, v
		})},
		{"a full list denies, whatever remains", "A11", bend(log(), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if len(s.Tail) >= 2*algorithm.MaxLogEntries && (r.Op == quota.OpTake || r.Op == quota.OpPeek) && r.Cost > 0 {
				return s, quota.Verdict{RetryAfter: max(quota.Micros(s.Tail[0])+second-now, 1), ResetAfter: v.ResetAfter}
			}
			return next, v
		})},
		{"a debit is denied where it does not fit", "A12", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpDebit {
				r.Op = quota.OpTake
			}
		})},
		{"a debit stops at zero", "A12", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if r.Op == quota.OpDebit {
				_, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, now)
				r.Cost = min(r.Cost, max(v.Remaining, 0))
			}
			return a.Decide(s, r, now)
		})},
		{"a refund gives all back", "A13", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpRefund && r.Cost > 0 {
				r.Cost = math.MaxInt64
			}
		})},
		{"a refund of long ago is honoured", "A13", asked(func(_ *quota.State, r *quota.Request, now *quota.Micros) { r.At = *now })},
		{"a refund counts for as long as a bucket takes to fill", "A13", asked(func(_ *quota.State, r *quota.Request, now *quota.Micros) {
			if r.Op == quota.OpRefund && *now-r.At > 10*second/7 {
				r.At = 0
			}
		})},
		{"a refund gives a token more after a while", "A13", asked(func(_ *quota.State, r *quota.Request, now *quota.Micros) {
			if r.Op == quota.OpRefund && r.Cost > 0 && r.At > 0 && *now-r.At > second {
				r.Cost++
			}
		})},
		{"a refund is lost", "A13", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.At = 0 })},
		{"a grant drops the fraction of a token that had come back", "A13", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if unit := a.Spec().Unit; r.Op == quota.OpTake && v.Allowed && v.Write {
				next.A += (unit - next.A%unit) % unit
				_, w := a.Decide(next, quota.Request{Op: quota.OpPeek}, now)
				v.ResetAfter = w.ResetAfter
			}
			return next, v
		})},
		{"a reset does nothing", "A14", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpReset {
				r.Op, r.Cost = quota.OpRefund, 0
			}
		})},
		{"the Lua admits one more", "A15", func() []quota.Algorithm {
			a := bucket(10)
			return []quota.Algorithm{scripted{a, "p2 = p2 + unit\n" + a.(driver.Scripted).Lua()}}
		}},
		{"the Lua calls Redis", "A15", func() []quota.Algorithm {
			a := bucket(10)
			return []quota.Algorithm{scripted{a, "redis.call('PING')\n" + a.(driver.Scripted).Lua()}}
		}},
		{"each share has the rate of the whole", "A16", func() []quota.Algorithm { return []quota.Algorithm{sharing{bucket(10)}} }},
		{"a rule without state writes one", "A18", bend(algorithm.Unlimited, func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			_, v := a.Decide(s, r, now)
			v.Write = r.Op == quota.OpTake
			return quota.State{Unit: 1, A: s.A + 1}, v
		})},
		{"a rule without state denies the debit of a cost that it would not admit", "A18", bend(algorithm.DenyAll, func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if r.Op == quota.OpDebit {
				r.Op = quota.OpTake
			}
			return a.Decide(s, r, now)
		})},
		{"a take ahead accepts any delay", "A19", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpAhead {
				r.At = quota.MaxNumber
			}
		})},
		{"a take ahead accepts no delay", "A19", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpAhead {
				r.Op = quota.OpTake
			}
		})},
		{"a take ahead does not tell its delay", "A19", answered(func(r quota.Request, v *quota.Verdict) {
			if r.Op == quota.OpAhead && v.Allowed {
				v.RetryAfter = 0
			}
		})},
		{"a denied take ahead is told to come back when a take fits", "A19", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if r.Op == quota.OpAhead && !v.Allowed {
				_, w := a.Decide(s, quota.Request{Op: quota.OpPeek, Cost: r.Cost}, now)
				v.RetryAfter = w.RetryAfter
			}
			return next, v
		})},
		{"a take ahead beyond the debt is granted, and charged in part", "A19", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if r.Op == quota.OpAhead && r.At == quota.MaxNumber && r.Cost <= 10 {
				r.Op = quota.OpDebit
			}
			return a.Decide(s, r, now)
		})},
		{"a take ahead is not charged", "A19", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if r.Op == quota.OpAhead && v.RetryAfter > 0 {
				return s, quota.Verdict{Outcome: quota.Outcome{Allowed: v.Allowed}, Remaining: v.Remaining, RetryAfter: v.RetryAfter, ResetAfter: v.ResetAfter}
			}
			return next, v
		})},
		{"a floor is ignored", "A20", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Floor = 0 })},
		{"a floor is charged", "A20", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Cost, r.Floor = r.Need(), 0 })},
		{"a peek ignores the floor", "A20", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpPeek {
				r.Floor = 0
			}
		})},
		{"a cost and floor beyond 2^63 are small", "A20", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Cost+r.Floor < 0 {
				r.Floor = 0
			}
		})},
		{"RetryAfter does not count the floor", "A20", bend(bucket(10), func(a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if r.Floor > 0 && !v.Allowed && v.RetryAfter < quota.Forever {
				_, w := a.Decide(s, quota.Request{Op: quota.OpPeek, Cost: r.Cost}, now)
				v.RetryAfter = max(w.RetryAfter, 1)
			}
			return next, v
		})},
		{"a take of up to so many takes all or none", "A21", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo {
				r.Op = quota.OpTake
			}
		})},
		{"a take of up to so many takes fewer than the least", "A21", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo {
				r.At = 0
			}
		})},
		{"a take of up to so many ignores the floor", "A21", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo {
				r.Floor = 0
			}
		})},
		{"the forecast is a millisecond late", "A17", func() []quota.Algorithm { return []quota.Algorithm{hopeful{bucket(10), time.Millisecond}} }},
	}
}
