package backend_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// reporter is a store in memory that plays one on a server.
type reporter struct {
	*local.Store
	health driver.Health
	err    error
}

func (r *reporter) Health(ctx context.Context) (driver.Health, error) {
	if err := ctx.Err(); err != nil {
		return driver.Health{}, err
	}
	return r.health, r.err
}

func tokens() *quota.Limit {
	return quota.NewLimit("tokens", algorithm.TokenBucket(10, 1, time.Second))
}

func ExampleHealth() {
	var store quota.Store = &reporter{Store: local.New(), health: driver.Health{Version: "7.4.1", Eviction: "allkeys-lru", Evicted: 12}}
	// A program has a store of backend.Open or a limiter of fleetquota.FromEnv here.
	store = quota.Must(resilience.Standard(store, resilience.FailWithError(), nil))
	limiter := quota.Must(quota.NewLimiter(store, tokens(), nil))
	defer limiter.Close()

	h, err := backend.Health(context.Background(), limiter.Store())
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Printf("version %s, eviction %s, %d keys evicted\n", h.Version, h.Eviction, h.Evicted)
	// Output:
	// version 7.4.1, eviction allkeys-lru, 12 keys evicted
}

// TestHealth finds the reporter through the policies that fleetquota.FromEnv puts around a store, and through
// leases.
func TestHealth(t *testing.T) {
	want := driver.Health{Version: "7.4.1", Eviction: "volatile-ttl", Evicted: 3}
	down := fmt.Errorf("asking for INFO: %w", quota.ErrUnavailable)
	wraps := map[string]func(quota.Store) (quota.Store, error){
		"nothing": func(s quota.Store) (quota.Store, error) { return s, nil },
		"policies": func(s quota.Store) (quota.Store, error) {
			return resilience.Standard(s, resilience.Fallback(local.New(), resilience.Instances(4), nil), nil)
		},
		"policies and leases": func(s quota.Store) (quota.Store, error) {
			s, err := resilience.Standard(s, resilience.FailWithError(), nil)
			if err != nil {
				return nil, err
			}
			return lease.New(s, &lease.Options{Instances: func() int64 { return 4 }})
		},
	}
	for name, wrap := range wraps {
		inner := &reporter{Store: local.New(), health: want}
		store, err := wrap(inner)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		limiter := quota.Must(quota.NewLimiter(store, tokens(), nil))
		if got, err := backend.Health(t.Context(), limiter.Store()); err != nil || got != want {
			t.Errorf("%s: health: got %+v, %v; want %+v, nil", name, got, err, want)
		}
		inner.err = down
		if _, err := backend.Health(t.Context(), limiter.Store()); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("%s: health of a server that is down: got %v, want ErrUnavailable", name, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := backend.Health(ctx, limiter.Store()); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: health with a context that has ended: got %v, want context.Canceled", name, err)
		}
		limiter.Close()
	}
}

func TestHealthRefuses(t *testing.T) {
	store, err := backend.Open(t.Context(), "memory://")
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if h, err := backend.Health(t.Context(), store); !errors.Is(err, errors.ErrUnsupported) || h != (driver.Health{}) {
		t.Errorf("health of a store in memory: got %+v, %v; want zero, ErrUnsupported", h, err)
	}
	if _, err := backend.Health(t.Context(), nil); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("health of a nil store: got %v, want ErrInvalid", err)
	}
}
