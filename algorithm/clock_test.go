package algorithm_test

import (
	"math/big"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

// A backward step never frees quota, however far it goes.
func TestClockBackFreesNothing(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(3000) {
			r := randomRule(rng, k)
			c, now := busy(rng, r)
			if c.state.IsZero() {
				continue
			}
			// A log of a shorter window than its state's would forget, but then not for the clock.
			if k != slidingLog && rng.IntN(4) == 0 {
				r = randomRule(rng, k)
			}
			now += forward(rng, r, quota.Verdict{})
			last := c.peek(r, 0, now).Remaining
			for range 4 {
				back := []int64{1, second, second + 1, rng.Int64N(second), rng.Int64N(2*r.period + 1), rng.Int64N(1e14)}[rng.IntN(6)]
				now -= back
				v := c.take(r, r.limit+1, now) // denied; writes a state that lies ahead
				if v.Remaining > max(last, -r.debt) {
					t.Fatalf("limit %d in %dµs: clock %dµs back on %+v: got %+v, want remaining %d at most", r.limit, r.period, back, c, v, max(last, -r.debt))
				}
				if v.Write && aheadOf(k, c.state, now) {
					t.Fatalf("state after a write: got %+v, want it not ahead of %d", c, now)
				}
				last = v.Remaining
			}
		}
	})
}

// After a backward step a key is as fresh within the time it takes to recover from its consumption, and the
// second that is waited for.
func TestClockBackStarvesNobody(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(2000) {
			r := randomRule(rng, k)
			c, now := busy(rng, r)
			full := int64(c.peek(r, 0, now).ResetAfter)
			switch k {
			case bucket: // the refill since the last charge is not in the state
				if !c.state.IsZero() {
					full = int64(c.peek(r, 0, c.state.B).ResetAfter)
				}
			case fixed, first, slidingLog, offset:
				full = max(full, r.period)
			case sliding:
				full = max(full, 2*r.period)
			}
			now -= rng.Int64N(1e14)
			v := c.take(r, r.limit+1, now)
			// A coarse tick may have just begun where the clock is now.
			if int64(v.ResetAfter) > full+second+r.tick {
				t.Fatalf("limit %d in %dµs: reset after, of %+v: got %dµs, want %dµs at most", r.limit, r.period, c, v.ResetAfter, full+second+r.tick)
			}
			if !c.take(r, r.limit, now+int64(v.ResetAfter)).Allowed {
				t.Fatalf("take of the whole limit after the reset of %+v: got it denied, want it allowed", c)
			}
		}
	})
}

// A clock that flaps adds at most the worth of its forward steps: rate × step for a bucket, one limit for a
// window whose boundary the step passes.
func TestClockFlaps(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(150) {
			r := randomRule(rng, k)
			var c cell
			now := int64(base) + rng.Int64N(1e13)
			got, bound := new(big.Int), new(big.Rat).SetInt64(r.limit)
			if k == sliding {
				bound.SetInt64(2 * r.limit)
			}
			for range 100 {
				step := forward(rng, r, quota.Verdict{})
				if rng.IntN(2) == 0 {
					step = rng.Int64N(3 * second)
				}
				if rng.IntN(3) > 0 {
					now -= step
				} else {
					now += step
					more := new(big.Rat).SetInt64(r.limit)
					if k == bucket {
						// Both ends of a step are floored, so a coarse tick may pass within it.
						ticks := step / r.tick
						if r.tick > 1 {
							ticks++
						}
						more = lesser(more, new(big.Rat).Mul(perTick(r), new(big.Rat).SetInt64(ticks)))
					} else if step == 0 {
						more.SetInt64(0)
					}
					bound.Add(bound, more)
				}
				if n := max(c.peek(r, 0, now).Remaining, 1); c.take(r, n, now).Allowed {
					got.Add(got, integer(n))
				}
				if new(big.Rat).SetInt(got).Cmp(bound) > 0 {
					t.Fatalf("limit %d refill %d in %dµs tick %d: admitted: got %v, want %v at most", r.limit, r.refill, r.period, r.tick, got, bound)
				}
			}
		}
	})
}

// The second is the line: a state up to it ahead is waited for, one further ahead is moved to the clock, and
// written, also where the request is denied.
func TestClockBackRebases(t *testing.T) {
	tests := map[kind]struct{ early, late int64 }{ // RetryAfter when a second, and a second and 1 µs, behind
		bucket:     {second + second/10, second / 10},
		fixed:      {second + 60*second, 1 + second},
		first:      {second + 60*second, 60 * second},
		sliding:    {second + 60*second, 1 + second},
		slidingLog: {second + 60*second, 60 * second},
		offset:     {second + 60*second, 1 + second},
	}
	forEach(t, func(t *testing.T, k kind) {
		want := tests[k]
		r := mustRule(t, k, 10, 600, 60*1e9)
		start := down(base, 60*second) + r.offset
		var c cell
		c.take(r, 10, start)
		used := c.state
		if v := c.take(r, 1, start-second); v.Write || int64(v.RetryAfter) != want.early {
			t.Errorf("clock a second back: got %+v, want no write, retry after %d", v, want.early)
		}
		v := c.take(r, 1, start-second-1)
		if v.Allowed || !v.Write || v.Remaining != 0 || int64(v.RetryAfter) != want.late {
			t.Errorf("clock more than a second back: got %+v, want it denied and written, remaining 0, retry after %d", v, want.late)
		}
		if sameState(used, c.state) {
			t.Errorf("state: got %+v as before, want it moved", c.state)
		}
		if v = c.take(r, 1, start-second-1); v.Write {
			t.Errorf("second denial: got %+v, want no write", v)
		}
	})
}
