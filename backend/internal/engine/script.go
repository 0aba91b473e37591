package engine

import (
	"crypto/sha1"
	_ "embed"
	"encoding/hex"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

//go:embed prelude.lua
var preludeText string

//go:embed state.lua
var stateText string

//go:embed single.lua
var singleText string

//go:embed batch.lua
var batchText string

const (
	serverClock   = "local t = call('TIME')\nlocal now = t[1] * 1000000 + t[2]\n"
	injectedClock = "local now = table.remove(ARGV) + 0\n"
	kernelParams  = "(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6)\n"
)

// foreign is the error of a script whose key holds something else than a state of its rule.
const foreign = "FLEETQUOTA the key holds no state of this rule and layout"

// injectedSlack is how many ms a state is kept longer than its reset under Options.Clock, which may stand
// still.
const injectedSlack = 24 * 60 * 60 * 1000

// script is a text and its SHA-1, boxed as arguments.
type script struct {
	text, sha any
}

func newScript(text string) *script {
	sum := sha1.Sum([]byte(text))
	return &script{text: text, sha: hex.EncodeToString(sum[:])}
}

// scripts assembles the texts and keeps them: one for each rule alone, and one for each set of rules in a
// batch. A text has only constants and kernels; keys and numbers travel as arguments.
type scripts struct {
	clock, slack string
	load, swap   *script // for algorithms without Lua

	// mu guards the maps. A kernel or script does not change once it is in a map.
	mu      sync.RWMutex
	kernels map[quota.Rule]string
	single  map[quota.Rule]*script
	sets    map[string]*script // by the names of the rules
}

func newScripts(injected bool) *scripts {
	s := &scripts{
		clock:   serverClock,
		slack:   strconv.FormatInt(driver.ExpirySlack.Milliseconds(), 10),
		kernels: map[quota.Rule]string{}, single: map[quota.Rule]*script{}, sets: map[string]*script{},
	}
	if injected {
		s.clock, s.slack = injectedClock, strconv.Itoa(injectedSlack)
	}
	s.load, s.swap = newScript(s.assemble("", loadText)), newScript(swapText)
	return s
}

// one returns the script of a charge that goes alone to a limit with this rule and kernel. It fails with
// ErrMisconfigured if the rule has come with another kernel before.
func (s *scripts) one(rule quota.Rule, kernel string) (*script, error) {
	s.mu.RLock()
	sc, known := s.single[rule], s.kernels[rule]
	s.mu.RUnlock()
	if sc == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if known = s.kernels[rule]; known == "" {
			known = kernel
			s.kernels[rule] = kernel
		}
		sc = newScript(s.assemble("local function kernel"+kernelParams+kernel+"\nend\n", singleText))
		s.single[rule] = sc
	}
	if known != kernel {
		return nil, fmt.Errorf("redis: %w: two algorithms have the rule %q; accepted: a rule for each algorithm", quota.ErrMisconfigured, rule)
	}
	return sc, nil
}

// batch returns the script of a call to limits with these rules. one must have been called for each.
func (s *scripts) batch(rules []quota.Rule) *script {
	names := make([]string, 0, len(rules))
	for _, r := range rules {
		names = append(names, r.String())
	}
	slices.Sort(names)
	names = slices.Compact(names)
	key := strings.Join(names, " ")
	s.mu.RLock()
	sc := s.sets[key]
	s.mu.RUnlock()
	if sc != nil {
		return sc
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	b.WriteString("local kernels = {}\n")
	for _, name := range names {
		var rule quota.Rule
		copy(rule[:], name)
		b.WriteString("kernels['" + name + "'] = function" + kernelParams + s.kernels[rule] + "\nend\n")
	}
	sc = newScript(s.assemble(b.String(), batchText))
	s.sets[key] = sc
	return sc
}

// assemble returns a text behind the locals, the clock and the kernels, and fills in the constants of the
// text. Kernels come from algorithms and stay as they are.
func (s *scripts) assemble(kernels, text string) string {
	text = strings.ReplaceAll(text, "HELPERS", stateText)
	return preludeText + s.clock + kernels + strings.NewReplacer(
		"SLACK", s.slack,
		"NUMBERS", "'>"+strings.Repeat("i7", 7)+"'",
		"MOST", strconv.Itoa((1+quota.MaxTail)*numberSize),
		"BIG", strconv.FormatInt(quota.MaxNumber, 10),
		"FOREIGN", "{err = '"+foreign+"'}",
	).Replace(text)
}
