package driver_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// unclocked is a KV whose database has no clock: its time is that of one process, and it keeps Change.At unless it forgets.
type unclocked struct {
	*memKV
	at      map[string]quota.Micros
	clock   func() quota.Micros
	forgets bool
}

func (u unclocked) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	entries, _, err := u.memKV.Load(ctx, keys)
	for i := range entries {
		entries[i].At = u.at[entries[i].Key]
	}
	return entries, u.clock(), err
}

func (u unclocked) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	for i := range changes {
		changes[i].Old.At = 0
	}
	swapped, err := u.memKV.Swap(ctx, changes)
	for _, c := range changes {
		if swapped && c.Value != c.Old.Value && !u.forgets {
			u.at[c.Old.Key] = c.At
		}
	}
	return swapped, err
}

// TestSkew has two processes with different clocks take all that they get in ten seconds. A database that keeps Change.At admits what
// the limit gains in the skew too much; one that does not admits many times the limit.
func TestSkew(t *testing.T) {
	const burst, rate = 100, 10
	l := quota.NewLimit("n", algorithm.TokenBucket(burst, rate, time.Second))
	for _, c := range []struct {
		skew     time.Duration
		forgets  bool
		from, to int64
	}{
		{0, false, 199, 200}, {500 * time.Millisecond, false, 199, 205}, {1500 * time.Millisecond, false, 199, 215}, {5 * time.Second, false, 199, 250},
		{1500 * time.Millisecond, true, 1000, 2000},
	} {
		clock := testkit.NewClock()
		at, kv := map[string]quota.Micros{}, newKV(func() quota.Micros { return testkit.Epoch })
		var stores []quota.Store
		for _, ahead := range []time.Duration{0, c.skew} {
			now := func() quota.Micros { return clock.Micros() + quota.Micros(ahead/time.Microsecond) }
			stores = append(stores, newCAS(t, unclocked{kv, at, now, c.forgets}, nil))
		}
		admitted := int64(0)
		for range 100 {
			for _, s := range stores {
				for {
					d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1}))
					if !d.Allowed {
						break
					}
					admitted++
				}
			}
			clock.Add(100 * time.Millisecond)
		}
		if admitted < c.from || admitted > c.to {
			t.Errorf("skew %v, forgets the time of changes %v: got %d tokens admitted, want %d to %d", c.skew, c.forgets, admitted, c.from, c.to)
		}
	}

	clock := testkit.NewClock()
	u := unclocked{newKV(clock.Micros), map[string]quota.Micros{"{k}:n": testkit.Epoch + 5_000_001}, clock.Micros, false}
	if _, err := newCAS(t, u, nil).Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1}); !errors.Is(err, quota.ErrMisconfigured) || u.swapped() != 0 {
		t.Errorf("skew above MaxSkew: got %v and %d swaps, want ErrMisconfigured and none", err, u.swapped())
	}
}

// repeating is a KV whose client library sends a swap again if its reply is lost.
type repeating struct {
	*memKV
	lose     int               // how many replies are lost
	attempts map[string]string // of the latest change of a key; nil where the author does not look
}

func (r *repeating) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	swapped, err := r.once(ctx, changes)
	for ; r.lose > 0; r.lose-- {
		swapped, err = r.once(ctx, changes)
	}
	return swapped, err
}

func (r *repeating) once(ctx context.Context, changes []driver.Change) (bool, error) {
	if a := changes[0].Attempt; r.attempts != nil && r.attempts[changes[0].Old.Key] == a {
		return true, nil
	}
	swapped, err := r.memKV.Swap(ctx, changes)
	if swapped && r.attempts != nil {
		r.attempts[changes[0].Old.Key] = changes[0].Attempt
	}
	return swapped, err
}

