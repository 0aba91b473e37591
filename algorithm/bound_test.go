package algorithm_test

import (
	"math/big"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
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
			req := quota.Request{Op: quota.OpAhead, Cost: randomCost(rng, r, left.Remaining), At: quota.Micros(rng.Int64N(within + 1))}
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
	for _, k := range []kind{fixed, first} {
		t.Run(k.String(), func(t *testing.T) {
			admits(t, k, func(t *testing.T, r rule, grants []admitted) {
				var start, sum int64
				for i, g := range grants {
					if i == 0 || g.at-start >= r.period {
						sum = 0
						if start = g.at; k == fixed {
							start = down(g.at, r.period)
						}
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

func TestSlidingWindowLogEntries(t *testing.T) {
	r := mustRule(t, slidingLog, 1<<30, 0, time.Minute)
	var c cell
	now := int64(base)
	for range algorithm.MaxLogEntries {
		now++
		if !c.take(r, 1, now).Allowed {
			t.Fatalf("charge at %d, before the log is full: got it denied, want it allowed", now)
		}
	}
	if v := c.take(r, 1, now); !v.Allowed {
		t.Errorf("charge in the newest entry's microsecond: got %+v, want it allowed", v)
	}
	v := c.take(r, 1, now+1)
	wait := int64(v.RetryAfter)
	if v.Allowed || v.Remaining != 0 || now+1+wait != base+1+r.period {
		t.Errorf("charge to a full log: got %+v, want it denied, remaining 0, until the oldest entry leaves", v)
	}
	if !c.peek(r, 0, now+1).Allowed {
		t.Error("peek of 0 at a full log: got it denied, want it allowed")
	}
	if c.peek(r, 1, now+wait).Allowed || !c.peek(r, 1, now+1+wait).Allowed {
		t.Errorf("retry after: got %d, want the first time at which 1 token is allowed", wait)
	}
	c.do(r, debit(5), now+2)
	if n := len(c.state.Tail); n != 2*algorithm.MaxLogEntries {
		t.Errorf("tail after a debit to a full log: got %d numbers, want %d", n, 2*algorithm.MaxLogEntries)
	}
	if left := c.peek(r, 0, now+1+wait).Remaining; left != r.limit-(algorithm.MaxLogEntries-1)-1-5 {
		t.Errorf("remaining once the oldest entry left: got %d, want %d", left, r.limit-(algorithm.MaxLogEntries-1)-1-5)
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
			if k == slidingLog && r.limit > 1<<12 {
				continue // greedy fills its entries first
			}
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
			case fixed:
				windows := down(end, r.period)/r.period - down(begin, r.period)/r.period + 1
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
