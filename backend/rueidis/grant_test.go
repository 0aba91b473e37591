package rueidis_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/enginetest"
)

func TestGrants(t *testing.T) { enginetest.Grants(t, connect) }
