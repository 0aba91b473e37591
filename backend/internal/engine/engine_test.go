package engine

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// other is a rule with another's name and its own Lua.
type other struct {
	quota.Algorithm
	lua string
}

func (o other) Lua() string { return o.lua }

func TestOneLuaForARule(t *testing.T) {
	s := newStore(t, false, func(args []any, keys int) (Reply, error) {
		r := elements{int64(1_795_427_141_791_724)}
		for range keys {
			r = append(r, nil)
		}
		return r, nil
	})
	good := quota.Charge{Limit: limitOf("a", window(10)), Key: "k", Cost: 1}
	bad := quota.Charge{Limit: limitOf("b", other{window(11), "return true"}), Key: "k", Cost: 1}
	if _, err := s.Take(bg, good); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Take(bg, bad); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("another Lua under the name of one rule: %v", err)
		}
		if err := s.TakeAll(bg, []quota.Charge{good, bad}, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("in a list: %v", err)
		}
	}
	if _, err := s.Take(bg, good); err != nil {
		t.Errorf("and then the first: %v", err)
	}
}

// Specs made without end do not fill the memory.
func TestPlansAreBounded(t *testing.T) {
	s := newStore(t, false, func(args []any, keys int) (Reply, error) { return elements{int64(1_795_427_141_791_724), nil}, nil })
	for n := range int64(3 * maxPlans) {
		if _, err := s.Take(bg, quota.Charge{Limit: limitOf("a", window(n+1)), Key: "k", Cost: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.plans); n > maxPlans {
		t.Errorf("%d plans", n)
	}
}

// What ends before anything is sent says so, and sends nothing.
func TestNothingIsSent(t *testing.T) {
	s := newStore(t, true, func([]any, int) (Reply, error) {
		t.Error("something was sent")
		return nil, nil
	})
	done, cancel := context.WithCancel(bg)
	cancel()
	cs := []quota.Charge{{Limit: limitOf("a", window(1)), Key: "k"}, {Limit: limitOf("a", window(1)), Key: "l"}}
	calls := func(ctx context.Context, want error) {
		t.Helper()
		if _, err := s.Take(ctx, cs[0]); !errors.Is(err, want) {
			t.Errorf("Take: %v", err)
		}
		if err := s.TakeAll(ctx, cs, make([]quota.Decision, 2)); !errors.Is(err, want) {
			t.Errorf("TakeAll: %v", err)
		}
		if _, err := s.Health(ctx); !errors.Is(err, want) {
			t.Errorf("Health: %v", err)
		}
	}
	calls(done, context.Canceled)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	calls(bg, quota.ErrClosed)
}

// What cannot be read of a state by compare-and-swap was not charged; what cannot be swapped may have been.
func TestSwapErrors(t *testing.T) {
	lost := errors.Join(quota.ErrIndeterminate, context.DeadlineExceeded)
	c := quota.Charge{Limit: limitOf("a", hidden{quota.Must(algorithm.FixedWindow(10, time.Hour))}), Key: "k", Cost: 1}
	for failing, want := range []error{quota.ErrUnavailable, quota.ErrIndeterminate} {
		call := 0
		s := newStore(t, false, func([]any, int) (Reply, error) {
			if call++; call > failing {
				return nil, lost
			}
			return elements{int64(1_795_427_141_791_724), nil}, nil
		})
		if _, err := s.Take(bg, c); !errors.Is(err, want) || call != failing+1 {
			t.Errorf("call %d lost: %v after %d calls", failing, err, call)
		}
	}
}
