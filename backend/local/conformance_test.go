package local_test

import (
	"testing"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
)

func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Name: "local",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			return quota.Must(local.NewWithOptions(local.Options{Clock: o.Clock}))
		},
		Lacks: []conformance.Lack{{Feature: conformance.Shared, Reason: "its state is the memory of one store"}},
	})
}
