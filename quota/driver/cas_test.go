package driver_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func newCAS(t testing.TB, kv driver.KV, o *driver.Options) quota.Store {
	t.Helper()
	return must[quota.Store](t)(driver.NewCAS(kv, o))
}

// TestStoresDecideAlike runs random histories on the local store, on the compare-and-swap adapter and on Apply itself: every
// decision is the same, to the last number.
func TestStoresDecideAlike(t *testing.T) {
	r := random(t)
	limits := someLimits()
	for i := range sized(40, 1500) {
		c := testkit.NewClock()
		kv := newKV(c.Micros)
		stores := map[string]quota.Store{"local": quota.Must(local.NewWithOptions(local.Options{Clock: c.Time})), "cas": newCAS(t, kv, nil)}
		flaps := i%4 == 0
		if flaps {
			// An expired entry is gone, also when the clock is set back; only a store that keeps every entry still decides as
			// Apply does.
			kv.keep = true
			delete(stores, "local")
		}
		kept := shelf{}
		for range 150 {
			c.Add(time.Duration(r.IntN(300)) * time.Millisecond)
			if flaps && r.IntN(10) == 0 {
				c.Add(-time.Duration(r.IntN(3000)) * time.Millisecond)
			}
			cs := randomList(r, limits, 3, 5, c.Micros())
			want := make([]quota.Decision, len(cs))
			if err := kept.apply(cs, c.Micros(), want); err != nil {
				t.Fatal(err)
			}
			for name, s := range stores {
				got := make([]quota.Decision, len(cs))
				var err error
				if len(cs) == 1 {
					got[0], err = s.Charge(bg, cs[0])
				} else {
					err = s.ChargeAll(bg, cs, got)
				}
				if err != nil || !reflect.DeepEqual(got, want) {
					t.Fatalf("%s on %s: got %v, %v, want %v", testkit.Show(cs), name, got, err, want)
				}
			}
		}
		for _, swap := range kv.swaps {
			for _, change := range swap {
				if change.TTL < 0 {
					t.Fatalf("TTL of %q: got %v, want 0 or more", change.Old.Key, change.TTL)
				}
			}
		}
	}
}

func TestCASKeepsUntilReset(t *testing.T) {
	testkit.EachRule(t, 5, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		c := testkit.NewClock()
		kv := newKV(c.Micros)
		s := newCAS(t, kv, nil)
		for i, op := range []quota.Op{quota.OpTake, quota.OpDebit} {
			d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 4, Op: op}))
			if ttl := kv.swaps[i][0].TTL; ttl < d.ResetAfter || ttl > d.ResetAfter+driver.ExpirySlack {
				t.Errorf("TTL after a %s: got %v, want ResetAfter, %v, and up to %v more", op, ttl, d.ResetAfter, driver.ExpirySlack)
			}
		}
		d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpReset}))
		if change := kv.swaps[2][0]; change.Value != "" {
			t.Errorf("change of a reset: got %+v, want one to no value", change)
		}
		if len(kv.entries) != 0 {
			t.Errorf("entries after a reset: got %v, want none", kv.entries)
		}
		if d.Remaining != 5 {
			t.Errorf("remaining after a reset: got %d, want 5", d.Remaining)
		}
	})
	// A quota that never comes back is kept for good.
	kv := newKV(testkit.NewClock().Micros)
	s := newCAS(t, kv, nil)
	if d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: quota.NewLimit("n", testkit.Counter{Capacity: 3}), Key: "k", Cost: 1})); d.ResetAfter != quota.Never {
		t.Fatalf("Charge of a quota that never comes back: got %v, want ResetAfter Never", d)
	}
	if ttl := kv.swaps[0][0].TTL; ttl != quota.Never {
		t.Errorf("TTL of a quota that never comes back: got %v, want %v", ttl, quota.Never)
	}
}

