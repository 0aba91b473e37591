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

// Each mutant is failed by the rule that it breaks. With -v it prints the table.
func TestMutants(t *testing.T) {
	algorithms, stores := mutant.Algorithms(), mutant.Stores()
	rows := make([]string, len(algorithms)+len(stores))
	try := func(t *testing.T, row int, name, rule string, examine func(t *testing.T) []conformance.Result) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			rules, caught := failed(examine(t), rule)
			for tries := 1; !caught && tries < 3; tries++ { // a search at random may miss it once
				rules, caught = failed(examine(t), rule)
			}
			rows[row] = fmt.Sprintf("| %s | %s | %.2f |\n", name, strings.Join(rules, ", "), time.Since(start).Seconds())
			if !caught {
				t.Errorf("failed by: got %v, want %s", rules, rule)
			}
		})
	}
	t.Run("of", func(t *testing.T) {
		for i, m := range algorithms {
			try(t, i, m.Name, m.Rule, func(t *testing.T) []conformance.Result {
				h := conformance.AlgorithmHarness{Algorithms: m.Make()}
				if m.Rule == "A15" {
					h.Eval = redisEval(t)
				}
				return conformance.ExamineAlgorithm(t, seed(t), h)
			})
		}
		for i, m := range stores {
			if m.Races && conformance.RaceEnabled {
				rows[len(algorithms)+i] = fmt.Sprintf("| %s | (the race detector's) | |\n", m.Name)
				continue
			}
			try(t, len(algorithms)+i, m.Name, m.Rule, func(t *testing.T) []conformance.Result {
				return conformance.Examine(t, harness(m), 3*time.Second, m.Rule).Results
			})
		}
	})
	t.Logf("%d mutants\n\n| mutant | failed by | seconds |\n|---|---|---|\n%s", len(rows), strings.Join(rows, ""))
}

// failed returns the rules that failed, provisionally or not, each once, and whether a rule is among them.
func failed(results []conformance.Result, want string) (rules []string, found bool) {
	for _, r := range results {
		if (r.Outcome == conformance.Failed || r.Outcome == conformance.Provisional) && (len(rules) == 0 || rules[len(rules)-1] != r.Rule) {
			rules = append(rules, r.Rule)
			found = found || r.Rule == want
		}
	}
	return rules, found
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

// A store without a fault passes every time.
func TestSound(t *testing.T) {
	runs := 2
	if os.Getenv("FLEETQUOTA_FULL") == "1" {
		runs = 100
		t.Setenv("FLEETQUOTA_FULL", "") // many runs of the usual length
	}
	together := make(chan struct{}, 4)
	var wg sync.WaitGroup
	for range runs {
		together <- struct{}{}
		wg.Go(func() {
			defer func() { <-together }()
			for _, r := range conformance.Examine(t, harness(mutant.Sound), 0).Results {
				if r.Outcome == conformance.Failed || r.Outcome == conformance.Provisional {
					t.Errorf("%s %s of a store without a fault: got %s, want %s\n%s", r.Rule, r.Case, r.Outcome, conformance.Passed, r.Text)
				}
			}
		})
	}
	wg.Wait()
}

// A store that takes a list in parts and marks it passes; the same store without the mark is failed for that alone.
func TestSplitting(t *testing.T) {
	unmarked := mutant.Stores()[slices.IndexFunc(mutant.Stores(), func(m *mutant.Store) bool { return strings.HasSuffix(m.Name, "splits without a mark") })]
	for _, c := range []struct {
		store *mutant.Store
		want  map[string]conformance.Outcome
	}{
		{mutant.Splitting, map[string]conformance.Outcome{"beyond": conformance.Passed, "marked": conformance.Passed}},
		{unmarked, map[string]conformance.Outcome{"beyond": conformance.Passed, "marked": conformance.Failed}},
	} {
		for _, r := range conformance.Examine(t, harness(c.store), 0).Results {
			want := conformance.Passed
			if r.Rule == "C6" {
				want = c.want[r.Case]
			}
			if r.Outcome != want && r.Outcome != conformance.NotApplicable && r.Outcome != conformance.Skipped {
				t.Errorf("%s, %s %s: got %s, want %s\n%s", c.store.Name, r.Rule, r.Case, r.Outcome, want, r.Text)
			}
		}
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

// harness opens stores with a mutation.
func harness(m *mutant.Store) conformance.Harness {
	var mu sync.Mutex
	all := map[string]*mutant.Data{}
	open := func(o conformance.Opening) *mutant.Handle {
		mu.Lock()
		defer mu.Unlock()
		if all[o.Data] == nil {
			all[o.Data] = mutant.NewData()
		}
		return m.Open(all[o.Data], o.Clock)
	}
	return conformance.Harness{
		Name: m.Name,
		Open: func(_ testing.TB, o conformance.Opening) quota.Store { return open(o) },
		Fault: func(_ testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			s := open(o)
			return s, s.Break
		},
	}
}
