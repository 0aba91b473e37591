package algorithm_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
)

// Every rule passes the suite that rules of others are told to pass: with everyday numbers, with others of
// another unit and tick for changes in use, and at the ends of the accepted ranges.
func TestConformance(t *testing.T) {
	type window = func(int64, time.Duration) (quota.Algorithm, error)
	windows := map[kind]window{
		fixed: algorithm.FixedWindow, first: algorithm.FixedWindowFromFirst, sliding: algorithm.SlidingWindow, slidingLog: algorithm.SlidingWindowLog,
	}
	for k, of := range windows {
		t.Run(k.String(), func(t *testing.T) {
			conformance.Algorithm(t,
				quota.Must(of(10, time.Minute)),
				quota.Must(of(1, time.Microsecond)),
				quota.Must(of(100_000, 24*time.Hour)),
				quota.Must(of(1<<40, time.Hour)),
				quota.Must(of(10, 10*year)),
			)
		})
	}
	t.Run(bucket.String(), func(t *testing.T) {
		conformance.Algorithm(t,
			quota.Must(algorithm.TokenBucket(10, 3, 2*time.Second)),
			quota.Must(algorithm.TokenBucket(1, 1, time.Microsecond)),
			quota.Must(algorithm.TokenBucket(1_000_000_000, 1_000_000_007, time.Hour)),
			quota.Must(algorithm.TokenBucket(10, 1, year)),
		)
		conformance.Algorithm(t, quota.Must(algorithm.TokenBucket(1<<40, 1<<40, 10*year)))
	})
}
