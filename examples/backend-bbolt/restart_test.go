package bboltstore

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// TestRestart spends quota, closes the file as the end of a process does, and finds the quota spent.
func TestRestart(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "quota.db")
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(10, 1, 24*time.Hour))

	for run, want := range []int64{6, 2} {
		db, err := bbolt.Open(file, 0o600, nil)
		if err != nil {
			t.Fatal(err)
		}
		limiter := quota.Must(quota.NewLimiter(quota.Must(New(db, nil)), limit, nil))
		d, err := limiter.Take(ctx, "agent-1", 4)
		if err != nil || !d.Allowed || d.Remaining != want {
			t.Errorf("run %d, Take(4) of 10: got %+v, error %v, want a grant and %d remaining", run, d, err, want)
		}
		limiter.Close()
		db.Close()
	}
}
