package rueidis_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	fleetrueidis "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
)

// rueidis makes no client while Redis is down. A store that is made from a URL connects at its first call;
// while there is no server a decision is an error, which says that nothing was charged.
func Example() {
	ctx := context.Background()
	store := quota.Must(backend.Open(ctx, "redis://127.0.0.1:1?client=rueidis")) // imports backend/rueidis
	limit := quota.NewLimit("calls", algorithm.TokenBucket(100, 100, time.Minute))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
	defer limiter.Close()

	decision, err := limiter.Take(ctx, "203.0.113.9", 1)
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

// A program that has a client already makes the store from it.
func ExampleNew() {
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{"127.0.0.1:1"}, AlwaysPipelining: true})
	if err != nil {
		fmt.Println("no client: Redis is down")
		return
	}
	defer client.Close()
	store := quota.Must(fleetrueidis.New(client, nil))
	defer store.Close()
	// Output: no client: Redis is down
}
