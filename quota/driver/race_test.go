//go:build race

package driver_test

func init() { raceEnabled = true }
