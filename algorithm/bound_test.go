package algorithm_test

import (
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

type admitted struct{ at, n int64 }

// demand takes from a fresh key by a clock that never steps back, and returns the admitted charges. A greedy
// client takes all there is, as soon as there is something.
func demand(rng *rand.Rand, r rule, steps int, greedy bool) (grants []admitted, begin, end int64) {
	var c cell
	now := int64(base) + rng.Int64N(1e13)
	begin = now
	for range steps {
		v := c.peek(r, 1, now)
		cost := max(v.Remaining, 1)
		if !greedy {
			cost = randomCost(rng, r, v.Remaining)
		}
		if v = c.take(r, cost, now); v.Allowed && cost > 0 {
			grants = append(grants, admitted{now, cost})
		}
		end = now
		if greedy {
			now += max(int64(c.peek(r, 1, now).RetryAfter), 1)
		} else {
			now += forward(rng, r, v)
		}
	}
	return grants, begin, end
}

// admits runs a property of the admitted charges against rules of all sizes.
func admits(t *testing.T, k kind, property func(t *testing.T, r rule, grants []admitted)) {
	t.Helper()
	rng := random(t)
	for i := range size(150) {
		r := randomRule(rng, k)
		grants, _, _ := demand(rng, r, 300, i%2 == 0)
		property(t, r, grants)
		if t.Failed() {
			t.Fatalf("limit %d refill %d period %dµs tick %dµs", r.limit, r.refill, r.period, r.tick)
		}
	}
}

// A bucket's bound over every interval at once: with S(t) admitted until t, S(t) - rate·t never exceeds its
// least value before by more than capacity + rate·tick.
func TestTokenBucketBound(t *testing.T) {
	admits(t, bucket, func(t *testing.T, r rule, grants []admitted) {
		if over := beyondRefill(r, grants); over != nil {
			t.Fatalf("admitted beyond refill: got %v, want %d and the tokens of a tick at most", over, r.limit)
		}
	})
}

// Tokens that were taken ahead are used when they may be: the bound holds at the times of use. Others' takes do not delay
// them, and cannot be admitted before. Counted when they are charged, the bound is larger by the refill of the longest delay.
func TestTokenBucketAheadBound(t *testing.T) {
	rng := random(t)
	delayed := 0
	for range size(300) {
		r := randomRule(rng, bucket)
		within := forward(rng, r, quota.Verdict{ResetAfter: quota.Micros(r.period)})
		var c cell
		var uses, charges []admitted
		now := int64(base) + rng.Int64N(1e13)
		for range 300 {
			left := c.peek(r, 1, now)
			req := quota.Request{Op: quota.OpAhead, Cost: randomCost(rng, r, left.Remaining), Arg: quota.Micros(rng.Int64N(within + 1))}
			if rng.IntN(3) == 0 {
				req = quota.Request{Cost: req.Cost}
			}
			v := c.do(r, req, now)
			if v.Allowed && req.Cost > 0 {
				uses, charges = append(uses, admitted{now + int64(v.RetryAfter), req.Cost}), append(charges, admitted{now, req.Cost})
				if v.RetryAfter > 0 {
					delayed++
				}
				if n := len(uses); n > 1 && uses[n-1].at < uses[n-2].at {
					t.Fatalf("limit %d refill %d in %dµs: use of a charge at %d: got %d, before the %d of an earlier charge", r.limit, r.refill, r.period, now, uses[n-1].at, uses[n-2].at)
				}
			}
			now += forward(rng, r, v)
		}
		if over := beyondRefill(r, uses); over != nil {
			t.Fatalf("limit %d refill %d in %dµs: used beyond refill: got %v, want %d and the tokens of a tick at most", r.limit, r.refill, r.period, over, r.limit)
		}
		more := r
		more.limit = r.limit + (within/r.period+1)*r.refill + 1
		if over := beyondRefill(more, charges); over != nil && within < 1000*r.period {
			t.Fatalf("limit %d refill %d in %dµs: charged beyond refill, at most %dµs ahead: got %v, want %d at most", r.limit, r.refill, r.period, within, over, more.limit)
		}
	}
	if delayed < 100 {
		t.Errorf("takes ahead with a delay: got %d, want 100 or more, or the test proves little", delayed)
	}
}

// beyondRefill returns by how much admitted tokens, less those that came back, exceed refill over some interval, if that is
// more than the capacity and the tokens of one tick.
func beyondRefill(r rule, grants []admitted) *big.Rat {
	rate := big.NewRat(r.refill, r.period)
	bound := new(big.Rat).Mul(rate, new(big.Rat).SetInt64(r.tick))
	bound.Add(bound, new(big.Rat).SetInt64(r.limit))
	sum := new(big.Rat)
	var least *big.Rat
	for _, g := range grants {
		refilled := new(big.Rat).SetInt64(g.at)
		refilled.Mul(refilled, rate)
		before := new(big.Rat).Sub(sum, refilled)
		if least == nil || before.Cmp(least) < 0 {
			least = before
		}
		sum.Add(sum, new(big.Rat).SetInt64(g.n))
		over := new(big.Rat).Sub(sum, refilled)
		if over.Sub(over, least).Cmp(bound) > 0 {
			return over
		}
	}
	return nil
}

// heaviest returns the most that was admitted in any half-open interval of a length, and its begin.
func heaviest(grants []admitted, length int64) (most *big.Int, begin int64) {
	most, sum, i := new(big.Int), new(big.Int), 0
	for _, g := range grants {
		sum.Add(sum, integer(g.n))
		for ; grants[i].at <= g.at-length; i++ {
			sum.Sub(sum, integer(grants[i].n))
		}
		if sum.Cmp(most) > 0 {
			most, begin = new(big.Int).Set(sum), grants[i].at
		}
	}
	return most, begin
}

func TestFixedWindowBound(t *testing.T) {
	for _, k := range []kind{fixed, first, offset} {
		t.Run(k.String(), func(t *testing.T) {
			admits(t, k, func(t *testing.T, r rule, grants []admitted) {
				var start, sum int64
				for i, g := range grants {
					if i == 0 || g.at-start >= r.period {
						sum = 0
						start = aligned(r, g.at)
					}
					if sum += g.n; sum > r.limit {
						t.Fatalf("admitted in the window of %d: got %d, want %d at most", start, sum, r.limit)
					}
				}
			})
		})
	}
}

func TestSlidingWindowLogBound(t *testing.T) {
	admits(t, slidingLog, func(t *testing.T, r rule, grants []admitted) {
		if most, begin := heaviest(grants, r.period); most.Cmp(integer(r.limit)) > 0 {
			t.Fatalf("admitted from %d on: got %v, want %d at most", begin, most, r.limit)
		}
	})
}

// The bound of a window that begins a fraction x into an aligned one is limit·(1 + x) + 1, and at most 2·limit, from a
// fresh key on. x counts up to the next whole tick.
func TestSlidingWindowBound(t *testing.T) {
	admits(t, sliding, func(t *testing.T, r rule, grants []admitted) {
		sum, i := new(big.Int), 0
		for _, g := range grants {
			sum.Add(sum, integer(g.n))
			for ; grants[i].at <= g.at-r.period; i++ {
				sum.Sub(sum, integer(grants[i].n))
			}
			into := up(grants[i].at%r.period, r.tick)
			bound := new(big.Int).Mul(integer(r.limit), integer(r.period+into))
			bound = least(bound.Add(bound, integer(r.period)), new(big.Int).Mul(integer(2*r.limit), integer(r.period)))
			if new(big.Int).Mul(sum, integer(r.period)).Cmp(bound) > 0 {
				t.Fatalf("admitted from %d to %d: got %v, want %v/%d at most", grants[i].at, g.at, sum, bound, r.period)
			}
		}
	})
}

// A log admits all of its limit, however many charges that is, in any window no more, and a token comes back a 2047th of the
// window late at most. The Lua agrees, see TestConformance.
func TestSlidingWindowLogOfManyCharges(t *testing.T) {
	if testenv.Race {
		t.Skip("this test has one goroutine, and takes long under the race detector")
	}
	rng := random(t)
	for _, limit := range []int64{5000, 9000} {
		for _, window := range []time.Duration{time.Minute, 24 * time.Hour} {
			r := mustRule(t, slidingLog, limit, 0, window)
			var c cell
			var o logOracle
			var exact, grants []admitted // exact ends with the charges that would count without joining
			now, denials, late := int64(base), 0, int64(0)
			checked := limit == 5000 && window == time.Minute // the oracle is slow
			for i := range 3 * limit / 2 {
				now += rng.Int64N(3 * r.period / (2 * limit))
				v := c.take(r, 1, now)
				for len(exact) > 0 && exact[0].at <= now-r.period-step(r) {
					exact = exact[1:]
				}
				if v.Allowed {
					if checked {
						o.charge(r, 1, now)
					}
					grants, exact = append(grants, admitted{now, 1}), append(exact, admitted{now, 1})
				} else if denials++; int64(len(exact)) < limit {
					t.Fatalf("limit %d in %v: got a denial where %d were taken in a window and a 2047th of it, want a grant", limit, window, len(exact))
				} else if late = int64(v.RetryAfter); c.peek(r, 1, now+late-1).Allowed || !c.peek(r, 1, now+late).Allowed {
					t.Fatalf("limit %d in %v: got retry after %d, want the first time at which 1 token is there", limit, window, late)
				}
				if i%64 == 0 {
					if want := room(&o, r, now).Int64(); checked && v.Remaining != want {
						t.Fatalf("limit %d in %v: remaining after %d takes: got %d, want %d", limit, window, len(grants), v.Remaining, want)
					}
				}
				if at := exact[rng.IntN(len(exact))].at; at > now-r.period && rng.IntN(10) == 0 {
					back := c
					if got := back.do(r, quota.Request{Op: quota.OpRefund, Cost: 1, Arg: quota.Micros(at)}, now).Remaining; got != v.Remaining+1 {
						t.Fatalf("limit %d in %v: remaining after a refund of a charge of %d µs ago: got %d, want %d", limit, window, now-at, got, v.Remaining+1)
					}
				}
				if n := len(c.state.Tail); n > 2*algorithm.MaxLogEntries {
					t.Fatalf("limit %d in %v: got %d numbers, want %d at most", limit, window, n, 2*algorithm.MaxLogEntries)
				}
			}
			if most, begin := heaviest(grants, r.period); most.Cmp(integer(limit)) > 0 {
				t.Errorf("limit %d in %v: admitted from %d on: got %v, want %d at most", limit, window, begin, most, limit)
			}
			if denials == 0 {
				t.Errorf("limit %d in %v: got no denial, want some, or the test proves little", limit, window)
			}
		}
	}
}

// A refund gives a charge back also where it was joined with others, and no other charge.
func TestSlidingWindowLogRefundsJoinedCharges(t *testing.T) {
	r := mustRule(t, slidingLog, 5000, 0, time.Minute)
	var c cell
	now := int64(base)
	for i := range int64(5000) {
		now = base + i*10_000
		if v := c.take(r, 1, now); !v.Allowed || v.Remaining != 4999-i {
			t.Fatalf("take %d of 5000: got %+v, want it allowed, remaining %d", i+1, v, 4999-i)
		}
	}
	if v := c.take(r, 1, now); v.Allowed {
		t.Errorf("take 5001 of 5000: got %+v, want a denial", v)
	}
	for i, at := range []int64{base, base + 10_000, base + 2_000_000} {
		if v := c.do(r, quota.Request{Op: quota.OpRefund, Cost: 1, Arg: quota.Micros(at)}, now); v.Remaining != int64(i)+1 {
			t.Errorf("refund of the charge at %d: got remaining %d, want %d", at, v.Remaining, i+1)
		}
	}
	for _, at := range []int64{0, base - r.period, now + 1, now - 1} {
		if v := c.do(r, quota.Request{Op: quota.OpRefund, Cost: 1, Arg: quota.Micros(at)}, now); v.Remaining != 3 {
			t.Errorf("refund of a charge at %d that was never made: got remaining %d, want 3", at, v.Remaining)
		}
	}
	if c.state.C == 0 {
		t.Error("state: got C 0, want the time up to which the log is joined")
	}
	if c.take(r, 1, now+2*r.period); c.state.C != 0 {
		t.Errorf("state, once the joined entries have left: got C %d, want 0", c.state.C)
	}
}

// overfills reports whether a tick can overfill the bucket of a client that takes whole tokens as they come.
func overfills(r rule) bool {
	return perTick(r).Cmp(new(big.Rat).SetInt64(r.limit-1)) > 0
}

// A greedy client gets its due.
func TestGreedyGetsItsDue(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(100) {
			r := randomRule(rng, k)
			grants, begin, end := demand(rng, r, 200, true)
			got := new(big.Int)
			for _, g := range grants {
				got.Add(got, integer(g.n))
			}
			due := integer(r.limit)
			switch k {
			case bucket:
				if overfills(r) {
					continue
				}
				ticks := (down(end, r.tick) - down(begin, r.tick)) / r.tick
				gain := new(big.Rat).SetInt64(ticks)
				gain.Mul(gain, perTick(r))
				due.Add(due, new(big.Int).Quo(gain.Num(), gain.Denom()))
			case fixed, offset:
				windows := (aligned(r, end)-aligned(r, begin))/r.period + 1
				due.Mul(due, integer(windows))
			case first, slidingLog:
				due.Mul(due, integer((end-begin)/r.period+1))
			case sliding:
				// At a window's last tick, the count before still weighs one tick, rounded up.
				windows := down(end, r.period)/r.period - down(begin, r.period)/r.period
				ticks := r.period / r.tick
				each := r.limit - (r.limit+ticks-1)/ticks
				due.Add(due, new(big.Int).Mul(integer(max(windows-1, 0)), integer(each)))
			}
			if got.Cmp(due) < 0 {
				t.Fatalf("limit %d refill %d period %dµs tick %d: admitted from %d to %d: got %v, want %v or more",
					r.limit, r.refill, r.period, r.tick, begin, end, got, due)
			}
		}
	})
}
