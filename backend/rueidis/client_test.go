package rueidis_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/clienttest"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
)

func TestMain(m *testing.M) { clienttest.Main(m) }

func TestClient(t *testing.T) {
	clienttest.Run(t, "rueidis", func(s quota.Store) *engine.Store { return s.(*rueidis.Store).Engine() })
}

func TestConformance(t *testing.T) { clienttest.Conformance(t, "rueidis") }
