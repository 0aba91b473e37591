package local_test

import (
	"context"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// limit returns a limit that fits some number of charges of 1.
func limit(name string, charges int64) *quota.Limit {
	return quota.NewLimit(name, algorithm.TokenBucket(charges, charges, 24*time.Hour))
}

// BenchmarkHot spends one key, from one goroutine and from as many as there are processors, and has it denied.
func BenchmarkHot(b *testing.B) {
	for name, cost := range map[string]int64{"granted": 1, "denied": 1<<30 + 1} {
		var s quota.Store = local.New()
		c := quota.Charge{Limit: limit("tokens", 1<<30), Key: "agent-0000042", Cost: cost}
		ctx := context.Background()
		take := func(b *testing.B) {
			d, err := s.Charge(ctx, c)
			if err != nil || d.Allowed != (name == "granted") {
				b.Error(d, err)
			}
		}
		b.Run(name+"/alone", func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				take(b)
			}
		})
		b.Run(name+"/parallel", func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					take(b)
				}
			})
		})
	}
}

// BenchmarkNewKeys charges keys that the store does not have yet, under some number of limit names.
func BenchmarkNewKeys(b *testing.B) {
	for _, names := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprint("names=", names), func(b *testing.B) {
			limits := make([]*quota.Limit, names)
			for i := range limits {
				limits[i] = limit(fmt.Sprint("n", i), 100)
			}
			s := quota.Must(local.NewWithOptions(local.Options{MaxKeys: 1 << 30}))
			var key []byte
			for i := 0; b.Loop(); i++ {
				key = strconv.AppendInt(append(key[:0], "agent-"...), int64(i), 10)
				s.Charge(context.Background(), quota.Charge{Limit: limits[i%names], Key: string(key), Cost: 1})
			}
		})
	}
}

// BenchmarkIDs charges many keys, each time with a new request id or with one that is made and not sent, from one goroutine and
// from 64.
func BenchmarkIDs(b *testing.B) {
	l := limit("tokens", 1<<30)
	bench := func(goroutines int, send bool) {
		b.Run(fmt.Sprint("goroutines=", goroutines, "/sent=", send), func(b *testing.B) {
			s := local.New()
			keys := make([]string, 1024)
			for i := range keys {
				keys[i] = fmt.Sprint("team-", i, "/agent")
			}
			var ids atomic.Int64
			take := func(id []byte) []byte {
				n := ids.Add(1)
				id = strconv.AppendInt(append(id[:0], "0190163d-8694-739b-aea5-966c26f8"...), n, 16)
				c := quota.Charge{Limit: l, Key: keys[n%1024], Cost: 1}
				if id := string(id); send {
					c.ID = id
				}
				d, err := s.Charge(context.Background(), c)
				if err != nil || !d.Allowed || d.Replayed {
					b.Error(d, err)
				}
				return id
			}
			b.ReportAllocs()
			if goroutines == 1 {
				var id []byte
				for b.Loop() {
					id = take(id)
				}
				return
			}
			b.SetParallelism(goroutines / runtime.GOMAXPROCS(0))
			b.RunParallel(func(pb *testing.PB) {
				var id []byte
				for pb.Next() {
					id = take(id)
				}
			})
		})
	}
	for _, goroutines := range []int{1, 64} {
		bench(goroutines, true)
		bench(goroutines, false)
	}
}

// BenchmarkSlowest reports how long single calls take at a million keys, each phase of which has another kind of work beside
// it: the table grows, stays, is swept after the keys are whole again, shrinks, and refuses new keys. Each charge is an operation.
func BenchmarkSlowest(b *testing.B) {
	const keys = 1 << 20
	var now atomic.Int64
	now.Store(time.Now().UnixMicro())
	names := make([]string, 2*keys)
	for i := range names {
		names[i] = fmt.Sprint("agent-", i)
	}
	l := limit("tokens", 100)
	ctx := context.Background()
	for b.Loop() {
		s := quota.Must(local.NewWithOptions(local.Options{MaxKeys: keys, Clock: func() time.Time { return time.UnixMicro(now.Load()) }}))
		phase := func(name string, calls int, key func(i int) string) {
			took := make([]time.Duration, calls)
			runtime.GC()
			for i := range took {
				start := time.Now()
				s.Charge(ctx, quota.Charge{Limit: l, Key: key(i), Cost: 1})
				took[i] = time.Since(start)
			}
			slices.Sort(took)
			b.ReportMetric(float64(took[calls/2].Nanoseconds()), name+"-p50-ns")
			b.ReportMetric(float64(took[calls-1-calls/10_000].Nanoseconds()), name+"-p99.99-ns")
			b.ReportMetric(float64(took[calls-1].Nanoseconds()), name+"-max-ns")
		}
		phase("grow", keys, func(i int) string { return names[i] })
		phase("full", keys/16, func(i int) string { return names[keys+i] })
		phase("held", keys, func(i int) string { return names[i*7919%keys] })
		now.Add((48 * time.Hour).Microseconds())
		phase("whole", keys, func(i int) string { return names[keys+i] })
		now.Add((48 * time.Hour).Microseconds())
		phase("shrink", 8*keys, func(i int) string { return names[i%1024] })
		b.ReportMetric(float64(s.Len()), "keys-left")
	}
}
