package quota_test

import (
	"errors"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// A shadow is charged where it fits, charges nothing where it does not, and never denies: with every rule.
func TestShadow(t *testing.T) {
	testkit.EachRule(t, 10, time.Hour, func(t *testing.T, l *quota.Limit) {
		lim := newLimiter(t, local.New(), l, nil)
		real := quota.Charge{Key: "real", Cost: 2}
		shadow := quota.Charge{Key: "shadow", Cost: 6, Shadow: true}
		ask := func(cs ...quota.Charge) quota.Result {
			t.Helper()
			return must[quota.Result](t)(lim.ChargeAll(bg, cs...))
		}
		want := func(what string, r quota.Result, granted, fits bool, charged, left int64) quota.Decision {
			t.Helper()
			d := r.Decisions[0]
			if r.Granted != granted || d.Allowed != fits || !d.Shadow || d.Charged != charged || d.Remaining != left || (d.RetryAfter > 0) == fits {
				t.Errorf("%s: got %v, want granted %v, and of the shadow: fits %v, %d charged, %d left", what, r, granted, fits, charged, left)
			}
			return d
		}
		fitted := want("a shadow that fits", ask(shadow, real), true, true, 6, 4)
		r := ask(shadow, real)
		denied := want("a shadow that does not fit", r, true, false, 0, 4)
		if r.Decider != 1 || r.RetryAfter() != 0 || r.Decisions[1].Charged != 2 || r.Decisions[1].Shadow {
			t.Errorf("a list with a shadow that does not fit: got %v, want it decided by the other charge, and that charged", r)
		}
		want("a shadow alone", ask(shadow), true, false, 0, 4)
		small := shadow
		small.Cost = 1
		r = ask(small, quota.Charge{Key: "real", Cost: 100})
		if want("a denied list", r, false, true, 0, 4); r.Decider != 1 || r.RetryAfter() != quota.Never {
			t.Errorf("a denied list: got %v, want it decided by the charge that denied", r)
		}
		for name, actual := range map[string]int64{"less": 1, "more": 9} {
			if d := ask(shadow.Settle(denied, actual)).Decisions[0]; d.Charged != 0 || d.Remaining != 4 {
				t.Errorf("settling a shadow that was not charged to %s: got %v, want no change", name, d)
			}
			denied = ask(shadow, real).Decisions[0] // a receipt is good for one settle
		}
		if d := ask(shadow.Settle(fitted, 1)).Decisions[0]; d.Charged != -5 || d.Remaining != 9 {
			t.Errorf("settling a shadow of 6 to 1: got %v, want 5 back", d)
		}
		if _, err := lim.ChargeAll(bg, shadow.Refund(denied, 1)); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("refunding 1 of a shadow that was not charged: got %v, want ErrInvalid", err)
		}
	})
}

func TestGrantedPassesOverShadows(t *testing.T) {
	yes, no := quota.Decision{Allowed: true, Capacity: 10, Remaining: 5}, quota.Decision{Capacity: 10, RetryAfter: time.Second}
	shadow := func(d quota.Decision) quota.Decision { d.Shadow = true; d.Remaining = 0; return d }
	for name, c := range map[string]struct {
		ds      []quota.Decision
		granted bool
		decider int
	}{
		"a shadow that fits first":  {[]quota.Decision{shadow(yes), yes}, true, 1},
		"a shadow that denies":      {[]quota.Decision{yes, shadow(no)}, true, 0},
		"a denial behind a shadow":  {[]quota.Decision{shadow(no), yes, no}, false, 2},
		"shadows alone":             {[]quota.Decision{shadow(no), shadow(yes)}, true, 0},
		"a denial before a longest": {[]quota.Decision{no, shadow(quota.Decision{RetryAfter: time.Hour})}, false, 0},
	} {
		if got := quota.Granted(c.ds); got != c.granted {
			t.Errorf("Granted of %s: got %v, want %v", name, got, c.granted)
		}
		if got := quota.Decider(c.ds); got != c.decider {
			t.Errorf("Decider of %s: got %d, want %d", name, got, c.decider)
		}
	}
}

// A repeat tells the same of a shadow: also after the numbers of its limit changed.
func TestShadowRepeats(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	store := local.New()
	list := []quota.Charge{{Limit: l, Key: "g/a", Cost: 1, ID: "x"}, {Limit: l, Key: "g/b", Cost: 11, Shadow: true, ID: "x"}}
	first, again := make([]quota.Decision, 2), make([]quota.Decision, 2)
	for _, out := range [][]quota.Decision{first, again} {
		if err := store.ChargeAll(bg, list, out); err != nil {
			t.Fatal(err)
		}
		list[1].Limit = testkit.Bucket("n", 20, time.Hour)
	}
	if d := again[1]; d.Allowed || !d.Shadow || !d.Replayed || d.Charged != 0 || d.RetryAfter != first[1].RetryAfter || !again[0].Allowed {
		t.Errorf("a repeat: got %v, want the decisions of before: %v", again, first)
	}
	list[1].Shadow = false
	if err := store.ChargeAll(bg, list, again); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("the id without the shadow: got %v, want ErrInvalid", err)
	}
}
