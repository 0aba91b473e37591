package fleetquota_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	comment = regexp.MustCompile(`(?m)^\s*// ?(.*)$`)
	words   = regexp.MustCompile(`[A-Za-z']+`)
)

// prose returns the text of a file that people read: the comments above Go code, without snippets, or a document without its
// programs and tables.
func prose(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var text strings.Builder
	if filepath.Ext(file) == ".md" {
		for paragraph := range strings.SplitSeq(fence.ReplaceAllString(string(b), ""), "\n\n") {
			if !strings.HasPrefix(strings.TrimSpace(paragraph), "|") {
				text.WriteString(paragraph + "\n")
			}
		}
		return text.String()
	}
	for _, m := range comment.FindAllStringSubmatch(string(b), -1) {
		if line := m[1]; !strings.HasPrefix(line, "\t") && !strings.HasPrefix(m[0], "//go:") {
			text.WriteString(line + "\n")
		}
	}
	return text.String()
}

// TestProse holds the English to nouns: "a waiting caller" and "the key's state", not "what waits" and "what a key holds". In
// a package and in a document, 'what' may stand at most twice in a thousand words.
func TestProse(t *testing.T) {
	const most = 2
	texts := map[string]*strings.Builder{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".") && d.Name() != ".github"):
			return filepath.SkipDir
		case strings.HasSuffix(path, "_test.go") || filepath.Ext(path) != ".go" && filepath.Ext(path) != ".md":
			return nil
		}
		name := path
		if filepath.Ext(path) == ".go" {
			name = "package " + filepath.Dir(path)
		}
		if texts[name] == nil {
			texts[name] = &strings.Builder{}
		}
		texts[name].WriteString(prose(t, path))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range texts {
		all, what := 0, 0
		for _, w := range words.FindAllString(text.String(), -1) {
			all++
			if strings.EqualFold(w, "what") {
				what++
			}
		}
		if what > 1 && what*1000 > most*all {
			t.Errorf("%s: got 'what' %d times in %d words, want at most %d in 1000: name the thing", name, what, all, most)
		}
	}
}

// TestSnippetsOfWaiting: RetryAfter is 292 years where a cost can never fit. No snippet, program or example sleeps that long:
// each tests for Never, or uses Wait.
func TestSnippetsOfWaiting(t *testing.T) {
	sleeps := regexp.MustCompile(`\b(Sleep|After|NewTimer|Reset|AfterFunc|WithTimeout)\([^\n]*\.RetryAfter\b`)
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		example := strings.HasPrefix(d.Name(), "example_")
		switch {
		case err != nil:
			return err
		case d.IsDir() && path != "." && (d.Name() == "testdata" || strings.HasPrefix(d.Name(), ".")):
			return filepath.SkipDir
		case d.IsDir() || filepath.Ext(path) != ".go" && filepath.Ext(path) != ".md" || strings.HasSuffix(path, "_test.go") && !example:
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for i, line := range strings.Split(string(b), "\n") {
			if sleeps.MatchString(line) {
				t.Errorf("%s:%d: got %q, want a test for quota.Never before, and the wait in a variable, or Limiter.Wait", path, i+1, strings.TrimSpace(line))
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
