package algorithm_test

import (
	"slices"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

// A denial, a peek and a cost of nothing write nothing, and no request writes to the list it was given.
func TestTraceless(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(3000) {
			r := randomRule(rng, k)
			c, now := busy(rng, r)
			if rng.IntN(4) == 0 {
				r = randomRule(rng, k)
			}
			now += forward(rng, r, quota.Verdict{}) - rng.Int64N(3*second)
			req := quota.Request{Op: quota.Op(rng.IntN(4)), Cost: randomCost(rng, r, 1), Arg: quota.Micros(now)}
			if rng.IntN(4) == 0 {
				req.Cost = 0
			}
			s := c.state
			tail := slices.Clone(s.Tail)
			got, v := r.Decide(s, req, quota.Micros(now))
			if !slices.Equal(tail, s.Tail) {
				t.Fatalf("%+v: tail of the argument: got %v, want it unchanged, %v", req, s.Tail, tail)
			}
			// Spare capacity behind the tail belongs to the store as well.
			if n := len(got.Tail); n > 0 && v.Write && len(s.Tail) > 0 && &got.Tail[0] == &s.Tail[0] {
				t.Fatalf("%+v on %+v: got a tail that shares memory with the argument, want a new one", req, s)
			}
			idle := !v.Allowed || req.Op == quota.OpPeek || req.Cost == 0
			if idle && v.Write && !aheadOf(k, s, now) {
				t.Fatalf("%+v at %d on %+v: got %+v, want no write", req, now, s, v)
			}
			if !idle && req.Op != quota.OpRefund && !v.Write && v.Remaining > -r.debt {
				t.Fatalf("%+v at %d on %+v: got %+v, want a write", req, now, s, v)
			}
		}
	})
}

// aheadOf reports whether a state is more than a second ahead of now.
func aheadOf(k kind, s quota.State, now int64) bool {
	switch k {
	case bucket:
		return s.B-now > second
	case slidingLog:
		return len(s.Tail) > 0 && s.Tail[len(s.Tail)-2]-now > second
	}
	return s.A-now > second
}
