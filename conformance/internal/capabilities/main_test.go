package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
)

func TestTable(t *testing.T) {
	dir := t.TempDir()
	for name, r := range map[string]conformance.Report{
		"one": {Suite: "9.9", Backend: "b", Atomicity: "any keys", Prompt: true, Processes: true, Race: true, Results: []conformance.Result{
			{Rule: "S1", Name: "Meaning", Case: "x", Outcome: conformance.Passed},
			{Rule: "S2", Name: "AllOrNothing", Case: "y", Outcome: conformance.Failed, Text: "wrong"},
		}},
		"two": {Suite: "9.9", Backend: "a", Atomicity: "one key", Lacks: []conformance.Lack{{Feature: conformance.Exact, Reason: "leases"}, {Feature: conformance.ServerClock, Reason: "a file"}}, Results: []conformance.Result{
			{Rule: "S1", Name: "Meaning", Case: "x", Outcome: conformance.Skipped, Text: "leases"},
			{Rule: "S2", Name: "AllOrNothing", Case: "y", Outcome: conformance.Passed},
			{Rule: "S2", Name: "AllOrNothing", Case: "z", Outcome: conformance.Skipped, Text: "nothing to freeze"},
			{Rule: "S2", Name: "AllOrNothing", Case: "w", Outcome: conformance.Skipped, Text: "nothing to freeze"},
			{Rule: "S1", Name: "Meaning", Case: "floors", Outcome: conformance.Failed},
			{Rule: "S2", Name: "AllOrNothing", Case: "alternatives", Outcome: conformance.Passed},
			{Rule: "C3", Name: "IDs", Case: "alternatives", Outcome: conformance.Skipped, Text: "no ids"},
			{Rule: "C7", Name: "Prompt", Case: "frozen", Outcome: conformance.NotApplicable, Text: "not prompt"},
		}},
	} {
		text, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name+".json"), text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	reports, err := read(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := write(&b, []string{listed("m", []string{"./a", "./c"})}, reports); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"version 9.9",
		"| a | one key | yes | yes | bounds | each client's | yes | no | no | one |\n| b | any keys | yes | yes | exact | the server's | yes | yes | no | two |\n",
		"| backend | S1 | S2 | C3 | C7 |\n|---|---|---|---|---|\n| a | **failed** | in part | not tested | – |\n| b | passed | **failed** | – | – |\n",
		"| backend | floor | up to | ahead | shadow | first that fits | request id | listing |\n|---|---|---|---|---|---|---|---|\n| a | **failed** | – | – | – | in part | not tested | – |\n| b | – | – | – | – | – | – | – |\n",
		"- nothing to freeze: S2 (z), S2 (w)\n",
		"- S1: x, floors\n- S2: y, z, w, alternatives\n- C3: alternatives\n- C7: frozen\n",
		"- `m`: ./a, ./c\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("table: got no %q in\n%s", want, b.String())
		}
	}
	if _, err := read(t.TempDir()); err == nil {
		t.Error("read of an empty directory: got no error, want one")
	}
}

// The file is of the packages that there are, by its modules in the directive that makes it.
func TestPackages(t *testing.T) {
	directive, err := os.ReadFile("../../report.go")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../CAPABILITIES.md")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(directive), "-o CAPABILITIES.md ")
	line, _, _ = strings.Cut(line, "\n")
	modules := strings.Fields(line)
	if len(modules) < 4 {
		t.Fatalf("modules of the directive: got %q, want four or more", line)
	}
	for _, module := range modules {
		packages, err := tested(filepath.Join("../..", module))
		if err != nil {
			t.Fatal(err)
		}
		if want := listed(module, packages); !strings.Contains(string(text), want) {
			t.Errorf("CAPABILITIES.md: got no line %q, want it; go generate ./conformance writes the file anew", want)
		}
	}
}

// The packages are those of the module that run the suite.
func TestTested(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{
		"go.mod":                "module m",
		"a/a_test.go":           "package a\n\nfunc TestConformance(t *testing.T) {}\n",
		"b/b_test.go":           "package b\n\nfunc TestOther(t *testing.T) {}\n",
		"c/c_test.go":           "package conformance\n\nfunc TestRun(t *testing.T) {}\n",
		"d/d_test.go":           "package d\n\nfunc TestRun(t *testing.T) {}\n",
		"nested/go.mod":         "module n",
		"nested/nested_test.go": "package nested\n\nfunc TestConformance(t *testing.T) {}\n",
	} {
		path := filepath.Join(dir, name)
		err := os.MkdirAll(filepath.Dir(path), 0o700)
		if err == nil {
			err = os.WriteFile(path, []byte(text), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got, err := tested(dir); err != nil || !slices.Equal(got, []string{"./a", "./c"}) {
		t.Errorf("packages: got %v, error %v, want ./a and ./c", got, err)
	}
	if _, err := tested(filepath.Join(dir, "b")); err == nil {
		t.Error("packages of a module without such a test: got no error, want one")
	}
}
