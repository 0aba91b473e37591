package quota_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// holder is a rule with holds, in name.
type holder struct {
	quota.Algorithm
	ttl time.Duration
}

func (h holder) Spec() quota.Spec {
	s := h.Algorithm.Spec()
	s.Rule, s.TTL = quota.Rule{'h'}, h.ttl
	return s
}

func holding(ttl time.Duration) *quota.Limit {
	return quota.NewLimit("held", holder{algorithm.TokenBucket(10, 1, time.Second), ttl})
}

func TestCheckHolds(t *testing.T) {
	held, plain := holding(time.Minute), testkit.Bucket("plain", 10, time.Second)
	for text, c := range map[string]quota.Charge{
		"operation is hold; accepted: OpTake, for the rule tb1 of limit": {Limit: plain, Op: quota.OpHold, Cost: 1},
		"operation is spend":                          {Limit: plain, Op: quota.OpSpend, Until: 1},
		"operation is renew":                          {Limit: plain, Op: quota.OpRenew, Until: 1},
		"Until of a spend is 0; accepted":             {Limit: held, Op: quota.OpSpend, Held: 1},
		"Until of a renew is -1; accepted":            {Limit: held, Op: quota.OpRenew, Held: 1, Until: -1},
		"Held of a spend is -1; accepted":             {Limit: held, Op: quota.OpSpend, Held: -1, Until: 1},
		"Held of a renew is 9007199254740993":         {Limit: held, Op: quota.OpRenew, Held: 1<<53 + 1, Until: 1},
		"Cost of a renew is 1; accepted: 0":           {Limit: held, Op: quota.OpRenew, Cost: 1, Held: 1, Until: 1},
		"Held of a hold is 1; accepted: 0 but":        {Limit: held, Op: quota.OpHold, Cost: 1, Held: 1},
		"Until of a take is 1; accepted: 0 but":       {Limit: held, Cost: 1, Until: 1},
		"Floor of a take-ahead is 1; accepted":        {Limit: plain, Op: quota.OpAhead, Cost: 1, Floor: 1},
		"operation is unknown; accepted: OpTake":      {Limit: held, Op: quota.OpRenew + 1},
		"operation of an alternative is spend; accep": {Limit: held, Op: quota.OpSpend, Until: 1, Alternative: 1},
	} {
		c.Key = "k"
		testkit.WantInvalid(t, quota.Check([]quota.Charge{c}), text)
	}
	for _, c := range []quota.Charge{
		{Op: quota.OpHold, Cost: 1 << 60, Floor: 3}, {Op: quota.OpHold}, {Op: quota.OpHold, Alternative: 1, Floor: 1, FloorOf: 2},
		{Op: quota.OpSpend, Held: 3, Until: 1, Cost: 1 << 60}, {Op: quota.OpRenew, Until: 1}, {Op: quota.OpRenew, Held: quota.MaxNumber, Until: quota.MaxNumber},
	} {
		c.Limit, c.Key = held, "k"
		if err := quota.Check([]quota.Charge{c}); err != nil {
			t.Errorf("%v: got %v, want it accepted", c, err)
		}
	}
	if err := quota.NewLimit("long", holder{algorithm.TokenBucket(10, 1, time.Second), 11 * 365 * 24 * time.Hour}).Err(); err == nil {
		t.Error("a TTL of eleven years: got no error, want ErrInvalid")
	}
	for op := quota.OpTake; op <= quota.OpRenew; op++ {
		firm := op == quota.OpDebit || op == quota.OpRefund || op == quota.OpReset || op == quota.OpSpend
		if op.Deniable() == firm || op.Holds() != (op >= quota.OpHold) {
			t.Errorf("%v: got deniable %v, holds %v; want %v, %v", op, op.Deniable(), op.Holds(), !firm, op >= quota.OpHold)
		}
	}
}

// The receipt of a hold is settled and refunded by a spend, and renewed by the time of its lapse.
func TestHoldReceipt(t *testing.T) {
	l := holding(time.Minute)
	c := quota.Charge{Limit: l, Key: "k", Op: quota.OpHold, Cost: 5, ID: "x"}
	d := quota.Decision{Allowed: true, Source: quota.FromFallback, Held: 5, Until: 70, At: 10}
	for _, x := range []struct {
		got, want quota.Charge
	}{
		{c.Settle(d, 7), quota.Charge{Limit: l, Key: "k", Op: quota.OpSpend, Cost: 7, Held: 5, Until: 70, From: quota.FromFallback, ID: "x/correction"}},
		{c.Settle(d, 0), quota.Charge{Limit: l, Key: "k", Op: quota.OpSpend, Held: 5, Until: 70, From: quota.FromFallback, ID: "x/correction"}},
		{c.Refund(d, 2), quota.Charge{Limit: l, Key: "k", Op: quota.OpSpend, Held: 2, Until: 70, From: quota.FromFallback, ID: "x/correction"}},
		{c.Renew(d), quota.Charge{Limit: l, Key: "k", Op: quota.OpRenew, Held: 5, Until: 70, From: quota.FromFallback}},
		// Admitted by a policy, and by no store.
		{c.Settle(quota.Decision{Allowed: true, Source: quota.FromOpen}, 7), quota.Charge{Limit: l, Key: "k", Op: quota.OpDebit, Cost: 7, From: quota.FromOpen, ID: "x/correction"}},
	} {
		if x.got != x.want {
			t.Errorf("got %+v, want %+v", x.got, x.want)
		}
	}
	testkit.WantInvalid(t, quota.Check([]quota.Charge{c.Refund(d, 6)}), "refund is", "Decision.Held of a hold")
	testkit.WantInvalid(t, quota.Check([]quota.Charge{c.Settle(d, -1)}), "actual cost or refund is -1")
	if got, want := c.Settle(d, 7).String(), `spend 7 of held for "k", of 5 held until 1970-01-01T00:00:00.000070Z, id "x/correction"`; got != want {
		t.Errorf("text of a spend: got %s, want %s", got, want)
	}
	if got, want := d.String(), "allowed by the fallback: holds 5 until 1970-01-01T00:00:00.000070Z, 0 of 0 left, at 1970-01-01T00:00:00.000010Z"; got != want {
		t.Errorf("text of a hold: got %s, want %s", got, want)
	}
}

// A hold lapses in [TTL, TTL + TTL/16), at a time that all holds of a sixteenth share.
func TestLapse(t *testing.T) {
	for _, ttl := range []time.Duration{time.Microsecond, 15 * time.Microsecond, 16 * time.Microsecond, time.Millisecond, 16 * time.Second, time.Minute, 10 * 365 * 24 * time.Hour} {
		s := holding(ttl).Spec()
		us := quota.Micros(ttl / time.Microsecond)
		slot := max(us/16, 1)
		for _, now := range []quota.Micros{0, 1, 1_795_427_141_791_724, 1_795_427_141_791_724 / slot * slot} {
			at := s.Lapse(now)
			if after := at - now; after < us || after >= us+slot || at%slot != 0 {
				t.Errorf("a hold of %v at %d: got a lapse at %d, want the first multiple of %d from %d on", ttl, now, at, slot, now+us)
			}
			if again := s.Lapse(at - us); again != at {
				t.Errorf("a hold of %v at %d: got a lapse at %d, want %d", ttl, at-us, again, at)
			}
		}
	}
}
