package fleetquota_test

import (
	"bytes"
	"fmt"
	"go/format"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/internal/redisserver"
)

// block is a fenced block of a page.
type block struct{ language, text string }

// page is a Markdown file of the documentation.
type page struct {
	path, text string
	blocks     []block
}

// pages returns the documentation: the pages at the root and all below docs. The tutorial has a test of its own.
func pages(t *testing.T) []page {
	t.Helper()
	paths, err := filepath.Glob("*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{"docs", ".github"} {
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && strings.HasSuffix(path, ".md") {
				paths = append(paths, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if len(paths) < 10 {
		t.Fatalf("found the pages %v only", paths)
	}
	list := make([]page, len(paths))
	for i, path := range paths {
		list[i] = readPage(t, path)
	}
	return list
}

var (
	fence   = regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$")
	link    = regexp.MustCompile(`\]\(([^)]+)\)`)
	heading = regexp.MustCompile(`(?m)^#+ (.*)$`)
)

func readPage(t *testing.T, path string) page {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	p := page{path: path, text: string(b)}
	for _, m := range fence.FindAllStringSubmatch(p.text, -1) {
		p.blocks = append(p.blocks, block{m[1], m[2]})
	}
	if n := strings.Count("\n"+p.text, "\n```"); n != 2*len(p.blocks) {
		t.Fatalf("%s has %d fences and %d blocks", path, n, len(p.blocks))
	}
	return p
}

// output returns the block of text behind block i, which is its output.
func (p *page) output(i int) (text string, ok bool) {
	if i+1 < len(p.blocks) && p.blocks[i+1].language == "text" {
		return p.blocks[i+1].text, true
	}
	return "", false
}

// shows reports whether a page has the output of block i.
func (p *page) shows(i int) bool {
	_, ok := p.output(i)
	return ok
}

// command returns the output of a command in a clean environment. If the command fails, so does the test.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	for _, v := range os.Environ() {
		switch key, _, _ := strings.Cut(v, "="); key {
		case "REDIS_URL", "TOKEN_BUCKET_SIZE", "TOKEN_REFILL_RATE", "FLEET_SIZE", "FALLBACK_MAX_KEYS",
			"QUOTA_URL", "QUOTA_LIMIT", "QUOTA_OUTAGE", "QUOTA_TIMEOUT", "QUOTA_IN_FLIGHT", "QUOTA_MAX_WAITERS":
		default:
			cmd.Env = append(cmd.Env, v)
		}
	}
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Errorf("%s %s: %v\n%s%s", name, strings.Join(args, " "), err, out, &stderr)
	}
	return string(out)
}

// TestDocsPrograms runs every program of the documentation. The block of text that follows a program is its output.
// A block without a language is a picture or a formula.
func TestDocsPrograms(t *testing.T) {
	programs := 0
	for _, p := range pages(t) {
		t.Run(p.path, func(t *testing.T) {
			for i, b := range p.blocks {
				switch b.language {
				case "go":
					programs++
					want, shown := p.output(i)
					runProgram(t, b.text, want, shown)
				case "text":
					if i == 0 || p.blocks[i-1].language != "go" && p.blocks[i-1].language != "sh" {
						t.Errorf("output without a program or command:\n%s", b.text)
					}
				case "sh", "":
				default:
					t.Errorf("got a block in %q, which no test runs; want go, sh or text", b.language)
				}
			}
		})
	}
	if programs < 8 {
		t.Errorf("got %d programs, want 8 or more", programs)
	}
}

// runProgram runs a program, and compares its output, or runs a test file.
func runProgram(t *testing.T, text, want string, shown bool) {
	t.Helper()
	name := "main.go"
	if strings.Contains(text, "\nfunc Test") {
		name = "main_test.go"
	}
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if formatted, err := format.Source([]byte(text)); err != nil || string(formatted) != text {
		t.Errorf("a program is not formatted (%v):\n%s", err, text)
	}
	if name == "main_test.go" {
		if redisserver.Available() == nil { // for Lua
			t.Setenv("REDIS_ADDR", redisserver.Start(t).Addr())
		}
		command(t, "go", "test", file)
		return
	}
	if !shown {
		t.Errorf("a program without its output:\n%s", text)
		return
	}
	command(t, "go", "vet", file)
	if got := command(t, "go", "run", file); got != want {
		t.Errorf("a program prints other text than the page shows: got\n%s\nwant\n%s", got, want)
	}
}

