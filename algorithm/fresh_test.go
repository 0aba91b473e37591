package algorithm_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

// A store may drop a state when ResetAfter has passed: from then on it decides as a fresh one.
func TestForgettable(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for i := range size(1500) {
			r := randomRule(rng, k)
			kept, now := busy(rng, r)
			receipt := now
			if rng.IntN(4) == 0 {
				r = randomRule(rng, k)
			}
			v := kept.peek(r, 0, now)
			if v.ResetAfter > 0 && kept.peek(r, 0, now+int64(v.ResetAfter)-1).Remaining >= r.limit {
				t.Fatalf("set %d: reset after, of %+v: got %dµs, want less: the limit is whole before", i, kept, v.ResetAfter)
			}
			now += int64(v.ResetAfter)
			var dropped cell
			for step := range 8 {
				req := quota.Request{Op: quota.Op(rng.IntN(4)), Cost: randomCost(rng, r, v.Remaining), Arg: quota.Micros(receipt)}
				before := kept
				a, b := kept.do(r, req, now), dropped.do(r, req, now)
				if a != b || a.Write && !sameState(kept.state, dropped.state) {
					t.Fatalf("set %d step %d: %+v at %d on %+v: kept gives %+v %+v, dropped gives %+v %+v",
						i, step, req, now, before, a, kept, b, dropped)
				}
				v = a
				now += forward(rng, r, v)
			}
		}
	})
}

func TestReset(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(500) {
			r := randomRule(rng, k)
			c, now := busy(rng, r)
			stored := !c.state.IsZero()
			v := c.do(r, quota.Request{Op: quota.OpReset, Cost: 5}, now)
			if want := (quota.Verdict{Outcome: quota.Outcome{Allowed: true, Write: stored}, Remaining: r.limit}); v != want || !c.state.IsZero() {
				t.Fatalf("reset: got %+v, %+v; want %+v, no state", v, c, want)
			}
		}
	})
}
