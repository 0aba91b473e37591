package enginetest

import (
	"errors"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// liar is a fixed window whose Lua is another.
type liar struct {
	quota.Algorithm
	rule string
	lua  string
}

func (l liar) Spec() quota.Spec {
	s := l.Algorithm.Spec()
	s.Rule = quota.Rule{}
	copy(s.Rule[:], l.rule)
	return s
}

func (l liar) Lua() string { return l.lua }

// Kernels: Lua that decides otherwise than its Go, or fails, is ErrMisconfigured, and what fails in a
// list fails before anything of it is written.
func Kernels(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	store := open(engine.Options{})
	window := yearly("w", 10)
	for name, test := range map[string]struct {
		lua    string
		writes bool // it decides, and too late to take back
	}{
		"grants":      {"return true, true, 1000, unit, 1, 1, 0, nil", true},
		"denies":      {"return false, false, 0, u, a, b, c, tail", false},
		"is fresh":    {"return true, false, 0, u, a, b, c, tail", false},
		"throws":      {"error('boom')", false},
		"is broken":   {"return return", false},
		"no numbers":  {"return true, true, 1000, unit, 'x', {}, 0, nil", false},
		"no state":    {"return true, true, 1000", false},
		"no time":     {"return true, true, 0/0, unit, 1, 1, 0, nil", false},
		"no end":      {"return true, true, 1/0, unit, 1, 1, 0, nil", false},
		"in the past": {"return true, true, -5000000, unit, 1, 1, 0, nil", false},
		"a global":    {"leak = 1 return true, true, 1000, unit, 1, 1, 0, nil", false},
	} {
		t.Run(name, func(t *testing.T) {
			rule := "r" + string(rune('a'+len(name))) + name[:1]
			c := quota.Charge{Limit: limitOf("liar", liar{window.Algorithm(), rule, test.lua}), Key: "k", Cost: 1}
			good := quota.Charge{Limit: window, Key: "k", Cost: 1}
			if name == "grants" { // no difference unless there is more than fits
				c.Cost = 11
			}
			server.FlushAll(bg)
			if d, err := store.Take(bg, c); !errors.Is(err, quota.ErrMisconfigured) {
				t.Errorf("decided %+v, %v", d, err)
			}
			if held := server.held(t, c); held != "" && !test.writes {
				t.Errorf("wrote %x", held)
			}
			server.FlushAll(bg)
			if name == "is fresh" {
				return // in a list only the grant counts
			}
			if err := store.TakeAll(bg, []quota.Charge{good, c}, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrMisconfigured) {
				t.Errorf("in a list: %v", err)
			}
			if held := server.held(t, good); held != "" && !test.writes {
				t.Errorf("the list wrote %x", held)
			}
		})
	}
}