func TestCASWritesNothingInVain(t *testing.T) {
	testkit.EachRule(t, 5, 10*time.Second, func(t *testing.T, l *quota.Limit) {
		kv := newKV(testkit.NewClock().Micros)
		s := newCAS(t, kv, nil)
		must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 4}))
		for _, c := range []quota.Charge{{Cost: 2}, {Cost: 6}, {Op: quota.OpPeek, Cost: 1}, {Op: quota.OpPeek, Cost: 1, ID: "p"}, {Cost: 2, ID: "d"}, {}} {
			c.Limit, c.Key = l, "k"
			must[quota.Decision](t)(s.Charge(bg, c))
		}
		if n := kv.swapped(); n != 1 {
			t.Errorf("swaps: got %d, want 1, of the first Charge: denials and peeks must not swap", n)
		}
		// In a list, an entry that is only read is compared too: it is part of the decision.
		out := make([]quota.Decision, 2)
		if err := s.ChargeAll(bg, []quota.Charge{{Limit: l, Key: "k", Op: quota.OpPeek}, {Limit: l, Key: "other", Cost: 1}}, out); err != nil {
			t.Fatal(err)
		}
		last := kv.swaps[1]
		if len(last) != 2 {
			t.Fatalf("swap of a peek and a take: got %+v, want two changes", last)
		}
		if last[0].Value != last[0].Old.Value || last[0].Value == "" {
			t.Errorf("change of the peeked key: got %+v, want its old value again", last[0])
		}
		if last[1].Old.Value != "" {
			t.Errorf("change of the fresh key: got %+v, want no old value", last[1])
		}
	})
}

func TestCASRetries(t *testing.T) {
	l := testkit.Bucket("n", 100, time.Hour)
	synctest.Test(t, func(t *testing.T) {
		// A change that comes between Load and Swap is seen, and the decision made anew.
		kv := newKV(testkit.NewClock().Micros)
		rival, s := newCAS(t, kv, nil), newCAS(t, kv, nil)
		conflicts := 5
		kv.beforeSwap = func() {
			if conflicts--; conflicts >= 0 {
				hook := kv.beforeSwap
				kv.beforeSwap = nil
				must[quota.Decision](t)(rival.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 10}))
				kv.beforeSwap = hook
			}
		}
		if d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1})); !d.Allowed || d.Remaining != 49 {
			t.Errorf("Charge after 5 conflicts: got %v, want it allowed with 49 left", d)
		}
	})
	for _, attempts := range []int{0, 1, 3} {
		synctest.Test(t, func(t *testing.T) {
			kv := newKV(testkit.NewClock().Micros)
			kv.deny = func([]driver.Change) bool { return true }
			s := newCAS(t, kv, &driver.Options{Attempts: attempts})
			start := time.Now()
			d, err := s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1})
			if !errors.Is(err, quota.ErrConflict) || d != (quota.Decision{}) {
				t.Errorf("Attempts %d, every swap conflicts: got %v, %v, want the zero Decision and ErrConflict", attempts, d, err)
			}
			want := attempts
			if want == 0 {
				want = 16
			}
			if kv.loads != want || kv.swapped() != want {
				t.Errorf("Attempts %d: got %d loads and %d swaps, want %d of each", attempts, kv.loads, kv.swapped(), want)
			}
			if took := time.Since(start); took > time.Duration(want)*64*time.Millisecond || want > 1 && took == 0 {
				t.Errorf("time of %d attempts: got %v, want up to 64ms each, and a pause between two", want, took)
			}
			// The pause between attempts ends with the context, and is not begun if the deadline would end it.
			ctx, cancel := context.WithCancel(bg)
			time.AfterFunc(time.Nanosecond, cancel)
			if _, err := s.Charge(ctx, quota.Charge{Limit: l, Key: "k", Cost: 1}); want > 1 && (!errors.Is(err, context.Canceled) || !errors.Is(err, quota.ErrConflict)) {
				t.Errorf("Attempts %d, context ends in the pause: got %v, want ErrConflict and context.Canceled", attempts, err)
			}
			ctx, cancel = context.WithTimeout(bg, time.Nanosecond)
			defer cancel()
			start = time.Now()
			if _, err := s.Charge(ctx, quota.Charge{Limit: l, Key: "k", Cost: 1}); !errors.Is(err, quota.ErrConflict) || time.Since(start) > 0 {
				t.Errorf("Attempts %d, no time for a pause: got %v after %v, want ErrConflict at once", attempts, err, time.Since(start))
			}
		})
	}
}

