package quota_test

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

func TestNewLimit(t *testing.T) {
	ok := testkit.Counter{Capacity: 1}
	for _, name := range []string{"a", "tokens", "A-Z_0.9", strings.Repeat("n", 64), ".", "-"} {
		l := quota.NewLimit(name, ok)
		if err := l.Err(); err != nil {
			t.Errorf("NewLimit(%q): got %v, want nil", name, err)
			continue
		}
		if l.Name() != name || l.Handle().Value() != name {
			t.Errorf("NewLimit(%q): got the name %q and the handle %q, want both as given", name, l.Name(), l.Handle().Value())
		}
		if got := l.Algorithm(); got != quota.Algorithm(ok) {
			t.Errorf("NewLimit(%q): got the algorithm %+v, want %+v", name, got, ok)
		}
		if got := *l.Spec(); got != ok.Spec() {
			t.Errorf("NewLimit(%q): got the spec %+v, want %+v", name, got, ok.Spec())
		}
	}
	for _, name := range []string{"", " ", "a b", "a:b", "a/b", "é", "a{", "a}", "a%", "a\x00", "a\n", strings.Repeat("n", 65), "a#"} {
		testkit.WantInvalid(t, quota.NewLimit(name, ok).Err(), "limit name", "1 to 64")
	}
	testkit.WantInvalid(t, quota.NewLimit("n", nil).Err(), "algorithm of limit n", "nil")
}

func TestNewLimitChecksTheSpec(t *testing.T) {
	for name, a := range map[string]testkit.Counter{
		"less than none": {Capacity: -1},
		"negative unit":  {Capacity: 1, Unit: -1},
		"negative debt":  {Capacity: 1, Debt: -1},
		"colon in rule":  {Capacity: 1, Rule: quota.Rule{'a', ':', 'b'}},
		"hole in rule":   {Capacity: 1, Rule: quota.Rule{'a', 0, 'b'}},
		"rule begins 0":  {Capacity: 1, Rule: quota.Rule{0, 'b'}},
		"space in rule":  {Capacity: 1, Rule: quota.Rule{'a', ' '}},
		"not ASCII rule": {Capacity: 1, Rule: quota.Rule{'a', 0xe9}},
	} {
		err := quota.NewLimit("n", a).Err()
		if err == nil {
			t.Errorf("NewLimit with %s: got nil, want ErrInvalid", name)
			continue
		}
		testkit.WantInvalid(t, err, "spec of limit n")
	}
	if err := quota.NewLimit("n", testkit.Counter{Capacity: 1, Rule: quota.Rule{'a', 'B', '.', '_', '-', '6', '7', '8'}}).Err(); err != nil {
		t.Errorf("NewLimit with a rule of 8 characters: got %v, want nil", err)
	}
	if l := quota.NewLimit("n", testkit.Counter{}); l.Err() != nil || l.Spec().Capacity != 0 {
		t.Errorf("NewLimit with a capacity of 0: got %v, %v; want a limit that denies", l, l.Err())
	}
}

// windowed is a rule that tells its window.
type windowed struct {
	testkit.Counter
	window time.Duration
}

func (w windowed) Spec() quota.Spec {
	s := w.Counter.Spec()
	s.Window = w.window
	return s
}

// A rule that does not tell its window, as rules of other authors may, makes limits as good as any.
func TestALimitWithoutAWindow(t *testing.T) {
	l := quota.NewLimit("n", testkit.Counter{Capacity: 7})
	if got := l.Window(); got != 0 || !math.IsNaN(l.Rate()) || l.Capacity() != 7 {
		t.Errorf("a rule without a window: got %v, %v a second, capacity %d; want 0, NaN and 7", got, l.Rate(), l.Capacity())
	}
	if b, err := l.MarshalText(); err != nil || string(b) != "n: ct1, capacity 7" {
		t.Errorf("MarshalText: got %q, %v; want the name, rule and capacity", b, err)
	}
	lim := newLimiter(t, local.New(), l, nil)
	if d := must[quota.Decision](t)(lim.Take(bg, "k", 7)); !d.Allowed {
		t.Errorf("Take: got %v, want it allowed", d)
	}
	testkit.WantInvalid(t, quota.NewLimit("n", windowed{testkit.Counter{Capacity: 1}, -1}).Err(), "spec of limit n", "window")
	for _, l := range []*quota.Limit{nil, {}} {
		_, err := l.MarshalText()
		testkit.WantInvalid(t, err, "limit", "NewLimit")
	}
}

func TestLimitsOfOneNameHaveOneHandle(t *testing.T) {
	a, b, c := testkit.Bucket("n", 1, time.Second), testkit.Bucket("n", 2, time.Second), testkit.Bucket("m", 1, time.Second)
	if a.Handle() != b.Handle() {
		t.Error("handles of two limits of one name: got two, want one")
	}
	if a.Handle() == c.Handle() {
		t.Error("handles of the names n and m: got one, want two")
	}
}

func TestMust(t *testing.T) {
	if got := quota.Must(7, nil); got != 7 {
		t.Errorf("Must(7, nil): got %d, want 7", got)
	}
	defer func() {
		got := recover()
		if err, _ := got.(error); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("Must of ErrInvalid: got the panic %v, want one with that error", got)
		}
	}()
	quota.Must(algorithm.ParseLimit("n: -1 burst 1/s bucket"))
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		quota.OpTake.String(): "take", quota.OpPeek.String(): "peek", quota.OpDebit.String(): "debit", quota.OpRefund.String(): "refund",
		quota.OpReset.String(): "reset", quota.OpAhead.String(): "take-ahead", quota.OpUpTo.String(): "take-up-to", quota.OpHold.String(): "hold", quota.OpSpend.String(): "spend", quota.OpRenew.String(): "renew", quota.Op(10).String(): "unknown", quota.FromStore.String(): "store", quota.FromLease.String(): "lease",
		quota.Source(99).String(): "unknown", quota.Rule{'t', 'b', '1'}.String(): "tb1", quota.Rule{}.String(): "", (quota.Rule{'1', '2', '3', '4', '5', '6', '7', '8'}).String(): "12345678",
	} {
		if got != want {
			t.Errorf("String: got %q, want %q", got, want)
		}
	}
}

func TestMicros(t *testing.T) {
	if got := testkit.Epoch.Time(); got.UnixMicro() != int64(testkit.Epoch) || got.Location() != time.UTC {
		t.Errorf("%d.Time(): got %v, want the same microsecond in UTC", testkit.Epoch, got)
	}
	const most = quota.Micros(1<<63-1) / 1000
	for m, want := range map[quota.Micros]time.Duration{0: 0, 1: time.Microsecond, most - 1: time.Duration(most-1) * 1000, most: quota.Never, quota.Forever: quota.Never, -1: -time.Microsecond} {
		if got := m.Duration(); got != want {
			t.Errorf("%d.Duration(): got %d, want %d", m, got, want)
		}
	}
}
