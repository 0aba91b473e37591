package quota_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

func TestNewLimit(t *testing.T) {
	ok := testkit.Counter{Capacity: 1}
	for _, name := range []string{"a", "tokens", "A-Z_0.9", strings.Repeat("n", 64), ".", "-"} {
		l, err := quota.NewLimit(name, ok)
		if err != nil || l.Name() != name || l.Handle().Value() != name || l.Algorithm() != quota.Algorithm(ok) || *l.Spec() != ok.Spec() {
			t.Errorf("NewLimit(%q) = %v, %v", name, l, err)
		}
	}
	for _, name := range []string{"", " ", "a b", "a:b", "a/b", "é", "a{", "a}", "a%", "a\x00", "a\n", strings.Repeat("n", 65), "a#"} {
		_, err := quota.NewLimit(name, ok)
		testkit.WantInvalid(t, err, "limit name", "1 to 64")
	}
	_, err := quota.NewLimit("n", nil)
	testkit.WantInvalid(t, err, "algorithm of limit n", "nil")
}

func TestNewLimitChecksTheSpec(t *testing.T) {
	for what, a := range map[string]testkit.Counter{
		"no capacity":    {},
		"negative unit":  {Capacity: 1, Unit: -1},
		"negative debt":  {Capacity: 1, Debt: -1},
		"colon in rule":  {Capacity: 1, Rule: quota.Rule{'a', ':', 'b'}},
		"hole in rule":   {Capacity: 1, Rule: quota.Rule{'a', 0, 'b'}},
		"rule begins 0":  {Capacity: 1, Rule: quota.Rule{0, 'b'}},
		"space in rule":  {Capacity: 1, Rule: quota.Rule{'a', ' '}},
		"not ASCII rule": {Capacity: 1, Rule: quota.Rule{'a', 0xe9}},
	} {
		_, err := quota.NewLimit("n", a)
		if err == nil {
			t.Errorf("%s: accepted", what)
			continue
		}
		testkit.WantInvalid(t, err, "spec of limit n")
	}
	if _, err := quota.NewLimit("n", testkit.Counter{Capacity: 1, Rule: quota.Rule{'a', 'B', '.', '_', '-', '6', '7', '8'}}); err != nil {
		t.Error(err)
	}
}

func TestLimitsOfOneNameHaveOneHandle(t *testing.T) {
	a, b, c := testkit.Bucket("n", 1, time.Second), testkit.Bucket("n", 2, time.Second), testkit.Bucket("m", 1, time.Second)
	if a.Handle() != b.Handle() || a.Handle() == c.Handle() {
		t.Error("handles do not follow names")
	}
}

func TestMust(t *testing.T) {
	if quota.Must(7, nil) != 7 {
		t.Error("Must changed its value")
	}
	defer func() {
		if err, _ := recover().(error); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("Must panicked with %v", err)
		}
	}()
	quota.Must(algorithm.TokenBucket(0, 1, time.Second))
}

func TestNames(t *testing.T) {
	for got, want := range map[string]string{
		quota.OpTake.String(): "take", quota.OpPeek.String(): "peek", quota.OpDebit.String(): "debit", quota.OpRefund.String(): "refund",
		quota.OpReset.String(): "reset", quota.Op(5).String(): "unknown", quota.FromStore.String(): "store", quota.FromLease.String(): "lease",
		quota.Source(99).String(): "unknown", quota.Rule{'t', 'b', '1'}.String(): "tb1", quota.Rule{}.String(): "", (quota.Rule{'1', '2', '3', '4', '5', '6', '7', '8'}).String(): "12345678",
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestMicros(t *testing.T) {
	if got := testkit.Epoch.Time(); got.UnixMicro() != int64(testkit.Epoch) || got.Location() != time.UTC {
		t.Errorf("Time = %v", got)
	}
	const most = quota.Micros(1<<63-1) / 1000
	for m, want := range map[quota.Micros]time.Duration{0: 0, 1: time.Microsecond, most - 1: time.Duration(most-1) * 1000, most: quota.Never, quota.Forever: quota.Never, -1: -time.Microsecond} {
		if got := m.Duration(); got != want {
			t.Errorf("%d.Duration() = %d, want %d", m, got, want)
		}
	}
}
