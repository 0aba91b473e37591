package algorithm_test

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// TestRefundUndoes takes random steps, of which one is a charge that is refunded later, and beside them the same steps
// without that charge, in numbers without bound. In between other callers charge too.
//
// A refund gives back at least as much as if the charge had never been made, until the key was whole, or the window of the
// charge has passed. It gives back exactly as much where the key without the charge was never whole in between: a bucket
// that would have been full would have lost refill, which the charge saved.
func TestRefundUndoes(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		exact, late := 0, 0
		for range sized(10_000, 400_000) {
			u := undo{k: k, r: smallRule(rng, k), without: newOracle(k), now: base + rng.Int64N(second)}
			u.walk(t, rng)
			if t.Failed() {
				return
			}
			exact += u.exact
			late += u.late
		}
		t.Logf("%d refunds were exact, of which %d came after the time in which a whole quota comes back", exact, late)
		if exact == 0 {
			t.Error("refunds that were exact: got none, want some, or the test proves little")
		}
		if k == bucket && late == 0 {
			t.Error("refunds after the time in which a bucket fills: got none, want some, or the test proves little")
		}
	})
}

// undo is a walk with a charge that is refunded, and an oracle that never saw the charge.
type undo struct {
	k           kind
	r           rule
	with        cell
	without     oracle
	now         int64
	whole       bool // the key without the charge was whole since
	exact, late int
}

func (u *undo) walk(t *testing.T, rng *rand.Rand) {
	t.Helper()
	for range rng.IntN(4) {
		u.others(rng)
	}
	if u.k == first && u.without.used(u.r, u.now).Sign() == 0 {
		return // without the charge another one would begin the window
	}
	u.whole = false
	cost := 1 + rng.Int64N(u.r.limit)
	receipt := u.now
	if v := u.with.do(u.r, quota.Request{Op: quota.OpDebit, Cost: cost}, u.now); v.Remaining < -u.r.debt {
		return // the debt has no more room
	}
	for range rng.IntN(20) {
		u.others(rng)
	}
	before := u.with.peek(u.r, 0, u.now)
	v := u.with.do(u.r, quota.Request{Op: quota.OpRefund, Cost: cost, Arg: quota.Micros(receipt)}, u.now)
	want := room(u.without, u.r, u.now).Int64()
	fail := func(words string) {
		t.Errorf("limit %d refill %d period %dµs: a charge of %d at %d, refunded %dµs later: remaining: got %d, before it %d, want %s %d, as if it had never been made",
			u.r.limit, u.r.refill, u.r.period, cost, receipt, u.now-receipt, v.Remaining, before.Remaining, words, want)
	}
	switch {
	case v.Remaining < want:
		fail("at least")
	case !u.whole && v.Remaining != want:
		fail("exactly")
	case !u.whole && v.Remaining > before.Remaining:
		u.exact++
		if u.k == bucket && u.now-receipt > u.r.limit*u.r.period/u.r.refill {
			u.late++
		}
	}
}

// others charges for other callers, who find the same room with the charge and without it, after a step in time.
func (u *undo) others(rng *rand.Rand) {
	if u.k == bucket {
		u.now += rng.Int64N(2 * u.r.period / u.r.refill * max(u.r.limit/4, 1))
	} else {
		u.now += rng.Int64N(u.r.period / 2)
	}
	u.whole = u.whole || u.without.used(u.r, u.now).Sign() == 0
	if left := u.with.peek(u.r, 0, u.now).Remaining; left > 0 {
		n := 1 + rng.Int64N(left)
		u.with.take(u.r, n, u.now)
		u.without.charge(u.r, n, u.now)
	}
}

var smallPeriods = []time.Duration{time.Millisecond, 7 * time.Millisecond, time.Second}

// smallRule returns a rule of few tokens, whose numbers meet often.
func smallRule(rng *rand.Rand, k kind) rule {
	for {
		if r, err := newRule(k, 1+rng.Int64N(12), 1+rng.Int64N(4), smallPeriods[rng.IntN(len(smallPeriods))]); err == nil {
			return r
		}
	}
}
