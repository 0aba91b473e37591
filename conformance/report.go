package conformance

//go:generate go run ./internal/capabilities -o CAPABILITIES.md .. ../examples/backend-bbolt ../examples/backend-sqlite

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Outcome is how a case ended.
type Outcome string

const (
	// Passed: no fault was found.
	Passed Outcome = "passed"
	// Failed: the store breaks the rule.
	Failed Outcome = "failed"
	// Skipped: the case was not tested; Result.Text says why.
	Skipped Outcome = "skipped"
	// NotApplicable: the case does not concern a store that says of itself what this one does; Result.Text says what.
	NotApplicable Outcome = "not applicable"
	// Provisional: the store breaks a rule that is too new to fail for.
	Provisional Outcome = "provisional"
)

// Report is what a run found, for machines. It is written as JSON.
type Report struct {
	Suite     string      `json:"suite"`            // Version
	Backend   string      `json:"backend"`          // Harness.Name
	Seed      uint64      `json:"seed"`             // of the random choices
	Atomicity string      `json:"atomicity"`        // any keys, one group or one key
	Prompt    bool        `json:"prompt"`           // the store says that it is prompt
	Faults    bool        `json:"faults"`           // the harness injects faults
	Lacks     []Lack      `json:"lacks,omitempty"`  // as declared
	Exempt    []Exemption `json:"exempt,omitempty"` // as declared
	Results   []Result    `json:"results"`          // case by case
}

// Result is how one case ended.
type Result struct {
	Rule    string  `json:"rule"` // such as S3
	Name    string  `json:"name"` // such as Traceless
	Case    string  `json:"case"` // such as list
	Outcome Outcome `json:"outcome"`
	Text    string  `json:"text,omitempty"` // what went wrong, or why it was not tested
	Seconds float64 `json:"seconds"`
}

// reportVariable names the directory that reports are written to.
const reportVariable = "FLEETQUOTA_CONFORMANCE_REPORT"

// write writes the report to the directory that the environment names, if it does.
func (r *Report) write(t testing.TB) {
	dir := os.Getenv(reportVariable)
	if dir == "" {
		return
	}
	text, err := json.MarshalIndent(r, "", "\t")
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, fileName(r.Backend)+".json"), append(text, '\n'), 0o644)
	}
	if err != nil {
		t.Errorf("%s: %v", reportVariable, err)
	}
}

// fileName returns a name in characters that every file system takes.
func fileName(name string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_':
			return c
		}
		return '-'
	}, name)
}
