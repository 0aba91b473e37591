package quotaotel_test

import (
	"context"
	"fmt"
	"time"

	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/quotaotel"
	"github.com/fleetquota/fleetquota/quota"
)

// Decisions, counted by the program's own SDK.
func ExampleNew() {
	ctx := context.Background()
	reader := metric.NewManualReader() // programs have one that exports
	telemetry := quota.Must(quotaotel.New(&quotaotel.Options{MeterProvider: metric.NewMeterProvider(metric.WithReader(reader))}))
	store := telemetry.Trace(local.New())
	limiter := quota.Must(quota.NewLimiter(store, quota.NewLimit("requests", algorithm.FixedWindowFromFirst(100, time.Hour)),
		&quota.Options{Observers: []func(context.Context, *quota.Call){telemetry.Observe}}))
	defer limiter.Close()
	telemetry.Watch(limiter)
	for range 130 {
		limiter.Take(ctx, "agent-1", 1)
	}

	var all metricdata.ResourceMetrics
	if err := reader.Collect(ctx, &all); err != nil {
		fmt.Println(err)
	}
	for _, m := range all.ScopeMetrics[0].Metrics {
		if m.Name == "fleetquota.decisions" {
			for _, p := range m.Data.(metricdata.Sum[int64]).DataPoints {
				outcome, _ := p.Attributes.Value("fleetquota.outcome")
				fmt.Println(outcome.AsString(), p.Value)
			}
		}
	}
	// Unordered output:
	// allowed 100
	// denied 30
}
