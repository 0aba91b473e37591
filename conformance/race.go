//go:build race

package conformance

import "time"

// raceEnabled reports whether the race detector watches.
const raceEnabled = true

// enough is the time of a case's random search, which is for races here: a run without the race detector searches for wrong
// answers, longer and several times as fast.
const enough = 250 * time.Millisecond
