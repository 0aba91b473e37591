package conformance

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// AlgorithmHarness is the input of [Algorithm]. Only Algorithms is required.
type AlgorithmHarness struct {
	// Algorithms are tested one by one. They should have small and large numbers, and at least two should have one
	// Rule: a change of a limit's numbers is tested between those.
	Algorithms []quota.Algorithm
	// Boundaries[i] are consecutive boundaries of the windows of Algorithms[i], for rule A23, such as those of some months, and of
	// the days round a change to summer time, in a rule of calendar windows. A rule without such windows has none.
	Boundaries [][]time.Time
	// Eval evaluates a Lua script on a Redis server, for rule A15. The script takes no keys; every argument is a
	// string, and so is every element of the reply, a list. Eval returns the reply, as []any, or the error that the
	// server replied. Any database number and any server version from 7.0 will do: the script reads and writes no
	// data. Without Eval the rule is skipped, and the last line of the test's log says so.
	//
	// With go-redis:
	//
	//	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"})
	//	eval := func(ctx context.Context, script string, args []any) (any, error) {
	//		return client.Eval(ctx, script, nil, args...).Result()
	//	}
	//
	// With miniredis, which runs Lua in the process of the test, the function is the same, on another client:
	//
	//	client := redis.NewClient(&redis.Options{Addr: miniredis.RunT(t).Addr()})
	//
	// Miniredis has a Lua interpreter of its own. It differs from Redis, for example, in an assignment that swaps
	// variables (a, b = b, a), so test with a redis-server before a release.
	Eval func(ctx context.Context, script string, args []any) (reply any, err error)
}

// Algorithm tests the algorithms of a harness, for authors of algorithms:
//
//	func TestConformance(t *testing.T) {
//		conformance.Algorithm(t, conformance.AlgorithmHarness{
//			Algorithms: []quota.Algorithm{mine.New(10, time.Second), mine.New(1000, time.Hour)},
//		})
//	}
//
// A1 to A7 are the rules of [quota.Algorithm], with its numbers; A8 to A23 are the promises that the rest of package
// quota and package driver make of algorithms, but for A18, the last rule of [quota.Algorithm]. Each is a subtest:
//
//	A1 Fresh       a state kept until ResetAfter has passed, and not one before, decides as the zero State
//	A2 Tight       a denied request is denied again before RetryAfter has passed, and admitted when it has
//	A3 Traceless   a denial, a peek and a cost of 0 change nothing
//	A4 Never       a cost above Spec.Capacity, and no other, is denied with RetryAfter Forever
//	A5 Clock       time that steps back frees nothing, and delays nothing by more than a second
//	A6 Change      consumption stays when the numbers change, in whole tokens, rounded up
//	A7 Untouched   Decide does not write to State.Tail, nor behind it
//	A8 Pure        the same input gives the same answer, on any goroutine, and no input panics
//	A9 Spec        a spec is valid and never changes, and equal specs decide equally
//	A10 State      numbers are within ±2^53, the list within MaxTail, and Unit is 0 in the zero State only
//	A11 Verdict    Remaining is the most that can be taken; waits are as documented
//	A12 Debt       a debit is always allowed and charged in full, down to Spec.Debt
//	A13 Refund     a refund gives back its cost, as if the charge had never been made, never more, and nothing of long ago
//	A14 Reset      a reset makes the key fresh
//	A15 Lua        a driver.Scripted decides in Lua as in Go, a driver.Moving nothing beyond its times; needs AlgorithmHarness.Eval
//	A16 Share      n shares of a driver.Sharer get no more than the whole, of the same Rule
//	A17 Forecast   a quota.Forecaster promises nothing later than a queue gets it, and more never earlier
//	A18 Stateless  a rule that keeps no state never writes, and answers by the operation and the cost alone
//	A19 Ahead      OpAhead charges as a debit does what refill repays in time, says when, and charges nothing else
//	A20 Floor      a take with a floor is admitted where a peek of both is, charges its cost, and waits as that peek says
//	A21 UpTo       OpUpTo takes the tokens that are left above the floor, at most its cost, or waits for the least
//	A22 Holds      OpHold holds the tokens that a take would get, until Spec.Lapse and no longer; OpSpend ends it by its receipt at any TTL and charges its cost; OpRenew moves the held tokens and brings nothing back
//	A23 Windows    the whole capacity comes back at the given boundaries and at no other time; needs AlgorithmHarness.Boundaries
//
// The search is random and starts at the boundaries. A failure shows the shortest trace found, and the seed:
// FLEETQUOTA_SEED in the environment repeats the search, FLEETQUOTA_FULL=1 makes it ten times as long.
func Algorithm(t *testing.T, h AlgorithmHarness) {
	t.Helper()
	if len(h.Algorithms) == 0 {
		t.Fatal("conformance: AlgorithmHarness.Algorithms is empty; accepted: at least one algorithm")
	}
	seed, err := seed()
	if err != nil {
		t.Fatal(err)
	}
	var all []Result
	for i, a := range h.Algorithms {
		if a == nil {
			t.Fatalf("conformance: AlgorithmHarness.Algorithms[%d] is nil; accepted: an algorithm", i)
		}
		p := newProber(h.Algorithms, i, seed)
		p.search()
		p.windows(h.Boundaries, i)
		t.Run(p.name(), func(t *testing.T) {
			for _, r := range algorithmRules {
				t.Run(r.id+"_"+r.name, func(t *testing.T) {
					if r == a15 {
						p.lua(t.Context(), h.Eval)
					}
					result := p.result(r)
					all = append(all, result)
					switch result.Outcome {
					case Failed:
						t.Error(result.Text)
					case Skipped:
						t.Skip(result.Text)
					}
				})
			}
		})
	}
	t.Log(summary(all, seed))
}

