package bboltstore

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const module = "github.com/fleetquota/fleetquota"

// A step of the tutorial is a file to write, or a command.
type step struct {
	file, text string
	command    []string
}

// steps reads README.md: each block is a file, which the line before it names, or commands.
func steps(t *testing.T) (steps []step) {
	t.Helper()
	text, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)(?:^`([\\w.]+)`:\n\n)?^```(\\w+)\n(.*?)^```$").FindAllSubmatch(text, -1)
	if n := bytes.Count(text, []byte("\n```")); n != 2*len(blocks) {
		t.Fatalf("README.md, fences: got %d, want %d, two for each block", n, 2*len(blocks))
	}
	for _, b := range blocks {
		switch file, language := string(b[1]), string(b[2]); {
		case language == "go" && file != "":
			steps = append(steps, step{file: file, text: string(b[3])})
		case language == "sh" && file == "":
			for line := range strings.Lines(string(b[3])) {
				steps = append(steps, step{command: strings.Fields(line)})
			}
		default:
			t.Errorf("a block: got language %q and file %q, want go with a file, or sh without:\n%s", language, file, b[3])
		}
	}
	return steps
}

// TestTutorialCode checks that the tutorial has all code of this package, word for word, except for two tests.
func TestTutorialCode(t *testing.T) {
	left := map[string]bool{}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		left[f] = true
	}
	delete(left, "store_test.go")
	delete(left, "tutorial_test.go")
	for _, s := range steps(t) {
		if s.file == "" {
			continue
		}
		if text, err := os.ReadFile(s.file); err != nil || string(text) != s.text {
			t.Errorf("%s, error %v: got\n%s\nwant the text in README.md:\n%s", s.file, err, text, s.text)
		}
		delete(left, s.file)
	}
	for f := range left {
		t.Errorf("files in README.md: got no %s", f)
	}
}

// TestTutorial follows the tutorial in an empty folder, and uses this clone in place of a release, as the
// tutorial tells.
func TestTutorial(t *testing.T) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	// The modules that this test was built from are in the module cache, and the cache can serve as a proxy: the
	// network is not used. The modules were verified when they came there.
	cache, err := exec.CommandContext(t.Context(), "go", "env", "GOMODCACHE").Output()
	if err != nil {
		t.Fatal(err)
	}
	proxy := "file://" + filepath.ToSlash(strings.TrimSpace(string(cache))) + "/cache/download"
	flags := "GOFLAGS="
	if testing.Short() {
		flags += "-short"
	}
	try := func(command ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), command[0], command[1:]...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), flags, "GOWORK=off", "GOSUMDB=off", "GOPROXY="+proxy,
			"FLEETQUOTA_CONFORMANCE_REPORT=") // TestConformance reports
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	run := func(command ...string) string {
		out, err := try(command...)
		if err != nil {
			t.Fatalf("%s: %v\n%s", strings.Join(command, " "), err, out)
		}
		return out
	}
	suite := ""
	for _, s := range steps(t) {
		switch {
		case s.file != "":
			if err := os.WriteFile(filepath.Join(dir, s.file), []byte(s.text), 0o600); err != nil {
				t.Fatal(err)
			}
		case s.command[0] == "cd":
			dir = filepath.Join(dir, s.command[1])
		case s.command[0] == "go" && s.command[1] == "get":
			run("go", "mod", "edit", "-replace", module+"="+root)
			run(s.command...)
		case s.command[0] == "go" && s.command[1] == "test":
			suite += run(s.command...)
		default:
			run(s.command...)
		}
	}
	for _, passed := range []string{"--- PASS: TestConformance ", "--- PASS: TestConformance/S1_Meaning ", "--- PASS: TestConformance/C4_Atomic ", "\nok"} {
		if !strings.Contains(suite, passed) {
			t.Errorf("output of the tutorial's tests: got no %q in\n%s", passed, suite)
		}
	}

	// Make the mistake that the tutorial describes.
	swap := filepath.Join(dir, "swap.go")
	text, err := os.ReadFile(swap)
	if err != nil {
		t.Fatal(err)
	}
	broken := bytes.Replace(text, []byte("err != nil || value != c.Old.Value"), []byte("err != nil || value == \"never\""), 1)
	if bytes.Equal(broken, text) {
		t.Fatal("swap.go: got no comparison to delete, want one")
	}
	if err := os.WriteFile(swap, broken, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := try("go", "test", "-run", "TestConformance/C4", ".")
	if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || !strings.Contains(out, "C4 Atomic") {
		t.Errorf("the suite without the comparison in Swap: got error %v, want a failure of C4 Atomic\n%s", err, out)
	}
}
