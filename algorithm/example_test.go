package algorithm_test

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// The bucket gains 2 tokens each second, up to 10.
func ExampleTokenBucket() {
	rule := algorithm.TokenBucket(10, 2, time.Second)
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 4 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 6))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(time.Second)
	}
	// Output:
	// 12:00:00 allowed: true remaining: 4 retry after: 0s
	// 12:00:01 allowed: true remaining: 0 retry after: 0s
	// 12:00:02 allowed: false remaining: 2 retry after: 2s
	// 12:00:03 allowed: false remaining: 4 retry after: 1s
}

// A call that may use up to 600 tokens holds as many, and is charged the 150 that it used. The other one's process dies: its hold
// lapses by itself.
func ExampleHeld() {
	rule := algorithm.Held(algorithm.TokenBucket(1000, 1, time.Minute), 16*time.Second)
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limit := quota.NewLimit("tokens", rule)
	ctx := context.Background()

	hold := quota.Charge{Limit: limit, Key: "agent-123", Op: quota.OpHold, Cost: 600}
	one := quota.Must(store.Charge(ctx, hold))
	fmt.Println(one)
	hold.Cost = 400
	fmt.Println(quota.Must(store.Charge(ctx, hold)))
	fmt.Println(quota.Must(store.Charge(ctx, hold.Settle(one, 150))))
	now = now.Add(16 * time.Second)
	fmt.Println(quota.Must(store.Charge(ctx, quota.Charge{Limit: limit, Key: "agent-123", Op: quota.OpPeek})))
	// Output:
	// allowed by the store: holds 600 until 2026-01-01T12:00:16.000000Z, 400 of 1000 left, whole after 16s, at 2026-01-01T12:00:00.000000Z
	// allowed by the store: holds 400 until 2026-01-01T12:00:16.000000Z, 0 of 1000 left, whole after 16s, at 2026-01-01T12:00:00.000000Z
	// allowed by the store: charged 150, 450 of 1000 left, whole after 2h30m0s, at 2026-01-01T12:00:00.000000Z
	// allowed by the store: 850 of 1000 left, whole after 2h29m44s, at 2026-01-01T12:00:16.000000Z
}

// At most two streams at once. A stream that goes on for longer than the ttl renews its hold.
func ExampleConcurrency() {
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	stream := quota.Charge{Limit: quota.NewLimit("streams", algorithm.Concurrency(2, 16*time.Second)), Key: "tenant-7", Op: quota.OpHold, Cost: 1}
	ctx := context.Background()

	first := quota.Must(store.Charge(ctx, stream))
	quota.Must(store.Charge(ctx, stream)) // its process dies
	now = now.Add(10 * time.Second)
	first = quota.Must(store.Charge(ctx, stream.Renew(first)))
	d := quota.Must(store.Charge(ctx, stream))
	fmt.Println("a third:", d.Allowed, "retry after:", d.RetryAfter)
	now = now.Add(d.RetryAfter)
	fmt.Println("a third:", quota.Must(store.Charge(ctx, stream)).Allowed)
	fmt.Println("left when the first ends:", quota.Must(store.Charge(ctx, stream.Settle(first, 0))).Remaining)
	// Output:
	// a third: false retry after: 6s
	// a third: true
	// left when the first ends: 1
}

// Two cells may come at once, and one more each second.
func ExampleGCRA() {
	rule := algorithm.GCRA(2, 1, time.Second)
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 4 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 1))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(500 * time.Millisecond)
	}
	// Output:
	// 12:00:00 allowed: true remaining: 1 retry after: 0s
	// 12:00:00 allowed: true remaining: 0 retry after: 0s
	// 12:00:01 allowed: true remaining: 0 retry after: 0s
	// 12:00:01 allowed: false remaining: 0 retry after: 500ms
}

// Charges of the minute from 12:00:00 on count in full until 12:01:00, and less and less in the minute after
// that.
func ExampleSlidingWindow() {
	rule := algorithm.SlidingWindow(10, time.Minute)
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 5 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 5))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(25 * time.Second)
	}
	// Output:
	// 12:00:00 allowed: true remaining: 5 retry after: 0s
	// 12:00:25 allowed: true remaining: 0 retry after: 0s
	// 12:00:50 allowed: false remaining: 0 retry after: 34s
	// 12:01:15 allowed: false remaining: 3 retry after: 9s
	// 12:01:40 allowed: true remaining: 2 retry after: 0s
}

// A charge counts for a minute exactly, and then not at all.
func ExampleSlidingWindowLog() {
	rule := algorithm.SlidingWindowLog(10, time.Minute)
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 4 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 5))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(20 * time.Second)
	}
	// Output:
	// 12:00:00 allowed: true remaining: 5 retry after: 0s
	// 12:00:20 allowed: true remaining: 0 retry after: 0s
	// 12:00:40 allowed: false remaining: 0 retry after: 20s
	// 12:01:00 allowed: true remaining: 0 retry after: 0s
}

