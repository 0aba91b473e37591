package goredis_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/enginetest"
)

func TestKeys(t *testing.T) { enginetest.Keys(t, connect) }

func TestCluster(t *testing.T) { enginetest.Cluster(t, connect) }

func TestHealth(t *testing.T) { enginetest.Health(t, connect) }
