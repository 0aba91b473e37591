//go:build !race

package conformance

// raceEnabled reports whether the race detector watches.
const raceEnabled = false
