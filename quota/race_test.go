//go:build race

package quota_test

func init() { raceEnabled = true }
