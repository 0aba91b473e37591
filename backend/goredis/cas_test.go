package goredis_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/enginetest"
)

func TestCAS(t *testing.T) { enginetest.CAS(t, connect) }