// TestAttempt checks that Change.Attempt tells a repeated swap from another one, and that without it the repeat charges twice.
func TestAttempt(t *testing.T) {
	l := testkit.Bucket("n", 100, time.Hour)
	for _, looks := range []bool{false, true} {
		kv, want := &repeating{memKV: newKV(testkit.NewClock().Micros), lose: 1}, int64(80)
		if looks {
			kv.attempts, want = map[string]string{}, 90
		}
		d := must[quota.Decision](t)(newCAS(t, kv, nil).Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 10}))
		if d.Remaining != want {
			t.Errorf("take of 10, its reply lost, attempts looked at %v: got %d left, want %d", looks, d.Remaining, want)
		}
	}

	kv := newKV(testkit.NewClock().Micros)
	seen := map[string]bool{}
	for range 2 {
		s := newCAS(t, kv, nil)
		for range 3 {
			chargeAll(t, s, quota.Charge{Limit: l, Key: "g/a", Cost: 1, ID: string(rune('a' + len(seen)))}, quota.Charge{Limit: l, Key: "g/b", Cost: 1, ID: string(rune('a' + len(seen)))})
			last := kv.swaps[len(kv.swaps)-1]
			if a := last[0].Attempt; seen[a] || len(a) < 8 || len(a) > 36 || last[1].Attempt != a || last[2].Attempt != a {
				t.Errorf("attempts of a swap: got %q, %q and %q, want one of 8 to 36 bytes that no swap had before", a, last[1].Attempt, last[2].Attempt)
			}
			seen[last[0].Attempt] = true
		}
	}
}

func TestKeyGroup(t *testing.T) {
	for _, group := range []string{"a", "{", "}", "a b:c%"} {
		want := string(driver.AppendEscaped(nil, group))
		for _, key := range []string{string(driver.AppendKey(nil, "n", group)), string(driver.AppendKey(nil, "n", group+"/x}")), string(driver.AppendIDKey(nil, group, "i}"))} {
			if got := driver.KeyGroup(key); got != want {
				t.Errorf("KeyGroup(%q): got %q, want %q", key, got, want)
			}
		}
	}
	for _, text := range []string{"", "a", "{a", "a}", "x{a}"} {
		if got := driver.KeyGroup(text); got != "" {
			t.Errorf("KeyGroup(%q): got %q, want none", text, got)
		}
	}
}

// optional is a KV with the optional interfaces that the adapters pass on.
type optional struct {
	*memKV
	err error
}

func (optional) Prompt() bool { return true }

func (o optional) Health(context.Context) (driver.Health, error) {
	return driver.Health{Kind: "map"}, o.err
}

// optionalTx is a Transactor with them.
type optionalTx struct {
	optional
	tx *memTx
}

func (o optionalTx) Transact(ctx context.Context, a *driver.Access, decide driver.Decide) error {
	return o.tx.Transact(ctx, a, decide)
}

func TestOptionalInterfacesPassThrough(t *testing.T) {
	kv := newKV(testkit.NewClock().Micros)
	plain := newCAS(t, kv, nil)
	if _, ok := driver.Find[driver.HealthReporter](plain); ok || driver.IsPrompt(plain) {
		t.Errorf("KV without optional interfaces: got health %v, prompt %v, want neither", ok, driver.IsPrompt(plain))
	}
	for name, s := range map[string]quota.Store{
		"KV":         newCAS(t, optional{memKV: kv}, nil),
		"Transactor": newTx(t, optionalTx{optional{memKV: kv}, &memTx{memKV: newKV(testkit.NewClock().Micros)}}, nil),
	} {
		h, ok := driver.Find[driver.HealthReporter](s)
		if !ok || !driver.IsPrompt(s) {
			t.Fatalf("%s with optional interfaces: got health %v, prompt %v, want both", name, ok, driver.IsPrompt(s))
		}
		if got, err := h.Health(bg); err != nil || got.Kind != "map" {
			t.Errorf("%s, Health: got %+v, %v, want kind map", name, got, err)
		}
		s.Close()
		if _, err := h.Health(bg); !errors.Is(err, quota.ErrClosed) {
			t.Errorf("%s, Health after Close: got %v, want ErrClosed", name, err)
		}
	}
	h, _ := driver.Find[driver.HealthReporter](newCAS(t, optional{memKV: kv, err: errors.New("refused")}, nil))
	if _, err := h.Health(bg); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("Health that fails: got %v, want ErrUnavailable", err)
	}
}
