package driver_test

import (
	"context"
	"fmt"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// shards is a KV that costs next to nothing: what is measured is the adapter.
type shards struct {
	seed maphash.Seed
	of   [256]struct {
		sync.Mutex
		rows map[string]string
	}
}

func newShards() *shards {
	s := &shards{seed: maphash.MakeSeed()}
	for i := range s.of {
		s.of[i].rows = map[string]string{}
	}
	return s
}

func (s *shards) Load(_ context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	entries := make([]driver.Entry, len(keys))
	for i, key := range keys {
		of := &s.of[maphash.String(s.seed, key)%256]
		of.Lock()
		entries[i] = driver.Entry{Key: key, Value: of.rows[key]}
		of.Unlock()
	}
	return entries, quota.Micros(time.Now().UnixMicro()), nil
}

func (s *shards) Swap(_ context.Context, changes []driver.Change) (bool, error) {
	for _, c := range changes { // one, in the benchmarks
		of := &s.of[maphash.String(s.seed, c.Old.Key)%256]
		of.Lock()
		if of.rows[c.Old.Key] != c.Old.Value {
			of.Unlock()
			return false, nil
		}
		of.rows[c.Old.Key] = c.Value
		of.Unlock()
	}
	return true, nil
}

// BenchmarkCAS charges keys that hardly ever meet, from one goroutine and from many.
func BenchmarkCAS(b *testing.B) {
	const keys = 10_000
	l := testkit.Bucket("n", 1<<30, time.Hour)
	var names [keys]string
	for i := range names {
		names[i] = fmt.Sprint("tenant-", i)
	}
	for _, clients := range []int{1, 32} {
		b.Run(fmt.Sprint("clients=", clients), func(b *testing.B) {
			s := quota.Must(driver.NewCAS(newShards(), nil))
			b.ReportAllocs()
			var next atomic.Int64
			take := func(more func() bool) {
				for i := next.Add(7919); more(); i += 13 {
					if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: names[i%keys], Cost: 1}); err != nil {
						b.Error(err)
					}
				}
			}
			if clients == 1 {
				take(b.Loop)
				return
			}
			b.SetParallelism(clients / 2)
			b.RunParallel(func(p *testing.PB) { take(p.Next) })
		})
	}
}
