package quotalog_test

import (
	"context"
	"log/slog"
	"os"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/quotalog"
	"github.com/fleetquota/fleetquota/quota"
)

// Of 100 denials in a minute one is logged.
func ExampleNew() {
	withoutTime := func(_ []string, a slog.Attr) slog.Attr {
		if a.Key == slog.TimeKey {
			return slog.Attr{}
		}
		return a
	}
	logger := slog.New(slog.NewTextHandler(os.Stdout, &slog.HandlerOptions{ReplaceAttr: withoutTime}))
	log := quota.Must(quotalog.New(&quotalog.Options{Logger: logger, PerMinute: 1, Secret: []byte("of the fleet")}))
	limiter := quota.Must(quota.NewLimiter(local.New(), quota.NewLimit("day", algorithm.FixedWindowFromFirst(50, 24*time.Hour)),
		&quota.Options{Observers: []func(context.Context, *quota.Call){log.Observe}}))
	defer limiter.Close()
	for range 100 {
		limiter.Take(context.Background(), "team-7/agent-1", 60)
	}
	// Output:
	// level=INFO msg="quota denied" limit=day key=812fd3264989457e op=take cost=60 remaining=50 capacity=50 retry_after=never source=store
}
