package lease_test

import (
	"context"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

func Example() {
	shared := local.New() // a fleet has a store on Redis here
	store, err := lease.New(shared, &lease.Options{Instances: func() int64 { return 8 }})
	if err != nil {
		fmt.Println(err)
		return
	}
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1_000_000, 1, time.Second))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
	defer limiter.Close()

	made := map[quota.Source]int{}
	for range 10_000 {
		d, err := limiter.Take(context.Background(), "fleet", 1)
		if err != nil {
			fmt.Println(err)
			continue
		}
		made[d.Source]++
	}
	fmt.Println(made[quota.FromStore], "by the store,", made[quota.FromLease], "out of a lease")
	// Output:
	// 2 by the store, 9998 out of a lease
}

// A limit that cannot be leased is refused.
func ExampleOptions() {
	daily := quota.NewLimit("daily", algorithm.FixedWindow(5000, 24*time.Hour))
	_, err := lease.New(local.New(), &lease.Options{
		Instances: func() int64 { return 8 },
		Limits:    []*quota.Limit{daily},
	})
	fmt.Println(err)
	// Output:
	// lease: invalid request: limit "daily" has the rule "fw1"; accepted: token buckets and GCRA, because tokens of a window are worthless in the next: a chunk would be spent twice or lost
}
