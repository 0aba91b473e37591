package quota_test

import (
	"context"
	"sync"
	"testing"

	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

var raceEnabled bool

func TestMain(m *testing.M) { testkit.Main(m) }

// sized returns the size of a test.
var sized = testenv.Sized

// random returns a generator whose seed a failing test prints.
var random = testenv.Random

var bg = context.Background()

func newLimiter(t testing.TB, s quota.Store, l *quota.Limit, o *quota.Options) *quota.Limiter {
	t.Helper()
	lim, err := quota.NewLimiter(s, l, o)
	if err != nil {
		t.Fatal(err)
	}
	return lim
}

// recorder is a store that notes the charges that reach it, and grants them all.
type recorder struct {
	mu    sync.Mutex
	calls [][]quota.Charge
}

func (r *recorder) Charge(_ context.Context, c quota.Charge) (quota.Decision, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, []quota.Charge{c})
	return quota.Decision{Allowed: true, Capacity: c.Limit.Spec().Capacity, Charged: c.Cost}, nil
}

func (r *recorder) ChargeAll(_ context.Context, cs []quota.Charge, out []quota.Decision) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, append([]quota.Charge(nil), cs...))
	for i := range out {
		out[i] = quota.Decision{Allowed: true, Capacity: 1}
	}
	return nil
}

func (r *recorder) Close() error { return nil }

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
