package goredis_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/internal/clienttest"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

func TestMain(m *testing.M) { clienttest.Main(m) }

func TestClient(t *testing.T) {
	clienttest.Run(t, "goredis", func(s quota.Store) *engine.Store { return s.(*goredis.Store).Engine() })
}

func TestConformance(t *testing.T) { clienttest.Conformance(t, "goredis") }
