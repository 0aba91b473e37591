package sqlitestore

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
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
		Process: func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, filesVariable+"="+dir) },
	})
}