// The windows begin at full minutes.
func ExampleFixedWindow() {
	rule := algorithm.FixedWindow(10, time.Minute)
	now := time.Date(2026, 1, 1, 12, 0, 40, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 3 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 10))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(10 * time.Second)
	}
	// Output:
	// 12:00:40 allowed: true remaining: 0 retry after: 0s
	// 12:00:50 allowed: false remaining: 0 retry after: 10s
	// 12:01:00 allowed: true remaining: 0 retry after: 0s
}

// The window begins at the first charge, 40 seconds after a full minute.
func ExampleFixedWindowFromFirst() {
	rule := algorithm.FixedWindowFromFirst(10, time.Minute)
	now := time.Date(2026, 1, 1, 12, 0, 40, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 4 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 10))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(20 * time.Second)
	}
	// Output:
	// 12:00:40 allowed: true remaining: 0 retry after: 0s
	// 12:01:00 allowed: false remaining: 0 retry after: 40s
	// 12:01:20 allowed: false remaining: 0 retry after: 20s
	// 12:01:40 allowed: true remaining: 0 retry after: 0s
}

// The windows begin at a quarter past each hour.
func ExampleFixedWindowOffset() {
	rule := algorithm.FixedWindowOffset(10, time.Hour, 15*time.Minute)
	now := time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("calls", rule), nil))

	for range 3 {
		d := quota.Must(limiter.Take(context.Background(), "agent-123", 10))
		fmt.Println(now.Format(time.TimeOnly), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(10 * time.Minute)
	}
	// Output:
	// 12:00:00 allowed: true remaining: 0 retry after: 0s
	// 12:10:00 allowed: false remaining: 0 retry after: 5m0s
	// 12:20:00 allowed: true remaining: 0 retry after: 0s
}

// A budget of the month from the 15th to the 15th: in this one the clock is set forward, and an hour is missing.
func ExampleCalendar() {
	rule := algorithm.Calendar(5_000_000, algorithm.Monthly(15).In("Europe/Berlin"))
	berlin := quota.Must(time.LoadLocation("Europe/Berlin"))
	now := time.Date(2027, 3, 15, 0, 0, 0, 0, berlin)
	store := quota.Must(local.NewWithOptions(local.Options{Clock: func() time.Time { return now }}))
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("budget", rule), nil))

	for range 3 {
		d := quota.Must(limiter.Take(context.Background(), "team", 5_000_000))
		fmt.Println(now.Format(time.DateTime), "allowed:", d.Allowed, "remaining:", d.Remaining, "retry after:", d.RetryAfter)
		now = now.Add(d.RetryAfter)
	}
	// Output:
	// 2027-03-15 00:00:00 allowed: true remaining: 0 retry after: 0s
	// 2027-03-15 00:00:00 allowed: false remaining: 0 retry after: 743h0m0s
	// 2027-04-15 00:00:00 allowed: true remaining: 0 retry after: 0s
}

// Periods as they stand in the text of a calendar.
func ExamplePeriod() {
	fmt.Println(algorithm.Daily())
	fmt.Println(algorithm.Weekly(time.Sunday).In("Asia/Tokyo"))
	fmt.Println(algorithm.Monthly(31).In("Europe/Berlin").At(8))
	fmt.Println(algorithm.Yearly(time.April, 6).In("Europe/London"))
	// Output:
	// day UTC
	// week Asia/Tokyo anchor sunday
	// month Europe/Berlin anchor 31 at 8h
	// year Europe/London anchor april-6
}

// Limits are written down as text, in a program or in its configuration, and every limit tells its text and its numbers.
func ExampleParseLimit() {
	for _, text := range []string{"tokens: 1000 burst 10/s bucket", "calls: 100/1m sliding", "jobs: 100/1d fixed"} {
		limit, err := algorithm.ParseLimit(text)
		if err != nil {
			fmt.Println(err)
			continue
		}
		fmt.Println(limit, "|", limit.Capacity(), "in", limit.Window())
	}
	// Output:
	// tokens: 1000 burst 10/s bucket | 1000 in 1m40s
	// calls: 100/1m sliding | 100 in 1m0s
	// algorithm: invalid request: span of rule "100/1d fixed" is "1d"; accepted: whole numbers of h, m, s, ms and us, such as 24h or 1m30s
}

// A plan of a program's configuration, with its rules as text.
func ExampleText() {
	var plan struct{ Tokens, Calls algorithm.Text }
	err := json.Unmarshal([]byte(`{"Tokens": "1000 burst 10/s bucket", "Calls": "100/1m sliding"}`), &plan)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(plan.Tokens.Algorithm.Spec().Capacity, plan.Calls.Algorithm)
	// Output: 1000 100/1m sliding
}
