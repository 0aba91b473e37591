package driver_test

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// eachStore runs a test on a local store and on the compare-and-swap adapter, both on one clock.
func eachStore(t *testing.T, test func(t *testing.T, s quota.Store, c *testkit.Clock)) {
	t.Run("local", func(t *testing.T) {
		c := testkit.NewClock()
		test(t, quota.Must(local.NewWithOptions(local.Options{Clock: c.Time})), c)
	})
	t.Run("cas", func(t *testing.T) {
		c := testkit.NewClock()
		test(t, newCAS(t, newKV(c.Micros), nil), c)
	})
}

// chargeAll is ChargeAll whose error fails the test.
func chargeAll(t *testing.T, s quota.Store, cs ...quota.Charge) []quota.Decision {
	t.Helper()
	out := make([]quota.Decision, len(cs))
	if err := s.ChargeAll(bg, cs, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func remaining(t *testing.T, s quota.Store, l *quota.Limit, key string) int64 {
	t.Helper()
	return must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: key, Op: quota.OpPeek})).Remaining
}

func TestIDIsGrantedOnce(t *testing.T) {
	testkit.EachRule(t, 10, 24*time.Hour, func(t *testing.T, l *quota.Limit) {
		eachStore(t, func(t *testing.T, s quota.Store, c *testkit.Clock) {
			ok := must[quota.Decision](t)
			charge := quota.Charge{Limit: l, Key: "g/k", Cost: 4, ID: "one"}
			first := ok(s.Charge(bg, charge))
			if !first.Allowed || first.Replayed || first.Charged != 4 {
				t.Fatalf("first call: got %v, want it allowed, 4 charged, not replayed", first)
			}
			c.Add(time.Minute)
			ok(s.Charge(bg, quota.Charge{Limit: l, Key: "g/k", Cost: 1})) // between the first and the repeat
			want := first
			want.Replayed = true
			for range 3 {
				if d := ok(s.Charge(bg, charge)); d != want {
					t.Errorf("repeat: got %v, want %v", d, want)
				}
			}
			if out := chargeAll(t, s, charge); out[0] != want {
				t.Errorf("repeat as a list: got %v, want %v", out[0], want)
			}
			if n := remaining(t, s, l, "g/k"); n != 5 {
				t.Errorf("remaining: got %d, want 5", n)
			}
			// Another id, and the same id in another group, are other calls.
			for _, other := range []quota.Charge{{Limit: l, Key: "g/k", Cost: 4, ID: "two"}, {Limit: l, Key: "h/k", Cost: 4, ID: "one"}} {
				if d := ok(s.Charge(bg, other)); !d.Allowed || d.Replayed {
					t.Errorf("%v: got %v, want it allowed, not replayed", other, d)
				}
			}
		})
	})
}

func TestIDWithOtherChargesIsInvalid(t *testing.T) {
	l, m := testkit.Bucket("n", 10, time.Hour), testkit.Bucket("m", 10, time.Hour)
	eachStore(t, func(t *testing.T, s quota.Store, _ *testkit.Clock) {
		a := quota.Charge{Limit: l, Key: "g/a", Cost: 2, ID: "i"}
		b := quota.Charge{Limit: l, Key: "g/b", Cost: 2, ID: "i"}
		first := chargeAll(t, s, a, b)
		change := func(c quota.Charge, f func(*quota.Charge)) quota.Charge { f(&c); return c }
		for name, cs := range map[string][]quota.Charge{
			"one of them": {a},
			"swapped":     {b, a},
			"one more":    {a, b, {Limit: m, Key: "g/a", Cost: 2, ID: "i"}},
			"other limit": {change(a, func(c *quota.Charge) { c.Limit = m }), b},
			"other key":   {change(a, func(c *quota.Charge) { c.Key = "g/c" }), b},
			"other cost":  {a, change(b, func(c *quota.Charge) { c.Cost = 1 })},
			"other op":    {a, change(b, func(c *quota.Charge) { c.Op = quota.OpDebit })},
			"other time":  {a, change(b, func(c *quota.Charge) { c.MadeAt = 1 })},
			"a peek":      {change(a, func(c *quota.Charge) { c.Op = quota.OpPeek }), b},
		} {
			err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs)))
			if !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("%s: got %v, want ErrInvalid", name, err)
			}
		}
		for i, d := range chargeAll(t, s, a, b) {
			if want := first[i]; !d.Replayed || d.Remaining != want.Remaining || d.At != want.At {
				t.Errorf("repeat, charge %d: got %v, want %v, replayed", i, d, want)
			}
		}
		if n := remaining(t, s, l, "g/a"); n != 8 {
			t.Errorf("remaining: got %d, want 8", n)
		}
	})
}

