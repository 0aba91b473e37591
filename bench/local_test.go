package bench

import (
	"context"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/time/rate"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

const keyCount = 1_000_000

// numbers are those of a bucket: capacity tokens, and one more each period.
type numbers struct {
	capacity int64
	period   time.Duration
}

var (
	hot  = numbers{1 << 32, time.Millisecond} // never used up
	cold = numbers{100_000, 30 * time.Minute} // never full again once used
)

// A limiter takes one token of a key. All of them copy the keys that they keep.
type limiter interface{ take(key string) bool }

type fleetquota struct {
	store quota.Store
	limit *quota.Limit
}

func newFleetquota(n numbers) limiter {
	bucket := quota.Must(algorithm.TokenBucket(n.capacity, 1, n.period))
	return &fleetquota{local.New(nil), quota.Must(quota.NewLimit("tokens", bucket))}
}

func (f *fleetquota) take(key string) bool {
	d, err := f.store.Take(context.Background(), quota.Charge{Limit: f.limit, Key: key, Cost: 1})
	return err == nil && d.Allowed
}

// xtime keeps a rate.Limiter for each key in a sync.Map, as programs do that need one for each client.
type xtime struct {
	limiters sync.Map // of *rate.Limiter, by key
	numbers  numbers
}

func newXTime(n numbers) limiter { return &xtime{numbers: n} }

func (x *xtime) take(key string) bool {
	l, ok := x.limiters.Load(key)
	if !ok {
		l, _ = x.limiters.LoadOrStore(strings.Clone(key), rate.NewLimiter(rate.Every(x.numbers.period), int(x.numbers.capacity)))
	}
	return l.(*rate.Limiter).Allow()
}

var libraries = []struct {
	name string
	new  func(numbers) limiter
}{
	{"fleetquota", newFleetquota},
	{"x-time-rate", newXTime},
}

func keys(n int) []string {
	all := make([]string, n)
	for i := range all {
		all[i] = fmt.Sprintf("agent-%010d", i)
	}
	return all
}

func BenchmarkHot(b *testing.B) {
	for _, lib := range libraries {
		b.Run(lib.name, func(b *testing.B) {
			l := lib.new(hot)
			key := keys(1)[0]
			b.ReportAllocs()
			for b.Loop() {
				if !l.take(key) {
					b.Fatal("denied")
				}
			}
		})
	}
}

func BenchmarkHotParallel(b *testing.B) {
	for _, lib := range libraries {
		b.Run(lib.name, func(b *testing.B) {
			l := lib.new(hot)
			key := keys(1)[0]
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if !l.take(key) {
						b.Error("denied")
						return
					}
				}
			})
		})
	}
}

func BenchmarkMillionKeys(b *testing.B) {
	all := keys(keyCount)
	for _, lib := range libraries {
		l := lib.new(cold)
		fill(b, l, all)
		runtime.GC() // the first run does not pay for fill's garbage
		b.Run(lib.name, func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				random := rand.New(rand.NewPCG(rand.Uint64(), rand.Uint64()))
				for pb.Next() {
					if !l.take(all[random.IntN(len(all))]) {
						b.Error("denied")
						return
					}
				}
			})
		})
	}
}

// fill takes a token of each key.
func fill(b *testing.B, l limiter, all []string) {
	for _, key := range all {
		if !l.take(key) {
			b.Fatal("denied")
		}
	}
}

func BenchmarkBytesPerKey(b *testing.B) {
	all := keys(keyCount)
	for _, lib := range libraries {
		b.Run(lib.name, func(b *testing.B) {
			var bytes float64
			for b.Loop() {
				before := heap()
				l := lib.new(cold)
				fill(b, l, all)
				bytes = float64(heap()-before)/keyCount - float64(len(all[0]))
				runtime.KeepAlive(l)
			}
			b.ReportMetric(bytes, "B/key")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// heap returns the bytes in use after a collection.
func heap() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestSameWork checks that all libraries do the work that is compared.
func TestSameWork(t *testing.T) {
	for _, lib := range libraries {
		l := lib.new(numbers{3, time.Hour})
		for _, key := range keys(2) {
			for i := range 5 {
				if got := l.take(key); got != (i < 3) {
					t.Errorf("%s: charge %d of 5 to a bucket of 3: %v", lib.name, i+1, got)
				}
			}
		}
	}
}
