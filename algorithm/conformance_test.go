package algorithm_test

import (
	"context"
	"fmt"
	"reflect"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

// eval returns a function that evaluates scripts on miniredis, and on a redis-server of the test's own as well, where
// there is one: both must answer the same. At normal sizes miniredis then runs the first of each batch. Under the race detector it
// returns nil: Lua has no races, and ./test compares it with Go without it.
func eval(t *testing.T) func(context.Context, string, []any) (any, error) {
	t.Helper()
	if testenv.Race && !testenv.Full() {
		return nil
	}
	addrs := []string{miniredis.RunT(t).Addr()}
	if redisserver.Available() == nil {
		addrs = append(addrs, redisserver.Start(t).Addr())
	} else {
		t.Run("redis-server", func(t *testing.T) { redisserver.Require(t) })
	}
	clients := make([]*redis.Client, len(addrs))
	for i, addr := range addrs {
		clients[i] = redis.NewClient(&redis.Options{Addr: addr})
		t.Cleanup(func() { clients[i].Close() })
	}
	return func(ctx context.Context, script string, args []any) (any, error) {
		var replies [][]any
		for i, client := range clients {
			some := args
			if i == 0 && len(clients) > 1 && !testenv.Full() {
				some = args[:(len(args)+9)/10] // its Lua is slow, and there is another server
			}
			reply, err := client.Eval(ctx, script, nil, some...).Result()
			if err != nil {
				return nil, fmt.Errorf("server %d of miniredis and redis-server: %w", i+1, err)
			}
			list, _ := reply.([]any)
			replies = append(replies, list)
		}
		first, last := replies[0], replies[len(replies)-1]
		if len(first) > len(last) || !reflect.DeepEqual(first, last[:len(first)]) {
			return nil, fmt.Errorf("got %.300q on miniredis and %.300q on redis-server, want the same", first, last)
		}
		return last, nil
	}
}

// Every rule passes the suite that rules of others are told to pass: with everyday numbers, with others of
// another unit and tick for changes in use, and at the ends of the accepted ranges.
func TestConformance(t *testing.T) {
	eval := eval(t)
	test := func(t *testing.T, algorithms ...quota.Algorithm) {
		if testenv.Race && !testenv.Full() { // which has the case of several goroutines to see
			algorithms = algorithms[:1]
		}
		conformance.Algorithm(t, conformance.AlgorithmHarness{Algorithms: algorithms, Eval: eval})
	}
	type window = func(int64, time.Duration) quota.Algorithm
	windows := map[kind]window{
		offset: func(limit int64, window time.Duration) quota.Algorithm {
			return algorithm.FixedWindowOffset(limit, window, offsetOf(window))
		},
		fixed: algorithm.FixedWindow, first: algorithm.FixedWindowFromFirst, sliding: algorithm.SlidingWindow, slidingLog: algorithm.SlidingWindowLog,
	}
	for k, of := range windows {
		t.Run(k.String(), func(t *testing.T) {
			most := int64(1<<52 - 1)
			if k == sliding {
				most = 70_000_000_000 // in ten years, in the coarsest tick
			}
			test(t,
				of(10, time.Minute),
				of(1, time.Microsecond),
				of(100_000, 24*time.Hour),
				of(1<<40, time.Hour),
				of(most, 10*year),
				of(0, time.Second),
				of(10, 10*year),
			)
		})
	}
	t.Run(bucket.String(), func(t *testing.T) {
		test(t,
			algorithm.TokenBucket(10, 3, 2*time.Second),
			algorithm.TokenBucket(1, 1, time.Microsecond),
			algorithm.TokenBucket(0, 10, time.Second),
			algorithm.TokenBucket(0, 1, 10*year),
			quota.Must(share(t, algorithm.TokenBucket(2, 1, time.Minute), 4)),
			algorithm.TokenBucket(1_000_000_000, 1_000_000_007, time.Hour),
			algorithm.TokenBucket(10, 1, year),
		)
		test(t, algorithm.TokenBucket(1<<40, 1<<40, 10*year))
		test(t, algorithm.TokenBucket(1<<52-1, 1_000_000, time.Microsecond))
		test(t, algorithm.TokenBucket(5<<40, 5<<40, 30*24*time.Hour))
	})
	const minute, day = time.Minute, 24 * time.Hour
	for k, of := range windows {
		t.Run("Held "+k.String(), func(t *testing.T) {
			test(t,
				algorithm.Held(of(10, minute), 10*time.Second),
				algorithm.Held(of(10, minute), 100*time.Second),
				algorithm.Held(of(100_000, day), 7*minute),
				algorithm.Held(of(1<<40, time.Hour), time.Millisecond),
				algorithm.Held(of(0, time.Second), 1234567*time.Microsecond),
			)
		})
	}
	t.Run("Held "+bucket.String(), func(t *testing.T) {
		test(t,
			algorithm.Held(algorithm.TokenBucket(10, 3, 2*time.Second), 3*time.Second),
			algorithm.Held(algorithm.TokenBucket(10, 3, 2*time.Second), 30*time.Second),
			algorithm.Held(algorithm.TokenBucket(1_000_000_000, 1_000_000_007, time.Hour), minute),
			algorithm.Held(algorithm.TokenBucket(10, 1, year), time.Hour),
		)
		test(t, algorithm.Held(algorithm.TokenBucket(5<<40, 5<<40, 30*day), 10*year))
	})
	t.Run("Held Calendar", func(t *testing.T) {
		test(t,
			algorithm.Held(algorithm.Calendar(10, algorithm.Monthly(31).In("Europe/Berlin")), 3*time.Hour),
			algorithm.Held(algorithm.Calendar(1000, algorithm.Daily()), minute),
			algorithm.Held(algorithm.FixedWindowOffset(10, day, 8*time.Hour), time.Hour),
		)
	})
	t.Run("Concurrency", func(t *testing.T) {
		test(t,
			algorithm.Concurrency(10, minute),
			algorithm.Concurrency(3, time.Second),
			algorithm.Concurrency(1<<52-1, 10*year),
			algorithm.Concurrency(0, time.Millisecond),
		)
	})
	t.Run("stateless", func(t *testing.T) { test(t, algorithm.DenyAll, algorithm.Unlimited) })
}
