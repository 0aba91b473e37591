package quota_test

import (
	"context"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// A gateway reserves the most that an answer may cost, one of the streams that a team may have at once, and one request. In the end
// it settles the tokens that were used, and the stream is free again.
func ExampleLimiter_Reserve() {
	tokens := quota.NewLimit("tokens", algorithm.Held(algorithm.SlidingWindow(10_000, time.Minute), 30*time.Second))
	streams := quota.NewLimit("streams", algorithm.Concurrency(2, 30*time.Second))
	requests := quota.NewLimit("requests", algorithm.FixedWindow(100, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), tokens, nil))
	defer limiter.Close()
	ctx := context.Background()

	stream := func(most, used int64) {
		r, err := limiter.Reserve(ctx,
			quota.Charge{Key: "team-7", Cost: most},
			quota.Charge{Limit: streams, Key: "team-7", Cost: 1},
			quota.Charge{Limit: requests, Key: "team-7", Cost: 1})
		if err != nil {
			panic(err)
		}
		if !r.Granted {
			fmt.Println("denied by charge", r.Decider)
			return
		}
		defer r.Release(ctx) // where the work panics; it has no effect after Settle
		fmt.Println("granted, and", r.Decisions[0].Remaining, "tokens are left")
		if err := r.Settle(ctx, used); err != nil {
			panic(err)
		}
	}
	stream(8000, 1200)
	stream(8000, 700)
	stream(9000, 0)

	// Output:
	// granted, and 2000 tokens are left
	// granted, and 800 tokens are left
	// denied by charge 0
}

// Acquire waits for one of the slots that a fleet has.
func ExampleLimiter_Acquire() {
	limiter := quota.Must(quota.NewLimiter(local.New(), quota.NewLimit("renders", algorithm.Concurrency(1, 10*time.Second)), nil))
	defer limiter.Close()
	ctx := context.Background()

	first, err := limiter.Acquire(ctx, "gpu-1", 1)
	fmt.Println("first:", err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		second, err := limiter.Acquire(ctx, "gpu-1", 1) // waits for the first
		fmt.Println("second:", err)
		second.Release(ctx)
	}()
	fmt.Println("the first ends")
	first.Release(ctx)
	<-done

	// Output:
	// first: <nil>
	// the first ends
	// second: <nil>
}

// A web server reserves the cost of a job, and hands the reservation to a worker with the job. The worker finishes it.
func ExampleLimiter_Resume() {
	store := local.New() // in real life a server that both share
	credits := quota.NewLimit("credits", algorithm.Held(algorithm.FixedWindow(1000, 24*time.Hour), time.Minute))
	server := quota.Must(quota.NewLimiter(store, credits, nil))
	worker := quota.Must(quota.NewLimiter(store, credits, nil))
	defer store.Close()
	defer server.Close()
	ctx := context.Background()

	r, err := server.Reserve(ctx, quota.Charge{Key: "team-7", Cost: 400})
	if err != nil {
		panic(err)
	}
	job, err := r.MarshalText()
	if err != nil {
		panic(err)
	}

	for range 2 { // a queue delivers the job twice
		r, err := worker.Resume(ctx, job)
		if err != nil {
			fmt.Println("not resumed:", quota.Charged(err))
			continue
		}
		fmt.Println("settled:", r.Settle(ctx, 250))
	}
	d, err := worker.Peek(ctx, "team-7", 0)
	fmt.Println("left:", d.Remaining, err)

	// Output:
	// settled: <nil>
	// not resumed: no
	// left: 750 <nil>
}
