package algorithm_test

import (
	"math"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

const (
	base   = 1_800_000_000_000_000 // a time in 2027, in µs
	second = 1_000_000
	year   = 365 * 24 * time.Hour
)

// size returns n, or twenty times as many steps where the whole suite was asked for (./test -full), and a tenth of them under
// the race detector: it is slow, these tests have one goroutine, and ./test runs all steps without it.
func size(n int) int { return sized(n, 20*n) }

// sized is size with a number of its own for the whole suite.
func sized(reduced, whole int) int {
	if testenv.Race {
		reduced /= 10
	}
	return testenv.Sized(reduced, whole)
}

// random returns a generator whose seed a failing test prints.
var random = testenv.Random

type kind int

const (
	bucket kind = iota
	fixed
	first
	sliding
	slidingLog
	offset
)

var kinds = []kind{bucket, fixed, first, sliding, slidingLog, offset}

func (k kind) String() string {
	return [...]string{"TokenBucket", "FixedWindow", "FixedWindowFromFirst", "SlidingWindow", "SlidingWindowLog", "FixedWindowOffset"}[k]
}

// forEach runs a property against each algorithm.
func forEach(t *testing.T, property func(t *testing.T, k kind)) {
	t.Helper()
	for _, k := range kinds {
		t.Run(k.String(), func(t *testing.T) { property(t, k) })
	}
}

// A rule is an algorithm with the parameters it was made from.
type rule struct {
	quota.Algorithm
	kind          kind
	limit, refill int64
	period        int64 // µs
	tick          int64 // µs
	debt          int64 // tokens
	offset        int64 // µs
}

func newRule(k kind, limit, refill int64, period time.Duration) (rule, error) {
	var alg quota.Algorithm
	switch k {
	case bucket:
		alg = algorithm.TokenBucket(limit, refill, period)
	case fixed:
		alg = algorithm.FixedWindow(limit, period)
	case first:
		alg = algorithm.FixedWindowFromFirst(limit, period)
	case sliding:
		alg = algorithm.SlidingWindow(limit, period)
	case slidingLog:
		alg = algorithm.SlidingWindowLog(limit, period)
	case offset:
		alg = algorithm.FixedWindowOffset(limit, period, offsetOf(period))
	}
	if err := quota.NewLimit("n", alg).Err(); err != nil {
		return rule{}, err
	}
	spec := alg.Spec()
	r := rule{alg, k, limit, refill, period.Microseconds(), 1, spec.Debt, 0}
	switch k {
	case offset:
		r.offset = offsetOf(period).Microseconds()
	case bucket:
		r.tick = spec.Params[3]
	case sliding:
		r.tick = spec.Params[2]
	}
	return r, nil
}

func offsetOf(window time.Duration) time.Duration { return (window / 3).Truncate(time.Microsecond) }

func mustRule(t testing.TB, k kind, limit, refill int64, period time.Duration) rule {
	t.Helper()
	r, err := newRule(k, limit, refill, period)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

type numbers struct {
	limit, refill int64
	period        time.Duration
}

var extremeBuckets = []numbers{
	{10, 1, year},
	{1, 1, 10 * year},
	{1, 1, time.Microsecond},
	{1 << 40, 1_000_000_000, time.Second},
	{1 << 40, 1000, time.Microsecond},
	{1 << 40, 1 << 40, 10 * year},
	{1<<52 - 1, 1_000_000, time.Microsecond},
	{5 << 40, 5 << 40, 30 * 24 * time.Hour},             // 5 TiB a month
	{2 << 40, 2 << 40, time.Second},                     // 2 TiB a second
	{10_000_000_000_000, 10_000_000_000_000, time.Hour}, // 10^13 nano-dollars an hour
	{1 << 39, 1<<40 - 87, 7 * 24 * time.Hour},
	{100_000, 99_991, time.Second},
	{50, 21, 2 * time.Second},
	{50, 53, 10 * year}, // a coarser tick at a low rate
	{1000, 10, time.Second},
	{1_000_000_000, 1_000_000_007, time.Hour},        // a prime rate: a coarser tick
	{1_000_000_007, 1_000_000_007, 1000 * time.Hour}, // a tick that leaves no room for debt, or a coarse one
	{7, 3, 999_983 * time.Microsecond},
}

var extremeWindows = []numbers{
	{10, 0, year},
	{1, 0, 10 * year},
	{1, 0, time.Microsecond},
	{1000, 0, time.Microsecond},
	{1 << 40, 0, time.Hour},
	{1 << 40, 0, 10 * year},
	{1<<52 - 1, 0, 10 * year},
	{1<<51 - 1, 0, 1000 * 24 * time.Hour},
	{5 << 40, 0, time.Hour},
	{10_000_000_000_000, 0, 30 * 24 * time.Hour},
	{1<<20 - 1, 0, (1<<31 - 1) * time.Microsecond}, // just below 2^51, with a prime window
	{1<<19 - 1, 0, (1<<31 - 1) * time.Microsecond},
	{1_000_000_000, 0, time.Second},
	{100, 0, time.Minute},
	{3, 0, 999_983 * time.Microsecond},
	{5, 0, 24 * time.Hour},
}

// magnitude returns 1 to 2^bits, with every order of magnitude as likely.
func magnitude(rng *rand.Rand, bits int) int64 {
	return 1 + rng.Int64N(int64(1)<<rng.IntN(bits+1))
}

// randomRule returns an extreme rule one time in four.
func randomRule(rng *rand.Rand, k kind) rule {
	for {
		n := numbers{magnitude(rng, 52), magnitude(rng, 52), 0}
		switch rng.IntN(8) {
		case 0:
			n.period = time.Duration(magnitude(rng, 48)) * time.Microsecond
		case 1, 2:
			extremes := extremeWindows
			if k == bucket {
				extremes = extremeBuckets
			}
			n = extremes[rng.IntN(len(extremes))]
		case 3:
			n.limit, n.refill, n.period = magnitude(rng, 6), magnitude(rng, 6), time.Duration(magnitude(rng, 22))*time.Microsecond
		case 4:
			n.limit, n.refill, n.period = magnitude(rng, 10), 99_991, time.Second
		default:
			periods := []time.Duration{time.Millisecond, time.Second, time.Minute, time.Hour, 24 * time.Hour}
			n.limit, n.refill, n.period = magnitude(rng, 20), magnitude(rng, 20), periods[rng.IntN(len(periods))]
		}
		if r, err := newRule(k, n.limit, n.refill, n.period); err == nil {
			return r
		}
	}
}

// A cell keeps a state as a store does.
type cell struct {
	state quota.State
}

func (c *cell) do(r rule, req quota.Request, now int64) quota.Verdict {
	s, v := r.Decide(c.state, req, quota.Micros(now))
	if v.Write {
		c.state = s
	}
	return v
}

func (c *cell) take(r rule, cost, now int64) quota.Verdict {
	return c.do(r, quota.Request{Cost: cost}, now)
}

// peek asks for one cost and changes nothing, not even a state ahead of the clock.
func (c cell) peek(r rule, cost, now int64) quota.Verdict {
	return c.do(r, quota.Request{Op: quota.OpPeek, Cost: cost}, now)
}

func randomCost(rng *rand.Rand, r rule, remaining int64) int64 {
	switch rng.IntN(12) {
	case 0:
		return 0
	case 1:
		return 1
	case 2:
		return r.limit
	case 3:
		return r.limit + 1
	case 4:
		return 1 << 62
	case 5:
		return math.MaxInt64
	case 6:
		return max(remaining, 0)
	case 7:
		return max(remaining, 0) + 1
	case 8:
		return 1 + rng.Int64N(8)
	default:
		return rng.Int64N(r.limit + 1)
	}
}

// forward returns a step of the clock: nothing, small, ticks, windows, or just to where v says that something
// happens.
func forward(rng *rand.Rand, r rule, v quota.Verdict) int64 {
	switch rng.IntN(10) {
	case 0:
		return 0
	case 1:
		return 1 + rng.Int64N(1000)
	case 2:
		return r.tick
	case 3:
		return rng.Int64N(100*r.tick + 1)
	case 4:
		return r.period
	case 5:
		return rng.Int64N(2*r.period + 1)
	case 6, 7:
		if v.RetryAfter < quota.Forever {
			return max(int64(v.RetryAfter)-rng.Int64N(2), 0)
		}
		return 1
	case 8:
		return max(int64(v.ResetAfter)-rng.Int64N(2), 0)
	default:
		return rng.Int64N(r.period/max(r.limit, 1) + 2)
	}
}

// busy returns a state that a short random use left, with the time of its last request.
func busy(rng *rand.Rand, r rule) (cell, int64) {
	var c cell
	var v quota.Verdict
	now := int64(base) + rng.Int64N(1e13)
	for range 2 + rng.IntN(8) {
		now += forward(rng, r, v)
		op := quota.OpTake
		if rng.IntN(6) == 0 {
			op = quota.OpDebit
		}
		cost := randomCost(rng, r, v.Remaining)
		if op == quota.OpDebit && rng.IntN(2) == 0 {
			cost = rng.Int64N(r.limit + 1)
		}
		v = c.do(r, quota.Request{Op: op, Cost: cost}, now)
	}
	return c, now
}

func sameState(a, b quota.State) bool {
	return a.Unit == b.Unit && a.A == b.A && a.B == b.B && a.C == b.C && slices.Equal(a.Tail, b.Tail)
}
