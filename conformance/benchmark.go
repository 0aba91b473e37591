package conformance

import (
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Benchmark measures the time and the allocations of a backend's calls, by its own clock: calls for one key and many,
// from one goroutine and from several, denials, lists, and request ids. The test of a backend has
//
//	func BenchmarkStore(b *testing.B) { conformance.Benchmark(b, harness) }
//
// A call that fails ends the benchmark.
func Benchmark(b *testing.B, h Harness) {
	b.Helper()
	s, err := newSuite(h, options{seed: 1})
	if err != nil {
		b.Fatal(err)
	}
	plenty := tokenBucket.limit("plenty", 1e9, 1e9, time.Second)
	other := tokenBucket.limit("other", 1e9, 1e9, time.Second)
	none := fromFirst.limit("none", 1, 0, year)
	many := make([]string, 1<<14)
	for i := range many {
		many[i] = fmt.Sprintf("team-%d/agent-%d", i%100, i)
	}
	var serial atomic.Int64
	run := func(name string, call func(store quota.Store, n int) error) {
		for _, parallel := range []bool{false, true} {
			full := name
			if parallel {
				full += ", parallel"
			}
			b.Run(full, func(b *testing.B) {
				store := h.Open(b, Opening{Data: fmt.Sprintf("%s%06d", s.run, serial.Add(1))})
				defer store.Close()
				for range 2 { // the first calls, which connect and prepare, are not counted
					if err := call(store, 0); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportAllocs()
				b.ResetTimer()
				if !parallel {
					for n := 0; b.Loop(); n++ {
						if err := call(store, n); err != nil {
							b.Fatal(err)
						}
					}
					return
				}
				var n atomic.Int64
				b.SetParallelism(8)
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := call(store, int(n.Add(1))); err != nil {
							b.Error(err)
							return
						}
					}
				})
			})
		}
	}
	run("one key", func(store quota.Store, _ int) error {
		_, err := store.Charge(bg, quota.Charge{Limit: plenty, Key: "agent", Cost: 1})
		return err
	})
	run("many keys", func(store quota.Store, n int) error {
		_, err := store.Charge(bg, quota.Charge{Limit: plenty, Key: many[n%len(many)], Cost: 1})
		return err
	})
	run("denied", func(store quota.Store, _ int) error {
		_, err := store.Charge(bg, quota.Charge{Limit: none, Key: "agent", Cost: 1})
		return err
	})
	run("list of two", func(store quota.Store, n int) error {
		var out [2]quota.Decision
		err := store.ChargeAll(bg, []quota.Charge{{Limit: plenty, Key: many[n%len(many)], Cost: 1}, {Limit: other, Key: many[n%len(many)], Cost: 1}}, out[:])
		return err
	})
	if h.lacks(IDs) == "" {
		var id atomic.Int64
		run("request id", func(store quota.Store, n int) error {
			_, err := store.Charge(bg, quota.Charge{Limit: plenty, Key: many[n%len(many)], Cost: 1, ID: fmt.Sprint(id.Add(1))})
			return err
		})
	}
}
