package conformance

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

// Algorithm tests rules, for those who write one:
//
//	func TestConformance(t *testing.T) {
//		conformance.Algorithm(t, mine.New(10, time.Second), mine.New(1000, time.Hour))
//	}
//
// Give it small and large numbers, and at least two with one Rule: what happens when a limit's numbers
// change is tested between those. A1 to A7 are the rules of [quota.Algorithm], with its numbers; A8 to A17
// are what the rest of package quota says of algorithms. Each is a subtest:
//
//	A1 Fresh       a state kept until ResetAfter has passed, and not one before, decides as the zero State
//	A2 Tight       a denied request is denied again before RetryAfter has passed, and admitted when it has
//	A3 Traceless   a denial, a peek and a cost of 0 change nothing
//	A4 Never       a cost above Spec.Capacity, and no other, is denied with RetryAfter Forever
//	A5 Clock       time that steps back frees nothing, and delays nothing by more than a second
//	A6 Change      what was consumed stays consumed when the numbers change, in whole tokens, rounded up
//	A7 Untouched   Decide does not write to State.Tail, nor behind it
//	A8 Pure        the same input gives the same answer, on any goroutine, and no input panics
//	A9 Spec        a spec is valid and never changes, and equal specs decide equally
//	A10 State      numbers are within ±2^53, the list within MaxTail, and Unit is 0 in the zero State only
//	A11 Verdict    Remaining is what can be taken, all of it and no more; waits are as documented
//	A12 Debt       a debit is always allowed and charged in full, down to Spec.Debt
//	A13 Refund     a refund gives back what it names, never more than was charged, and nothing of long ago
//	A14 Reset      a reset makes the key fresh
//	A15 Lua        a driver.Scripted decides in Lua as in Go; needs a redis-server
//	A16 Share      n shares of a driver.Sharer get no more than the whole, of the same Rule
//	A17 Forecast   a quota.Forecaster promises nothing later than a queue gets it, and more never earlier
//
// The search is random and starts at the boundaries. A failure shows the shortest trace found, and the seed:
// FLEETQUOTA_SEED repeats the search, FLEETQUOTA_FULL=1 makes it ten times as long.
func Algorithm(t *testing.T, algorithms ...quota.Algorithm) {
	t.Helper()
	if len(algorithms) == 0 {
		t.Fatal("conformance: no algorithm was given")
	}
	seed := rand.Uint64()
	if text := os.Getenv("FLEETQUOTA_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("conformance: FLEETQUOTA_SEED is %q; accepted: a number", text)
		}
	}
	for i, a := range algorithms {
		if a == nil {
			t.Fatalf("conformance: algorithm %d is nil", i)
		}
		p := newProber(algorithms, i, seed)
		p.search()
		t.Run(p.name(), func(t *testing.T) {
			for _, r := range algorithmRules {
				t.Run(r.id+"_"+r.name, func(t *testing.T) {
					if r == a15 {
						p.lua(t)
					}
					switch result := p.result(r); result.Outcome {
					case Failed:
						t.Error(result.Text)
					case Skipped:
						t.Skip(result.Text)
					}
				})
			}
		})
	}
}

var (
	a1  = &rule{"A1", "Fresh", "a state kept until ResetAfter has passed, and not one before, decides as the zero State"}
	a2  = &rule{"A2", "Tight", "a denied request is denied again before RetryAfter has passed, and admitted when it has"}
	a3  = &rule{"A3", "Traceless", "a denial, a peek and a cost of 0 change nothing"}
	a4  = &rule{"A4", "Never", "a cost above Spec.Capacity, and no other, is denied with RetryAfter Forever"}
	a5  = &rule{"A5", "Clock", "time that steps back frees nothing, and delays nothing by more than a second"}
	a6  = &rule{"A6", "Change", "what was consumed stays consumed when the numbers change, in whole tokens, rounded up"}
	a7  = &rule{"A7", "Untouched", "Decide does not write to State.Tail, nor behind it"}
	a8  = &rule{"A8", "Pure", "the same input gives the same answer, on any goroutine, and no input panics"}
	a9  = &rule{"A9", "Spec", "a spec is valid and never changes, and equal specs decide equally"}
	a10 = &rule{"A10", "State", "numbers are within ±2^53, the list within MaxTail, and Unit is 0 in the zero State only"}
	a11 = &rule{"A11", "Verdict", "Remaining is what can be taken, all of it and no more; waits are as documented"}
	a12 = &rule{"A12", "Debt", "a debit is always allowed and charged in full, down to Spec.Debt"}
	a13 = &rule{"A13", "Refund", "a refund gives back what it names, never more than was charged, and nothing of long ago"}
	a14 = &rule{"A14", "Reset", "a reset makes the key fresh"}
	a15 = &rule{"A15", "Lua", "a driver.Scripted decides in Lua as in Go"}
	a16 = &rule{"A16", "Share", "n shares of a driver.Sharer get no more than the whole, of the same Rule"}
	a17 = &rule{"A17", "Forecast", "a quota.Forecaster promises nothing later than a queue gets it, and more never earlier"}
)

var algorithmRules = []*rule{a1, a2, a3, a4, a5, a6, a7, a8, a9,
	a10, a11, a12, a13, a14, a15, a16, a17}

// result returns what the search found about a rule.
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