// checks are the commands that have a check of their own: the long ones run in a short form.
var checks = map[string]func(t *testing.T){
	"go run ./examples/fleet": func(t *testing.T) {
		if out := command(t, "go", "run", "./examples/fleet"); !strings.Contains(out, "No limit was exceeded") {
			t.Errorf("got\n%s\nwant the line that no limit was exceeded", out)
		}
	},
	"go -C bench run . -docs ../docs/performance.md": func(t *testing.T) {
		dir := t.TempDir()
		command(t, "go", "-C", "bench", "run", ".", "-quick", "-only", "local", "-out", dir)
		if b, err := os.ReadFile(filepath.Join(dir, "RESULTS.md")); err != nil || !strings.Contains(string(b), "\n## Targets\n") {
			t.Errorf("RESULTS.md: got %q, %v; want targets", b, err)
		}
	},
	"go test -run '^$' -bench Decision -count 5 ./backend/internal/engine": func(t *testing.T) {
		if _, err := exec.LookPath("redis-server"); err != nil {
			t.Skip("there is no redis-server")
		}
		out := command(t, "go", "test", "-run", "^$", "-bench", "Decision/g1/", "-benchtime", "1x", "./backend/internal/engine")
		if n := strings.Count(out, "ns/op"); n != 6 {
			t.Errorf("got %d benchmarks, want 6:\n%s", n, out)
		}
	},
	"go test -v -run HeldMemory -bench HeldOnServer -benchtime 20x ./backend/internal/engine": func(t *testing.T) {
		if _, err := exec.LookPath("redis-server"); err != nil {
			t.Skip("there is no redis-server")
		}
		out := command(t, "go", "test", "-v", "-run", "HeldMemory", "-bench", "HeldOnServer", "-benchtime", "1x", "./backend/internal/engine")
		if !strings.Contains(out, "MEMORY USAGE") || !strings.Contains(out, "x/hold-17-slots") {
			t.Errorf("got\n%s\nwant memory and time of holds", out)
		}
	},
	"go -C examples/observed run . -listen :8080": func(t *testing.T) {
		if out := command(t, "go", "-C", "examples/observed", "run", ".", "-listen", "127.0.0.1:0", "-for", "500ms"); !strings.Contains(out, "/metrics") || !strings.Contains(out, ", 0 failed\n") {
			t.Errorf("got\n%s\nwant the pages, and calls of which none failed", out)
		}
	},
	"go generate ./conformance": func(t *testing.T) {
		files, err := filepath.Glob("conformance/*.go")
		if err != nil || !slices.ContainsFunc(files, func(file string) bool {
			b, err := os.ReadFile(file)
			return err == nil && bytes.Contains(b, []byte("\n//go:generate "))
		}) {
			t.Errorf("got no generator in %v, %v; want one", files, err)
		}
	},
	outage: func(t *testing.T) {
		checkShape(t, outage, "The bound holds.")
	},
	gateway: func(t *testing.T) {
		checkShape(t, gateway, "Nothing was over its limit, and all that was held came back.")
	},
}

// checkShape runs an example whose output a page shows, which differs between runs in its numbers.
func checkShape(t *testing.T, example, verdict string) {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Skip("there is no redis-server")
	}
	want := ""
	for _, p := range pages(t) {
		for i, b := range p.blocks {
			if text, ok := p.output(i); ok && strings.TrimSpace(b.text) == example {
				want = text
			}
		}
	}
	words := strings.Fields(example)
	if out := command(t, words[0], words[1:]...); want == "" || shape(out) != shape(want) || !strings.Contains(out, verdict) {
		t.Errorf("got output of another shape than the page shows:\n%s\nthe shape: got\n%s\nwant\n%s", out, shape(out), shape(want))
	}
}

// Examples that a page shows with their output.
const (
	outage  = "go run ./examples/outage"
	gateway = "go run ./examples/gateway -redis"
)