// summary returns the last line of a log: how many rules passed, and which were not tested, with the reasons.
func summary(all []Result, seed uint64) string {
	count := map[Outcome]int{}
	var reasons []string
	skipped := map[string][]string{}
	for _, r := range all {
		count[r.Outcome]++
		if r.Outcome == Skipped {
			if skipped[r.Text] == nil {
				reasons = append(reasons, r.Text)
			}
			skipped[r.Text] = append(skipped[r.Text], fmt.Sprintf("%s %s of %s", r.Rule, r.Name, r.Case))
		}
	}
	var b strings.Builder
	fmt.Fprintf(&b, "conformance suite %s, seed %d: %d passed, %d failed, %d not tested", Version, seed, count[Passed], count[Failed], count[Skipped])
	for _, reason := range reasons {
		fmt.Fprintf(&b, "; %s, because %s", strings.Join(skipped[reason], ", "), reason)
	}
	return b.String()
}

var (
	a1  = &rule{"A1", "Fresh", "a state kept until ResetAfter has passed, and not one before, decides as the zero State"}
	a2  = &rule{"A2", "Tight", "a denied request is denied again before RetryAfter has passed, and admitted when it has"}
	a3  = &rule{"A3", "Traceless", "a denial, a peek and a cost of 0 change nothing"}
	a4  = &rule{"A4", "Never", "a cost above Spec.Capacity, and no other, is denied with RetryAfter Forever"}
	a5  = &rule{"A5", "Clock", "time that steps back frees nothing, and delays nothing by more than a second"}
	a6  = &rule{"A6", "Change", "consumption stays when the numbers change, in whole tokens, rounded up"}
	a7  = &rule{"A7", "Untouched", "Decide does not write to State.Tail, nor behind it"}
	a8  = &rule{"A8", "Pure", "the same input gives the same answer, on any goroutine, and no input panics"}
	a9  = &rule{"A9", "Spec", "a spec is valid and never changes, and equal specs decide equally"}
	a10 = &rule{"A10", "State", "numbers are within ±2^53, the list within MaxTail, and Unit is 0 in the zero State only"}
	a11 = &rule{"A11", "Verdict", "Remaining is the most that can be taken; waits are as documented"}
	a12 = &rule{"A12", "Debt", "a debit is always allowed and charged in full, down to Spec.Debt"}
	a13 = &rule{"A13", "Refund", "a refund gives back its cost, as if the charge had never been made, never more, and nothing of long ago"}
	a14 = &rule{"A14", "Reset", "a reset makes the key fresh"}
	a15 = &rule{"A15", "Lua", "a driver.Scripted decides in Lua as in Go, a driver.Moving nothing beyond its times"}
	a16 = &rule{"A16", "Share", "n shares of a driver.Sharer get no more than the whole, of the same Rule"}
	a17 = &rule{"A17", "Forecast", "a quota.Forecaster promises nothing later than a queue gets it, and more never earlier"}
	a18 = &rule{"A18", "Stateless", "a rule that keeps no state never writes, and answers by the operation and the cost alone"}
	a19 = &rule{"A19", "Ahead", "OpAhead charges as a debit does what refill repays in time, says when, and charges nothing else"}
	a20 = &rule{"A20", "Floor", "a take with a floor is admitted where a peek of both is, charges its cost, and waits as that peek says"}
	a21 = &rule{"A21", "UpTo", "OpUpTo takes the tokens that are left above the floor, at most its cost, or waits for the least"}
	a22 = &rule{"A22", "Holds", "OpHold holds the tokens that a take would get, until Spec.Lapse and no longer; OpSpend ends it by its receipt at any TTL and charges its cost; OpRenew moves the held tokens and brings nothing back"}
	a23 = &rule{"A23", "Windows", "the whole capacity comes back at the given boundaries and at no other time"}
)

var algorithmRules = []*rule{a1, a2, a3, a4, a5, a6, a7, a8, a9,
	a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23}

// result returns the search's result for a rule.
func (p *prober) result(r *rule) Result {
	result := Result{Rule: r.id, Name: r.name, Case: p.name(), Outcome: Passed}
	if text := p.faults[r]; text != "" {
		result.Outcome = Failed
		result.Text = fmt.Sprintf("%s %s: %s\n%s\nof %+v\nreplay with FLEETQUOTA_SEED=%d", r.id, r.name, r.text, text, p.specs[0], p.seed)
	} else if reason := p.skips[r]; reason != "" {
		result.Outcome, result.Text = Skipped, reason
	}
	return result
}
