package conformance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// kind is a kind of algorithm that the suite tests stores with.
type kind struct {
	name string
	make func(n numbers) quota.Algorithm
}

type numbers struct {
	limit, refill int64 // windows take the limit alone
	period        time.Duration
}

var (
	tokenBucket = kind{"TokenBucket", func(n numbers) quota.Algorithm {
		return algorithm.TokenBucket(n.limit, n.refill, n.period)
	}}
	fixedWindow = kind{"FixedWindow", func(n numbers) quota.Algorithm {
		return algorithm.FixedWindow(n.limit, n.period)
	}}
	fromFirst = kind{"FixedWindowFromFirst", func(n numbers) quota.Algorithm {
		return algorithm.FixedWindowFromFirst(n.limit, n.period)
	}}
	slidingWindow = kind{"SlidingWindow", func(n numbers) quota.Algorithm {
		return algorithm.SlidingWindow(n.limit, n.period)
	}}
	slidingLog = kind{"SlidingWindowLog", func(n numbers) quota.Algorithm {
		return algorithm.SlidingWindowLog(n.limit, n.period)
	}}
	offsetWindow = kind{"FixedWindowOffset", func(n numbers) quota.Algorithm {
		return algorithm.FixedWindowOffset(n.limit, n.period, (n.period / 3).Truncate(time.Microsecond))
	}}
	// calendar has windows of UTC, which no machine lacks.
	calendar = kind{"Calendar", func(n numbers) quota.Algorithm {
		return algorithm.Calendar(n.limit, []algorithm.Period{
			algorithm.Daily(), algorithm.Weekly(time.Monday).At(8), algorithm.Monthly(31), algorithm.Yearly(time.February, 29),
		}[n.refill%4])
	}}
	// goOnly stands for an algorithm of a program's own, without Lua.
	goOnly = kind{"an algorithm in Go only", func(n numbers) quota.Algorithm {
		return tally{n.limit}
	}}

	// keepNone are the rules that keep no state.
	keepNone = []kind{
		{"DenyAll", func(numbers) quota.Algorithm { return algorithm.DenyAll }},
		{"Unlimited", func(numbers) quota.Algorithm { return algorithm.Unlimited }},
	}

	// heldKinds are rules with holds, whose ttl follows from the number of tokens that come back.
	heldKinds = []kind{
		heldKind("TokenBucket, held", tokenBucket.make), heldKind("FixedWindow, held", fixedWindow.make), heldKind("SlidingWindowLog, held", slidingLog.make),
		{"Concurrency", func(n numbers) quota.Algorithm { return algorithm.Concurrency(n.limit, ttlOf(n)) }},
	}

	builtIn = []kind{tokenBucket, fixedWindow, fromFirst, slidingWindow, slidingLog}
	kinds   = append(slices.Clip(builtIn), goOnly)
	// random are the kinds of random traces.
	random = append(slices.Clip(kinds), offsetWindow, calendar)
)

// heldKind returns the kind of a rule with holds.
func heldKind(name string, inside func(n numbers) quota.Algorithm) kind {
	return kind{name, func(n numbers) quota.Algorithm { return algorithm.Held(inside(n), ttlOf(n)) }}
}

func ttlOf(n numbers) time.Duration { return time.Duration(1+n.refill%60_000) * time.Millisecond }

// limit returns the limit called name of a kind.
func (k kind) limit(name string, limit, refill int64, period time.Duration) *quota.Limit {
	return quota.NewLimit(name, k.make(numbers{limit, refill, period}))
}

// tally is an algorithm whose tokens never come back. Its states hold the largest and smallest numbers that are
// allowed, and its verdict shows if the store did not keep them.
type tally struct{ capacity int64 }

const (
	tallyDebt = 1000
	tallyEnd  = 1 << 53
)

func (t tally) Spec() quota.Spec {
	return quota.Spec{Rule: quota.Rule{'t', 'a', 'l', 'l', 'y', '-', '1'}, Unit: 1, Capacity: t.capacity, Debt: tallyDebt}
}

func (t tally) Decide(s quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	used := int64(0)
	if !s.IsZero() {
		used = s.A + tallyEnd
		if s.B != tallyEnd-used || s.C != -used || !slices.Equal(s.Tail, []int64{used, -used}) {
			return s, quota.Verdict{Remaining: math.MinInt64} // the store did not keep the numbers
		}
	}
	v := quota.Verdict{Outcome: quota.Outcome{Allowed: true}}
	kept := used
	switch r.Op {
	case quota.OpTake, quota.OpPeek:
		switch need := r.Need(); {
		case need > t.capacity || need > 0 && need > t.capacity-used, need == 0 && used > t.capacity:
			v.Allowed, v.RetryAfter = false, quota.Forever
		case r.Op == quota.OpTake:
			kept += r.Cost
		}
	case quota.OpDebit:
		kept = max(kept, min(kept+min(r.Cost, t.capacity+tallyDebt), t.capacity+tallyDebt))
	case quota.OpRefund:
		kept = max(kept-r.Cost, 0)
	case quota.OpReset:
		kept = 0
	}
	if v.Write = kept != used; v.Write {
		s = quota.State{}
		if kept > 0 {
			s = quota.State{Unit: 1, A: kept - tallyEnd, B: tallyEnd - kept, C: -kept, Tail: []int64{kept, -kept}}
		}
	}
	if v.Remaining = t.capacity - kept; kept > 0 {
		v.ResetAfter = quota.Forever
	}
	return s, v
}

