package bboltstore

import (
	"path/filepath"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
)

// TestConformance runs the suite. Two processes cannot share a bbolt file, but two stores can share a
// database: when the suite opens the same data twice, it gets two such stores.
func TestConformance(t *testing.T) {
	dir := t.TempDir()
	var mu sync.Mutex
	databases := map[string]*bbolt.DB{}
	t.Cleanup(func() {
		for _, db := range databases {
			db.Close()
		}
	})
	conformance.Run(t, conformance.Harness{
		Name: "bbolt",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			mu.Lock()
			defer mu.Unlock()
			db := databases[o.Data]
			if db == nil {
				var err error
				// Without a sync after each charge, for the speed of the test alone.
				db, err = bbolt.Open(filepath.Join(dir, o.Data), 0o600, &bbolt.Options{NoSync: true})
				if err != nil {
					t.Fatal(err)
				}
				databases[o.Data] = db
			}
			store, err := New(db, &Options{Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return store
		},
	})
}
