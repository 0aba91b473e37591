package backend_test

import (
	"context"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
)

// A configuration file or a flag has the URL; "redis://localhost:6379" opens a store that processes share.
func ExampleOpen() {
	ctx := context.Background()
	store, err := backend.Open(ctx, "memory://?max_keys=100000")
	if err != nil {
		fmt.Println(err)
		return
	}
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Second))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
	defer limiter.Close()

	d, err := limiter.Take(ctx, "team-7/agent-123", 250)
	fmt.Println(d.Allowed, d.Remaining, err)
	// Output:
	// true 750 <nil>
}

// A parameter that the driver does not know is an error, so that a typing mistake is noticed.
func ExampleOpen_refused() {
	_, err := backend.Open(context.Background(), "memory://?maxkeys=100000")
	fmt.Println(err)
	// Output:
	// backend: open memory: invalid request: unknown parameter of the memory URL: "maxkeys"; accepted: max_keys, max_ids
}

// Without environment variables the store is in memory, and the bucket holds 1000 tokens and gains 10 each
// second.
func ExampleFromEnv() {
	env, err := backend.FromEnv(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer env.Store.Close()
	fmt.Println(env.Capacity, "tokens,", env.Refill, "more each", env.Per)
	// Output:
	// 1000 tokens, 10 more each 1s
}