// shape returns the part of the output of an example that does not differ between runs: the text without lines
// that were left out, without numbers and states, and without a line that repeats the line before.
func shape(text string) string {
	var lines []string
	for line := range strings.Lines(text) {
		line = regexp.MustCompile(`\d+(\.\d+)?`).ReplaceAllString(strings.Join(strings.Fields(line), " "), "0")
		line = regexp.MustCompile(`^0s (up|killed)( [-X?]){4}`).ReplaceAllString(line, "0s")
		if line != "…" && (len(lines) == 0 || lines[len(lines)-1] != line) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// TestDocsCommands checks every command of the documentation: by a check of its own, or one for its kind.
func TestDocsCommands(t *testing.T) {
	seen := map[string]bool{}
	for _, p := range pages(t) {
		for i, b := range p.blocks {
			if b.language != "sh" {
				continue
			}
			if command := strings.TrimSpace(b.text); command != outage && command != gateway && p.shows(i) {
				t.Errorf("%s: no test checks the output of %q", p.path, b.text)
			}
			for line := range strings.Lines(b.text) {
				line, _, _ = strings.Cut(strings.TrimSpace(line), " # ")
				if line = strings.TrimSpace(line); seen[line] {
					continue
				}
				seen[line] = true
				if check := checks[line]; check != nil {
					t.Run(line, check)
				} else {
					t.Run(line, func(t *testing.T) { checkKind(t, p.path, strings.Fields(line)) })
				}
			}
		}
	}
	for line := range checks {
		if !seen[line] {
			t.Errorf("no page has the command %q", line)
		}
	}
	if info, err := os.Stat(".ci/run"); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf(".ci/run: got %v, %v; want an executable file", info, err)
	}
}

// checkKind checks a command by its kind.
func checkKind(t *testing.T, path string, words []string) {
	for len(words) > 0 && strings.HasPrefix(words[0], "FLEETQUOTA_") { // assignments in front of the command
		words = words[1:]
	}
	line := strings.Join(words, " ")
	switch {
	case strings.HasPrefix(line, "./test"):
		help := command(t, "./test", "-h")
		for _, flag := range words[1:] {
			if !strings.Contains(help, flag) {
				t.Errorf("%s: ./test -h does not name %s:\n%s", path, flag, help)
			}
		}
	case strings.HasPrefix(line, "go get "):
		b, err := os.ReadFile("go.mod")
		if err != nil {
			t.Fatal(err)
		}
		module, _, _ := bytes.Cut(b, []byte("\n"))
		if want := "go get " + strings.TrimPrefix(string(module), "module "); line != want {
			t.Errorf("%s: got %q, want %q", path, line, want)
		}
	case strings.HasPrefix(line, "go run ") && strings.Contains(line, "@"): // a linter, in the version that ./test has
		b, err := os.ReadFile("test")
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), "="+words[2]+"\n") {
			t.Errorf("%s: ./test does not run %s", path, words[2])
		}
	case strings.HasPrefix(line, "go test "), strings.HasPrefix(line, "go -C "):
		checkGoTest(t, path, words)
	case strings.HasPrefix(line, "redis-cli "):
		server := redisserver.Start(t)
		for i, w := range words {
			words[i] = strings.Trim(w, "'")
		}
		if _, err := server.Do(words[1:]...); err != nil {
			t.Errorf("%s: %q: %v", path, line, err)
		}
	default:
		t.Errorf("%s: no test checks the command %q", path, line)
	}
}

// checkGoTest checks that the tests, benchmarks or fuzz targets that a go test command names are there.
func checkGoTest(t *testing.T, path string, words []string) {
	list := []string{words[0]}
	words = words[1:]
	if words[0] == "-C" {
		list, words = append(list, words[:2]...), words[2:]
	}
	if words[0] != "test" {
		t.Fatalf("%s: no test checks the command %q", path, words)
	}
	names, packages := "", 0
	list = append(list, "list", "-f", "{{.Dir}}{{range .TestGoFiles}} {{.}}{{end}}{{range .XTestGoFiles}} {{.}}{{end}}")
	for words = words[1:]; len(words) > 0; words = words[1:] {
		switch w := words[0]; {
		case w == "-run" || w == "-bench" || w == "-fuzz":
			if name, _, _ := strings.Cut(strings.Trim(words[1], "'"), "/"); name != "^$" {
				names = name
			}
			words = words[1:]
		case w == "-count" || w == "-benchtime" || w == "-fuzztime" || w == "-timeout":
			words = words[1:]
		case w == "-v" || w == "-race" || w == "-update" || w == "-cover" || w == "-benchmem":
		case strings.HasPrefix(w, "-"):
			t.Errorf("%s: the flag %s is unknown to this test", path, w)
		default:
			packages++
			list = append(list, w)
		}
	}
	if names == "" || packages != 1 {
		t.Fatalf("%s: got the name %q and %d packages, want a name and one package", path, names, packages)
	}
	files := strings.Fields(command(t, list[0], list[1:]...))
	form := regexp.MustCompile(names)
	for _, file := range files[min(1, len(files)):] {
		b, err := os.ReadFile(filepath.Join(files[0], file))
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range testFunc.FindAllSubmatch(b, -1) {
			if form.Match(m[1]) {
				return
			}
		}
	}
	t.Errorf("%s: no test, benchmark or fuzz target is called %s in %v", path, names, files)
}

