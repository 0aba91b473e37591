package conformance

import (
	"testing"
	"time"
)

// Examine runs the suite, or the rules and cases named in only, on a store that may be broken, and returns what it
// found. It does not fail tb. No call is waited for longer than patience; 0 is what Run waits.
func Examine(tb testing.TB, h Harness, patience time.Duration, only ...string) *Report {
	tb.Helper()
	r, err := examine(tb, h, options{only: only, patience: patience})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}
