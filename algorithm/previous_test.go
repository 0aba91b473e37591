package algorithm_test

import (
	"math/rand/v2"
	"testing"

	"github.com/fleetquota/fleetquota/algorithm/testdata/previous"
	"github.com/fleetquota/fleetquota/quota"
)

// While a fleet rolls a release out, this release and the previous one decide on the same states in turn. The bounds of
// the rules hold all the same: takes and refunds mint no quota.
func TestPreviousReleaseInTurn(t *testing.T) {
	for _, k := range []kind{bucket, sliding} {
		t.Run(k.String(), func(t *testing.T) {
			rng := random(t)
			for range size(300) {
				r := randomRule(rng, k)
				grants := takeInTurn(rng, r)
				if k == sliding {
					if most, begin := heaviest(grants, r.period); most.Cmp(integer(2*r.limit)) > 0 {
						t.Errorf("limit %d in %dµs: admitted from %d: got %v, want %d at most", r.limit, r.period, begin, most, 2*r.limit)
					}
				} else if over := beyondRefill(r, grants); over != nil {
					t.Errorf("limit %d refill %d in %dµs: admitted beyond refill: got %v, want %d at most", r.limit, r.refill, r.period, over, r.limit)
				}
				if t.Failed() {
					return
				}
			}
		})
	}
}

// takeInTurn takes and refunds by either release in turn, from a fresh key on. A refund is a grant of less than 0.
func takeInTurn(rng *rand.Rand, r rule) (grants []admitted) {
	before := r
	before.Algorithm = previous.Of(r.Algorithm)
	var c cell
	var receipts []admitted
	now := int64(base) + rng.Int64N(1e13)
	for range 300 {
		release := r
		if rng.IntN(2) == 0 {
			release = before
		}
		left := c.peek(release, 1, now)
		if r.kind == bucket && len(receipts) > 0 && rng.IntN(4) == 0 {
			i := rng.IntN(len(receipts))
			v := c.do(release, quota.Request{Op: quota.OpRefund, Cost: receipts[i].n, Arg: quota.Micros(receipts[i].at)}, now)
			if back := v.Remaining - left.Remaining; back > 0 {
				grants = append(grants, admitted{now, -back})
			}
			receipts = append(receipts[:i], receipts[i+1:]...)
			continue
		}
		cost := randomCost(rng, r, left.Remaining)
		v := c.take(release, cost, now)
		if v.Allowed && cost > 0 {
			grants = append(grants, admitted{now, cost})
			receipts = append(receipts, admitted{now, cost})
		}
		now += forward(rng, r, v)
	}
	return grants
}
