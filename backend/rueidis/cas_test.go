package rueidis_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/enginetest"
)

func TestCAS(t *testing.T) { enginetest.CAS(t, connect) }
