package algorithm_test

import (
	"context"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// redisEval returns a function that evaluates scripts on a redis-server of the test's own. On a machine without one,
// a subtest says so, and Lua is not compared with Go.
func redisEval(t *testing.T) func(context.Context, string, []any) (any, error) {
	t.Helper()
	if redisserver.Available() != nil {
		t.Run("redis-server", func(t *testing.T) { redisserver.Require(t) })
		return nil
	}
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	t.Cleanup(func() { client.Close() })
	return func(ctx context.Context, script string, args []any) (any, error) {
		return client.Eval(ctx, script, nil, args...).Result()
	}
}

// Every rule passes the suite that rules of others are told to pass: with everyday numbers, with others of
// another unit and tick for changes in use, and at the ends of the accepted ranges.
func TestConformance(t *testing.T) {
	eval := redisEval(t)
	test := func(t *testing.T, algorithms ...quota.Algorithm) {
		conformance.Algorithm(t, conformance.AlgorithmHarness{Algorithms: algorithms, Eval: eval})
	}
	type window = func(int64, time.Duration) (quota.Algorithm, error)
	windows := map[kind]window{
		fixed: algorithm.FixedWindow, first: algorithm.FixedWindowFromFirst, sliding: algorithm.SlidingWindow, slidingLog: algorithm.SlidingWindowLog,
	}
	for k, of := range windows {
		t.Run(k.String(), func(t *testing.T) {
			test(t,
				quota.Must(of(10, time.Minute)),
				quota.Must(of(1, time.Microsecond)),
				quota.Must(of(100_000, 24*time.Hour)),
				quota.Must(of(1<<40, time.Hour)),
				quota.Must(of(0, time.Second)),
				quota.Must(of(10, 10*year)),
			)
		})
	}
	t.Run(bucket.String(), func(t *testing.T) {
		test(t,
			quota.Must(algorithm.TokenBucket(10, 3, 2*time.Second)),
			quota.Must(algorithm.TokenBucket(1, 1, time.Microsecond)),
			quota.Must(algorithm.TokenBucket(0, 10, time.Second)),
			quota.Must(algorithm.TokenBucket(0, 1, 10*year)),
			quota.Must(share(t, quota.Must(algorithm.TokenBucket(2, 1, time.Minute)), 4)),
			quota.Must(algorithm.TokenBucket(1_000_000_000, 1_000_000_007, time.Hour)),
			quota.Must(algorithm.TokenBucket(10, 1, year)),
		)
		test(t, quota.Must(algorithm.TokenBucket(1<<40, 1<<40, 10*year)))
	})
}
