package lease

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// plenty is a limit that no benchmark comes to the end of.
var plenty = bucket(1<<40, 1<<20, time.Second)

func redisStore(b testing.TB) quota.Store {
	server := redisserver.Start(b)
	client := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	b.Cleanup(func() { client.Close() })
	s, err := goredis.New(client, nil)
	if err != nil {
		b.Fatal(err)
	}
	return s
}

// run has goroutines take one token of keys; each has its own choice of them.
func run(b *testing.B, s quota.Store, goroutines int, choice func() func() string) {
	b.ReportAllocs()
	one := func(key string) bool {
		d, err := s.Charge(bg, quota.Charge{Limit: plenty, Key: key, Cost: 1})
		if err != nil || !d.Allowed {
			b.Errorf("take: got %+v, %v; want it allowed", d, err)
		}
		return !b.Failed()
	}
	if goroutines == 1 {
		next := choice()
		for b.Loop() && one(next()) {
		}
		return
	}
	b.SetParallelism(max(goroutines/runtime.GOMAXPROCS(0), 1))
	b.RunParallel(func(pb *testing.PB) {
		next := choice()
		for pb.Next() && one(next()) {
		}
	})
}

// BenchmarkHotKey takes from one key: local is the store in memory by itself, the others are leases.
func BenchmarkHotKey(b *testing.B) {
	hot := func() func() string { return func() string { return "agent-0000000001" } }
	stores := []struct {
		name string
		s    quota.Store
	}{
		{"local", local.New()},
		{"lease-local", open(b, local.New(), Options{MaxKeys: DefaultMaxKeys})},
		{"lease-redis", open(b, redisStore(b), Options{MaxKeys: DefaultMaxKeys})},
	}
	for _, g := range []int{1, 2, 64, 256} {
		for _, x := range stores {
			b.Run(fmt.Sprintf("%s/g%d", x.name, g), func(b *testing.B) { run(b, x.s, g, hot) })
		}
	}
}

// BenchmarkMillionKeys takes from a million keys, few of them often.
func BenchmarkMillionKeys(b *testing.B) {
	names := make([]string, 1_000_000)
	for i := range names {
		names[i] = fmt.Sprintf("agent-%010d", i)
	}
	zipf := func() func() string {
		z := rand.NewZipf(rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64())), 1.1, 1, uint64(len(names)-1))
		return func() string { return names[z.Uint64()] }
	}
	below := redisStore(b)
	s := open(b, below, Options{MaxKeys: DefaultMaxKeys})
	b.Run("redis/g64", func(b *testing.B) { run(b, below, 64, zipf) })
	b.Run("lease-redis/g64", func(b *testing.B) { run(b, s, 64, zipf) })
}
