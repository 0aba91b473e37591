package local_test

import (
	"context"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// BenchmarkHot spends one key, from one goroutine and from as many as there are processors.
func BenchmarkHot(b *testing.B) {
	l := quota.Must(quota.NewLimit("tokens", quota.Must(algorithm.TokenBucket(1<<30, 1e9, time.Second))))
	var s quota.Store = local.New(nil)
	c := quota.Charge{Limit: l, Key: "agent-0000042", Cost: 1}
	ctx := context.Background()
	take := func(b *testing.B) {
		d, err := s.Take(ctx, c)
		if err != nil || !d.Allowed {
			b.Error(d, err)
		}
	}
	b.Run("alone", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			take(b)
		}
	})
	b.Run("parallel", func(b *testing.B) {
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for pb.Next() {
				take(b)
			}
		})
	})
}