func TestDenialsAndPeeksAreNotRemembered(t *testing.T) {
	l := testkit.Bucket("n", 10, 10*time.Second)
	eachStore(t, func(t *testing.T, s quota.Store, c *testkit.Clock) {
		ok := must[quota.Decision](t)
		ok(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 10}))
		charge := quota.Charge{Limit: l, Key: "k", Cost: 3, ID: "i"}
		for range 2 {
			if d := ok(s.Charge(bg, charge)); d.Allowed || d.Replayed {
				t.Fatalf("Charge of 3 with 0 left: got %v, want it denied, not replayed", d)
			}
		}
		other := charge
		other.Cost = 4 // a denial does not bind the id to its charge
		if d := ok(s.Charge(bg, other)); d.Allowed || d.Replayed {
			t.Fatalf("Charge of 4 with the denied id: got %v, want it denied, not replayed", d)
		}
		peek := charge
		peek.Op, peek.Cost = quota.OpPeek, 0
		for range 2 {
			if d := ok(s.Charge(bg, peek)); !d.Allowed || d.Replayed {
				t.Fatalf("Peek with the denied id: got %v, want it allowed, not replayed", d)
			}
		}
		c.Add(3 * time.Second)
		if d := ok(s.Charge(bg, charge)); !d.Allowed || d.Replayed || d.Charged != 3 {
			t.Fatalf("first granted Charge: got %v, want it allowed, 3 charged, not replayed", d)
		}
		if d := ok(s.Charge(bg, charge)); !d.Allowed || !d.Replayed || d.Charged != 3 {
			t.Fatalf("repeat of the granted Charge: got %v, want it allowed, 3 charged, replayed", d)
		}
	})
}

func TestIDCoversEveryOperation(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	eachStore(t, func(t *testing.T, s quota.Store, _ *testkit.Clock) {
		receipt := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 9}))
		for i, c := range []struct {
			charge quota.Charge
			left   int64
		}{
			{quota.Charge{Op: quota.OpDebit, Cost: 3}, -2},
			{quota.Charge{Op: quota.OpRefund, Cost: 5, MadeAt: receipt.At}, 3},
			{quota.Charge{Op: quota.OpTake, Cost: 0}, 3},
			{quota.Charge{Op: quota.OpTake, Cost: 2}, 1},
			{quota.Charge{Op: quota.OpAhead, Cost: 3, Within: time.Hour}, -2},
			{quota.Charge{Op: quota.OpReset}, 10},
		} {
			c.charge.Limit, c.charge.Key, c.charge.ID = l, "k", fmt.Sprint("id ", i)
			for again := range 2 {
				d := must[quota.Decision](t)(s.Charge(bg, c.charge))
				if n := remaining(t, s, l, "k"); n != c.left {
					t.Errorf("remaining after %v, %d repeats: got %d, want %d", c.charge, again, n, c.left)
				}
				if want := again == 1; d.Replayed != want {
					t.Errorf("%v, %d repeats: got %v, want Replayed %v", c.charge, again, d, want)
				}
			}
		}
	})
}

func TestIDIsForgotten(t *testing.T) {
	l := testkit.Bucket("n", 1000, 24*time.Hour)
	eachStore(t, func(t *testing.T, s quota.Store, c *testkit.Clock) {
		charge := quota.Charge{Limit: l, Key: "k", Cost: 400, ID: "i"}
		must[quota.Decision](t)(s.Charge(bg, charge))
		c.Add(quota.IDWindow - time.Microsecond)
		if d := must[quota.Decision](t)(s.Charge(bg, charge)); !d.Replayed {
			t.Fatalf("repeat within IDWindow: got %v, want it replayed", d)
		}
		c.Add(2 * time.Second)
		if d := must[quota.Decision](t)(s.Charge(bg, charge)); d.Replayed || d.Charged != 400 {
			t.Fatalf("same id after IDWindow: got %v, want 400 charged, not replayed", d)
		}
		c.Add(quota.IDWindow + time.Second)
		charge.Cost = 1 // an id that is forgotten may come back with other charges
		if d := must[quota.Decision](t)(s.Charge(bg, charge)); d.Replayed || d.Charged != 1 {
			t.Fatalf("forgotten id with another cost: got %v, want 1 charged, not replayed", d)
		}
	})
}

// TestIDOfASpend: a spend with a request id is remembered until IDWindow after its hold lapses, and denied from then on: it is
// never charged twice.
func TestIDOfASpend(t *testing.T) {
	const ttl = 10 * time.Minute
	l := quota.NewLimit("n", algorithm.Held(algorithm.FixedWindow(1000, 24*time.Hour), ttl))
	for _, late := range []time.Duration{0, quota.IDWindow + time.Second, ttl + quota.IDWindow - time.Microsecond, ttl + quota.IDWindow + time.Microsecond, time.Hour} {
		t.Run(late.String(), func(t *testing.T) {
			eachStore(t, func(t *testing.T, s quota.Store, c *testkit.Clock) {
				hold := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 400, Op: quota.OpHold}))
				c.Add((hold.Until - hold.At).Duration() - ttl) // now it lapses in a ttl
				spend := quota.Charge{Limit: l, Key: "k", Cost: 300, Op: quota.OpSpend, Held: 400, Until: hold.Until, ID: "i"}
				must[quota.Decision](t)(s.Charge(bg, spend))
				c.Add(late)
				d := must[quota.Decision](t)(s.Charge(bg, spend))
				switch tooLate := late > ttl+quota.IDWindow; {
				case tooLate && (d.Allowed || d.RetryAfter != quota.Never || d.Charged != 0):
					t.Errorf("repeat: got %v, want it denied for ever", d)
				case !tooLate && !d.Replayed:
					t.Errorf("repeat: got %v, want it replayed", d)
				}
				if n := remaining(t, s, l, "k"); n != 700 {
					t.Errorf("remaining: got %d, want 700", n)
				}
				spend.ID = "" // without an id it is charged at any time
				if d := must[quota.Decision](t)(s.Charge(bg, spend)); !d.Allowed || d.Charged != 300 {
					t.Errorf("spend without an id: got %v, want 300 charged", d)
				}
			})
		})
	}
}

