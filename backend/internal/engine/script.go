package engine

import (
	"bytes"
	"crypto/sha1"
	_ "embed"
	"encoding/hex"
	"fmt"
	"maps"
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
	// The functions are parameters too: a function that took them from around it would cost more to make than to call.
	kernelParams = "(u, a, b, c, tail, op, cost, at, now, unit, p1, p2, p3, p4, p5, p6, p7, p8, keep, floor, ceil, min, max)\n"
)

// foreign is the error of a script whose key holds something else than a state of its rule.
const foreign = "FLEETQUOTA the key holds no state of this rule and layout"

// injectedSlack is how many ms a state is kept longer than its reset under Options.Clock, which may stand
// still.
const injectedSlack = 24 * 60 * 60 * 1000

// script is a text and its SHA-1, boxed as arguments.
type script struct {
	text, sha any
	rules     map[quota.Rule]bool // of a mix of rules, see scripts; else nil
}

func newScript(text string) *script {
	sum := sha1.Sum([]byte(text))
	return &script{text: text, sha: hex.EncodeToString(sum[:])}
}

// scripts assembles the texts and keeps them: for each rule one for a charge alone and one for batches, and one for batches
// of several rules, the mix. A text has only constants and kernels; keys and numbers travel as arguments.
//
// A server keeps every text that it was sent, so their number must not grow with the combinations of rules. The mix has
// the kernels of all rules that were in a batch with another, and is made anew when a rule joins them: n rules make at most
// n mixes, one after the other. A rule joins when a script with its kernel has run: a server compiles a text as a whole, and
// a kernel that is no Lua must not cost other rules their batches.
type scripts struct {
	clock, slack string
	load, swap   *script // for algorithms without Lua

	// mu guards the fields below. A kernel or script does not change once it is here.
	mu      sync.RWMutex
	kernels map[quota.Rule]string
	reads   map[quota.Rule]quota.Rule // Spec.Reads of those
	single  map[quota.Rule]*script
	batches map[quota.Rule]*script
	mix     *script
	next    *script // is to be the mix once it has run; nil if there was none
}

// maxRules is how many rules get scripts. Charges of further ones are decided by compare-and-swap, and a notice says so.
const maxRules = 64

func newScripts(injected bool) *scripts {
	s := &scripts{
		clock:   serverClock,
		slack:   strconv.FormatInt(driver.ExpirySlack.Milliseconds(), 10),
		kernels: map[quota.Rule]string{}, reads: map[quota.Rule]quota.Rule{}, single: map[quota.Rule]*script{}, batches: map[quota.Rule]*script{}, mix: &script{},
	}
	if injected {
		s.clock, s.slack = injectedClock, strconv.Itoa(injectedSlack)
	}
	s.load, s.swap = newScript(s.assemble("", loadText)), newScript(swapText)
	return s
}

// one returns the script of a charge that goes alone to a limit with this rule and kernel, or nil where there are maxRules
// others. It fails with ErrMisconfigured if the rule has come with another kernel before. reads is Spec.Reads.
func (s *scripts) one(rule, reads quota.Rule, kernel string) (*script, error) {
	s.mu.RLock()
	sc, known, other := s.single[rule], s.kernels[rule], s.reads[rule]
	s.mu.RUnlock()
	if sc == nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		if known, other = s.kernels[rule], s.reads[rule]; known == "" {
			if len(s.kernels) == maxRules {
				return nil, nil
			}
			known, other = kernel, reads
			s.kernels[rule], s.reads[rule] = kernel, reads
		}
		sc = newScript(s.assemble("local function kernel"+kernelParams+kernel+"\nend\n", singleText, rule))
		s.single[rule] = sc
	}
	if known != kernel || other != reads {
		return nil, fmt.Errorf("redis: %w: two algorithms have the rule %q; accepted: a rule for each algorithm", quota.ErrMisconfigured, rule)
	}
	return sc, nil
}

