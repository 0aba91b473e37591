package clienttest

import (
	"math"
	"math/rand/v2"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

type kind int

const (
	bucket kind = iota
	fixed
	first
	sliding
	slidingLog
	kinds
)

// Rules with holds.
const (
	heldBucket = kinds + iota
	heldFirst
	heldLog
	concurrency
)

// Rules of calendars, whose windows go by the date.
const (
	calendar = concurrency + 1 + iota
	heldCalendar
	allKinds
)

var kindNames = [allKinds]string{"bucket", "fixed", "first", "sliding", "log", "held-bucket", "held-first", "held-log", "concurrency", "calendar", "held-calendar"}

var periods = []algorithm.Period{
	algorithm.Daily(), algorithm.Daily().In("America/Santiago").At(2), algorithm.Weekly(time.Monday).In("Asia/Shanghai"), algorithm.Monthly(31).In("Europe/Berlin"),
	algorithm.Monthly(1), algorithm.Yearly(time.February, 29).In("Pacific/Apia"),
}

func newRule(k kind, limit, refill int64, period time.Duration) quota.Algorithm {
	switch k {
	case bucket:
		return algorithm.TokenBucket(limit, refill, period)
	case fixed:
		return algorithm.FixedWindow(limit, period)
	case first:
		return algorithm.FixedWindowFromFirst(limit, period)
	case sliding:
		return algorithm.SlidingWindow(limit, period)
	case slidingLog:
		return algorithm.SlidingWindowLog(limit, period)
	case calendar:
		return algorithm.Calendar(limit, periods[refill%int64(len(periods))])
	case heldCalendar:
		return algorithm.Held(newRule(calendar, limit, refill, period), ttlOf(refill))
	case concurrency:
		return algorithm.Concurrency(limit, ttlOf(refill))
	default:
		return algorithm.Held(newRule([...]kind{bucket, first, slidingLog}[k-heldBucket], limit, refill, period), ttlOf(refill))
	}
}

// ttlOf returns a ttl from one millisecond to a minute.
func ttlOf(refill int64) time.Duration {
	return time.Duration(1000+refill%60_000*1009) * time.Microsecond
}

type numbers struct {
	limit, refill int64 // windows take the limit
	period        time.Duration
}

// extremes are the ends of the numbers that rules accept, and the numbers that need a coarse tick.
var extremes = []numbers{
	{1, 1, year}, {10, 1, year}, {1, 1, 10 * year}, {1, 1, time.Microsecond}, {1000, 1000, time.Microsecond},
	{1_000_000_000, 1_000_000_000, time.Second}, {1 << 40, 1_000_000_000, time.Second}, {1 << 40, 1 << 40, 10 * year},
	{1 << 40, 1 << 30, time.Hour}, {1<<52 - 1, 1_000_000, time.Microsecond}, {5 << 40, 5 << 40, 30 * 24 * time.Hour}, {1_000_000_000, 1_000_000_007, time.Hour}, {1_000_000_007, 1_000_000_007, 1000 * time.Hour},
	{1 << 39, 1<<40 - 87, 7 * 24 * time.Hour}, {50, 53, 10 * year}, {1<<20 - 1, 1, (1<<31 - 1) * time.Microsecond},
	{100_000, 99_991, time.Second}, {7, 3, 999_983 * time.Microsecond},
}

var usual = []time.Duration{time.Millisecond, 10 * time.Millisecond, time.Second, 2 * time.Second, time.Minute, time.Hour, 24 * time.Hour}

// magnitude returns 1 to 2^bits, every order of magnitude as likely.
func magnitude(rng *rand.Rand, bits int) int64 { return 1 + rng.Int64N(int64(1)<<rng.IntN(bits+1)) }

// randomRule returns a rule of a kind: an extreme one time in four, else often one that a few charges fill.
func randomRule(rng *rand.Rand, k kind) quota.Algorithm {
	for {
		n := numbers{magnitude(rng, 52), magnitude(rng, 52), time.Duration(magnitude(rng, 48)) * time.Microsecond}
		switch rng.IntN(8) {
		case 0, 1:
			n = extremes[rng.IntN(len(extremes))]
		case 2:
		case 3, 4, 5:
			n = numbers{magnitude(rng, 7), magnitude(rng, 7), usual[rng.IntN(len(usual))]}
		default:
			n = numbers{magnitude(rng, 20), magnitude(rng, 20), usual[rng.IntN(len(usual))]}
		}
		r := newRule(k, n.limit, n.refill, n.period)
		if k == fixed && rng.IntN(2) == 0 {
			r = algorithm.FixedWindowOffset(n.limit, n.period, time.Duration(rng.Int64N(n.period.Microseconds()))*time.Microsecond)
		}
		if quota.NewLimit("n", r).Err() == nil {
			return r
		}
	}
}

func randomCost(rng *rand.Rand, capacity, remaining int64) int64 {
	switch rng.IntN(14) {
	case 0:
		return 0
	case 1, 2:
		return 1
	case 3:
		return capacity
	case 4:
		return capacity + 1
	case 5:
		return []int64{1 << 52, 1<<52 + 1, 1 << 53, 1 << 62, math.MaxInt64}[rng.IntN(5)]
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

func randomOp(rng *rand.Rand) quota.Op {
	switch n := rng.IntN(20); {
	case n < 9:
		return quota.OpTake
	case n < 10:
		return quota.OpUpTo
	case n < 12:
		return quota.OpAhead
	case n < 14:
		return quota.OpPeek
	case n < 16:
		return quota.OpDebit
	case n < 19:
		return quota.OpRefund
	default:
		return quota.OpReset
	}
}
