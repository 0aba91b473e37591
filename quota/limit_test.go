package quota_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// counter is a rule in as few lines as it takes: a quota that never comes back. Its spec is what a test says.
type counter struct {
	capacity int64
	rule     quota.Rule
	unit     int64
	debt     int64
}

func (c counter) Spec() quota.Spec {
	s := quota.Spec{Rule: quota.Rule{'c', 't', '1'}, Unit: 1, Capacity: c.capacity, Debt: c.debt}
	if c.rule != (quota.Rule{}) {
		s.Rule = c.rule
	}
	if c.unit != 0 {
		s.Unit = c.unit
	}
	return s
}

func (c counter) Decide(s quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	v := quota.Verdict{Outcome: quota.Outcome{Allowed: true}}
	kept := s.A
	switch r.Op {
	case quota.OpTake, quota.OpPeek:
		if r.Cost > c.capacity-s.A {
			v.Allowed, v.RetryAfter = false, quota.Forever
		} else if r.Op == quota.OpTake {
			kept += r.Cost
		}
	case quota.OpDebit:
		kept += min(r.Cost, c.capacity+c.debt-kept)
	case quota.OpRefund:
		kept = max(kept-r.Cost, 0)
	case quota.OpReset:
		kept = 0
	}
	if kept != s.A {
		v.Write, s = true, quota.State{}
		if kept > 0 {
			s = quota.State{Unit: 1, A: kept}
		}
	}
	v.Remaining = c.capacity - kept
	if kept > 0 {
		v.ResetAfter = quota.Forever
	}
	return s, v
}

func TestNewLimit(t *testing.T) {
	ok := counter{capacity: 1}
	for _, name := range []string{"a", "tokens", "A-Z_0.9", strings.Repeat("n", 64), ".", "-"} {
		l, err := quota.NewLimit(name, ok)
		if err != nil || l.Name() != name || l.Handle().Value() != name || l.Algorithm() != quota.Algorithm(ok) || *l.Spec() != ok.Spec() {
			t.Errorf("NewLimit(%q) = %v, %v", name, l, err)
		}
	}
	for _, name := range []string{"", " ", "a b", "a:b", "a/b", "é", "a{", "a}", "a%", "a\x00", "a\n", strings.Repeat("n", 65), "a#"} {
		_, err := quota.NewLimit(name, ok)
		wantInvalid(t, err, "limit name", "1 to 64")
	}
	_, err := quota.NewLimit("n", nil)
	wantInvalid(t, err, "algorithm of limit n", "nil")
}

func TestNewLimitChecksTheSpec(t *testing.T) {
	for what, a := range map[string]counter{
		"no capacity":    {},
		"negative unit":  {capacity: 1, unit: -1},
		"negative debt":  {capacity: 1, debt: -1},
		"colon in rule":  {capacity: 1, rule: quota.Rule{'a', ':', 'b'}},
		"hole in rule":   {capacity: 1, rule: quota.Rule{'a', 0, 'b'}},
		"rule begins 0":  {capacity: 1, rule: quota.Rule{0, 'b'}},
		"space in rule":  {capacity: 1, rule: quota.Rule{'a', ' '}},
		"not ASCII rule": {capacity: 1, rule: quota.Rule{'a', 0xe9}},
	} {
		_, err := quota.NewLimit("n", a)
		if err == nil {
			t.Errorf("%s: accepted", what)
			continue
		}
		wantInvalid(t, err, "spec of limit n")
	}
	if _, err := quota.NewLimit("n", counter{capacity: 1, rule: quota.Rule{'a', 'B', '.', '_', '-', '6', '7', '8'}}); err != nil {
		t.Error(err)
	}
}

func TestLimitsOfOneNameHaveOneHandle(t *testing.T) {
	a, b, c := bucket("n", 1, time.Second), bucket("n", 2, time.Second), bucket("m", 1, time.Second)
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
	if got := epoch.Time(); got.UnixMicro() != int64(epoch) || got.Location() != time.UTC {
		t.Errorf("Time = %v", got)
	}
	const most = quota.Micros(1<<63-1) / 1000
	for m, want := range map[quota.Micros]time.Duration{0: 0, 1: time.Microsecond, most - 1: time.Duration(most-1) * 1000, most: quota.Never, quota.Forever: quota.Never, -1: -time.Microsecond} {
		if got := m.Duration(); got != want {
			t.Errorf("%d.Duration() = %d, want %d", m, got, want)
		}
	}
}
