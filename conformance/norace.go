//go:build !race

package conformance

import "time"

// raceEnabled reports whether the race detector watches.
const raceEnabled = false

// enough is the time of a case's random search; with FLEETQUOTA_FULL=1 it is ten times as long.
const enough = 700 * time.Millisecond
