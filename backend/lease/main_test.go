package lease

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var bg = context.Background()

// sized returns the size of a test.
var sized = testenv.Sized

// seedOf returns a seed that a failing test prints.
var seedOf = testenv.Seed

// bucket returns a limit of capacity tokens that gains refill tokens a period.
func bucket(capacity, refill int64, per time.Duration) *quota.Limit {
	return quota.NewLimit("tokens", algorithm.TokenBucket(capacity, refill, per))
}

// instances is a constant Options.Instances.
func instances(n int64) func() int64 { return func() int64 { return n } }

// open returns a lease on a store, which the test closes at its end.
func open(t testing.TB, below quota.Store, o Options) *Store {
	t.Helper()
	if o.Instances == nil {
		o.Instances = instances(1)
	}
	if o.MaxKeys == 0 {
		o.MaxKeys = 64 // a small table is walked faster
	}
	s, err := New(below, &o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func take(t testing.TB, s quota.Store, c quota.Charge) quota.Decision {
	t.Helper()
	d, err := s.Charge(bg, c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