func TestCASErrors(t *testing.T) {
	l := testkit.Bucket("n", 100, time.Hour)
	cause := errors.New("broken pipe")
	take := quota.Charge{Limit: l, Key: "k", Cost: 1}
	for _, c := range []struct {
		name       string
		load, swap error
		want       error
		not        error
	}{
		{"Load fails", cause, nil, quota.ErrUnavailable, quota.ErrIndeterminate},
		{"Load is refused", fmt.Errorf("no: %w", quota.ErrMisconfigured), nil, quota.ErrMisconfigured, quota.ErrUnavailable},
		{"Swap fails", nil, cause, quota.ErrIndeterminate, quota.ErrUnavailable},
		{"Swap times out", nil, context.DeadlineExceeded, quota.ErrIndeterminate, quota.ErrUnavailable},
		{"Swap is refused", nil, fmt.Errorf("no: %w", quota.ErrUnavailable), quota.ErrUnavailable, quota.ErrIndeterminate},
		{"Swap is overloaded", nil, quota.ErrOverloaded, quota.ErrOverloaded, quota.ErrIndeterminate},
	} {
		t.Run(c.name, func(t *testing.T) {
			kv := newKV(testkit.NewClock().Micros)
			kv.loadErr, kv.swapErr = c.load, c.swap
			d, err := newCAS(t, kv, nil).Charge(bg, take)
			if !errors.Is(err, c.want) {
				t.Errorf("error: got %v, want %v", err, c.want)
			}
			if errors.Is(err, c.not) {
				t.Errorf("error: got %v, want one that is not %v", err, c.not)
			}
			if d != (quota.Decision{}) {
				t.Errorf("decision: got %v, want the zero Decision", d)
			}
			if given := errors.Join(c.load, c.swap); !errors.Is(err, cause) && errors.Is(given, cause) {
				t.Errorf("error: got %v, want one that wraps %v", err, cause)
			}
			if kv.loads != 1 || kv.swapped() > 1 {
				t.Errorf("calls of the KV: got %d loads and %d swaps, want 1 load and 1 swap at most", kv.loads, kv.swapped())
			}
		})
	}

	ctx, cancel := context.WithCancel(bg)
	cancel()
	kv := newKV(testkit.NewClock().Micros)
	if _, err := newCAS(t, kv, nil).Charge(ctx, take); !errors.Is(err, context.Canceled) || kv.loads != 0 {
		t.Errorf("Charge with an ended context: got %v and %d loads, want context.Canceled and no load", err, kv.loads)
	}
	ctx, cancel = context.WithCancel(bg)
	kv.clock = func() quota.Micros { cancel(); return testkit.Epoch } // ends within Load
	kv.loadErr = cause
	if _, err := newCAS(t, kv, nil).Charge(ctx, take); err != context.Canceled {
		t.Errorf("Charge whose context ends in Load: got %v, want context.Canceled itself", err)
	}

	kv = newKV(testkit.NewClock().Micros)
	s := newCAS(t, kv, nil)
	for _, text := range []string{"hello", "tb9:1:2:3:4", "sw1:1:2:3:4"} {
		kv.entries["{k}:n"] = memEntry{value: text, expires: testkit.Epoch * 2}
		if _, err := s.Charge(bg, take); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("Charge on the value %q: got %v, want ErrMisconfigured", text, err)
		}
		if got := kv.entries["{k}:n"].value; kv.swapped() != 0 || got != text {
			t.Errorf("after Charge on the value %q: got %d swaps and the value %q, want no swap and the value unchanged", text, kv.swapped(), got)
		}
	}
	if _, err := newCAS(t, short{kv}, nil).Charge(bg, take); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("Charge where Load returns too few entries: got %v, want ErrMisconfigured", err)
	}
}

