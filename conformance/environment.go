package conformance

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
)

// seed returns the seed of the random choices: the environment's, or a random one.
func seed() (uint64, error) {
	text := os.Getenv("FLEETQUOTA_SEED")
	if text == "" {
		return rand.Uint64(), nil
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("conformance: FLEETQUOTA_SEED is %q; accepted: a number", text)
	}
	return n, nil
}

// strict reports whether the environment has provisional cases fail the test.
func strict() bool { return os.Getenv("FLEETQUOTA_STRICT") == "1" }

// full reports whether the environment asks for searches that are ten times as long.
func full() bool { return os.Getenv("FLEETQUOTA_FULL") == "1" }
