package main

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"testing"
)

// A constant beyond 32 bits in an int is found for 386, also in a test, and no fault for amd64.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":      "module m\n\ngo 1.26\n",
		"m.go":        "package m\n\nconst Big = 1 << 40\n",
		"m_test.go":   "package m_test\n\nimport \"m\"\n\nvar n int = m.Big\n",
		"m_js.go":     "package m\n\nvar broken string = 1\n",
		"cgo.go":      "package m\n\nimport \"C\"\n",
		"p/p.go":      "package p\n\nimport \"m\"\n\nvar X int64 = m.Big\n",
		"p/p_test.go": "package p\n\nimport \"testing\"\n\nfunc Test(t *testing.T) { t.Log(X) }\n",
	} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(dir)
	for platform, right := range map[string]bool{"linux/amd64": true, "linux/386": false, "js/wasm": false, "linux/none": false} {
		c := checker{fset: token.NewFileSet(), files: map[string]*ast.File{}}
		_, err := c.check(platform)
		if got := err == nil && !c.failed; got != right {
			t.Errorf("%s compiles: got %v (error %v), want %v", platform, got, err, right)
		}
	}
}
