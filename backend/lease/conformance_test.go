package lease

import (
	"context"
	"fmt"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

var inexact = []conformance.Lack{{Feature: conformance.Exact, Reason: "what a process holds is charged before it is spent"}}

// shared keeps a local store for each name, which outlives the leases on it.
type shared struct {
	mu     sync.Mutex
	stores map[string]*local.Store
}

func (s *shared) below(t testing.TB, o conformance.Opening) *remote {
	s.mu.Lock()
	defer s.mu.Unlock()
	store := s.stores[o.Data]
	if store == nil {
		store = quota.Must(local.NewWithOptions(local.Options{Clock: o.Clock}))
		s.stores[o.Data] = store
		t.Cleanup(func() { store.Close() })
	}
	return &remote{Store: calm{store}}
}

// calm is a store that turns a panic of an algorithm into an error, as a server would: remote holds a lock meanwhile.
type calm struct{ quota.Store }

func (c calm) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("test: %w: %v", quota.ErrUnavailable, r)
		}
	}()
	return c.Store.ChargeAll(ctx, cs, out)
}

func leased(t testing.TB, below quota.Store, o conformance.Opening) quota.Store {
	s, err := New(below, &Options{Instances: instances(2), Clock: o.Clock})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestConformance(t *testing.T) {
	t.Parallel()
	stores := &shared{stores: map[string]*local.Store{}}
	conformance.Run(t, conformance.Harness{
		Name:  "lease over local",
		Open:  func(t testing.TB, o conformance.Opening) quota.Store { return leased(t, stores.below(t, o), o) },
		Lacks: inexact,
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			below := stores.below(t, o)
			return leased(t, below, o), func(f conformance.Fault) {
				below.set(always(fault{
					refused: f == conformance.Refused,
					lost:    f == conformance.LostReply,
					frozen:  f == conformance.Frozen,
				}))
			}
		},
	})
}

func TestConformanceOnRedis(t *testing.T) {
	t.Parallel()
	server := redisserver.Start(t)
	client := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	t.Cleanup(func() { client.Close() })
	conformance.Run(t, conformance.Harness{
		Name: "lease over goredis",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			below, err := goredis.New(client, &goredis.Options{Prefix: o.Data + ":", Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return leased(t, below, o)
		},
		Lacks: inexact,
	})
}
