package algorithm_test

import (
	"math"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

func debit(n int64) quota.Request { return quota.Request{Op: quota.OpDebit, Cost: n} }

// Debits of any size go down to the stated floor, never below, and time repays them.
func TestDebt(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(1000) {
			r := randomRule(rng, k)
			var c cell
			now := int64(base) + rng.Int64N(1e13)
			c.take(r, rng.Int64N(r.limit+1), now)
			last := c.peek(r, 0, now).Remaining
			for range 6 {
				cost := []int64{1, r.limit, math.MaxInt64, 1 << 62, rng.Int64N(1 << 52)}[rng.IntN(5)]
				v := c.do(r, debit(cost), now)
				if want := max(last-min(cost, 1<<53), -r.debt); !v.Allowed || v.Remaining != want {
					t.Fatalf("limit %d debt %d: debit of %d: got %+v, want it allowed, remaining %d", r.limit, r.debt, cost, v, want)
				}
				last = v.Remaining
				if rng.IntN(2) == 0 {
					continue
				}
				now += rng.Int64N(r.period)
				if k == sliding && rng.IntN(2) == 0 {
					now = down(now, r.period) + r.period // where the old count weighs fully
				}
				if last = c.peek(r, 0, now).Remaining; last < -r.debt {
					t.Fatalf("limit %d: remaining: got %d, want %d or more", r.limit, last, -r.debt)
				}
			}
			if last < 0 && c.take(r, 0, now).Allowed {
				t.Fatalf("take of 0 with %d remaining: got it allowed, want it denied", last)
			}
			v := c.do(r, debit(math.MaxInt64), now)
			if v.Remaining != -r.debt || v.ResetAfter <= 0 || v.ResetAfter.Duration() > 2*10*year+time.Second {
				t.Fatalf("limit %d: the largest debit: got %+v, want remaining %d, reset within twice ten years", r.limit, v, -r.debt)
			}
			if v = c.take(r, r.limit, now+int64(v.ResetAfter)); !v.Allowed {
				t.Fatalf("limit %d: take of the whole limit after the reset: got %+v, want it allowed", r.limit, v)
			}
		}
	})
}

func TestRefund(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(1000) {
			r := randomRule(rng, k)
			var c cell
			at := int64(base) + rng.Int64N(1e13)
			cost := 1 + rng.Int64N(r.limit)
			c.take(r, cost, at)
			refund := quota.Request{Op: quota.OpRefund, Cost: cost, Arg: quota.Micros(at)}

			part := c
			refund.Cost = rng.Int64N(cost) + 1
			if v := part.do(r, refund, at); v.Remaining != r.limit-cost+refund.Cost {
				t.Fatalf("%d of %d taken and %d refunded: got %+v, want remaining %d", cost, r.limit, refund.Cost, v, r.limit-cost+refund.Cost)
			}
			whole := c
			refund.Cost = math.MaxInt64
			if v := whole.do(r, refund, at); v.Remaining != r.limit || v.ResetAfter != 0 || !whole.state.IsZero() {
				t.Fatalf("all refunded: got %+v, %+v; want remaining %d, no state", v, whole, r.limit)
			}
			// Once the charge counts no more, its receipt does not refund later charges.
			late := at + r.period*2
			if k == bucket {
				late = at + int64(float64(r.limit)/float64(r.refill)*float64(r.period)*1.001) + 2*r.tick
			}
			c.take(r, cost, late)
			for _, paid := range []quota.Micros{quota.Micros(at), 0, math.MinInt64} {
				refund.Arg = paid
				if v := c.do(r, refund, late); v.Write || v.Remaining != r.limit-cost {
					t.Fatalf("limit %d: refund of %d at %d, charged at %d: got %+v, want no write, remaining %d", r.limit, cost, late, paid, v, r.limit-cost)
				}
			}
		}
	})
}
