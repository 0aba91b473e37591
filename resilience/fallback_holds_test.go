package resilience_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// A hold is made and spent on this instance's share while the primary is down, and charged to the primary; with the primary up
// again the hold's renewal is the primary's, and its spend is charged there. A hold of the primary stays the primary's.
func TestFallbackHolds(t *testing.T) {
	held := quota.NewLimit("held", algorithm.Held(algorithm.TokenBucket(100, 1, time.Hour), time.Minute))
	of := func(op quota.Op, n int64) quota.Charge {
		return quota.Charge{Limit: held, Key: "team/agent", Op: op, Cost: n}
	}
	inOutage(t, func(o *outage) {
		hold := of(quota.OpHold, 1)
		want := func(d quota.Decision, source quota.Source, allowed bool, holds, charged, left int64) quota.Decision {
			t.Helper()
			if d.Source != source || d.Allowed != allowed || d.Held != holds || d.Until > 0 != (holds > 0) || d.Charged != charged || d.Remaining != left {
				t.Errorf("got %v; want of the %v: allowed %v, %d held, %d charged, %d left", d, source, allowed, holds, charged, left)
			}
			return d
		}
		first := want(o.do(of(quota.OpHold, 40)), store, true, 40, 0, 60)
		o.down()
		for _, c := range []quota.Charge{hold.Settle(first, 10), hold.Renew(first)} {
			_, err := o.s.Charge(bg, c)
			wantErr(t, err, quota.ErrUnavailable)
		}
		one := want(o.do(of(quota.OpHold, 10)), fall, true, 10, 0, 5) // a quarter of what was left
		want(o.do(of(quota.OpHold, 6)), fall, false, 0, 0, 5)
		want(o.do(hold.Settle(one, 3)), fall, true, 0, 3, 12)
		two := want(o.do(of(quota.OpHold, 5)), fall, true, 5, 0, 7)
		three := want(o.do(of(quota.OpHold, 6)), fall, true, 6, 0, 1)
		two = want(o.do(hold.Renew(two)), fall, true, 5, 0, 1)
		o.up()
		want(o.do(of(quota.OpPeek, 0)), store, true, 0, 0, 57) // 40 are held, and 3 were spent
		two = want(o.do(hold.Renew(two)), store, true, 5, 0, 52)
		want(o.do(hold.Settle(three, 4)), store, true, 0, 4, 48) // and nothing of another hold comes back
		want(o.do(hold.Settle(two, 1)), store, true, 0, 1, 52)
		want(o.do(hold.Settle(first, 0)), store, true, 0, 0, 92)
		time.Sleep(2 * time.Minute)
		want(o.do(of(quota.OpPeek, 0)), store, true, 0, 0, 92)
	})
}

// Of two slots an instance of four has a share of none: two are not eight.
func TestFallbackConcurrency(t *testing.T) {
	streams := quota.NewLimit("streams", algorithm.Concurrency(2, time.Minute))
	inOutage(t, func(o *outage) {
		o.down()
		for _, op := range []quota.Op{quota.OpHold, quota.OpTake} {
			if d := o.do(quota.Charge{Limit: streams, Key: "k", Op: op, Cost: 1}); d.Allowed || d.Source != fall {
				t.Errorf("%v of a share of none: got %v, want a denial of the fallback", op, d)
			}
		}
	})
}

// A memory of denials keeps none of a limit with holds: tokens come back when a hold ends, long before RetryAfter.
func TestMemoryOfHolds(t *testing.T) {
	streams := quota.NewLimit("streams", algorithm.Concurrency(1, time.Minute))
	r := &remote{Store: local.New()}
	s := wrap(t, r, resilience.DenialMemory(nil))
	take := func(op quota.Op) quota.Decision {
		t.Helper()
		d, err := s.Charge(bg, quota.Charge{Limit: streams, Key: "k", Op: op, Cost: 1})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	first := take(quota.OpHold)
	for _, op := range []quota.Op{quota.OpHold, quota.OpTake} {
		if d := take(op); d.Allowed {
			t.Fatalf("a second %v: got %v, want it denied", op, d)
		}
	}
	// Another process ends the hold.
	if _, err := r.Store.Charge(bg, quota.Charge{Limit: streams, Key: "k", Op: quota.OpHold}.Settle(first, 0)); err != nil {
		t.Fatal(err)
	}
	for _, op := range []quota.Op{quota.OpTake} {
		if d := take(op); !d.Allowed || d.Source != store {
			t.Errorf("a %v when the hold has ended: got %v, want the store's grant", op, d)
		}
	}
}
