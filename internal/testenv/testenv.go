// Package testenv reads the settings of a run of the tests from the environment: FLEETQUOTA_FULL=1 asks for
// the whole sizes, FLEETQUOTA_SEED for the random choices of an earlier run.
package testenv

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// Full reports whether the whole sizes are asked for. Tests ask while they run, where go test sees it and
// does not answer from its cache.
func Full() bool { return os.Getenv("FLEETQUOTA_FULL") == "1" }

// Sized returns the size of a test: the reduced one unless the whole is asked for.
func Sized(reduced, whole int) int {
	if Full() {
		return whole
	}
	return reduced
}

// Seed returns a seed that a failing test prints: another each time, unless one is asked for.
func Seed(t testing.TB) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if s := os.Getenv("FLEETQUOTA_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("replay with FLEETQUOTA_SEED=%d", seed)
		}
	})
	return seed
}

// Random returns a generator with a Seed.
func Random(t testing.TB) *rand.Rand {
	t.Helper()
	return rand.New(rand.NewPCG(Seed(t), 0))
}
