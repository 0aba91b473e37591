// Command capabilities runs the conformance tests of modules and writes a table of the capabilities of their backends.
//
//	go run ./conformance/internal/capabilities -o conformance/CAPABILITIES.md . examples/backend-bbolt
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/fleetquota/fleetquota/conformance"
)

func main() {
	out := flag.String("o", "", "the file to write; without it, the standard output")
	flag.Parse()
	if err := run(*out, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "capabilities:", err)
		os.Exit(1)
	}
}

// run tests the modules and writes the table, even if a test fails.
func run(out string, modules []string) error {
	dir, err := os.MkdirTemp("", "capabilities")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var failed error
	var all []string
	for _, module := range modules {
		packages, err := tested(module)
		if err != nil {
			return err
		}
		all = append(all, listed(module, packages))
		cmd := exec.Command("go", append([]string{"test", "-count", "1", "-timeout", "45m", "-run", tests}, packages...)...)
		cmd.Dir = module
		cmd.Env = append(os.Environ(), "FLEETQUOTA_CONFORMANCE_REPORT="+dir, "FLEETQUOTA_REQUIRE_REDIS=1", "FLEETQUOTA_REQUIRE_POSTGRES=1")
		cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
		if err := cmd.Run(); err != nil {
			failed = fmt.Errorf("go test in %s: %w", module, err)
		}
	}
	reports, err := read(dir)
	if err != nil {
		return err
	}
	w := io.Writer(os.Stdout)
	if out != "" {
		f, err := os.Create(out)
		if err != nil {
			return err
		}
		defer f.Close()
		w = f
	}
	if err := write(w, all, reports); err != nil {
		return err
	}
	return failed
}

// tests are the tests that run the suite.
const tests = "^(TestConformance|TestRun)$"

// tested returns the packages of a module that have such tests. Those of nested modules are not among them.
func tested(module string) (packages []string, err error) {
	err = filepath.WalkDir(module, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if _, err := os.Stat(filepath.Join(path, "go.mod")); err == nil && path != module {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		has := func(part string) bool { return strings.Contains("\n"+string(text), "\n"+part) }
		if has("func TestConformance(") || has("package conformance\n") && has("func TestRun(") {
			relative, err := filepath.Rel(module, filepath.Dir(path))
			if err != nil {
				return err
			}
			if name := "./" + filepath.ToSlash(relative); !slices.Contains(packages, name) {
				packages = append(packages, name)
			}
		}
		return nil
	})
	if err == nil && len(packages) == 0 {
		err = fmt.Errorf("no package of %s has a test called TestConformance", module)
	}
	return packages, err
}

// listed returns a line of the file: the packages of a module that run the suite.
func listed(module string, packages []string) string {
	return fmt.Sprintf("- `%s`: %s\n", filepath.ToSlash(module), strings.Join(packages, ", "))
}

// read returns the reports in a directory, by name of the backend.
func read(dir string) ([]conformance.Report, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.json"))
	if err != nil {
		return nil, err
	}
	var all []conformance.Report
	for _, name := range names {
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		var r conformance.Report
		if err := json.Unmarshal(text, &r); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		all = append(all, r)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no reports in %s", dir)
	}
	slices.SortFunc(all, func(a, b conformance.Report) int { return strings.Compare(a.Backend, b.Backend) })
	return all, nil
}

// operations are the ways to ask that have cases of their own, and those cases.
var operations = []struct {
	name string
	is   func(r *conformance.Result) bool
}{
	{"floor", named("floors")},
	{"up to", named("up to")},
	{"ahead", named("TokenBucket")}, // whose random operations are of all kinds
	{"shadow", named("shadows")},
	{"first that fits", named("alternatives")},
	{"request id", ofRule("C3")},
	{"listing", ofRule("C9")},
}

// named returns the filter of the cases of a name, in any rule.
func named(name string) func(*conformance.Result) bool {
	return func(r *conformance.Result) bool { return r.Case == name }
}

// ofRule returns the filter of the cases of a rule.
func ofRule(rule string) func(*conformance.Result) bool {
	return func(r *conformance.Result) bool { return r.Rule == rule }
}

