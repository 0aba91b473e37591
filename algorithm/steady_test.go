package algorithm_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testenv"
)

// steadyWindows are lengths in µs: even ones, prime ones, and some whose numbers need a coarser tick.
var steadyWindows = []time.Duration{
	time.Second, 10 * time.Second, time.Minute, time.Hour, 24 * time.Hour, 30 * 24 * time.Hour, year, 10 * year, 999_983 * time.Microsecond,
}

// pace takes cost tokens each interval from a fresh key for some windows, and returns how many takes were denied, and the
// most of them in one aligned window.
func pace(r rule, begin, interval, cost int64, windows int64) (denied, most int) {
	var c cell
	window, of := int64(0), 0
	for now := begin; now < begin+windows*r.period; now += interval {
		v := c.take(r, cost, now)
		if v.Allowed {
			continue
		}
		if start := down(now, r.period); start != window {
			window, of = start, 0
		}
		denied++
		of++
		most = max(most, of)
	}
	return denied, most
}

// phases returns where in a window an even pace may begin: at its ends, and in between.
func phases(rng *rand.Rand, r rule, interval int64) []int64 {
	list := []int64{0, 1, r.period - 1}
	for range 5 {
		list = append(list, rng.Int64N(r.period), rng.Int64N(min(interval, r.period)))
	}
	return list
}

// A caller who takes one token at a time at an even pace within the limit is never denied by a rule of windows that
// slide, nor by a bucket.
func TestSteadyPace(t *testing.T) {
	for _, k := range []kind{bucket, sliding, slidingLog} {
		t.Run(k.String(), func(t *testing.T) {
			rng := random(t)
			step := int64(97)
			switch {
			case testenv.Race:
				step = 1000
			case testenv.Full():
				step = 1
			}
			for n, last := int64(1), int64(1000); n <= last; {
				if k == slidingLog {
					last = 100 // a log takes time for each entry
				}
				for _, window := range steadyWindows {
					r := mustRule(t, k, n, n, window)
					interval := up(r.period, n) / n // rounded up
					for _, slower := range []int64{0, 1, 1 + rng.Int64N(interval)} {
						for _, phase := range phases(rng, r, interval) {
							begin := down(base, r.period) + phase
							if denied, _ := pace(r, begin, interval+slower, 1, 3); denied > 0 {
								t.Fatalf("limit %d in %v: one token each %d µs, from %d µs into a window: got %d denied, want none",
									n, window, interval+slower, phase, denied)
							}
						}
					}
				}
				if n < 12 {
					n++
				} else {
					n += 1 + rng.Int64N(step)
				}
			}
		})
	}
}

// At an even pace of several tokens at a time a window that slides denies at most one take in an aligned window.
func TestSteadyPaceOfSeveral(t *testing.T) {
	rng := random(t)
	for range size(3000) {
		n := 1 + rng.Int64N(1000)
		cost := 1 + rng.Int64N(n)
		window := steadyWindows[rng.IntN(len(steadyWindows))]
		r := mustRule(t, sliding, n, 0, window)
		interval := up(cost*r.period, n) / n
		begin := down(base, r.period) + rng.Int64N(r.period)
		if _, most := pace(r, begin, interval, cost, 6); most > 1 {
			t.Fatalf("limit %d in %v: %d tokens each %d µs, from %d µs into a window: got %d denied in one window, want at most 1",
				n, window, cost, interval, begin%r.period, most)
		}
	}
}
