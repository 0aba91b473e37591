package driver_test

import (
	"context"
	"testing"

	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/internal/testkit"
)

func TestMain(m *testing.M) { testkit.Main(m) }

// sized returns the size of a test.
var sized = testenv.Sized

// random returns a generator whose seed a failing test prints.
var random = testenv.Random

var bg = context.Background()

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}
