package conformance

//go:generate go run ./internal/capabilities -o CAPABILITIES.md .. ../backend/postgres ../examples/backend-bbolt ../examples/backend-sqlite

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Outcome is the outcome of a case.
type Outcome string

const (
	// Passed: no fault was found.
	Passed Outcome = "passed"
	// Failed: the store or algorithm breaks the rule.
	Failed Outcome = "failed"
	// Skipped: the case was not tested; Result.Text says why.
	Skipped Outcome = "skipped"
	// NotApplicable: the case does not concern this store, by the store's own description; Result.Text names it.
	NotApplicable Outcome = "not applicable"
	// Provisional: the store breaks a rule that is too new to fail a test.
	Provisional Outcome = "provisional"
)

// Report holds the results of a run, for programs. It is written as JSON.
type Report struct {
	Suite     string      `json:"suite"`            // Version
	Backend   string      `json:"backend"`          // Harness.Name
	Seed      uint64      `json:"seed"`             // of the random choices
	Atomicity string      `json:"atomicity"`        // "any keys", "one group" or "one key"
	Prompt    bool        `json:"prompt"`           // whether the store declares that it is prompt
	Faults    bool        `json:"faults"`           // whether the harness injects faults
	Race      bool        `json:"race"`             // whether the race detector watched
	Processes bool        `json:"processes"`        // whether the harness opens handles in another process
	Lacks     []Lack      `json:"lacks,omitempty"`  // as declared
	Exempt    []Exemption `json:"exempt,omitempty"` // as declared
	Results   []Result    `json:"results"`          // case by case
}

// Result is the result of one case.
type Result struct {
	Rule    string  `json:"rule"` // such as S3
	Name    string  `json:"name"` // such as Traceless
	Case    string  `json:"case"` // such as lists
	Outcome Outcome `json:"outcome"`
	Text    string  `json:"text,omitempty"` // the failure, or the reason why the case was not tested
	Seconds float64 `json:"seconds"`
}

// weak returns why the report does not show that calls are charged once when the connection breaks, or "".
func (r *Report) weak() string {
	if !r.Faults {
		return "Harness.Fault is nil"
	}
	for _, c := range r.Results {
		if c.Outcome == Skipped && strings.HasPrefix(c.Text, noPower) {
			return c.Text
		}
	}
	return ""
}

// reportVariable is the environment variable that names the directory for reports.
const reportVariable = "FLEETQUOTA_CONFORMANCE_REPORT"

// write writes the report to the directory that the environment names, if it names one.
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

// fileName returns a name with other characters in place of those that some file systems refuse.
func fileName(name string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_':
			return c
		}
		return '-'
	}, name)
}