// batch returns the script of a call to limits with these rules. one must have returned a script for each, and ran must be
// called when the script has run.
func (s *scripts) batch(rules []quota.Rule) *script {
	several := slices.ContainsFunc(rules, func(r quota.Rule) bool { return r != rules[0] })
	s.mu.RLock()
	sc := s.batches[rules[0]]
	if several {
		if sc = s.mix; !sc.has(rules) {
			sc = nil
		}
	}
	s.mu.RUnlock()
	if sc != nil {
		return sc
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !several {
		sc = s.ofRules(rules)
		s.batches[rules[0]] = sc
		return sc
	}
	rules = slices.AppendSeq(slices.Clone(rules), maps.Keys(s.mix.rules))
	if sc = s.ofRules(rules); s.next != nil && s.next.sha == sc.sha {
		return s.next // nodes know a script by its address
	}
	sc.rules = setOf(rules)
	s.next = sc
	return sc
}

// ran notes that a script has run.
func (s *scripts) ran(sc *script) {
	if sc.rules == nil {
		return
	}
	s.mu.RLock()
	known := s.mix == sc
	s.mu.RUnlock()
	if known {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	rules, before := slices.Collect(maps.Keys(sc.rules)), slices.Collect(maps.Keys(s.mix.rules))
	switch {
	case s.mix.has(rules): // it was the mix earlier
	case sc.has(before):
		s.mix = sc
	default: // another rule joined meanwhile
		rules = append(rules, before...)
		s.mix = s.ofRules(rules)
		s.mix.rules = setOf(rules)
	}
}

func setOf(rules []quota.Rule) map[quota.Rule]bool {
	set := make(map[quota.Rule]bool, len(rules))
	for _, r := range rules {
		set[r] = true
	}
	return set
}

// has reports whether a mix has the kernels of these rules.
func (sc *script) has(rules []quota.Rule) bool {
	return !slices.ContainsFunc(rules, func(r quota.Rule) bool { return !sc.rules[r] })
}

// ofRules returns the script of batches with these rules. The caller holds s.mu.
func (s *scripts) ofRules(rules []quota.Rule) *script {
	slices.SortFunc(rules, func(a, b quota.Rule) int { return bytes.Compare(a[:], b[:]) })
	var b strings.Builder
	b.WriteString("local function kernelOf(rule)\n")
	for _, r := range slices.Compact(rules) {
		b.WriteString("if rule == '" + r.String() + "' then return function" + kernelParams + s.kernels[r] + "\nend end\n")
	}
	b.WriteString("end\n")
	return newScript(s.assemble(b.String(), batchText, rules...))
}

// assemble returns a text behind the locals, the clock and the kernels, and fills in the constants of the
// text, which serves states of some rules. Kernels come from algorithms and stay as they are.
func (s *scripts) assemble(kernels, text string, rules ...quota.Rule) string {
	var reads strings.Builder
	for _, r := range slices.Compact(rules) {
		if other := s.reads[r].String(); other != "" {
			fmt.Fprintf(&reads, "elseif name == '%s' and sub(v, 1, %d) == '\\%03d%s' then n = %d\n", r, 1+len(other), len(other), other, 1+len(other)+numberSize)
		}
	}
	text = strings.ReplaceAll(strings.ReplaceAll(text, "HELPERS", stateText), "READS", reads.String())
	return preludeText + s.clock + kernels + strings.NewReplacer(
		"SLACK", s.slack,
		"IDWINDOW", strconv.FormatInt(quota.IDWindow.Milliseconds(), 10),
		"NUMBERS", "'>"+strings.Repeat("i7", 1+fewParams)+"'",
		"FEW", strconv.Itoa((1+fewParams)*numberSize),
		"MORE", "'>"+strings.Repeat("i7", 1+len(quota.Spec{}.Params))+"'",
		"HUNDRED", "'>"+strings.Repeat("I7", 100)+"'",
		"MOST", strconv.Itoa((1+quota.MaxTail)*numberSize),
		"BIG", strconv.FormatInt(quota.MaxNumber, 10),
		"FOREIGN", "{err = '"+foreign+"'}",
	).Replace(text)
}
