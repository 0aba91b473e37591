package main

import (
	"go/ast"
	"go/token"
	"os"
	"path/filepath"
	"testing"
)

// write writes files below a folder.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o777); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o666); err != nil {
			t.Fatal(err)
		}
	}
}

func newChecker() *checker { return &checker{fset: token.NewFileSet(), files: map[string]*ast.File{}} }

// A constant beyond 32 bits in an int is found for 386, also in a test, and no fault for amd64.
func TestCheck(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"go.mod":      "module m\n\ngo 1.26\n",
		"m.go":        "package m\n\nconst Big = 1 << 40\n",
		"m_test.go":   "package m_test\n\nimport \"m\"\n\nvar n int = m.Big\n",
		"m_js.go":     "package m\n\nvar broken string = 1\n",
		"cgo.go":      "package m\n\nimport \"C\"\n",
		"p/p.go":      "package p\n\nimport \"m\"\n\nvar X int64 = m.Big\n",
		"p/p_test.go": "package p\n\nimport \"testing\"\n\nfunc Test(t *testing.T) { t.Log(X) }\n",
	})
	for platform, right := range map[string]bool{"linux/amd64": true, "linux/386": false, "js/wasm": false, "linux/none": false} {
		c := newChecker()
		_, err := c.check(dir, platform)
		if got := err == nil && !c.failed; got != right {
			t.Errorf("%s compiles: got %v (error %v), want %v", platform, got, err, right)
		}
	}
}

// A second module is checked with the packages that it has in common with the first one, where they are the same: a package
// of the same path that needs another one is checked anew, and so are the bodies of functions that the first left out.
func TestCheckOfSeveral(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, map[string]string{
		"a/go.mod":  "module a\n\ngo 1.26\n\nrequire (\n\tb v0.0.0\n\tc v0.0.0\n)\n\nreplace (\n\tb => ../b\n\tc => ../c\n)\n",
		"a/a.go":    "package a\n\nimport \"b\"\n\nvar X int = b.X\n",
		"a2/go.mod": "module a\n\ngo 1.26\n\nrequire (\n\tb v0.0.0\n\tc v0.0.0\n)\n\nreplace (\n\tb => ../b\n\tc => ../c2\n)\n",
		"a2/a.go":   "package a\n\nimport \"b\"\n\nvar X string = b.X\n",
		"b/go.mod":  "module b\n\ngo 1.26\n\nrequire c v0.0.0\n\nreplace c => ../c\n",
		"b/b.go":    "package b\n\nimport \"c\"\n\nvar X = c.X\n\nfunc f() { var s string = 1; _ = s }\n",
		"c/go.mod":  "module c\n\ngo 1.26\n",
		"c/c.go":    "package c\n\nvar X = 1\n",
		"c2/go.mod": "module c\n\ngo 1.26\n",
		"c2/c.go":   "package c\n\nvar X = \"\"\n",
	})
	c := newChecker()
	for _, of := range []struct {
		folder string
		right  bool
	}{{"a", true}, {"a2", true}, {"a", true}, {"b", false}} {
		n, err := c.check(filepath.Join(dir, of.folder), "linux/386")
		if got := !c.failed; err != nil || n != 1 || got != of.right {
			t.Errorf("%s compiles: got %v, of %d packages, error %v; want %v, of 1", of.folder, got, n, err, of.right)
		}
	}
	if n := len(c.known["c"]); n != 2 {
		t.Errorf("packages c that were checked: got %d, want one for each folder", n)
	}
}
