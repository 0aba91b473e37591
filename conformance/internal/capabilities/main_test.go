package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
)

func TestTable(t *testing.T) {
	dir := t.TempDir()
	for name, r := range map[string]conformance.Report{
		"one": {Suite: "9.9", Backend: "b", Atomicity: "any keys", Prompt: true, Results: []conformance.Result{
			{Rule: "S1", Name: "Meaning", Case: "x", Outcome: conformance.Passed},
			{Rule: "S2", Name: "AllOrNothing", Case: "y", Outcome: conformance.Failed, Text: "wrong"},
		}},
		"two": {Suite: "9.9", Backend: "a", Atomicity: "one key", Lacks: []conformance.Lack{{Feature: conformance.Exact, Reason: "leases"}}, Results: []conformance.Result{
			{Rule: "S1", Name: "Meaning", Case: "x", Outcome: conformance.Skipped, Text: "leases"},
			{Rule: "S2", Name: "AllOrNothing", Case: "y", Outcome: conformance.Passed},
			{Rule: "S2", Name: "AllOrNothing", Case: "z", Outcome: conformance.Skipped, Text: "nothing to freeze"},
			{Rule: "S2", Name: "AllOrNothing", Case: "w", Outcome: conformance.Skipped, Text: "nothing to freeze"},
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
	if err := write(&b, reports); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"version 9.9",
		"| a | one key | yes | yes | bounds | yes | no | no |\n| b | any keys | yes | yes | exact | yes | yes | no |\n",
		"| backend | S1 | S2 | C7 |\n|---|---|---|---|\n| a | not tested | in part | – |\n| b | passed | **failed** | – |\n",
		"- nothing to freeze: S2 (z), S2 (w)\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("table: got no %q in\n%s", want, b.String())
		}
	}
	if _, err := read(t.TempDir()); err == nil {
		t.Error("read of an empty directory: got no error, want one")
	}
}
