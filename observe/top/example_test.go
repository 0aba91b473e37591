package top_test

import (
	"context"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/top"
	"github.com/fleetquota/fleetquota/quota"
)

// Three agents share a limit of 100 requests each; one of them asks for far more.
func ExampleNew() {
	ctx := context.Background()
	requests := quota.NewLimit("requests", algorithm.FixedWindowFromFirst(100, time.Hour))
	offenders := quota.Must(top.New(nil))
	limiter := quota.Must(quota.NewLimiter(local.New(), requests, &quota.Options{Observers: []func(context.Context, *quota.Call){offenders.Observe}}))
	defer limiter.Close()
	for key, n := range map[string]int{"agent-1": 60, "agent-2": 450, "agent-3": 101} {
		for range n {
			limiter.Take(ctx, key, 1)
		}
	}
	for _, l := range offenders.Report().Limits {
		for _, row := range l.Denied.Rows {
			fmt.Println(l.Limit, "denied", row.Key, row.Weight)
		}
		for _, row := range l.Used.Rows {
			fmt.Println(l.Limit, "used by", row.Key, row.Weight)
		}
	}
	// Output:
	// requests denied agent-2 350
	// requests denied agent-3 1
	// requests used by agent-2 100
	// requests used by agent-3 100
	// requests used by agent-1 60
}

// The reports of two processes add up.
func ExampleMerge() {
	var reports []top.Report
	for range 2 { // in each process
		observer := quota.Must(top.New(nil))
		limit := quota.NewLimit("requests", algorithm.FixedWindowFromFirst(100, time.Hour))
		limiter := quota.Must(quota.NewLimiter(local.New(), limit, &quota.Options{Observers: []func(context.Context, *quota.Call){observer.Observe}}))
		limiter.Take(context.Background(), "agent-1", 30)
		reports = append(reports, observer.Report())
		limiter.Close()
	}
	used := top.Merge(reports...).Limits[0].Used
	fmt.Println(used.Rows[0].Key, used.Rows[0].Weight, "of", used.Total)
	// Output:
	// agent-1 60 of 60
}
