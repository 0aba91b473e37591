package quota_test

import (
	"errors"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// wrong are limits that are not valid, and parts of the texts of their errors.
var wrong = map[string]struct {
	limit *quota.Limit
	parts []string
}{
	"nil":              {nil, []string{"limit is nil", "a limit that NewLimit made"}},
	"the zero limit":   {&quota.Limit{}, []string{"limit is", "the zero Limit", "a limit that NewLimit made"}},
	"a name":           {quota.NewLimit("a b", algorithm.DenyAll), []string{`limit name is "a b"`, "1 to 64"}},
	"no algorithm":     {quota.NewLimit("n", nil), []string{"algorithm of limit n is nil"}},
	"a capacity":       {quota.NewLimit("n", algorithm.TokenBucket(-1, 1, time.Second)), []string{"capacity is -1", "0 to 2^52-1"}},
	"a window":         {quota.NewLimit("n", algorithm.SlidingWindow(1, 0)), []string{"window is 0s", "whole microseconds"}},
	"another's errors": {quota.NewLimit("n", fussy{errors.New("odd; accepted: even")}), []string{"algorithm of limit n", "odd"}},
}

// fussy is a rule of another author, whose constructor refused its numbers.
type fussy struct{ err error }

func (f fussy) Err() error       { return f.err }
func (f fussy) Spec() quota.Spec { panic("asked though it has an error") }
func (f fussy) Decide(quota.State, quota.Request, quota.Micros) (quota.State, quota.Verdict) {
	panic("asked though it has an error")
}

// A limit that is not valid carries its error to every method that takes it, and no store is asked.
func TestALimitCarriesItsError(t *testing.T) {
	ok := testkit.Bucket("ok", 10, time.Hour)
	for name, w := range wrong {
		t.Run(name, func(t *testing.T) {
			testkit.WantInvalid(t, w.limit.Err(), w.parts...)
			s := &recorder{}
			ch := must[*quota.Charger](t)(quota.NewCharger(s, nil))
			lim := must[*quota.Limiter](t)(ch.For(ok))
			charge := quota.Charge{Limit: w.limit, Key: "k", Cost: 1}
			cs := []quota.Charge{{Limit: ok, Key: "k", Cost: 1}, charge}
			doors := map[string]func() error{
				"NewLimiter":        func() error { _, err := quota.NewLimiter(s, w.limit, nil); return err },
				"For":               func() error { _, err := ch.For(w.limit); return err },
				"Check":             func() error { return quota.Check(cs) },
				"Charger.ChargeAll": func() error { _, err := ch.ChargeAll(bg, cs...); return err },
				"Charger.AllowAll":  func() error { return ch.AllowAll(bg, cs...) },
				"Charger.WaitAll":   func() error { _, err := ch.WaitAll(bg, cs...); return err },
				"MarshalText":       func() error { _, err := w.limit.MarshalText(); return err },
			}
			if w.limit != nil { // nil stands for the limit of the limiter
				chosen := newLimiter(t, s, ok, &quota.Options{LimitFor: func(string) *quota.Limit { return w.limit }})
				doors["ChargeAll"] = func() error { _, err := lim.ChargeAll(bg, charge); return err }
				doors["AllowAll"] = func() error { return lim.AllowAll(bg, charge) }
				doors["WaitAll"] = func() error { _, err := lim.WaitAll(bg, charge); return err }
				doors["a list of LimitFor"] = func() error { _, err := chosen.ChargeAll(bg, quota.Charge{Key: "k"}); return err }
				doors["Take of LimitFor"] = func() error { _, err := chosen.Take(bg, "k", 1); return err }
				doors["Wait of LimitFor"] = func() error { _, err := chosen.Wait(bg, "k", 1); return err }
				doors["Reset of LimitFor"] = func() error { return chosen.Reset(bg, "k") }
				if text := w.limit.String(); text == "" {
					t.Error("text: got none, want one")
				}
				if c := w.limit.Capacity(); c != 0 || w.limit.Window() != 0 || w.limit.Rate() != 0 || *w.limit.Spec() != (quota.Spec{}) {
					t.Errorf("numbers: got a capacity of %d, %v, want none", c, w.limit.Spec())
				}
			}
			for door, call := range doors {
				err := call()
				testkit.WantInvalid(t, err, w.parts...)
				if quota.Charged(err) != quota.NotCharged {
					t.Errorf("%s: got charged %v, want no", door, quota.Charged(err))
				}
			}
			if len(s.calls) > 0 {
				t.Errorf("charges that the store got: %v, want none", s.calls)
			}
		})
	}
}

// A charger has no limit of its own: a charge that names none has the limit that LimitFor chooses, or is refused.
func TestChargerNamesLimits(t *testing.T) {
	nameless := quota.Charge{Key: "k", Cost: 1}
	s := local.New()
	ch := must[*quota.Charger](t)(quota.NewCharger(s, nil))
	_, err := ch.ChargeAll(bg, nameless)
	testkit.WantInvalid(t, err, "limit is nil")

	ten := testkit.Bucket("n", 10, time.Hour)
	ch = must[*quota.Charger](t)(quota.NewCharger(s, &quota.Options{LimitFor: func(string) *quota.Limit { return ten }}))
	r, err := ch.ChargeAll(bg, nameless)
	if err != nil || !r.Granted || r.Decisions[0].Capacity != 10 {
		t.Errorf("a charge of the limit that LimitFor chooses: got %v, %v; want it granted by a limit of 10", r, err)
	}
	if s := ch.Store(); s == nil {
		t.Error("store: got nil, want the charger's")
	}
	if _, err := quota.NewCharger(nil, nil); err == nil {
		t.Error("charger without a store: got no error, want ErrInvalid")
	}
}

// Limiters of one charger remember the corrections of each other's receipts, and their waiting callers stand in one queue.
func TestLimitersOfOneCharger(t *testing.T) {
	ten := testkit.Bucket("n", 10, time.Hour)
	for name, o := range map[string]*quota.Options{
		"plain":    nil,
		"LimitFor": {LimitFor: func(string) *quota.Limit { return ten }},
		"silent":   {LimitFor: func(string) *quota.Limit { return nil }},
	} {
		t.Run(name, func(t *testing.T) {
			ch := must[*quota.Charger](t)(quota.NewCharger(local.New(), o))
			a, b := must[*quota.Limiter](t)(ch.For(ten)), must[*quota.Limiter](t)(ch.For(ten))
			receipt := must[quota.Decision](t)(a.Take(bg, "k", 4))
			if d := must[quota.Decision](t)(b.Settle(bg, "k", receipt, 3)); d.Charged != -1 || d.Replayed {
				t.Errorf("settle by another limiter: got %v, want 1 back", d)
			}
			if d := must[quota.Decision](t)(a.Settle(bg, "k", receipt, 3)); !d.Replayed {
				t.Errorf("second settle: got %v, want the answer of the first", d)
			}

			leave := a.Enqueue("waited", 1)
			defer leave()
			defer b.Enqueue("waited", 1)()
			if keys, waiting := b.Queues(); keys != 1 || waiting != 1 {
				t.Errorf("queues after a caller of each: got %d with %d waiting, want 1 with 1", keys, waiting)
			}
			other := must[*quota.Limiter](t)(ch.For(testkit.Bucket("m", 10, time.Hour)))
			if name == "LimitFor" { // it chooses the limit of all
				return
			}
			defer other.Enqueue("waited", 1)()
			if keys, _ := b.Queues(); keys != 2 {
				t.Errorf("queues after a caller of another limit: got %d, want 2", keys)
			}
		})
	}
}
