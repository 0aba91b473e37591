package lease

import (
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestFleetOnRedis has four processes, each with its own connections, use up a bucket on a real server, one
// of them through a line that loses replies. Together they admit no more than was charged.
func TestFleetOnRedis(t *testing.T) {
	server := redisserver.Start(t)
	proxy := redisserver.StartProxy(t, server.Addr())
	proxy.Inject(redisserver.Fault{Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA"), Every: 20, Seed: 1})
	const n, capacity = 4, 200_000
	limit := bucket(capacity, 1, 10*time.Minute) // no refill during the test
	fleet := quota.Charge{Limit: limit, Key: "fleet"}
	var stores []*Store
	for i := range n {
		addr := server.Addr()
		if i == 0 {
			addr = proxy.Addr()
		}
		client := redis.NewClient(&redis.Options{Addr: addr, ContextTimeoutEnabled: true, MaxRetries: -1})
		t.Cleanup(func() { client.Close() })
		below, err := goredis.New(client, nil)
		if err != nil {
			t.Fatal(err)
		}
		stores = append(stores, open(t, below, Options{Instances: instances(n)}))
	}
	var admitted, errors, leased atomic.Int64
	var workers sync.WaitGroup
	for i, s := range stores {
		for g := range 8 {
			workers.Go(func() {
				c := fleet
				c.Cost = int64(1 + (i+g)%3)
				for {
					d, err := s.Charge(bg, c)
					switch {
					case err != nil:
						errors.Add(1)
					case !d.Allowed:
						return
					default:
						admitted.Add(c.Cost)
						if d.Source == quota.FromLease {
							leased.Add(1)
						}
					}
				}
			})
		}
	}
	workers.Wait()
	if errors.Load() == 0 {
		t.Error("lost replies: got 0, want some, else the test is void")
	}
	for _, s := range stores[1:] {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	proxy.Clear()
	peek := fleet
	peek.Op = quota.OpPeek
	d := take(t, stores[0].Unwrap(), peek)
	charged := capacity - d.Remaining
	t.Logf("%d admitted, %d of the decisions leased, %d charged, %d errors", admitted.Load(), leased.Load(), charged, errors.Load())
	if admitted.Load() > charged {
		t.Errorf("admitted: got %d, want the %d charged at most", admitted.Load(), charged)
	}
	if lost := charged - admitted.Load(); lost > errors.Load()*capacity/part/n {
		t.Errorf("charged and not admitted: got %d, want %d at most", lost, errors.Load()*capacity/part/n)
	}
	if leased.Load() < 10_000 {
		t.Errorf("decisions out of a lease: got %d, want 10000 or more", leased.Load())
	}
}