func TestLostReply(t *testing.T) {
	// The swap is applied and its reply lost: without an id the outcome stays unknown; with one the repeat gets the first
	// decision.
	l := testkit.Bucket("n", 10, time.Hour)
	kv := newKV(testkit.NewClock().Micros)
	s := newCAS(t, kv, nil)
	lose := func() { kv.lostReply = errors.New("connection reset") }
	lose()
	if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1}); !errors.Is(err, quota.ErrIndeterminate) {
		t.Fatalf("Charge whose reply is lost: got %v, want ErrIndeterminate", err)
	}
	if n := remaining(t, s, l, "k"); n != 9 || kv.swapped() != 1 {
		t.Fatalf("after the lost reply: got %d left and %d swaps, want 9 and 1", n, kv.swapped())
	}
	lose()
	cs := []quota.Charge{{Limit: l, Key: "k", Cost: 2, ID: "i"}, {Limit: l, Key: "k/2", Cost: 3, ID: "i"}}
	if err := s.ChargeAll(bg, cs, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrIndeterminate) {
		t.Fatalf("ChargeAll whose reply is lost: got %v, want ErrIndeterminate", err)
	}
	for i, d := range chargeAll(t, s, cs...) {
		if !d.Replayed || d.Remaining != 7 || d.Charged != cs[i].Cost {
			t.Errorf("repeat, charge %d: got %v, want %d charged, 7 left, replayed", i, d, cs[i].Cost)
		}
	}
	if a, b := remaining(t, s, l, "k"), remaining(t, s, l, "k/2"); a != 7 || b != 7 {
		t.Errorf("remaining after the repeat: got %d and %d, want 7 of each", a, b)
	}
	// The swap was lost before it was applied: the repeat is the first.
	kv.swapErr = errors.New("connection reset")
	cs[0].ID, cs[1].ID = "j", "j"
	if err := s.ChargeAll(bg, cs, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrIndeterminate) {
		t.Fatalf("ChargeAll whose swap is lost: got %v, want ErrIndeterminate", err)
	}
	kv.swapErr = nil
	if out := chargeAll(t, s, cs...); out[0].Replayed || out[0].Remaining != 5 {
		t.Errorf("repeat after the lost swap: got %v, want 5 left on the first key, not replayed", out)
	}
}

func TestRememberedGrantIsChecked(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	kv := newKV(testkit.NewClock().Micros)
	s := newCAS(t, kv, nil)
	charge := quota.Charge{Limit: l, Key: "k", Cost: 1, ID: "i"}
	must[quota.Decision](t)(s.Charge(bg, charge))
	held := kv.entries["{k}#i"]
	for _, text := range []string{"tb1:1:2:3:4", "id2" + held.value[3:], "id3" + held.value[3:], held.value + ":1", held.value + "x", "id1", "id1:", held.value[:len(held.value)-20]} {
		kv.entries["{k}#i"] = memEntry{text, held.version, held.expires}
		d, err := s.Charge(bg, charge)
		if err == nil || d != (quota.Decision{}) {
			t.Errorf("repeat on the remembered text %q: got %v, %v, want the zero Decision and an error", text, d, err)
		}
	}
	if n := remaining(t, s, l, "k"); n != 9 {
		t.Errorf("remaining: got %d, want 9", n)
	}
}

func TestIDKeysAreEscaped(t *testing.T) {
	// No id reaches another key than its own.
	l := testkit.Bucket("n", 100, time.Hour)
	kv := newKV(testkit.NewClock().Micros)
	s := newCAS(t, kv, nil)
	ids := []string{"x", "}", "{", "a b", "\x00", "%", "%7D", ":n", "}:n", "/x:n", "#", "é"}
	for _, id := range ids {
		if d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1, ID: id})); d.Replayed {
			t.Errorf("first Charge with id %q: got %v, want it not replayed", id, d)
		}
	}
	if want := len(ids) + 1; len(kv.entries) != want {
		t.Errorf("entries: got %d, want %d, one for each id and one for the key", len(kv.entries), want)
	}
	for key := range kv.entries {
		for i := range len(key) {
			if key[i] <= ' ' || key[i] == 0x7f {
				t.Errorf("key of an entry: got %q, want one without spaces and control bytes", key)
			}
		}
	}
}
