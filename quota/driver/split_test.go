package driver_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// TestSplit decides lists that the database does not reach in one step, and looks at the keys afterwards.
func TestSplit(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	take := func(key string, cost int64) quota.Charge { return quota.Charge{Limit: l, Key: key, Cost: cost} }
	with := func(op quota.Op, c quota.Charge) quota.Charge { c.Op, c.MadeAt = op, testkit.Epoch; return c }
	for _, grade := range []driver.Atomicity{driver.OneGroup, driver.OneKey} {
		for _, c := range []struct {
			name  string
			cs    []quota.Charge
			want  string // allowed, remaining, charged
			after []int64
		}{
			{"granted", []quota.Charge{take("a/1", 1), take("b/1", 2), take("a/2", 3)}, "true 9 1|true 8 2|true 7 3", []int64{9, 8, 7}},
			{"denied", []quota.Charge{take("a/1", 1), take("b/1", 11), take("a/2", 3)}, "true 10 0|false 10 0|true 10 0", []int64{10, 10, 10}},
			{"debit after a grant", []quota.Charge{take("a/1", 1), with(quota.OpDebit, take("b/1", 4))}, "true 9 1|true 6 4", []int64{9, 6}},
			{"debit after a denial", []quota.Charge{take("a/1", 11), with(quota.OpDebit, take("b/1", 4))}, "false 10 0|true 10 0", []int64{10, 10}},
			{"debits only", []quota.Charge{with(quota.OpDebit, take("a/1", 1)), with(quota.OpDebit, take("b/1", 4))}, "true 9 1|true 6 4", []int64{9, 6}},
			{"peeks", []quota.Charge{with(quota.OpPeek, take("a/1", 1)), with(quota.OpPeek, take("b/1", 11))}, "true 10 0|false 10 0", []int64{10, 10}},
		} {
			s := newCAS(t, newKV(testkit.NewClock().Micros), &driver.Options{Atomicity: grade, Split: true})
			out := make([]quota.Decision, len(c.cs))
			if err := s.ChargeAll(bg, c.cs, out); err != nil {
				t.Errorf("%s, atomicity %d: got %v, want nil", c.name, grade, err)
			}
			var got []string
			for i, d := range out {
				got = append(got, fmt.Sprint(d.Allowed, " ", d.Remaining, " ", d.Charged))
				if !d.Split {
					t.Errorf("%s, atomicity %d, charge %d: got a decision without mark, want Split", c.name, grade, i)
				}
			}
			if strings.Join(got, "|") != c.want {
				t.Errorf("%s, atomicity %d: got %s, want %s", c.name, grade, strings.Join(got, "|"), c.want)
			}
			for i, want := range c.after {
				if n := remaining(t, s, l, c.cs[i].Key); n != want {
					t.Errorf("%s, atomicity %d, remaining of %s: got %d, want %d", c.name, grade, c.cs[i].Key, n, want)
				}
			}
		}
	}
	s := newCAS(t, newKV(testkit.NewClock().Micros), &driver.Options{Atomicity: driver.OneGroup, Split: true})
	if out := chargeAll(t, s, take("a/1", 1), take("a/2", 1)); out[0].Split || out[1].Split {
		t.Errorf("list of one group: got %v, want decisions without the mark Split", out)
	}
}

// TestSplitAlternatives takes the first of several lists that fits, each of several parts: no other has a token charged.
func TestSplitAlternatives(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	take := func(key string, cost int64) quota.Charge { return quota.Charge{Key: key, Cost: cost} }
	for _, grade := range []driver.Atomicity{driver.OneGroup, driver.OneKey} {
		s := newCAS(t, newKV(testkit.NewClock().Micros), &driver.Options{Atomicity: grade, Split: true})
		lim := quota.Must(quota.NewLimiter(s, l, nil))
		lists := [][]quota.Charge{{take("a/1", 4), take("b/1", 11)}, {take("b/1", 4), take("c/1", 3)}, {take("a/1", 1), take("c/1", 1)}}
		for i, c := range []struct {
			taken int
			left  string
		}{{1, "10 6 7"}, {1, "10 2 4"}, {2, "9 2 3"}} {
			r, err := lim.TakeFirst(bg, lists...)
			left := fmt.Sprint(remaining(t, s, l, "a/1"), remaining(t, s, l, "b/1"), remaining(t, s, l, "c/1"))
			if err != nil || !r.Granted || r.Taken != c.taken || left != c.left {
				t.Errorf("atomicity %d, call %d: got list %d of %v, %v, and %s left; want list %d, and %s left", grade, i, r.Taken, r, err, left, c.taken, c.left)
			}
			for n, list := range r.Lists {
				for _, d := range list {
					if !d.Split || (d.Charged > 0) != (n == c.taken) {
						t.Errorf("atomicity %d, call %d, list %d: got %v, want it marked Split, and charged only of list %d", grade, i, n, d, c.taken)
					}
				}
			}
		}
		if r, err := lim.TakeFirst(bg, lists[2]); err != nil || !r.Granted || !r.Decisions[0].Split {
			t.Errorf("atomicity %d, one list of two parts: got %v, %v, want it granted and marked Split", grade, r, err)
		}
	}
}

