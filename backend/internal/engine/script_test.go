package engine

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// own is a rule of a user's.
type own struct {
	quota.Algorithm
	rule, lua string
}

func (o own) Spec() quota.Spec {
	s := o.Algorithm.Spec()
	s.Rule = quota.Rule{}
	copy(s.Rule[:], o.rule)
	return s
}

func (o own) Lua() string { return o.Algorithm.(driver.Scripted).Lua() + o.lua }

// owns returns limits of so many rules.
func owns(n int) (limits []*quota.Limit) {
	for i := range n {
		limits = append(limits, limitOf(fmt.Sprint("own", i), own{window(10), fmt.Sprint("r", i), ""}))
	}
	return limits
}

// cache is a client of a server that keeps every text which it was sent, and grants every charge.
type cache struct {
	mu    sync.Mutex
	texts map[any]string // by SHA
	cas   int            // loads and swaps
	bad   string         // a text that holds it is no Lua
}

func (c *cache) client() fake {
	c.texts = map[any]string{}
	return func(args []any, keys int) (Reply, error) {
		c.mu.Lock()
		defer c.mu.Unlock()
		if args[0] == evalSHA && c.texts[args[1]] == "" {
			return nil, errors.New("NOSCRIPT No matching script")
		}
		text := c.texts[args[1]]
		if args[0] == eval {
			text = args[1].(string)
			if c.bad != "" && strings.Contains(text, c.bad) {
				return nil, ReplyError(errors.New("ERR Error compiling script (new function): user_script:9: unexpected symbol"))
			}
			c.texts[newScript(text).sha] = text
		}
		if r := probeReply(args); r != nil {
			return r, nil
		}
		switch {
		case text == swapText:
			c.cas++
			return elements{int64(1)}, nil
		case strings.Contains(text, "Returns the time and the values"):
			c.cas++
		}
		return freshReply(args, keys), nil
	}
}

// size returns how many bytes of scripts the server keeps.
func (c *cache) size() (n int) {
	for _, text := range c.texts {
		n += len(text)
	}
	return n
}

// A server keeps three scripts or fewer for each rule, whatever rules go together and in which order.
func TestScriptsGrowWithRules(t *testing.T) {
	rng := random(t)
	limits := owns(13)
	var key atomic.Int64
	charge := func(i int) quota.Charge { return quota.Charge{Limit: limits[i], Key: fmt.Sprint(key.Add(1)), Cost: 1} }
	for name, calls := range map[string]func(s *Store) error{
		"every list": func(s *Store) error {
			for set := 1; set < 1<<len(limits); set++ {
				var cs []quota.Charge
				for i := range limits {
					if set>>i&1 == 1 {
						cs = append(cs, charge(i))
					}
				}
				if err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs))); err != nil {
					return err
				}
			}
			return nil
		},
		"random batches": func(s *Store) error {
			for range 5000 {
				var calls [][]quota.Charge
				for range 1 + rng.IntN(8) {
					var cs []quota.Charge
					for _, i := range rng.Perm(len(limits))[:1+rng.IntN(3)] {
						cs = append(cs, charge(i))
					}
					calls = append(calls, cs)
				}
				_, errs := Together(bg, s, calls)
				if err := errors.Join(errs...); err != nil {
					return err
				}
			}
			return nil
		},
		"at once": func(s *Store) error {
			return errors.Join(Each(64, func(g int) error {
				for i := range 200 {
					cs := []quota.Charge{charge((g + i) % 13), charge((g*g + 2*i + 1) % 13)}
					if g%2 == 0 || cs[0].Limit == cs[1].Limit {
						cs = cs[:1]
					}
					if err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs))); err != nil {
						return err
					}
				}
				return nil
			})...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			var c cache
			s := newStore(t, false, c.client())
			if err := calls(s); err != nil {
				t.Fatal(err)
			}
			most := 3 * len(limits)
			if name == "at once" { // several calls may bring new rules at the same time
				most += maxInFlight * len(limits)
			}
			if n := len(c.texts); n > most || n == 0 {
				t.Errorf("scripts on the server: got %d, want %d or fewer", n, most)
			}
			if n := c.size(); n > 1<<20 {
				t.Errorf("bytes of scripts on the server: got %d, want 1 MiB or less", n)
			}
			t.Logf("%d scripts, %d bytes", len(c.texts), c.size())
		})
	}
}

// The number of scripts is bounded: charges of rules beyond that are decided all the same, and a notice says so once.
func TestMostScripts(t *testing.T) {
	var c cache
	var told []string
	s := quota.Must(New(c.client(), false, Options{Batching: BatchAll, Notice: func(n quota.Notice) { told = append(told, n.Name+": "+n.Text) }}))
	limits := owns(maxRules + 20)
	for i, l := range limits {
		for range 2 {
			for _, other := range []*quota.Limit{l, limits[0], limits[i/2]} {
				cs := []quota.Charge{{Limit: l, Key: "a", Cost: 1}, {Limit: other, Key: "b", Cost: 1}}
				if _, err := s.Charge(bg, cs[0]); err != nil {
					t.Fatal(err)
				}
				out := make([]quota.Decision, 2)
				if err := s.ChargeAll(bg, cs, out); err != nil || !quota.Granted(out) {
					t.Fatalf("a list of rules %d and others: got %v, error %v; want a grant", i, out, err)
				}
			}
		}
		if i == maxRules-1 && (c.cas > 0 || told != nil) {
			t.Errorf("decisions by compare-and-swap with %d rules: got %d, and notices %q; want none", maxRules, c.cas, told)
		}
	}
	if len(told) != 1 || !strings.HasPrefix(told[0], "rules: 64 rules have scripts") || !strings.Contains(told[0], `under rule "r64"`) {
		t.Errorf("notices: got %q, want one about the first rule without a script", told)
	}
	if n, most := len(c.texts), 3*maxRules+2; n > most || c.cas == 0 {
		t.Errorf("scripts on the server: got %d, and %d decisions by compare-and-swap; want %d or fewer, and some", n, c.cas, most)
	}
}

// Lua that is none costs no other rule its batches.
func TestBrokenLua(t *testing.T) {
	c := cache{bad: "return return"}
	s := newStore(t, false, c.client())
	good := owns(3)
	bad := limitOf("bad", own{window(10), "bad", "return return"})
	for range 3 {
		if _, err := s.Charge(bg, quota.Charge{Limit: bad, Key: "k", Cost: 1}); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("the rule alone: got error %v, want ErrMisconfigured", err)
		}
		for i := range good {
			cs := []quota.Charge{{Limit: good[i], Key: "k", Cost: 1}, {Limit: good[(i+1)%3], Key: "k", Cost: 1}, {Limit: bad, Key: "k", Cost: 1}}
			out := make([]quota.Decision, 3)
			if err := s.ChargeAll(bg, cs, out); !errors.Is(err, quota.ErrMisconfigured) || errors.Is(err, quota.ErrIndeterminate) {
				t.Errorf("a list with the rule: got error %v, want ErrMisconfigured", err)
			}
			if err := s.ChargeAll(bg, cs[:2], out[:2]); err != nil {
				t.Errorf("a list without the rule: got error %v, want none", err)
			}
		}
	}
}