// short is a KV that forgets entries.
type short struct{ driver.KV }

func (short) Load(context.Context, []string) ([]driver.Entry, quota.Micros, error) {
	return nil, testkit.Epoch, nil
}

func TestNewCASRefuses(t *testing.T) {
	kv := newKV(nil)
	_, err := driver.NewCAS(nil, nil)
	testkit.WantInvalid(t, err, "kv", "nil")
	_, err = driver.NewCAS(kv, &driver.Options{Attempts: -1})
	testkit.WantInvalid(t, err, "Options.Attempts", "-1", "0 or more")
	_, err = driver.NewCAS(kv, &driver.Options{Atomicity: 3})
	testkit.WantInvalid(t, err, "Options.Atomicity", "3", "AnyKeys, OneGroup or OneKey")
}

func TestCASAtomicity(t *testing.T) {
	l, m := testkit.Bucket("n", 100, time.Hour), testkit.Bucket("m", 100, time.Hour)
	lists := map[string][]quota.Charge{
		"one":        {{Limit: l, Key: "g/a", Cost: 1}},
		"one group":  {{Limit: l, Key: "g/a", Cost: 1}, {Limit: l, Key: "g/b", Cost: 1}},
		"one key":    {{Limit: l, Key: "g/a", Cost: 1}, {Limit: m, Key: "g/a", Cost: 1}},
		"two groups": {{Limit: l, Key: "g/a", Cost: 1}, {Limit: l, Key: "h/a", Cost: 1}},
		"one, id":    {{Limit: l, Key: "g/a", Cost: 1, ID: "i"}},
		"group, id":  {{Limit: l, Key: "g/a", Cost: 1, ID: "j"}, {Limit: l, Key: "g/b", Cost: 1, ID: "j"}},
	}
	for grade, crossing := range map[driver.Atomicity]string{
		driver.AnyKeys: "", driver.OneGroup: "two groups", driver.OneKey: "one group|one key|two groups|one, id|group, id",
	} {
		kv := newKV(testkit.NewClock().Micros)
		s := newCAS(t, kv, &driver.Options{Atomicity: grade})
		if got := s.(driver.Graded).Atomicity(); got != grade {
			t.Errorf("Atomicity: got %v, want %v", got, grade)
		}
		for name, cs := range lists {
			loads := kv.loads
			err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs)))
			if crosses := strings.Contains("|"+crossing+"|", "|"+name+"|"); crosses && !errors.Is(err, quota.ErrCrossSlot) {
				t.Errorf("atomicity %d, list %q: got %v, want ErrCrossSlot", grade, name, err)
			} else if !crosses && err != nil {
				t.Errorf("atomicity %d, list %q: got %v, want nil", grade, name, err)
			}
			if n := kv.loads - loads; err != nil && n != 0 {
				t.Errorf("atomicity %d, refused list %q: got %d loads, want none", grade, name, n)
			}
		}
	}
}

func TestCASCloses(t *testing.T) {
	l := testkit.Bucket("n", 100, time.Hour)
	kv := newKV(testkit.NewClock().Micros)
	for _, kv := range []driver.KV{kv, struct{ driver.KV }{newKV(testkit.NewClock().Micros)}} {
		s := newCAS(t, kv, nil)
		for range 2 {
			if err := s.Close(); err != nil {
				t.Errorf("Close: got %v, want nil", err)
			}
		}
		if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1}); !errors.Is(err, quota.ErrClosed) {
			t.Errorf("Charge after Close: got %v, want ErrClosed", err)
		}
		if err := s.ChargeAll(bg, []quota.Charge{{Limit: l, Key: "k", Cost: 1}}, make([]quota.Decision, 1)); !errors.Is(err, quota.ErrClosed) {
			t.Errorf("ChargeAll after Close: got %v, want ErrClosed", err)
		}
	}
	if kv.closed != 1 || kv.loads != 0 {
		t.Errorf("calls of the KV: got %d of Close and %d of Load, want 1 and none", kv.closed, kv.loads)
	}
	var _ io.Closer = kv
}