// TestSplitFails has the database fail for one part of a list: the others are given back, repeatedly if need be, or else the error
// says that a part may be charged.
func TestSplitFails(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	cs := []quota.Charge{{Limit: l, Key: "a", Cost: 1}, {Limit: l, Key: "b", Cost: 1}}
	for name, c := range map[string]struct {
		refunds []error // of the first refunds of a; nil makes them
		grade   driver.Atomicity
		want    error
		left    int64 // of a
	}{
		"the refund is made":                {nil, driver.OneGroup, quota.ErrUnavailable, 10},
		"the refund is refused twice":       {[]error{quota.ErrUnavailable, quota.ErrConflict}, driver.OneKey, quota.ErrUnavailable, 10},
		"the refund is lost, with an id":    {[]error{errors.New("lost")}, driver.OneGroup, quota.ErrUnavailable, 10},
		"the refund is lost, without an id": {[]error{errors.New("lost")}, driver.OneKey, quota.ErrIndeterminate, 9},
		"the refund cannot be made":         {slices.Repeat([]error{quota.ErrUnavailable}, 1000), driver.OneGroup, quota.ErrIndeterminate, 9},
		"the refund is refused for good":    {[]error{quota.ErrMisconfigured}, driver.OneGroup, quota.ErrIndeterminate, 9},
	} {
		synctest.Test(t, func(t *testing.T) {
			tx := &memTx{memKV: newKV(testkit.NewClock().Micros)}
			taken := false
			tx.around = func(transact func() error, a *driver.Access) error {
				switch {
				case strings.HasPrefix(a.Keys[0], "{b}"):
					return quota.ErrUnavailable
				case taken && !a.Peek && len(c.refunds) > 0:
					err := c.refunds[0]
					c.refunds = c.refunds[1:]
					if errors.Is(err, quota.ErrUnavailable) || errors.Is(err, quota.ErrConflict) || errors.Is(err, quota.ErrMisconfigured) {
						return err
					}
					tx.lostReply = err
					if c.grade == driver.OneKey {
						tx.lostReply, tx.swapErr = nil, err
						defer func() { tx.swapErr = nil }()
					}
				}
				taken = true
				return transact()
			}
			s := newTx(t, tx, &driver.Options{Atomicity: c.grade, Split: true, Attempts: 1})
			err := s.ChargeAll(bg, cs, make([]quota.Decision, 2))
			if !errors.Is(err, c.want) || c.want != quota.ErrIndeterminate && errors.Is(err, quota.ErrIndeterminate) {
				t.Errorf("%s: got %v, want %v", name, err, c.want)
			}
			if n := remaining(t, s, l, "a"); n != c.left {
				t.Errorf("%s: got %d left, want %d", name, n, c.left)
			}
		})
	}
}

// TestSplitCallerLeaves ends the context while a grant is given back, or just before: the refund is made all the same, and
// Close waits for it.
func TestSplitCallerLeaves(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	for name, leaves := range map[string]func(a *driver.Access) bool{
		"during the refund": func(a *driver.Access) bool { return strings.HasPrefix(a.Keys[0], "{a}") },
		"at the denial":     func(a *driver.Access) bool { return strings.HasPrefix(a.Keys[0], "{b}") },
	} {
		synctest.Test(t, func(t *testing.T) {
			tx := &memTx{memKV: newKV(testkit.NewClock().Micros)}
			ctx, cancel := context.WithCancel(bg)
			var calls atomic.Int32
			tx.around = func(transact func() error, a *driver.Access) error {
				if strings.HasPrefix(a.Keys[0], "{a}") {
					calls.Add(1)
				}
				if leaves(a) && (calls.Load() == 2 || strings.HasPrefix(a.Keys[0], "{b}")) {
					time.Sleep(time.Second / 4) // until the part of a is granted
					cancel()
					time.Sleep(time.Second / 4)
				}
				return transact()
			}
			s := newTx(t, tx, &driver.Options{Atomicity: driver.OneGroup, Split: true})
			err := s.ChargeAll(ctx, []quota.Charge{{Limit: l, Key: "a", Cost: 1}, {Limit: l, Key: "b", Cost: 11}}, make([]quota.Decision, 2))
			if !errors.Is(err, quota.ErrIndeterminate) || !errors.Is(err, context.Canceled) {
				t.Errorf("%s: got %v, want ErrIndeterminate and context.Canceled", name, err)
			}
			s.Close()
			if got := newTx(t, tx, nil); remaining(t, got, l, "a") != 10 {
				t.Errorf("%s, after Close: got %d left of a, want 10", name, remaining(t, got, l, "a"))
			}
		})
	}
}
