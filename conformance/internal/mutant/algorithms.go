// Package mutant has stores and algorithms that are broken on purpose, each in one way. They test the conformance suite:
// each must be failed by the case and with the words that it states, and its twin must pass.
//
// A mutant and its repaired twin are one source, in which a switch makes the fault: parts.fault of a store, the argument fault
// of an algorithm. All that a mutant does differently from [Sound] in either position must be right, but for the one line that
// asks the switch. Clauses lists the parts of the rules that need a mutant.
package mutant

import (
	"math"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Algorithm is a broken algorithm.
type Algorithm struct {
	Name   string // the fault
	Rule   string // the rule of conformance.Algorithm that it breaks
	Clause string // the part of the rule's text that it breaks
	Says   string // as that of a Store
	// Make returns the broken algorithm, or its twin without the fault, and others of its Rule.
	Make func(fault bool) []quota.Algorithm
}

const second = 1_000_000 // µs

type decide = func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict)

// altered is an algorithm with another Decide.
type altered struct {
	quota.Algorithm
	fault  bool
	decide decide
}

func (a altered) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	return a.decide(a.fault, a.Algorithm, s, r, now)
}

func bucket(capacity int64) quota.Algorithm {
	return algorithm.TokenBucket(capacity, 7, time.Second)
}

func log() quota.Algorithm { return algorithm.SlidingWindowLog(1<<20, time.Second) }

// bend replaces the Decide of an algorithm.
func bend(a quota.Algorithm, d decide) func(bool) []quota.Algorithm {
	return func(fault bool) []quota.Algorithm { return []quota.Algorithm{altered{a, fault, d}} }
}

// asked alters the input of Decide.
func asked(f func(s *quota.State, r *quota.Request, now *quota.Micros)) func(bool) []quota.Algorithm {
	return bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
		if fault {
			f(&s, &r, &now)
		}
		return a.Decide(s, r, now)
	})
}

// answered alters the verdict of Decide.
func answered(f func(r quota.Request, v *quota.Verdict)) func(bool) []quota.Algorithm {
	return bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
		next, v := a.Decide(s, r, now)
		if fault {
			f(r, &v)
		}
		return next, v
	})
}

// converting alters states of another unit.
func converting(f func(s *quota.State)) func(bool) []quota.Algorithm {
	return func(fault bool) []quota.Algorithm {
		other := algorithm.TokenBucket(20, 11, time.Minute)
		return []quota.Algorithm{altered{bucket(10), fault, func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if fault && s.Unit != 0 && s.Unit != a.Spec().Unit {
				f(&s)
			}
			return a.Decide(s, r, now)
		}}, other}
	}
}

// listing alters the list that a charge leaves.
func listing(f func(given []int64, s *quota.State, now quota.Micros)) func(bool) []quota.Algorithm {
	return bend(log(), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
		given := s.Tail
		next, v := a.Decide(s, r, now)
		if fault && (r.Op == quota.OpTake || r.Op == quota.OpDebit) && v.Write && len(next.Tail) > 0 {
			f(given, &next, now)
		}
		return next, v
	})
}

type restless struct {
	quota.Algorithm
	fault bool
	calls *int64
}

func (r restless) Spec() quota.Spec {
	*r.calls++
	s := r.Algorithm.Spec()
	if r.fault {
		s.Debt -= *r.calls
	}
	return s
}

type scripted struct {
	quota.Algorithm
	lua string
}

func (s scripted) Lua() string { return s.lua }

type moving struct {
	quota.Algorithm
	driver.Moving
	lua string
}

func (m moving) Lua() string { return m.lua }

// still has numbers of the time at which the suite begins.
type still struct {
	quota.Algorithm
	driver.Moving
	fault bool
}

func (s still) ParamsAt(now quota.Micros) ([8]int64, quota.Micros, quota.Micros) {
	if s.fault {
		now = 1_800_000_000_000_000
	}
	return s.Moving.ParamsAt(now)
}

// stating alters a Spec.
type stating struct {
	quota.Algorithm
	alter func(s *quota.Spec)
}

func (a stating) Spec() quota.Spec {
	s := a.Algorithm.Spec()
	a.alter(&s)
	return s
}

