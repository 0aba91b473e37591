package goredis_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Without a server a decision is an error, which says that nothing was charged.
func Example() {
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ContextTimeoutEnabled: true, DialerRetries: 1})
	defer client.Close()
	store := quota.Must(goredis.New(client, nil))
	limit := quota.NewLimit("calls", algorithm.TokenBucket(100, 100, time.Minute))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
	defer limiter.Close()

	decision, err := limiter.Take(context.Background(), "203.0.113.9", 1)
	switch {
	case errors.Is(err, quota.ErrUnavailable):
		fmt.Println("Redis is down; charged:", quota.Charged(err))
	case err != nil:
		fmt.Println(err)
	case decision.Allowed:
		fmt.Println("remaining:", decision.Remaining)
	default:
		fmt.Println("retry after", decision.RetryAfter)
	}
	// Output: Redis is down; charged: no
}

// With Strict a single server refuses the lists of charges that a cluster could not decide in one step.
func ExampleNew_strict() {
	client := redis.NewClient(&redis.Options{Addr: "localhost:6379", ContextTimeoutEnabled: true})
	defer client.Close()
	store := quota.Must(goredis.New(client, &goredis.Options{Strict: true}))
	defer store.Close()
	fmt.Println("one group a list:", store.Atomicity() == driver.OneGroup)

	limit := quota.NewLimit("calls", algorithm.TokenBucket(100, 100, time.Minute))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
	_, err := limiter.ChargeAll(context.Background(),
		quota.Charge{Limit: limit, Key: "user-42", Cost: 1},
		quota.Charge{Limit: limit, Key: "team-7", Cost: 1})
	fmt.Println("two groups:", errors.Is(err, quota.ErrCrossSlot))
	// Output:
	// one group a list: true
	// two groups: true
}

// A store that is made from a URL has a client of its own, which asks for no rights but those of its scripts.
func Example_url() {
	ctx := context.Background()
	store := quota.Must(backend.Open(ctx, "redis://127.0.0.1:1?client=goredis&timeout=250ms")) // imports backend/goredis
	defer store.Close()
	limit := quota.NewLimit("calls", algorithm.TokenBucket(100, 100, time.Minute))
	_, err := store.Charge(ctx, quota.Charge{Limit: limit, Key: "203.0.113.9", Cost: 1})
	fmt.Println(errors.Is(err, quota.ErrUnavailable))
	// Output: true
}
