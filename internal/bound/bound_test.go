package bound_test

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/internal/bound"
	"github.com/fleetquota/fleetquota/quota"
)

func TestBound(t *testing.T) {
	r := bound.Rule{Capacity: 10, Refill: 3, Instances: 4}
	for _, test := range []struct {
		elapsed, served time.Duration
		losses          int
		want            bound.Terms
	}{
		{0, 0, 0, bound.Terms{Burst: 10, Refill: 1, ShareBursts: 8, ShareRefills: 1}},
		// One microsecond less than the time of the next token, for a tick is counted on top.
		{time.Second - time.Microsecond, 4*time.Second - time.Microsecond, 2, bound.Terms{10, 3, 8, 3, 36}},
		{time.Second, 4 * time.Second, 0, bound.Terms{10, 4, 8, 4, 0}},
	} {
		got := r.Bound(test.elapsed, test.served, test.losses)
		if got != test.want || got.Sum() != got.Burst+got.Refill+got.ShareBursts+got.ShareRefills+got.Losses {
			t.Errorf("%v, %v, %d: got %+v, want %+v", test.elapsed, test.served, test.losses, got, test.want)
		}
	}
	small := bound.Rule{Capacity: 2, Refill: 1, Instances: 3}
	if got, want := small.Bound(time.Second, time.Hour, 1), (bound.Terms{Burst: 2, Refill: 2, Losses: 2}); got != want {
		t.Errorf("shares of less than a token: got %+v, want %+v", got, want)
	}
	small.AtLeastOne = true
	if got, want := small.Bound(0, 3*time.Second, 1), (bound.Terms{2, 1, 3, 2, 5}); got != want {
		t.Errorf("shares of at least one token: got %+v, want %+v", got, want)
	}
}

func TestAccount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var a bound.Account
		start := time.Now()
		at := func(s int) { time.Sleep(time.Until(start.Add(time.Duration(s) * time.Second))) }
		// note notes a call that was asked for at a second and is answered now.
		note := func(asked int, allowed bool, by quota.Source) {
			a.Add(start.Add(time.Duration(asked)*time.Second), 5, quota.Decision{Allowed: allowed, Source: by})
		}
		want := func(store, fallback int64, served time.Duration) {
			t.Helper()
			if got, want := a.Sum(), (bound.Sum{Store: store, Fallback: fallback, Served: served}); got != want {
				t.Errorf("account: got %+v, want %+v", got, want)
			}
		}
		at(1)
		note(0, true, quota.FromStore)
		note(0, false, quota.FromStore)
		want(5, 0, 0)
		at(4)
		note(2, true, quota.FromFallback)
		want(5, 5, 2*time.Second) // from when it was asked for
		at(6)
		note(3, true, quota.FromStore) // perhaps made before the fallback's
		want(10, 5, 4*time.Second)
		note(5, false, quota.FromFallback)
		at(8)
		note(7, false, quota.FromStore)
		want(10, 5, 6*time.Second+time.Microsecond)
		at(20)
		want(10, 5, 6*time.Second+time.Microsecond)
		note(20, true, quota.FromFallback)
		at(21)
		want(10, 10, 7*time.Second+time.Microsecond)
		if s := a.Sum().Add(bound.Sum{Store: 1, Fallback: 2, Served: 3}); s.Admitted() != 23 || s.Served != 7*time.Second+time.Microsecond+3 {
			t.Errorf("sum: got %+v, want 23 admitted in 7s, a tick and 3ns", s)
		}
	})
}