// foretelling alters forecasts.
type foretelling struct {
	quota.Algorithm
	alter func(n int64, t time.Duration) time.Duration
}

func (a foretelling) Forecast(d quota.Decision, n int64) time.Duration {
	return a.alter(n, a.Algorithm.(quota.Forecaster).Forecast(d, n))
}

// dividing has shares of another rule.
type dividing struct {
	quota.Algorithm
	fault bool
}

func (a dividing) Share(n int64) (quota.Algorithm, error) {
	if a.fault && n > 1 {
		return algorithm.SlidingWindow(max(a.Spec().Capacity/n, 1), time.Hour), nil
	}
	return a.Algorithm.(driver.Sharer).Share(n)
}

type sharing struct {
	quota.Algorithm
	fault bool
}

func (s sharing) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return s, nil
	}
	if !s.fault {
		return s.Algorithm.(driver.Sharer).Share(n)
	}
	return algorithm.TokenBucket(s.Spec().Capacity/n, 7, time.Second), nil
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
	var calls, scratch atomic.Int64
	return append([]Algorithm{
		{"a state that is as fresh denies the whole capacity", "A1", "decides as the zero State", "want: as the zero State", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if _, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, now); fault && !s.IsZero() && v.ResetAfter == 0 && r.Op == quota.OpTake && r.Cost == 10 {
				return s, quota.Verdict{Remaining: 10, RetryAfter: 1}
			}
			return a.Decide(s, r, now)
		})},
		{"a take of nothing takes one", "A3", "a cost of 0 change nothing", "take of 0: allowed, written", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpTake && r.Cost == 0 {
				r.Cost = 1
			}
		})},
		{"a cost of the whole capacity can never fit", "A4", "no other", "got: 10 of a capacity of 10 are denied", answered(func(r quota.Request, v *quota.Verdict) {
			if r.Cost == 10 && !v.Allowed {
				v.RetryAfter = quota.Forever
			}
		})},
		{"calls at the same time use one place for their time", "A8", "on any goroutine", "on one of several goroutines", asked(func(_ *quota.State, _ *quota.Request, now *quota.Micros) {
			scratch.Store(int64(*now))
			if calls.Add(1)%16 == 0 {
				runtime.Gosched()
			}
			*now = quota.Micros(scratch.Load())
		})},
		{"the debt is below 0", "A9", "a spec is valid", "want: a spec that quota.NewLimit takes", func(fault bool) []quota.Algorithm {
			return []quota.Algorithm{stating{bucket(10), func(s *quota.Spec) {
				if fault {
					s.Debt = -1
				}
			}}}
		}},
		{"the unit of a state in debt is 0", "A10", "Unit is 0 in the zero State only", "got: {Unit:0 A:1", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && v.Remaining < 0 {
				next.Unit = 0
			}
			return next, v
		})},
		{"a grant tells a wait", "A11", "waits are as documented", "want: RetryAfter 0 where it is allowed", answered(func(r quota.Request, v *quota.Verdict) {
			if r.Op == quota.OpTake && v.Allowed {
				v.RetryAfter = 1
			}
		})},
		{"a debit stops at half of the debt", "A12", "down to Spec.Debt", "were debited, remaining", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if fault && r.Op == quota.OpDebit {
				_, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, now)
				r.Cost = min(r.Cost, max(v.Remaining+a.Spec().Debt/2, 0))
			}
			return a.Decide(s, r, now)
		})},
		{"shares are of another rule", "A16", "of the same Rule", "want: the rule tb1", func(fault bool) []quota.Algorithm { return []quota.Algorithm{dividing{bucket(10), fault}} }},
		{"many tokens are forecast at once", "A17", "more never earlier", "want: no less", func(fault bool) []quota.Algorithm {
			return []quota.Algorithm{foretelling{bucket(10), func(n int64, t time.Duration) time.Duration {
				if fault && n > 5 && t != quota.Never {
					return 0
				}
				return t
			}}}
		}},
		{"ResetAfter is half", "A1", "a state kept until ResetAfter has passed", "want: as the zero State", answered(func(_ quota.Request, v *quota.Verdict) { v.ResetAfter /= 2 })},
		{"ResetAfter is a tick too long", "A1", "not one before", "want: as fresh then, and not before", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.ResetAfter > 0 {
				v.ResetAfter++
			}
		})},
		{"RetryAfter is a tick early", "A2", "admitted when it has", "when these have passed; want: allowed", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.RetryAfter > 1 && v.RetryAfter < quota.Forever {
				v.RetryAfter--
			}
		})},
		{"RetryAfter is a tick late", "A2", "a denied request is denied again before RetryAfter has passed", "want: denied until then", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.RetryAfter > 0 && v.RetryAfter < quota.Forever {
				v.RetryAfter++
			}
		})},
		{"a denial is charged", "A3", "a denial", "denied, written", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && !v.Allowed && r.Op == quota.OpTake {
				next, _ = a.Decide(s, quota.Request{Op: quota.OpDebit, Cost: 1}, now)
				v.Write = true
			}
			return next, v
		})},
		{"a peek writes", "A3", "a peek", "written", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			v.Write = v.Write || fault && r.Op == quota.OpPeek && !s.IsZero()
			return next, v
		})},
		{"a cost above the capacity takes all", "A4", "a cost above Spec.Capacity", "got: 11 of a capacity of 10 are allowed", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpTake || r.Op == quota.OpPeek {
				r.Cost = min(r.Cost, 10)
			}
		})},
		{"a cost that can never fit is told to retry in a year", "A4", "is denied with RetryAfter Forever", "retry after 31536000000000", answered(func(_ quota.Request, v *quota.Verdict) {
			v.RetryAfter = min(v.RetryAfter, 365*24*3600*1e6)
		})},
		{"a cost is cut to 32 bits", "A4", "a cost above Spec.Capacity", "of a capacity of 10 are allowed", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Cost = int64(uint32(r.Cost)) })},
		{"a clock set back mints", "A5", "time that steps back frees nothing", "when the clock is", asked(func(s *quota.State, _ *quota.Request, now *quota.Micros) {
			if quota.Micros(s.B) > *now {
				*s = quota.State{}
			}
		})},
		{"a clock set back starves", "A5", "delays nothing by more than a second", "a second longer than", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			late := now
			if fault {
				late = max(now, quota.Micros(s.B))
			}
			next, v := a.Decide(s, r, late)
			if v.RetryAfter > 0 && v.RetryAfter < quota.Forever {
				v.RetryAfter += late - now
			}
			if v.ResetAfter > 0 {
				v.ResetAfter += late - now
			}
			return next, v
		})},
		{"a state moved to a clock set back is not returned with a denial", "A5", "delays nothing by more than a second", "a second longer than", answered(func(_ quota.Request, v *quota.Verdict) { v.Write = v.Write && v.Allowed })},
		{"a change of numbers refills", "A6", "consumption stays when the numbers change", "at the same time remain", converting(func(s *quota.State) { *s = quota.State{} })},
		{"a change of numbers rounds down", "A6", "in whole tokens, rounded up", "the consumption in whole tokens, rounded up", converting(func(s *quota.State) { s.A -= s.A % s.Unit })},
		{"the given list is written to", "A7", "Decide does not write to State.Tail", "got: State.Tail was", listing(func(given []int64, _ *quota.State, _ quota.Micros) {
			if len(given) > 1 {
				given[1]++
			}
		})},
		{"an entry is appended in place", "A7", "nor behind it", "numbers behind State.Tail changed", listing(func(given []int64, s *quota.State, _ quota.Micros) {
			if n := len(given); n > 0 && len(s.Tail) == n+2 {
				s.Tail = append(given, s.Tail[n:]...)
			}
		})},
		{"every third call denies", "A8", "the same input gives the same answer", "want: the same twice", answered(func(r quota.Request, v *quota.Verdict) {
			if calls.Add(1)%3 == 0 && r.Op == quota.OpTake && v.Allowed {
				v.Allowed, v.Write, v.RetryAfter = false, false, 1
			}
		})},
		{"the process's clock decides", "A8", "the same input gives the same answer", "want: the same twice", asked(func(_ *quota.State, _ *quota.Request, now *quota.Micros) { *now = quota.Micros(time.Now().UnixNano()) })},
		{"panics on a state that it did not write", "A8", "no input panics", "panic: negative deficit", asked(func(s *quota.State, _ *quota.Request, _ *quota.Micros) {
			if s.A < 0 {
				panic("negative deficit")
			}
		})},
		{"panics on an unknown operation", "A8", "no input panics", "index out of range", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			_ = [...]string{"", "", "", "", "", "", ""}[r.Op]
		})},
		{"the spec changes", "A9", "never changes", "and then {Rule:tb1", func(fault bool) []quota.Algorithm { return []quota.Algorithm{restless{bucket(10), fault, new(int64)}} }},
		{"two of one spec decide differently", "A9", "equal specs decide equally", "by another algorithm with the same spec", func(fault bool) []quota.Algorithm {
			return []quota.Algorithm{bucket(10), answered(func(_ quota.Request, v *quota.Verdict) { v.ResetAfter++ })(fault)[0]}
		}},
		{"the state counts nanoseconds, beyond 2^53", "A10", "numbers are within ±2^53", "want: numbers within ±2^53", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			unit := int64(1)
			if fault {
				unit = 1000
			}
			s.B /= unit
			next, v := a.Decide(s, r, now)
			next.B *= unit
			return next, v
		})},
		{"the list has no end", "A10", "the list within MaxTail", "want: at most " + strconv.Itoa(quota.MaxTail), listing(func(given []int64, s *quota.State, _ quota.Micros) {
			s.Tail = append(slices.Clone(given), s.Tail[len(s.Tail)-2:]...)
		})},
		{"denies everything", "A11", "Remaining is the most that can be taken", "a peek of the capacity on the zero State", answered(func(r quota.Request, v *quota.Verdict) {
			if r.Op == quota.OpTake || r.Op == quota.OpPeek {
				*v = quota.Verdict{RetryAfter: max(v.RetryAfter, 1), Remaining: min(v.Remaining, 0)}
			}
		})},
		{"allows everything", "A11", "Remaining is the most that can be taken", "want: all remaining tokens can be taken, and no more", answered(func(_ quota.Request, v *quota.Verdict) { v.Allowed, v.RetryAfter = true, 0 })},
		{"Remaining is one too many", "A11", "Remaining is the most that can be taken", "were taken, remaining", answered(func(_ quota.Request, v *quota.Verdict) {
			if v.Remaining < 10 {
				v.Remaining++
			}
		})},
		{"Remaining is a percentage", "A11", "Remaining is the most that can be taken", "want: at most the capacity", answered(func(_ quota.Request, v *quota.Verdict) { v.Remaining = v.Remaining * 100 / 10 })},
		{"a take charges one token, whatever its cost", "A11", "Remaining is the most that can be taken", "were taken, remaining", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpTake && r.Cost <= 10 {
				r.Cost = min(r.Cost, 1)
			}
		})},
		{"consumption is kept in a float32", "A11", "Remaining is the most that can be taken", "remaining", bend(bucket(1<<30), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault {
				next.A = int64(float32(next.A))
			}
			return next, v
		})},
		{"a full list denies, whatever remains", "A11", "Remaining is the most that can be taken", "however many charges that is", bend(log(), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && len(s.Tail) >= 2*algorithm.MaxLogEntries && (r.Op == quota.OpTake || r.Op == quota.OpPeek) && r.Cost > 0 {
				return s, quota.Verdict{RetryAfter: max(quota.Micros(s.Tail[0])+second-now, 1), ResetAfter: v.ResetAfter}
			}
			return next, v
		})},
		{"a debit is denied where it does not fit", "A12", "a debit is always allowed", "got: a debit is denied", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpDebit {
				r.Op = quota.OpTake
			}
		})},
		{"a debit stops at zero", "A12", "charged in full", "were debited, remaining 0", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if fault && r.Op == quota.OpDebit {
				_, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, now)
				r.Cost = min(r.Cost, max(v.Remaining, 0))
			}
			return a.Decide(s, r, now)
		})},
		{"a refund gives all back", "A13", "never more", "were just taken gives", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpRefund && r.Cost > 0 {
				r.Cost = math.MaxInt64
			}
		})},
		{"a refund of long ago is honoured", "A13", "nothing of long ago", "whose tokens have come back, is refunded", asked(func(_ *quota.State, r *quota.Request, now *quota.Micros) { r.Arg = *now })},
		{"a refund counts for as long as a bucket takes to fill", "A13", "as if the charge had never been made", "as if the second had never been", asked(func(_ *quota.State, r *quota.Request, now *quota.Micros) {
			if r.Op == quota.OpRefund && *now-r.Arg > 10*second/7 {
				r.Arg = 0
			}
		})},
		{"a refund gives a token more after a while", "A13", "never more", "want: up to as many more", asked(func(_ *quota.State, r *quota.Request, now *quota.Micros) {
			if r.Op == quota.OpRefund && r.Cost > 0 && r.Arg > 0 && *now-r.Arg > second {
				r.Cost++
			}
		})},
		{"a refund is lost", "A13", "a refund gives back its cost", "were just taken gives", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Arg = 0 })},
		{"a grant drops the fraction of a token that had come back", "A13", "as if the charge had never been made", "want: as before", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if unit := a.Spec().Unit; fault && r.Op == quota.OpTake && v.Allowed && v.Write {
				next.A += (unit - next.A%unit) % unit
				_, w := a.Decide(next, quota.Request{Op: quota.OpPeek}, now)
				v.ResetAfter = w.ResetAfter
			}
			return next, v
		})},
		{"a reset does nothing", "A14", "a reset makes the key fresh", "got: a reset answers", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpReset {
				r.Op, r.Cost = quota.OpRefund, 0
			}
		})},
		{"the Lua admits one more", "A15", "a driver.Scripted decides in Lua as in Go", "want: ", func(fault bool) []quota.Algorithm {
			a := bucket(10)
			more := ""
			if fault {
				more = "p2 = p2 + unit\n"
			}
			return []quota.Algorithm{scripted{a, more + a.(driver.Scripted).Lua()}}
		}},
		{"the Lua calls Redis", "A15", "a driver.Scripted decides in Lua as in Go", "attempt to index local 'redis'", func(fault bool) []quota.Algorithm {
			a := bucket(10)
			more := ""
			if fault {
				more = "redis.call('PING')\n"
			}
			return []quota.Algorithm{scripted{a, more + a.(driver.Scripted).Lua()}}
		}},
		{"the Lua takes a time beyond its windows for one of the last", "A15", "a driver.Moving nothing beyond its times", "want: nothing decided", func(fault bool) []quota.Algorithm {
			a := algorithm.Calendar(10, algorithm.Daily())
			more := ""
			if fault {
				more = "if now >= p5 - 1000000 then p5 = now + 1000001 end\n"
			}
			return []quota.Algorithm{moving{a, a.(driver.Moving), more + a.(driver.Moving).Lua()}}
		}},
		{"the Lua's days do not move on", "A15", "a driver.Scripted decides in Lua as in Go", "numbers for that time", func(fault bool) []quota.Algorithm {
			a := algorithm.Calendar(10, algorithm.Daily())
			return []quota.Algorithm{still{a, a.(driver.Moving), fault}}
		}},
		{"each share has the rate of the whole", "A16", "n shares of a driver.Sharer get no more than the whole", "want: together no more than the whole", func(fault bool) []quota.Algorithm { return []quota.Algorithm{sharing{bucket(10), fault}} }},
		{"a rule without state writes one", "A18", "a rule that keeps no state never writes", "and the zero State", bend(algorithm.Unlimited, func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Op == quota.OpTake {
				next, v.Write = quota.State{Unit: 1, A: s.A + 1}, true
			}
			return next, v
		})},
		{"a rule without state denies the debit of a cost that it would not admit", "A18", "answers by the operation and the cost alone", "got: debit of 1 at 0: denied", bend(algorithm.DenyAll, func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if fault && r.Op == quota.OpDebit {
				r.Op = quota.OpTake
			}
			return a.Decide(s, r, now)
		})},
		{"a take ahead accepts any delay", "A19", "OpAhead charges as a debit does what refill repays in time", "with no delay accepted, are allowed", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpAhead {
				r.Arg = quota.MaxNumber
			}
		})},
		{"a take ahead accepts no delay", "A19", "OpAhead charges as a debit does what refill repays in time", "are denied", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpAhead {
				r.Op = quota.OpTake
			}
		})},
		{"a take ahead does not tell its delay", "A19", "says when", "want: as for a debit", answered(func(r quota.Request, v *quota.Verdict) {
			if r.Op == quota.OpAhead && v.Allowed {
				v.RetryAfter = 0
			}
		})},
		{"a denied take ahead is told to come back when a take fits", "A19", "says when", "want: denied until then", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Op == quota.OpAhead && !v.Allowed {
				_, w := a.Decide(s, quota.Request{Op: quota.OpPeek, Cost: r.Cost}, now)
				v.RetryAfter = w.RetryAfter
			}
			return next, v
		})},
		{"a denied take ahead charges one", "A19", "charges nothing else", "with no delay accepted, are denied, written", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Op == quota.OpAhead && !v.Allowed {
				next, _ = a.Decide(s, quota.Request{Op: quota.OpDebit, Cost: 1}, now)
				v.Write = true
			}
			return next, v
		})},
		{"a take ahead beyond the largest debt is granted and charged in part", "A19", "OpAhead charges as a debit does what refill repays in time", "or all of them charged", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			_, before := a.Decide(s, quota.Request{Op: quota.OpPeek}, now)
			if spec := a.Spec(); fault && r.Op == quota.OpAhead && r.Arg > 0 && r.Cost <= spec.Capacity && before.Remaining-r.Cost < -spec.Debt {
				r.Op = quota.OpDebit
			}
			return a.Decide(s, r, now)
		})},
		{"a take ahead is not charged", "A19", "OpAhead charges as a debit does what refill repays in time", "want: as for a debit", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Op == quota.OpAhead && v.RetryAfter > 0 {
				return s, quota.Verdict{Outcome: quota.Outcome{Allowed: v.Allowed}, Remaining: v.Remaining, RetryAfter: v.RetryAfter, ResetAfter: v.ResetAfter}
			}
			return next, v
		})},
		{"a floor is ignored", "A20", "a take with a floor is admitted where a peek of both is", "above a floor of", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Floor = 0 })},
		{"a floor is charged", "A20", "charges its cost", "above a floor of", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) { r.Cost, r.Floor = r.Need(), 0 })},
		{"a peek ignores the floor", "A20", "a take with a floor is admitted where a peek of both is", "above a floor of", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpPeek {
				r.Floor = 0
			}
		})},
		{"a cost and floor beyond 2^63 are small", "A20", "a take with a floor is admitted where a peek of both is", "above a floor of", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Cost+r.Floor < 0 {
				r.Floor = 0
			}
		})},
		{"RetryAfter does not count the floor", "A20", "waits as that peek says", "above a floor of", bend(bucket(10), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Floor > 0 && !v.Allowed && v.RetryAfter < quota.Forever {
				_, w := a.Decide(s, quota.Request{Op: quota.OpPeek, Cost: r.Cost}, now)
				v.RetryAfter = max(w.RetryAfter, 1)
			}
			return next, v
		})},
		{"a take of up to so many takes all or none", "A21", "OpUpTo takes the tokens that are left above the floor", "got: up to", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo {
				r.Op = quota.OpTake
			}
		})},
		{"a take of up to so many takes one more", "A21", "at most its cost", "got: up to", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo && r.Cost < 10 {
				r.Cost++
			}
		})},
		{"a take of up to so many takes fewer than the least", "A21", "waits for the least", "got: up to", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo {
				r.Arg = 0
			}
		})},
		{"a take of up to so many ignores the floor", "A21", "OpUpTo takes the tokens that are left above the floor", "got: up to", asked(func(_ *quota.State, r *quota.Request, _ *quota.Micros) {
			if r.Op == quota.OpUpTo {
				r.Floor = 0
			}
		})},
		{"the forecast is a millisecond late", "A17", "a quota.Forecaster promises nothing later than a queue gets it", "which a queue of takes", func(fault bool) []quota.Algorithm {
			late := time.Duration(0)
			if fault {
				late = time.Millisecond
			}
			return []quota.Algorithm{hopeful{bucket(10), late}}
		}},
	}, holders()...)
}
