package conformance_test

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/conformance/internal/mutant"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// pair is a mutant and its repaired twin: one source, in which the fault is switched on or off.
type pair struct {
	name, rule, clause, of, says string
	// examine tests the mutant, or the twin: by the case that finds the fault, the rule, or the whole suite.
	examine func(t *testing.T, fault bool, how scope) []conformance.Result
}

type scope int

const (
	findingCase scope = iota
	brokenRule
	wholeSuite
)

// pairs returns all mutants. eval evaluates scripts.
func pairs(eval func(context.Context, string, []any) (any, error)) (all []pair) {
	for _, m := range mutant.Stores() {
		all = append(all, pair{m.Name, m.Rule, m.Clause, m.Case, m.Says, func(t *testing.T, fault bool, how scope) []conformance.Result {
			h := harness(m, fault)
			switch {
			case fault && m.Races && conformance.RaceEnabled: // the race detector finds it
				return []conformance.Result{{Rule: m.Rule, Case: m.Case, Outcome: conformance.Failed, Text: m.Says}}
			case how == findingCase:
				return conformance.Examine(t, h, patience, m.Rule+"/"+m.Case).Results
			case how == brokenRule:
				return conformance.ExamineBriefly(t, h, 30*time.Millisecond, m.Rule).Results
			case fault:
				return conformance.Examine(t, h, patience).Results
			}
			return conformance.ExamineBriefly(t, h, 200*time.Millisecond).Results
		}})
	}
	for _, m := range mutant.Algorithms() {
		all = append(all, pair{m.Name, m.Rule, m.Clause, "", m.Says, func(t *testing.T, fault bool, how scope) []conformance.Result {
			h := conformance.AlgorithmHarness{Algorithms: m.Make(fault)}
			if m.Rule == "A15" {
				h.Eval = eval
			}
			part := 3
			if how == brokenRule {
				part = 20
			}
			return conformance.ExamineAlgorithm(t, seed(t), h, part)
		}})
	}
	return append(all, windowed()...)
}

// windowed returns the pairs of mutants whose windows are known.
func windowed() (all []pair) {
	for _, m := range mutant.Windows() {
		all = append(all, pair{m.Name, m.Rule, m.Clause, "", m.Says, func(t *testing.T, fault bool, _ scope) []conformance.Result {
			return conformance.ExamineAlgorithm(t, seed(t), conformance.AlgorithmHarness{Algorithms: m.Make(fault), Boundaries: [][]time.Time{m.Boundaries}}, 20)
		}})
	}
	return all
}

// patience is the time that the suite waits for a mutant that hangs. One that is late by seconds must not seem to.
const patience = 5 * time.Second

// failures returns the results that tell a fault of a store.
func failures(results []conformance.Result) (all []conformance.Result) {
	for _, r := range results {
		if r.Outcome == conformance.Failed || r.Outcome == conformance.Provisional {
			all = append(all, r)
		}
	}
	return all
}

// check tests a pair: the case of the broken rule must fail the mutant, with a text that names the fault, and no case of
// the rule the twin. In a full run the whole suite is asked, and must find no other fault in the twin.
func (p *pair) check(t *testing.T, full bool) {
	one, all := findingCase, brokenRule
	if full {
		one, all = wholeSuite, wholeSuite
	}
	var found []conformance.Result
	caught := func() bool {
		found = failures(p.examine(t, true, one))
		return slices.ContainsFunc(found, func(r conformance.Result) bool {
			said := func(part string) bool { return strings.Contains(r.Text, part) }
			return r.Rule == p.rule && (p.of == "" || r.Case == p.of) && slices.ContainsFunc(strings.Split(p.says, " | "), said)
		})
	}
	seen := caught()
	for tries := 1; !seen && tries < 3; tries++ { // a search at random may miss it once
		seen = caught()
	}
	if !seen {
		t.Errorf("the mutant: got %s, want a failure of %s, %s, that says %q", texts(found), p.rule, p.of, p.says)
	}
	for _, r := range failures(p.examine(t, false, all)) {
		if full || r.Rule == p.rule {
			t.Errorf("the twin without the fault: got %s, want it passed", texts([]conformance.Result{r}))
		}
	}
}

func texts(results []conformance.Result) string {
	if len(results) == 0 {
		return "no failure"
	}
	var b strings.Builder
	for _, r := range results {
		fmt.Fprintf(&b, "\n%s, %s: %s\n", r.Rule, r.Case, r.Text)
	}
	return b.String()
}

