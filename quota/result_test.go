package quota_test

import (
	"math"
	"math/big"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

func TestLess(t *testing.T) {
	r := random(t)
	edges := []int64{0, 1, 2, 3, math.MaxInt64, math.MaxInt64 - 1, 1 << 32, 1<<32 + 1, 1 << 62}
	number := func() int64 {
		n := r.Int64() >> r.IntN(63)
		if r.IntN(3) == 0 {
			n = edges[r.IntN(len(edges))]
		}
		return n
	}
	for range sized(200_000, 5_000_000) {
		a, b, c, d := number(), max(number(), 1), number(), max(number(), 1)
		if r.IntN(2) == 0 {
			a = -a - int64(r.IntN(2)) // down to the smallest integer
		}
		if r.IntN(2) == 0 {
			c = -c - int64(r.IntN(2))
		}
		if r.IntN(4) == 0 {
			c, d = a, b
		}
		left := new(big.Int).Mul(big.NewInt(a), big.NewInt(b))
		right := new(big.Int).Mul(big.NewInt(c), big.NewInt(d))
		if got, want := quota.Less(a, b, c, d), left.Cmp(right) < 0; got != want {
			t.Fatalf("%d*%d < %d*%d: got %v, want %v", a, b, c, d, got, want)
		}
	}
}

func TestDecider(t *testing.T) {
	ok := func(remaining, limit int64) quota.Decision {
		return quota.Decision{Allowed: true, Remaining: remaining, Capacity: limit}
	}
	no := func(after time.Duration) quota.Decision { return quota.Decision{RetryAfter: after, Capacity: 1} }
	for _, c := range []struct {
		ds   []quota.Decision
		want int
	}{
		{[]quota.Decision{ok(1, 2)}, 0},
		{[]quota.Decision{ok(1, 2), ok(1, 3), ok(1, 2)}, 1},
		{[]quota.Decision{ok(5, 10), ok(1, 2)}, 0},
		{[]quota.Decision{ok(0, 10), ok(-1, 1000)}, 1},
		{[]quota.Decision{ok(-1, 10), ok(-1, 9)}, 1},
		{[]quota.Decision{ok(1000, 1000), ok(0, 0)}, 1}, // nothing is left of a limit of 0
		{[]quota.Decision{ok(0, 0), ok(0, 5), ok(1, 5)}, 0},
		{[]quota.Decision{ok(0, 0), ok(-1, 5), ok(-2, 0), ok(-3, 5)}, 2},
		{[]quota.Decision{ok(1<<40, 1<<40), ok(1<<40-1, 1<<40)}, 1},
		{[]quota.Decision{ok(0, 1), no(time.Second), ok(-5, 1)}, 1},
		{[]quota.Decision{no(time.Second), no(time.Minute), no(time.Hour), no(time.Minute)}, 2},
		{[]quota.Decision{no(quota.Never - 1), no(quota.Never)}, 1},
		{[]quota.Decision{no(time.Second), no(time.Second)}, 0},
	} {
		if got := quota.Decider(c.ds); got != c.want {
			t.Errorf("Decider(%v): got %d, want %d", c.ds, got, c.want)
		}
	}
	// Against exact fractions.
	r := random(t)
	for range sized(5000, 100_000) {
		ds := make([]quota.Decision, 1+r.IntN(6))
		best := 0
		var share *big.Rat
		for i := range ds {
			ds[i] = ok(r.Int64N(40)-20, r.Int64N(21))
			if ds[i].Capacity == 0 {
				ds[i].Remaining = min(ds[i].Remaining, 0)
			}
			s := big.NewRat(ds[i].Remaining, max(ds[i].Capacity, 1))
			if share == nil || s.Cmp(share) < 0 {
				best, share = i, s
			}
		}
		if got := quota.Decider(ds); got != best {
			t.Fatalf("Decider(%v): got %d, want %d", ds, got, best)
		}
	}
}
