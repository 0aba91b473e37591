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
		return freshReply(args, keys), nil
	})
	good := quota.Charge{Limit: limitOf("a", window(10)), Key: "k", Cost: 1}
	bad := quota.Charge{Limit: limitOf("b", other{window(11), "return true"}), Key: "k", Cost: 1}
	if _, err := s.Charge(bg, good); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if _, err := s.Charge(bg, bad); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("Charge with another Lua for the rule: got error %v, want ErrMisconfigured", err)
		}
		if err := s.ChargeAll(bg, []quota.Charge{good, bad}, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("ChargeAll with another Lua for the rule: got error %v, want ErrMisconfigured", err)
		}
	}
	if _, err := s.Charge(bg, good); err != nil {
		t.Errorf("Charge with the first Lua again: got error %v, want nil", err)
	}
}

// Specs made without end do not fill the memory.
func TestPlansAreBounded(t *testing.T) {
	s := newStore(t, false, func(args []any, keys int) (Reply, error) { return freshReply(args, keys), nil })
	for n := range int64(3 * maxPlans) {
		if _, err := s.Charge(bg, quota.Charge{Limit: limitOf("a", window(n+1)), Key: "k", Cost: 1}); err != nil {
			t.Fatal(err)
		}
	}
	if n := len(s.plans); n > maxPlans {
		t.Errorf("plans: got %d, want at most %d", n, maxPlans)
	}
}

// A call of a closed store, or under an ended context, sends nothing and returns that error.
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
		if _, err := s.Charge(ctx, cs[0]); !errors.Is(err, want) {
			t.Errorf("Charge: got error %v, want %v", err, want)
		}
		if err := s.ChargeAll(ctx, cs, make([]quota.Decision, 2)); !errors.Is(err, want) {
			t.Errorf("ChargeAll: got error %v, want %v", err, want)
		}
		if _, err := s.Health(ctx); !errors.Is(err, want) {
			t.Errorf("Health: got error %v, want %v", err, want)
		}
	}
	calls(done, context.Canceled)
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("Close: got error %v, want nil", err)
		}
	}
	calls(bg, quota.ErrClosed)
}

// By compare-and-swap, a state that could not be loaded was not charged; one whose swap was lost may have
// been.
func TestSwapErrors(t *testing.T) {
	lost := errors.Join(quota.ErrIndeterminate, context.DeadlineExceeded)
	c := quota.Charge{Limit: limitOf("a", hidden{algorithm.FixedWindow(10, time.Hour)}), Key: "k", Cost: 1}
	for failing, want := range []error{quota.ErrUnavailable, quota.ErrIndeterminate} {
		call := 0
		s := newStore(t, false, func([]any, int) (Reply, error) {
			if call++; call > failing {
				return nil, lost
			}
			return elements{int64(1_795_427_141_791_724), nil}, nil
		})
		if _, err := s.Charge(bg, c); !errors.Is(err, want) || call != failing+1 {
			t.Errorf("call %d lost: got error %v after %d calls, want %v after %d", failing, err, call, want, failing+1)
		}
	}
}
