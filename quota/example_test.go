package quota_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

func ExampleLimiter_Take() {
	ctx := context.Background()
	perAgent := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Minute))
	limiter := quota.Must(quota.NewLimiter(local.New(), perAgent, nil))
	defer limiter.Close()

	for range 2 {
		d, err := limiter.Take(ctx, "team-7/agent-123", 600)
		switch {
		case err != nil:
			fmt.Println("no decision:", err)
		case d.Allowed:
			fmt.Println("allowed,", d.Remaining, "of", d.Capacity, "left")
		default:
			fmt.Println("denied, retry in", d.RetryAfter.Round(time.Minute))
		}
	}
	// Output:
	// allowed, 400 of 1000 left
	// denied, retry in 20m0s
}

// An agent, its team and the fleet are charged together or not at all, in tokens and in requests.
func ExampleLimiter_ChargeAll() {
	ctx := context.Background()
	limit := func(name string, capacity int64) *quota.Limit {
		return quota.NewLimit(name, algorithm.TokenBucket(capacity, capacity, time.Hour))
	}
	agent, team, fleet, requests := limit("agent", 1000), limit("team", 1500), limit("fleet", 50_000), limit("requests", 60)
	limiter := quota.Must(quota.NewLimiter(local.New(), agent, nil))
	defer limiter.Close()

	for _, name := range []string{"agent-1", "agent-2"} {
		key := quota.Key("team-7", name)
		r, err := limiter.ChargeAll(ctx,
			quota.Charge{Key: key, Cost: 900},
			quota.Charge{Limit: requests, Key: key, Cost: 1},
			quota.Charge{Limit: team, Key: "team-7", Cost: 900},
			quota.Charge{Limit: fleet, Key: "fleet", Cost: 900},
		)
		if err != nil {
			fmt.Println("no decision:", err)
			continue
		}
		fmt.Printf("%s: granted %v, decided by charge %d, team has %d left\n", name, r.Granted, r.Decider, r.Decisions[2].Remaining)
	}
	// Output:
	// agent-1: granted true, decided by charge 0, team has 600 left
	// agent-2: granted false, decided by charge 2, team has 600 left
}

