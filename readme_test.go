package fleetquota_test

import (
	"go/format"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// block is a fenced block of the README.
type block struct{ language, text string }

func readme(t *testing.T) (text string, blocks []block) {
	t.Helper()
	b, err := os.ReadFile("README.md")
	if err != nil {
		t.Fatal(err)
	}
	text = string(b)
	for _, m := range regexp.MustCompile("(?ms)^```(\\w*)\n(.*?)^```$").FindAllStringSubmatch(text, -1) {
		blocks = append(blocks, block{m[1], m[2]})
	}
	if n := strings.Count(text, "\n```"); n != 2*len(blocks) {
		t.Fatalf("README.md has %d fences and %d blocks", n, len(blocks))
	}
	return text, blocks
}

// command returns a command in a clean environment, which shows its output when it fails.
func command(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	for _, v := range os.Environ() {
		switch key, _, _ := strings.Cut(v, "="); key {
		case "REDIS_URL", "TOKEN_BUCKET_SIZE", "TOKEN_REFILL_RATE", "FLEET_SIZE":
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

// TestReadmePrograms runs every program in the README. The text block that follows one is its output; that
// of a command is checked with the command.
func TestReadmePrograms(t *testing.T) {
	_, blocks := readme(t)
	programs := 0
	for i, b := range blocks {
		switch b.language {
		case "go":
			programs++
			if strings.Contains(b.text, "\nfunc Test") {
				file := filepath.Join(t.TempDir(), "main_test.go")
				if err := os.WriteFile(file, []byte(b.text), 0o600); err != nil {
					t.Fatal(err)
				}
				command(t, "go", "test", file)
				continue
			}
			if i+1 == len(blocks) || blocks[i+1].language != "text" {
				t.Errorf("a program without its output:\n%s", b.text)
				continue
			}
			file := filepath.Join(t.TempDir(), "main.go")
			if err := os.WriteFile(file, []byte(b.text), 0o600); err != nil {
				t.Fatal(err)
			}
			command(t, "go", "vet", file)
			if got := command(t, "go", "run", file); got != blocks[i+1].text {
				t.Errorf("a program prints\n%s\nand not, as the README says,\n%s", got, blocks[i+1].text)
			}
			if formatted, err := format.Source([]byte(b.text)); err != nil || string(formatted) != b.text {
				t.Errorf("a program is not formatted (%v):\n%s", err, b.text)
			}
		case "text":
			if i == 0 || blocks[i-1].language != "go" && blocks[i-1].language != "sh" {
				t.Errorf("output without a program:\n%s", b.text)
			}
		case "sh":
		default:
			t.Errorf("a block in %q, which nothing runs", b.language)
		}
	}
	if programs < 3 {
		t.Errorf("found %d programs", programs)
	}
}

// TestReadmeCommands runs every command in the README, the long ones in a short form.
func TestReadmeCommands(t *testing.T) {
	_, blocks := readme(t)
	checks := map[string]func(t *testing.T){
		"go run ./examples/fleet": func(t *testing.T) {
			if out := command(t, "go", "run", "./examples/fleet"); !strings.Contains(out, "No limit was exceeded") {
				t.Errorf("it prints\n%s", out)
			}
		},
		"./test": func(t *testing.T) { // which runs this test
			if out := command(t, "./test", "-h"); !strings.Contains(out, "-no-install") || !strings.Contains(out, "-full") {
				t.Errorf("-h prints\n%s", out)
			}
		},
		"go -C bench run . -readme ../README.md": func(t *testing.T) {
			dir := t.TempDir()
			command(t, "go", "-C", "bench", "run", ".", "-quick", "-only", "local", "-out", dir)
			if b, err := os.ReadFile(filepath.Join(dir, "RESULTS.md")); err != nil || !strings.Contains(string(b), "\n## Targets\n") {
				t.Errorf("it writes %q, %v", b, err)
			}
		},
	}
	checks["go test -run '^$' -bench Decision -count 5 ./backend/internal/engine"] = func(t *testing.T) {
		if _, err := exec.LookPath("redis-server"); err != nil {
			t.Skip("there is no redis-server")
		}
		out := command(t, "go", "test", "-run", "^$", "-bench", "Decision/g1/", "-benchtime", "1x", "./backend/internal/engine")
		if strings.Count(out, "ns/op") != 6 {
			t.Errorf("it prints\n%s", out)
		}
	}
	const outage = "go run ./examples/outage"
	shown := map[string]string{} // the output of commands
	checks[outage] = func(t *testing.T) {
		want := shown[outage]
		if _, err := exec.LookPath("redis-server"); err != nil {
			t.Skip("there is no redis-server")
		}
		if out := command(t, "go", "run", "./examples/outage"); want == "" || shape(out) != shape(want) || !strings.Contains(out, "The bound holds.") {
			t.Errorf("it prints\n%s\nwhich has not the shape of what the README shows:\n%s\nbut\n%s", out, shape(want), shape(out))
		}
	}
	seen := map[string]bool{}
	for i, b := range blocks {
		if b.language != "sh" {
			continue
		}
		if i+1 < len(blocks) && blocks[i+1].language == "text" {
			shown[strings.TrimSpace(b.text)] = blocks[i+1].text
			if strings.TrimSpace(b.text) != outage {
				t.Errorf("no test checks the output of %q", b.text)
			}
		}
		for line := range strings.Lines(b.text) {
			line = strings.TrimSpace(line)
			if seen[line] {
				continue
			}
			seen[line] = true
			if check := checks[line]; check != nil {
				t.Run(line, check)
			} else {
				t.Errorf("no test runs the command %q", line)
			}
		}
	}
	for line := range checks {
		if !seen[line] {
			t.Errorf("the README no longer has the command %q", line)
		}
	}
	if info, err := os.Stat(".ci/run"); err != nil || info.Mode()&0o111 == 0 {
		t.Errorf(".ci/run: %v, %v", info, err)
	}
}

// shape returns what does not differ between runs of examples/outage: a text without lines that were left
// out, without numbers and states, and without one line twice in a row.
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

// TestReadmeLinks checks that what the README links to in the repository is there.
func TestReadmeLinks(t *testing.T) {
	text, _ := readme(t)
	headings := map[string]bool{}
	for _, m := range regexp.MustCompile(`(?m)^#+ (.*)$`).FindAllStringSubmatch(text, -1) {
		headings["#"+strings.ReplaceAll(strings.ToLower(m[1]), " ", "-")] = true
	}
	for _, m := range regexp.MustCompile(`\]\(([^)]+)\)`).FindAllStringSubmatch(text, -1) {
		switch target := m[1]; {
		case strings.HasPrefix(target, "https://"), headings[target]:
		default:
			if _, err := os.Stat(target); err != nil {
				t.Errorf("README.md links to %s, which is not there", target)
			}
		}
	}
}
