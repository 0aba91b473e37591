package sqlitestore

import (
	"path/filepath"
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
)

// TestConformance runs the suite. Two handles are two databases of package sql on one file, as in two processes.
func TestConformance(t *testing.T) {
	dir := t.TempDir()
	conformance.Run(t, conformance.Harness{
		Name: "SQLite",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			store, err := Open(t.Context(), filepath.Join(dir, o.Data), &Options{Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return store
		},
	})
}