var testFunc = regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)\w+)\(`)

// TestWorkflow checks that the workflow on GitHub runs ./test, with the Go of go.mod and no rights but to read.
func TestWorkflow(t *testing.T) {
	b, err := os.ReadFile(".github/workflows/test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"run: ./test\n", "go-version-file: go.mod\n", "\npermissions:\n  contents: read\n"} {
		if !bytes.Contains(b, []byte(want)) {
			t.Errorf("test.yml: got\n%s\nwant %q in it", b, want)
		}
	}
}

// anchor returns the fragment under which a heading is linked.
func anchor(heading string) string {
	heading = regexp.MustCompile(`[^\p{L}\p{N} _-]`).ReplaceAllString(strings.ToLower(heading), "")
	return strings.ReplaceAll(strings.TrimSpace(heading), " ", "-")
}

// TestDocsLinks checks that the files and headings that pages link to are there.
func TestDocsLinks(t *testing.T) {
	list := append(pages(t), readPage(t, "bench/RESULTS.md"), readPage(t, "examples/backend-bbolt/README.md"))
	for _, p := range list {
		for _, m := range link.FindAllStringSubmatch(fence.ReplaceAllString(p.text, ""), -1) {
			target, fragment, _ := strings.Cut(m[1], "#")
			if strings.HasPrefix(target, "https://") {
				continue
			}
			file := p.path
			if target != "" {
				file = filepath.Join(filepath.Dir(p.path), target)
			}
			if _, err := os.Stat(file); err != nil {
				t.Errorf("%s links to %s, which is not there", p.path, m[1])
				continue
			}
			if fragment == "" {
				continue
			}
			if !slices.ContainsFunc(heading.FindAllStringSubmatch(readPage(t, file).text, -1), func(h []string) bool { return anchor(h[1]) == fragment }) {
				t.Errorf("%s links to %s, and %s has no such heading", p.path, m[1], file)
			}
		}
	}
}

// TestDocsReached checks that every page below docs can be reached from the README.
func TestDocsReached(t *testing.T) {
	reached := map[string]bool{}
	var visit func(path string)
	visit = func(path string) {
		if reached[path] {
			return
		}
		reached[path] = true
		for _, m := range link.FindAllStringSubmatch(readPage(t, path).text, -1) {
			if target, _, _ := strings.Cut(m[1], "#"); strings.HasSuffix(target, ".md") && !strings.HasPrefix(target, "https://") {
				visit(filepath.Join(filepath.Dir(path), target))
			}
		}
	}
	visit("README.md")
	for _, p := range pages(t) {
		if strings.HasPrefix(p.path, "docs") && !reached[p.path] {
			t.Errorf("%s cannot be reached from the README", p.path)
		}
	}
}

// TestReadmeLines keeps the README short.
func TestReadmeLines(t *testing.T) {
	if n := strings.Count(readPage(t, "README.md").text, "\n"); n > 300 {
		t.Errorf("lines of README.md: got %d, want at most 300", n)
	}
}

// TestReadmeFigures compares the figures in the README with those that bench wrote.
func TestReadmeFigures(t *testing.T) {
	results := readPage(t, "bench/RESULTS.md").text
	sentence := regexp.MustCompile(`A peer is ahead in (\d+) of (\d+) comparisons`)
	want := sentence.FindString(results)
	if want == "" {
		t.Fatal("bench/RESULTS.md does not say in how many comparisons a peer is ahead")
	}
	_, table, _ := strings.Cut(results, "\n## Where a peer is ahead\n")
	table, _, _ = strings.Cut(table, "\n## ")
	if n := strings.Count(table, " × |\n"); !strings.HasPrefix(want, fmt.Sprintf("A peer is ahead in %d of ", n)) {
		t.Errorf("bench/RESULTS.md lists %d comparisons, and says %q", n, want)
	}
	figures := readPage(t, "docs/performance.md").text
	readme := strings.Join(strings.Fields(readPage(t, "README.md").text), " ")
	for path, text := range map[string]string{"docs/performance.md": figures, "README.md": readme} {
		if got := sentence.FindString(text); got != want {
			t.Errorf("%s: got %q, want %q", path, got, want)
		}
	}
	for work, form := range map[string]string{
		"Redis, 100k keys, 256 goroutines | decisions/s":            "%s decisions/s over 100k keys",
		"Redis, one key, 256 goroutines | decisions/s":              "%s on one key",
		"Redis, with leases, one key, 256 goroutines | decisions/s": "leases make %s on one key",
	} {
		m := regexp.MustCompile(`\| ` + regexp.QuoteMeta(work) + ` \| (\S+) \|`).FindStringSubmatch(figures)
		if m == nil {
			t.Errorf("docs/performance.md has no row %q", work)
		} else if want := strings.Replace(form, "%s", m[1], 1); !strings.Contains(readme, want) {
			t.Errorf("the README does not say %q", want)
		}
	}
}
