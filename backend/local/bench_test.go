package local_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

func BenchmarkHot(b *testing.B) {
	l := quota.Must(quota.NewLimit("tokens", quota.Must(algorithm.TokenBucket(1<<30, 1e9, time.Second))))
	var s quota.Store = local.New(nil)
	c := quota.Charge{Limit: l, Key: "agent-0000042", Cost: 1}
	ctx := context.Background()
	b.ReportAllocs()
	for b.Loop() {
		d, err := s.Take(ctx, c)
		if err != nil || !d.Allowed {
			b.Fatal(d, err)
		}
	}
}

var _ = fmt.Sprint
