package algorithm_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

func TestDecideDoesNotAllocate(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector allocates")
	}
	for _, k := range []kind{bucket, fixed, first, sliding, offset} {
		t.Run(k.String(), func(t *testing.T) {
			var r quota.Algorithm = mustRule(t, k, 1000, 1000, time.Second).Algorithm
			var s quota.State
			now, i := quota.Micros(base), 0
			got := testing.AllocsPerRun(5000, func() {
				i++
				now += 300
				req := quota.Request{Op: quota.Op(i % 4), Cost: int64(i % 5), Arg: now}
				if next, v := r.Decide(s, req, now); v.Write {
					s = next
				}
			})
			if got != 0 {
				t.Errorf("allocations of a decision: got %v, want 0", got)
			}
		})
	}
}

func BenchmarkDecide(b *testing.B) {
	for _, k := range kinds {
		b.Run(k.String(), func(b *testing.B) {
			var r quota.Algorithm = mustRule(b, k, 1000, 1000, time.Second).Algorithm
			var s quota.State
			now := quota.Micros(base)
			b.ReportAllocs()
			for b.Loop() {
				now += 900 // a little over the rate: one in ten is denied
				if next, v := r.Decide(s, quota.Request{Cost: 1}, now); v.Write {
					s = next
				}
			}
		})
	}
}
