package lease

import (
	"context"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var bg = context.Background()

// sized returns the size of a test: the reduced one unless FLEETQUOTA_FULL=1.
func sized(reduced, whole int) int {
	if os.Getenv("FLEETQUOTA_FULL") == "1" {
		return whole
	}
	return reduced
}

// seedOf returns the seed of a test, which a failing one prints; FLEETQUOTA_SEED replays it.
func seedOf(t testing.TB) uint64 {
	seed := rand.Uint64()
	if s := os.Getenv("FLEETQUOTA_SEED"); s != "" {
		seed, _ = strconv.ParseUint(s, 10, 64)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with FLEETQUOTA_SEED=%d", seed)
		}
	})
	return seed
}

// bucket returns a limit of capacity tokens that gains refill tokens a period.
func bucket(capacity, refill int64, per time.Duration) *quota.Limit {
	return quota.Must(quota.NewLimit("tokens", quota.Must(algorithm.TokenBucket(capacity, refill, per))))
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
	d, err := s.Take(bg, c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
