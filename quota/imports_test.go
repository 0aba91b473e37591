package quota_test

import (
	"os/exec"
	"strings"
	"testing"
)

// TestImports holds what keeps the module light: whoever imports this package links the standard library and nothing else.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	if got := strings.Fields(string(out)); len(got) != 1 || got[0] != "github.com/fleetquota/fleetquota/quota" {
		t.Errorf("quota depends on %v", got)
	}
}