// Share is for fallbacks, as of every rule of the suite.
func (t tally) Share(n int64) (quota.Algorithm, error) {
	return tally{t.capacity / max(n, 1)}, nil
}

const year = 365 * 24 * time.Hour

// extremes are the largest and smallest numbers that algorithms accept, and numbers that need a coarse tick.
var extremes = []numbers{
	{1, 1, year}, {10, 1, year}, {1, 1, 10 * year}, {1, 1, time.Microsecond}, {1000, 1000, time.Microsecond},
	{1_000_000_000, 1_000_000_000, time.Second}, {1 << 40, 1_000_000_000, time.Second}, {1 << 40, 1 << 40, 10 * year},
	{1 << 40, 1 << 30, time.Hour}, {1<<52 - 1, 1_000_000, time.Microsecond}, {5 << 40, 5 << 40, 30 * 24 * time.Hour}, {1_000_000_000, 1_000_000_007, time.Hour}, {1_000_000_007, 1_000_000_007, 1000 * time.Hour},
	{1 << 39, 1<<40 - 87, 7 * 24 * time.Hour}, {50, 53, 10 * year}, {1<<20 - 1, 1, (1<<31 - 1) * time.Microsecond},
	{100_000, 99_991, time.Second}, {7, 3, 999_983 * time.Microsecond},
}

var usual = []time.Duration{time.Millisecond, 10 * time.Millisecond, time.Second, 1900 * time.Millisecond, time.Minute, time.Hour, 24 * time.Hour}

// magnitude returns 1 to 2^bits; every order of magnitude is equally likely.
func magnitude(rng *rand.Rand, bits int) int64 { return 1 + rng.Int64N(int64(1)<<rng.IntN(bits+1)) }

func oneOf[T any](rng *rand.Rand, of []T) T { return of[rng.IntN(len(of))] }

// randomNumbers returns numbers that the kind accepts. Most are so small that a few charges use the limit up.
func (k kind) randomNumbers(rng *rand.Rand, big bool) numbers {
	for {
		n := numbers{magnitude(rng, 7), magnitude(rng, 7), oneOf(rng, usual)}
		switch {
		case big || rng.IntN(6) == 0:
			n = oneOf(rng, extremes)
			if rng.IntN(2) == 0 {
				n = numbers{magnitude(rng, 52), magnitude(rng, 52), time.Duration(magnitude(rng, 48)) * time.Microsecond}
			}
			if big && n.limit < 1<<31 {
				continue
			}
		case rng.IntN(4) == 0:
			n = numbers{magnitude(rng, 20), magnitude(rng, 20), oneOf(rng, usual)}
		}
		if quota.NewLimit("limit", k.make(n)).Err() == nil {
			return n
		}
	}
}

// randomCost returns a cost that is often close to the remaining tokens or to the capacity.
func randomCost(rng *rand.Rand, capacity, remaining int64) int64 {
	capacity, remaining = min(capacity, 1<<62), min(remaining, 1<<62) // of Unlimited
	switch rng.IntN(15) {
	case 0:
		return 0
	case 1, 2:
		return 1
	case 3:
		return capacity
	case 4:
		return capacity + 1
	case 5:
		return oneOf(rng, []int64{1 << 31, 1 << 32, 1 << 52, 1<<53 - 1, 1 << 53, 1<<53 + 1, 1 << 62, math.MaxInt64})
	case 6, 7:
		return max(remaining, 0)
	case 8:
		return max(remaining, 0) + 1
	case 9:
		return rng.Int64N(capacity + 1)
	default:
		return 1 + rng.Int64N(capacity/8+1)
	}
}

// named makes a limit of a kind and remembers its description for failures.
func (t *trial) named(name string, k kind, n numbers) *quota.Limit {
	l := k.limit(name, n.limit, n.refill, n.period)
	text := fmt.Sprintf("%s(%d, %v)", k.name, n.limit, n.period)
	switch k.name {
	case tokenBucket.name, heldKinds[0].name, heldKinds[1].name, heldKinds[2].name, heldKinds[3].name:
		text = fmt.Sprintf("%s(%d, %d, %v)", k.name, n.limit, n.refill, n.period)
	case offsetWindow.name, calendar.name:
		text = fmt.Sprint(l.Algorithm())
	case goOnly.name:
		text = fmt.Sprintf("%s, of %d that do not come back", k.name, n.limit)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.limits[l] = text
	t.recipes[l] = recipe{name, k.name, n.limit, n.refill, n.period}
	return l
}

func (t *trial) describe(l *quota.Limit) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if text := t.limits[l]; text != "" {
		return text
	}
	return fmt.Sprintf("%+v", *l.Spec())
}
