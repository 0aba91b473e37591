package sqlitestore

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// filesVariable names the folder of the files to the process that the suite starts.
const filesVariable = "SQLITESTORE_TEST_FILES"

// TestConformance runs the suite. Two handles are two databases of package sql on one file, in one process or in two.
func TestConformance(t *testing.T) {
	dir := os.Getenv(filesVariable)
	if dir == "" {
		dir = t.TempDir()
	}
	conformance.Run(t, conformance.Harness{
		Name: "SQLite",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			store, err := Open(t.Context(), filepath.Join(dir, o.Data), &Options{Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return store
		},
		// The transaction begins on a disk that may be frozen or refuse it, and the answer to the commit is lost.
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			disk := newDisk(t, filepath.Join(dir, o.Data))
			f, err := connect(t.Context(), disk, &Options{Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return quota.Must(driver.NewTransactional(f, nil)), disk.set
		},
		Process: func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, filesVariable+"="+dir) },
	})
}