// The cost of a call to a language model is known when it is over: charge an estimate, then settle.
func ExampleLimiter_Settle() {
	ctx := context.Background()
	limit := quota.NewLimit("tokens", algorithm.FixedWindow(10_000, 24*time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()

	receipt, err := limiter.Take(ctx, "agent-123", 2000)
	if err != nil || !receipt.Allowed {
		return
	}
	fmt.Println("estimated:", receipt.Remaining, "left")

	used := int64(1234) // as the model reports
	d, err := limiter.Settle(ctx, "agent-123", receipt, used)
	if err != nil {
		return
	}
	fmt.Println("settled:", d.Remaining, "left")
	// Output:
	// estimated: 8000 left
	// settled: 8766 left
}

func ExampleLimiter_Wait() {
	limit := quota.NewLimit("calls", algorithm.TokenBucket(1, 1, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()

	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for range 2 {
		_, err := limiter.Wait(ctx, "agent-123", 1)
		fmt.Println(err == nil) // the second would come after the deadline, and is refused at once
	}
	// Output:
	// true
	// false
}

func ExampleKey() {
	fmt.Println(quota.Key("team-7", "user/../../admin"))
	// Output: team-7/user%2F..%2F..%2Fadmin
}

// A caller that must not be overtaken takes ahead of refill, and waits before it uses its tokens.
func ExampleLimiter_TakeAhead() {
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(100, 10, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()
	ctx := context.Background()

	limiter.Take(ctx, "agent-1", 100)
	d, _ := limiter.TakeAhead(ctx, "agent-1", 10, 2*time.Hour)
	fmt.Println(d.Allowed, d.Charged, d.Remaining, d.Delay.Round(time.Minute))
	later, _ := limiter.TakeAhead(ctx, "agent-1", 15, 2*time.Hour)
	fmt.Println(later.Allowed, later.RetryAfter.Round(time.Minute))
	limiter.Refund(ctx, "agent-1", d, d.Charged) // does not wait for them after all
	later, _ = limiter.TakeAhead(ctx, "agent-1", 15, 2*time.Hour)
	fmt.Println(later.Allowed, later.Delay.Round(time.Minute))
	// Output:
	// true 10 -10 1h0m0s
	// false 30m0s
	// true 1h30m0s
}

// A worker takes as many tokens as there are, if they are enough for a piece of work.
func ExampleLimiter_TakeUpTo() {
	limit := quota.NewLimit("rows", algorithm.TokenBucket(1000, 10, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()
	ctx := context.Background()

	for range 3 {
		d, err := limiter.TakeUpTo(ctx, "export", 600, 100)
		if err != nil {
			return
		}
		fmt.Println(d.Allowed, d.Charged, d.Remaining)
	}
	// Output:
	// true 600 400
	// true 400 0
	// false 0 0
}

// A new limit is tried on real traffic before it denies anything.
func ExampleCharge_shadow() {
	limit := func(name string, capacity int64) *quota.Limit {
		return quota.NewLimit(name, algorithm.TokenBucket(capacity, capacity, time.Hour))
	}
	tokens, stricter := limit("tokens", 1000), limit("stricter", 500)
	limiter := quota.Must(quota.NewLimiter(local.New(), tokens, nil))
	defer limiter.Close()

	for range 2 {
		r, err := limiter.ChargeAll(context.Background(),
			quota.Charge{Key: "agent-1", Cost: 400},
			quota.Charge{Limit: stricter, Key: "agent-1", Cost: 400, Shadow: true})
		if err != nil {
			return
		}
		fmt.Println("granted:", r.Granted, "the stricter limit would grant:", r.Decisions[1].Allowed)
	}
	// Output:
	// granted: true the stricter limit would grant: true
	// granted: true the stricter limit would grant: false
}

// A tenant has a guaranteed share, and beyond it what is left of a common pool.
func ExampleLimiter_TakeFirst() {
	limit := func(name string, capacity int64) *quota.Limit {
		return quota.NewLimit(name, algorithm.TokenBucket(capacity, capacity, time.Hour))
	}
	share, pool := limit("share", 100), limit("pool", 150)
	limiter := quota.Must(quota.NewLimiter(local.New(), share, nil))
	defer limiter.Close()

	for range 4 {
		r, err := limiter.TakeFirst(context.Background(),
			[]quota.Charge{{Limit: share, Key: "team-7", Cost: 80}},
			[]quota.Charge{{Limit: pool, Key: "common", Cost: 80}})
		if err != nil {
			return
		}
		fmt.Println(r.Granted, r.Taken, r.RetryAfter().Round(time.Minute))
	}
	// Output:
	// true 0 0s
	// true 1 0s
	// false 1 4m0s
	// false 1 4m0s
}

// Free callers leave a fifth of the limit to paid ones, who may take the last token.
func ExampleCharge_floor() {
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(100, 10, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()
	ctx := context.Background()

	free := quota.Charge{Key: "fleet", Cost: 50, Floor: 20, FloorOf: 100}
	paid := quota.Charge{Key: "fleet", Cost: 50}
	for _, c := range []quota.Charge{free, free, paid} {
		r, err := limiter.ChargeAll(ctx, c)
		if err != nil {
			return
		}
		fmt.Println(r.Granted, r.Decisions[0].Remaining, "left, retry after", r.RetryAfter().Round(time.Hour))
	}
	// Output:
	// true 50 left, retry after 0s
	// false 50 left, retry after 2h0m0s
	// true 0 left, retry after 0s
}

// An observer sees each call once, a list too: here two lists are granted and one is denied.
func ExampleCall() {
	observe := func(_ context.Context, c *quota.Call) {
		decider := c.Charges[c.Decider]
		fmt.Println("granted:", c.Granted, "decided by:", decider.Limit.Name(), decider.Key, "charges:", len(c.Charges))
	}
	limit := func(name string, capacity int64) *quota.Limit {
		return quota.NewLimit(name, algorithm.TokenBucket(capacity, capacity, time.Hour))
	}
	agent, team := limit("agent", 100), limit("team", 150)
	limiter := quota.Must(quota.NewLimiter(local.New(), agent, &quota.Options{
		Observers: []func(context.Context, *quota.Call){observe},
	}))
	defer limiter.Close()

	for _, name := range []string{"agent-1", "agent-2", "agent-3"} {
		limiter.ChargeAll(context.Background(),
			quota.Charge{Key: quota.Key("team-7", name), Cost: 60},
			quota.Charge{Limit: team, Key: "team-7", Cost: 60})
	}
	// Output:
	// granted: true decided by: agent team-7/agent-1 charges: 2
	// granted: true decided by: team team-7 charges: 2
	// granted: false decided by: team team-7 charges: 2
}

// A caller that checks an error and nothing else does not overlook a denial.
func ExampleLimiter_Allow() {
	limit := quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/m bucket"))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
	defer limiter.Close()

	for _, n := range []int64{600, 600, 1001} {
		err := limiter.Allow(context.Background(), "agent-123", n)
		var denial *quota.Denial
		switch {
		case err == nil:
			fmt.Println("allowed")
		case errors.As(err, &denial): // and errors.Is(err, quota.ErrDenied)
			wait, ever := denial.RetryAfter()
			fmt.Println("denied by", denial.Limit, "retry:", ever, wait.Round(time.Minute))
		default:
			fmt.Println("no decision:", err)
		}
	}
	// Output:
	// allowed
	// denied by tokens: 1000 burst 10/m bucket retry: true 20m0s
	// denied by tokens: 1000 burst 10/m bucket retry: false 0s
}

func ExampleLimiter_AllowAll() {
	calls := quota.Must(algorithm.ParseLimit("calls: 2/24h fixed-from-first"))
	tokens := quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/m bucket"))
	limiter := quota.Must(quota.NewLimiter(local.New(), calls, nil))
	defer limiter.Close()

	for range 3 {
		err := limiter.AllowAll(context.Background(),
			quota.Charge{Key: "agent-123", Cost: 1},
			quota.Charge{Limit: tokens, Key: "agent-123", Cost: 100})
		var denial *quota.Denial
		if errors.As(err, &denial) {
			fmt.Println("denied by", denial.Limit)
		} else {
			fmt.Println(err)
		}
	}
	// Output:
	// <nil>
	// <nil>
	// denied by calls: 2/24h fixed-from-first
}

// A call to a model waits until its tokens and its request fit. The second one would come after the deadline, and is refused
// at once.
func ExampleLimiter_WaitAll() {
	tokens := quota.Must(algorithm.ParseLimit("tokens: 1000 burst 1000/m bucket"))
	requests := quota.Must(algorithm.ParseLimit("requests: 60 burst 60/m bucket"))
	limiter := quota.Must(quota.NewLimiter(local.New(), tokens, nil))
	defer limiter.Close()

	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for range 2 {
		r, err := limiter.WaitAll(ctx,
			quota.Charge{Key: "agent-123", Cost: 800},
			quota.Charge{Limit: requests, Key: "agent-123", Cost: 1})
		fmt.Println(r.Granted, errors.Is(err, context.DeadlineExceeded))
	}
	// Output:
	// true false
	// false true
}

// A program whose charges all name their limits needs no limiter of one of them.
func ExampleCharger() {
	tokens := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Minute))
	calls := quota.NewLimit("calls", algorithm.FixedWindowFromFirst(2, 24*time.Hour))
	charger := quota.Must(quota.NewCharger(local.New(), nil))
	defer charger.Close()

	for range 3 {
		r, err := charger.ChargeAll(context.Background(),
			quota.Charge{Limit: tokens, Key: "agent-123", Cost: 250},
			quota.Charge{Limit: calls, Key: "agent-123", Cost: 1})
		fmt.Println(r.Granted, err)
	}
	perAgent := quota.Must(charger.For(tokens)) // on the same store
	d, err := perAgent.Take(context.Background(), "agent-123", 1000)
	fmt.Println(d.Allowed, d.Remaining, err)
	// Output:
	// true <nil>
	// true <nil>
	// false <nil>
	// false 500 <nil>
}

// A limit whose numbers are refused carries the error to the limiter.
func ExampleNewLimit() {
	_, err := quota.NewLimiter(local.New(), quota.NewLimit("tokens", algorithm.TokenBucket(1000, 0, time.Second)), nil)
	fmt.Println(err)
	// Output:
	// algorithm: invalid request: refill is 0; accepted: at least 1
}
