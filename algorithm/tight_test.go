package algorithm_test

import (
	"math/rand/v2"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

func TestRetryAfterIsTight(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		denials := 0
		for range size(4000) {
			r := randomRule(rng, k)
			c, now := busy(rng, r)
			if rng.IntN(3) == 0 {
				r = randomRule(rng, k) // the limit changed meanwhile
			}
			now -= rng.Int64N(2) * rng.Int64N(second)
			denials += checkTight(t, rng, r, c, now)
			if t.Failed() {
				return
			}
		}
		if denials == 0 {
			t.Fatal("denials: got 0, want some, else the test is void")
		}
	})
}

// checkTight returns 1 where a random request was denied.
func checkTight(t *testing.T, rng *rand.Rand, r rule, c cell, now int64) int {
	t.Helper()
	cost := randomCost(rng, r, c.peek(r, 0, now).Remaining)
	v := c.take(r, cost, now)
	switch after := v.RetryAfter; {
	case v.Allowed != (after == 0), (after == quota.Forever) != (cost > r.limit), after < 0:
		t.Errorf("%+v: %d of %d in %dµs at %d: got %+v, want retry after 0 of a grant, Forever only above the limit", c, cost, r.limit, r.period, now, v)
	case v.Allowed:
		return 0
	case after == quota.Forever:
		if c.peek(r, cost, now+2*year.Microseconds()*10).Allowed {
			t.Errorf("%+v: %d of %d, decades later: got it allowed, want it denied", c, cost, r.limit)
		}
	default:
		for _, early := range []int64{1, rng.Int64N(int64(after)) + 1} {
			if c.peek(r, cost, now+int64(after)-early).Allowed {
				t.Errorf("%+v: %d of %d in %dµs at %d: got it allowed %dµs before the retry after %dµs, want it denied", c, cost, r.limit, r.period, now, early, after)
			}
		}
		if !c.peek(r, cost, now+int64(after)).Allowed {
			t.Errorf("%+v: %d of %d in %dµs at %d: got it denied after %dµs, want it allowed", c, cost, r.limit, r.period, now, after)
		}
	}
	return 1
}

// A bucket that counts in a coarser tick admits at the tick and not a microsecond earlier.
func TestRetryAfterOfCoarseTick(t *testing.T) {
	r := mustRule(t, bucket, 1_000_000_000, 1_000_000_007, 3600*second*1000)
	if r.tick == 1 {
		t.Fatalf("tick: got %d µs, want a coarse one, else the test is void", r.tick)
	}
	var c cell
	now := int64(base) + 7
	c.take(r, r.limit, now)
	v := c.take(r, 1, now)
	at := now + int64(v.RetryAfter)
	if at%r.tick != 0 || c.peek(r, 1, at-1).Allowed || !c.peek(r, 1, at).Allowed {
		t.Errorf("tick %d: got %+v at %d, want the first tick at which 1 token is allowed", r.tick, v, now)
	}
}
