//go:build race

package resilience_test

func init() { raceEnabled = true }
