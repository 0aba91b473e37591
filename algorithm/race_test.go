//go:build race

package algorithm_test

// The race detector allocates on its own account.
const raceEnabled = true
