package quota_test

import (
	"context"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// BenchmarkTake takes tokens of one key from a local store.
func BenchmarkTake(b *testing.B) {
	lim := newLimiter(b, local.New(), testkit.Bucket("tokens", 1<<40, time.Hour), nil)
	b.ReportAllocs()
	for b.Loop() {
		if d, err := lim.Take(bg, "team-7/agent-0000042", 1); err != nil || !d.Allowed {
			b.Fatal(d, err)
		}
	}
}

// BenchmarkObservedTake does the same with an observer that does nothing.
func BenchmarkObservedTake(b *testing.B) {
	lim := newLimiter(b, local.New(), testkit.Bucket("tokens", 1<<40, time.Hour), &quota.Options{
		Observers: []func(context.Context, *quota.Call){func(context.Context, *quota.Call) {}},
	})
	b.ReportAllocs()
	for b.Loop() {
		if d, err := lim.Take(bg, "team-7/agent-0000042", 1); err != nil || !d.Allowed {
			b.Fatal(d, err)
		}
	}
}