// Each mutant is failed by the rule that it breaks, and its twin, which lacks the fault alone, passes that rule. With
// FLEETQUOTA_FULL=1 the whole suite tests each three times. With -v it prints the table. The race detector makes cases three
// times as slow: it sees an eighth of the pairs, or each once, and ./test runs all of them without it.
func TestMutants(t *testing.T) {
	times, full := 1, os.Getenv("FLEETQUOTA_FULL") == "1"
	if full {
		t.Setenv("FLEETQUOTA_FULL", "") // runs of the usual length
	}
	if full && !conformance.RaceEnabled {
		times = 3
	}
	all := pairs(redisEval(t))
	if conformance.RaceEnabled && !full {
		n := 0
		all = slices.DeleteFunc(all, func(pair) bool { n++; return n%8 != 0 })
	}
	rows := make([]string, len(all))
	t.Run("of", func(t *testing.T) {
		var wg sync.WaitGroup
		some := make(chan struct{}, 16) // many cases only wait
		for i, p := range all {
			some <- struct{}{}
			wg.Go(func() {
				defer func() { <-some }()
				t.Run(p.name, func(t *testing.T) {
					start := time.Now()
					for range times {
						p.check(t, full)
					}
					rows[i] = fmt.Sprintf("| %s | %s | %s | %.2f |\n", p.name, p.rule, p.of, time.Since(start).Seconds())
				})
			})
		}
		wg.Wait()
	})
	t.Logf("%d mutants\n\n| mutant | rule | case | seconds |\n|---|---|---|---|\n%s", len(all), strings.Join(rows, ""))
}

// Each clause of a rule has a mutant that breaks it.
func TestClauses(t *testing.T) {
	broken := map[string]bool{}
	for _, p := range pairs(nil) {
		if !slices.Contains(mutant.Clauses[p.rule], p.clause) {
			t.Errorf("mutant %q: got clause %q of %s, want one of %q", p.name, p.clause, p.rule, mutant.Clauses[p.rule])
		}
		broken[p.rule+p.clause] = true
	}
	rules := conformance.RuleTexts()
	for id, text := range rules {
		rest := text
		for _, clause := range mutant.Clauses[id] {
			if !broken[id+clause] {
				t.Errorf("clause %q of %s: got no mutant, want one", clause, id)
			}
			before, after, found := strings.Cut(rest, clause)
			if !found {
				t.Errorf("%s %q: got no clause %q, want all in their order", id, rest, clause)
			}
			rest = before + "|" + after
		}
		for word := range strings.FieldsFuncSeq(rest, func(r rune) bool { return strings.ContainsRune(" |,;:", r) }) {
			if word != "and" && word != "or" && word != "unless" {
				t.Errorf("%s: got %q in no clause of %q, want each word in one", id, word, text)
			}
		}
	}
	for id := range mutant.Clauses {
		if rules[id] == "" {
			t.Errorf("clauses of %s: got no such rule", id)
		}
	}
}

// seed returns the seed of searches: the same every time, unless FLEETQUOTA_SEED says another.
func seed(t *testing.T) uint64 {
	text := os.Getenv("FLEETQUOTA_SEED")
	if text == "" {
		return 1
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// A store without a fault passes every time. The script "sound" asks more stores, more often, and for longer than go test -short.
func TestSound(t *testing.T) {
	t.Setenv("FLEETQUOTA_FULL", "") // a run of the usual length
	search := conformance.Enough
	if testing.Short() {
		search /= 3
	}
	for _, m := range []*mutant.Store{mutant.Sound, mutant.Splitting} {
		t.Run(m.Name, func(t *testing.T) {
			t.Parallel()
			for _, r := range failures(conformance.ExamineBriefly(t, harness(m, false), search).Results) {
				t.Errorf("%s %s of a store without a fault: got %s, want %s\n%s", r.Rule, r.Case, r.Outcome, conformance.Passed, r.Text)
			}
		})
	}
}

// redisEval returns a function that evaluates scripts on a redis-server of the test's own.
func redisEval(t *testing.T) func(context.Context, string, []any) (any, error) {
	t.Helper()
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	t.Cleanup(func() { client.Close() })
	return func(ctx context.Context, script string, args []any) (any, error) {
		return client.Eval(ctx, script, nil, args...).Result()
	}
}

// harness opens stores with a fault, or twins without it.
func harness(m *mutant.Store, fault bool) conformance.Harness {
	var mu sync.Mutex
	all := map[string]*mutant.Data{}
	open := func(o conformance.Opening) *mutant.Handle {
		mu.Lock()
		defer mu.Unlock()
		if all[o.Data] == nil {
			all[o.Data] = mutant.NewData()
		}
		return m.Open(all[o.Data], o.Clock, fault)
	}
	h := conformance.Harness{
		Name: m.Name,
		Open: func(_ testing.TB, o conformance.Opening) quota.Store { return open(o) },
		Fault: func(_ testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			s := open(o)
			return s, s.Break
		},
	}
	if m.ClientClock {
		h.Lacks = []conformance.Lack{{Feature: conformance.ServerClock, Reason: "it goes by the clocks of its handles"}}
		for _, back := range []string{"S1/clock steps back", "C3/clock steps back"} {
			h.Exempt = append(h.Exempt, conformance.Exemption{Rule: back, Reason: "it goes on from the latest of these clocks"})
		}
	}
	if m.OwnClock {
		h.Lacks = []conformance.Lack{{Feature: conformance.Clock, Reason: "it goes by a clock of its own"}}
	}
	return h
}
