package local_test

import (
	"context"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

func Example() {
	limit := quota.NewLimit("calls", algorithm.SlidingWindowLog(2, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()

	for range 3 {
		d, err := limiter.Take(context.Background(), "agent-123", 1)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println(d.Allowed, d.Remaining)
	}
	// Output:
	// true 1
	// true 0
	// false 0
}

// A test gives the store a clock of its own.
func ExampleNew() {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{MaxKeys: 100_000, Clock: func() time.Time { return now }}))
	limit := quota.NewLimit("calls", algorithm.TokenBucket(1, 1, time.Minute))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))

	for range 3 {
		d, err := limiter.Take(context.Background(), "agent-123", 1)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println(d.Allowed, d.RetryAfter)
		now = now.Add(40 * time.Second)
	}
	// Output:
	// true 0s
	// false 20s
	// true 0s
}
