package quota_test

import (
	"os/exec"
	"strings"
	"testing"
)

// TestImports keeps the package light: a program that imports it links no other package outside the standard library.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: got %v, want nil; its output:\n%s", err, out)
	}
	if got := strings.Fields(string(out)); len(got) != 1 || got[0] != "github.com/fleetquota/fleetquota/quota" {
		t.Errorf("dependencies outside the standard library: got %v, want only quota itself", got)
	}
}