// write writes the tables: the capabilities of the backends, the operations and rules that they passed, the cases that were not
// tested, and the cases and packages of which the file is, by which a test sees that it is old.
func write(w io.Writer, packages []string, reports []conformance.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "# Capabilities of the backends\n\nFound by the conformance suite, version %s; `go generate ./conformance` writes this file.\n\n", reports[0].Suite)
	b.WriteString("| backend | keys in one step | shared | request ids | verdicts | clock | clock can be set | prompt | faults injected | processes |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, r := range reports {
		has := func(f conformance.Feature) string {
			return yes(!slices.ContainsFunc(r.Lacks, func(l conformance.Lack) bool { return l.Feature == f }))
		}
		verdicts := "exact"
		if has(conformance.Exact) == no {
			verdicts = "bounds"
		}
		clock := "the server's"
		switch {
		case has(conformance.Shared) == no:
			clock = "its own"
		case has(conformance.ServerClock) == no:
			clock = "each client's"
		}
		processes := "one"
		if r.Processes {
			processes = "two"
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s |\n", r.Backend, r.Atomicity, has(conformance.Shared), has(conformance.IDs), verdicts,
			clock, has(conformance.Clock), yes(r.Prompt), yes(r.Faults), processes)
	}
	const outcomes = "passed, passed in part (some cases were not tested), not tested, **failed**, or – where the cases do not concern a backend"
	fmt.Fprintf(&b, "\nOperations, by the cases of their own: %s.\n\n| backend |", outcomes)
	for _, op := range operations {
		fmt.Fprintf(&b, " %s |", op.name)
	}
	fmt.Fprintf(&b, "\n|---|%s\n", strings.Repeat("---|", len(operations)))
	for _, r := range reports {
		fmt.Fprintf(&b, "| %s |", r.Backend)
		for _, op := range operations {
			fmt.Fprintf(&b, " %s |", verdict(r.Results, op.is))
		}
		b.WriteByte('\n')
	}
	fmt.Fprintf(&b, "\nRules, as the package documentation numbers them: %s.\n\n", outcomes)
	var rules []string
	for _, r := range reports[0].Results {
		if !slices.Contains(rules, r.Rule) {
			rules = append(rules, r.Rule)
		}
	}
	fmt.Fprintf(&b, "| backend | %s |\n|---|%s\n", strings.Join(rules, " | "), strings.Repeat("---|", len(rules)))
	for _, r := range reports {
		fmt.Fprintf(&b, "| %s |", r.Backend)
		for _, rule := range rules {
			fmt.Fprintf(&b, " %s |", verdict(r.Results, ofRule(rule)))
		}
		b.WriteByte('\n')
	}
	b.WriteString("\n## Not tested\n")
	for _, r := range reports {
		var reasons []string
		cases := map[string][]string{}
		for _, c := range r.Results {
			if c.Outcome == conformance.Skipped {
				if cases[c.Text] == nil {
					reasons = append(reasons, c.Text)
				}
				cases[c.Text] = append(cases[c.Text], fmt.Sprintf("%s (%s)", c.Rule, c.Case))
			}
		}
		if len(reasons) > 0 {
			fmt.Fprintf(&b, "\n%s:\n\n", r.Backend)
		}
		for _, reason := range reasons {
			fmt.Fprintf(&b, "- %s: %s\n", reason, strings.Join(cases[reason], ", "))
		}
	}
	b.WriteString("\n## Cases\n\n")
	for _, rule := range rules {
		var names []string
		for _, r := range reports[0].Results {
			if r.Rule == rule {
				names = append(names, r.Case)
			}
		}
		fmt.Fprintf(&b, "- %s: %s\n", rule, strings.Join(names, ", "))
	}
	b.WriteString("\n## Packages that run the suite, by module\n\n" + strings.Join(packages, ""))
	_, err := io.WriteString(w, b.String())
	return err
}

const no = "no"

func yes(is bool) string {
	if is {
		return "yes"
	}
	return no
}

// verdict sums up cases.
func verdict(results []conformance.Result, of func(*conformance.Result) bool) string {
	count := map[conformance.Outcome]int{}
	for i := range results {
		if of(&results[i]) {
			count[results[i].Outcome]++
		}
	}
	switch {
	case count[conformance.Failed] > 0:
		return "**failed**"
	case count[conformance.Passed] == 0 && count[conformance.Skipped] == 0:
		return "–"
	case count[conformance.Passed] == 0:
		return "not tested"
	case count[conformance.Skipped]+count[conformance.Provisional] > 0:
		return "in part"
	}
	return "passed"
}
