package bboltstore

import (
	"path/filepath"
	"sync"
	"testing"

	"go.etcd.io/bbolt"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
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
	database := func(t testing.TB, data string) *bbolt.DB {
		mu.Lock()
		defer mu.Unlock()
		if databases[data] == nil {
			// Without a sync after each charge, for the speed of the test alone.
			db, err := bbolt.Open(filepath.Join(dir, data), 0o600, &bbolt.Options{NoSync: true})
			if err != nil {
				t.Fatal(err)
			}
			databases[data] = db
		}
		return databases[data]
	}
	conformance.Run(t, conformance.Harness{
		Name: "bbolt",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			store, err := New(database(t, o.Data), &Options{Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return store
		},
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			table, err := newTable(database(t, o.Data), &Options{Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			kv, set := conformance.FaultyKV(table, nil)
			return quota.Must(driver.NewCAS(kv, nil)), set
		},
	})
}
