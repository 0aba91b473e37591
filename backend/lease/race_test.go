package lease

import (
	"context"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// TestConcurrent has many goroutines do everything at once, on leases that live for some milliseconds. Two
// processes share the store. What they admit was charged, and when they are closed nothing is left.
func TestConcurrent(t *testing.T) {
	seed := seedOf(t)
	below := newRemote(t)
	limit := bucket(1<<20, 1, time.Minute)
	below.set(func(c *quota.Charge) fault {
		return fault{refused: rand.IntN(50) == 0, lost: c.Op != quota.OpRefund && rand.IntN(50) == 0}
	})
	var stores []*Store
	for range 2 {
		stores = append(stores, open(t, below, Options{Instances: instances(2), Lifetime: 10 * time.Millisecond, MaxKeys: 4}))
	}
	var net atomic.Int64 // admitted tokens less those that callers gave back
	var workers sync.WaitGroup
	for g := range 32 {
		workers.Go(func() {
			random := rand.New(rand.NewPCG(seed, uint64(g)))
			s := stores[g%2]
			for range sized(3000, 100_000) {
				c := quota.Charge{Limit: limit, Key: "hot", Cost: 1 + random.Int64N(3)}
				if random.IntN(10) == 0 {
					c.Key = string(rune('a' + random.IntN(6)))
				}
				ctx, cancel := bg, func() {}
				if random.IntN(20) == 0 {
					ctx, cancel = context.WithTimeout(bg, time.Duration(random.IntN(100))*time.Microsecond)
				}
				switch random.IntN(12) {
				case 0:
					c.Op = quota.OpPeek
				case 1:
					c.Cost = 2000
				}
				d, err := s.Charge(ctx, c)
				cancel()
				if err != nil || !d.Allowed || c.Op == quota.OpPeek {
					continue
				}
				net.Add(c.Cost)
				if d.Charged != c.Cost {
					t.Errorf("charged: got %+v, want %d", d, c.Cost)
				}
				if random.IntN(8) == 0 {
					net.Add(-c.Cost) // before: it may be spent again at once
					if _, err := s.Charge(bg, c.Refund(d, c.Cost)); err != nil {
						net.Add(c.Cost)
					}
				}
			}
		})
	}
	workers.Wait()
	below.set(nil)
	for _, s := range stores {
		if err := s.Close(); err != nil { // on a busy machine a request takes longer than the 5 ms that Close waits
			t.Log(err)
			<-s.ended
		}
		for e := range s.table.all {
			if e.lease.Load() != nil || e.request != nil || e.refunding != 0 {
				t.Errorf("key %q after Close: got lease %+v, request %+v, %d refunds; want none", e.key, e.lease.Load(), e.request, e.refunding)
			}
		}
		if s.keys() > 4 || s.running != 0 {
			t.Errorf("after Close: got %d keys, %d goroutines; want 4 at most, 0", s.keys(), s.running)
		}
	}
	if admitted, charged := net.Load(), below.net(); admitted > charged || admitted == 0 {
		t.Errorf("admitted: got %d, want 1 to the %d charged", admitted, charged)
	}
}
