package conformance

import (
	"testing"
	"time"
)

// Examine runs the suite, or the rules and cases named in only, on a store that may be broken, and returns the results. It
// does not fail tb. The suite waits no longer than patience for a call; 0 stands for the patience of Run.
func Examine(tb testing.TB, h Harness, patience time.Duration, only ...string) *Report {
	tb.Helper()
	r, err := examine(tb, h, options{only: only, patience: patience})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

const RaceEnabled = raceEnabled
