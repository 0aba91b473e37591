package conformance

import (
	"testing"
	"time"
)

// Examine runs the suite, or the rules and cases named in only, on a store that may be broken, and returns the results. It
// does not fail tb. Searches have their usual length under -short too. The suite waits no longer than patience for a call; 0
// stands for the patience of Run.
func Examine(tb testing.TB, h Harness, patience time.Duration, only ...string) *Report {
	tb.Helper()
	r, err := examine(tb, h, options{only: only, patience: patience, search: enough})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// ExamineBriefly is Examine with random searches that end after a time.
func ExamineBriefly(tb testing.TB, h Harness, search time.Duration, only ...string) *Report {
	tb.Helper()
	r, err := examine(tb, h, options{only: only, search: search})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

// RuleTexts returns the meaning of each rule, by its id.
func RuleTexts() map[string]string {
	all := map[string]string{}
	for _, c := range cases() {
		all[c.rule.id] = c.rule.text
	}
	for _, r := range algorithmRules {
		all[r.id] = r.text
	}
	return all
}

const (
	RaceEnabled = raceEnabled
	Enough      = enough
)
