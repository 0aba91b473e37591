package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/observe/top"
)

// serve runs a fleet for some calls, and returns it and the address of its pages. The fleet rests from then on.
func serve(t *testing.T, url string) (*fleet, string) {
	t.Helper()
	f, err := newFleet(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.close)
	f.work(t.Context(), 100, time.Millisecond)
	server := httptest.NewServer(f.pages)
	t.Cleanup(server.Close)
	return f, server.URL
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != 200 {
		t.Fatalf("%s: got %d, %v, %s", url, resp.StatusCode, err, b)
	}
	return string(b)
}

// rows are the numbers of a ranking, by limit, ranking and key: at least, at most and, of used, given back.
type rows map[string][]int64

// ofLedger returns the rows that a page must have.
func ofLedger(s sums) rows {
	all := rows{}
	for limit, keys := range s.Tokens {
		for key, p := range keys {
			if p.Denied > 0 {
				all[limit+" denied "+key] = []int64{p.Denied, p.Denied}
			}
			if p.Used > 0 {
				all[limit+" used "+key] = []int64{p.Used, p.Used, p.Back}
			}
		}
	}
	return all
}

func equal(t *testing.T, source string, got, want rows) {
	t.Helper()
	for name, numbers := range want {
		if fmt.Sprint(got[name]) != fmt.Sprint(numbers) {
			t.Errorf("%s: %q: got %v, want %v of the ledger", source, name, got[name], numbers)
		}
	}
	for name := range got {
		if want[name] == nil {
			t.Errorf("%s: got a row %q, which the ledger does not have", source, name)
		}
	}
	if len(want) < 2*len(keys) {
		t.Errorf("the ledger: got %d rows, want those of all keys, and denials", len(want))
	}
}

// The JSON of /top, the metrics and the traces have the numbers of the ledger, in memory and on Redis.
func TestNumbers(t *testing.T) {
	urls := map[string]string{"memory": ""}
	if redisserver.Available() == nil {
		urls["redis"] = "redis://" + redisserver.Start(t).Addr()
	}
	for name, url := range urls {
		f, address := serve(t, url)
		var ledger sums
		if err := json.Unmarshal([]byte(get(t, address+"/ledger")), &ledger); err != nil {
			t.Fatal(err)
		}
		if ledger.Granted == 0 || ledger.Denied == 0 || ledger.Failed != 0 {
			t.Errorf("%s: calls: got %+v, want some granted, some denied, and none failed", name, ledger)
		}
		var report top.Report
		if err := json.Unmarshal([]byte(get(t, address+"/top?format=json")), &report); err != nil {
			t.Fatal(err)
		}
		got := rows{}
		for _, l := range report.Limits {
			for _, r := range l.Denied.Rows {
				got[l.Limit+" denied "+r.Key] = []int64{r.Weight - r.Error, r.Weight}
			}
			for _, r := range l.Used.Rows {
				got[l.Limit+" used "+r.Key] = []int64{r.Weight - r.Error, r.Weight, r.Back}
			}
		}
		equal(t, name+": /top as JSON", got, ofLedger(ledger))

		metrics := get(t, address+"/metrics")
		decisions := map[string]int64{}
		for _, m := range regexp.MustCompile(`(?m)^fleetquota_decisions_total\{limit="(\w+)",op="(\w+)",outcome="(\w+)",source="\w+"\} (\S+)`).FindAllStringSubmatch(metrics, -1) {
			n, err := strconv.ParseFloat(m[4], 64)
			if err != nil {
				t.Fatal(err)
			}
			decisions[m[1]+" "+m[2]+" "+m[3]] += int64(n)
		}
		if fmt.Sprint(decisions) != fmt.Sprint(ledger.Decisions) {
			t.Errorf("%s: /metrics: got the decisions %v, want %v of the ledger", name, decisions, ledger.Decisions)
		}
		f.spans.mu.Lock()
		if got := f.spans.events["fleetquota.denied"]; got != ledger.Denied {
			t.Errorf("%s: events of denials: got %d, want %d of the ledger", name, got, ledger.Denied)
		}
		f.spans.mu.Unlock()
		var spans []struct{ Name, ID, Parent string }
		if err := json.Unmarshal([]byte(get(t, address+"/traces")), &spans); err != nil {
			t.Fatal(err)
		}
		children := 0
		for _, s := range spans {
			if s.Name == "fleetquota.charge" && s.Parent != "" {
				children++
			}
		}
		if len(spans) != maxSpans || (children > 0) != (url != "") {
			t.Errorf("%s: /traces: got %d spans, %d around round trips, want %d, and round trips on Redis alone", name, len(spans), children, maxSpans)
		}
		if got := get(t, address+"/readyz"); !strings.Contains(got, `"state":"ok"`) {
			t.Errorf("%s: /readyz: got %s, want ok", name, got)
		}
		for _, secret := range keys {
			if strings.Contains(metrics, secret) {
				t.Errorf("%s: /metrics has the key %q", name, secret)
			}
		}
	}
}

// chromium returns the path of a browser. Without one the test is skipped, or fails where ./test found one.
func chromium(t *testing.T) string {
	for _, name := range []string{os.Getenv("FLEETQUOTA_CHROMIUM"), "chromium", "chromium-browser", "google-chrome"} {
		if path, err := exec.LookPath(name); name != "" && err == nil {
			return path
		}
	}
	const text = "SKIPPED: THE PAGE WAS NOT SEEN BY A BROWSER: there is no chromium; FLEETQUOTA_CHROMIUM may name one"
	if os.Getenv("FLEETQUOTA_REQUIRE_CHROMIUM") != "" {
		t.Fatal(text)
	}
	t.Skip(text)
	return ""
}

// A browser shows the numbers of the ledger, runs no script of a key, and applies the page's style.
func TestBrowser(t *testing.T) {
	browser := chromium(t)
	f, address := serve(t, "")
	var dom, log bytes.Buffer
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--no-proxy-server",
		"--user-data-dir="+t.TempDir(), "--enable-logging=stderr", "--v=0", "--timeout=20000", "--dump-dom", address+"/top")
	cmd.Env = append(os.Environ(), "HOME="+t.TempDir())
	cmd.Stdout, cmd.Stderr = &dom, &log
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", browser, err, &log)
	}
	if strings.Contains(log.String(), "Content Security Policy") {
		t.Errorf("the page breaks its own policy:\n%s", &log)
	}
	page := dom.String()
	if !strings.Contains(page, "<title>Top keys</title>") || strings.Contains(page, "<script>") {
		t.Errorf("page: got\n%s\nwant its own title, and no script", page)
	}
	got := rows{}
	for _, table := range regexp.MustCompile(`(?s)<table data-limit="(\w+)" data-ranking="(\w+)">.*?<tbody>(.*?)</tbody>`).FindAllStringSubmatch(page, -1) {
		for _, row := range regexp.MustCompile(`(?s)<tr><td class="key"><bdi>(.*?)</bdi></td>(.*?)</tr>`).FindAllStringSubmatch(table[3], -1) {
			key := html.UnescapeString(row[1])
			if strings.HasPrefix(key, `"`) {
				var err error
				if key, err = strconv.Unquote(key); err != nil {
					t.Fatal(err)
				}
			}
			name := table[1] + " " + table[2] + " " + key
			for _, cell := range regexp.MustCompile(`<td class="n">(\d+)</td>`).FindAllStringSubmatch(row[2], -1) {
				n, err := strconv.ParseInt(cell[1], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				got[name] = append(got[name], n)
			}
		}
	}
	f.ledger.mu.Lock()
	defer f.ledger.mu.Unlock()
	equal(t, "the browser", got, ofLedger(f.ledger.sums))
}

// The lines in the README are those of this program, in their order.
func TestReadme(t *testing.T) {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile("main.go")
	if err != nil {
		t.Fatal(err)
	}
	_, block, ok := strings.Cut(string(readme), "```\nmetrics, offenders := ")
	block, _, _ = strings.Cut("metrics, offenders := "+block, "```")
	if !ok {
		t.Fatal("README.md: got no block that makes metrics and offenders, want it")
	}
	lines := 0
	for line := range strings.Lines(block) {
		if line = strings.TrimSpace(line); line == "" || strings.HasPrefix(line, "//") {
			continue
		}
		lines++
		line, _, _ = strings.Cut(line, " // ")
		_, after, ok := strings.Cut(string(program), "\n\t"+line+"\n")
		if !ok {
			t.Errorf("main.go: got no line %q behind those before it, want it", line)
		}
		program = []byte("\n" + after)
	}
	if lines != 5 {
		t.Errorf("README.md: got %d lines, want 5", lines)
	}
}

// The program runs, says where its pages are, and ends.
func TestRun(t *testing.T) {
	var out strings.Builder
	if err := run(t.Context(), []string{"-listen", "127.0.0.1:0", "-for", "300ms"}, &out); err != nil {
		t.Fatal(err)
	}
	if !regexp.MustCompile(`^http://127\.0\.0\.1:\d+/top, .*\n\d+ calls granted, \d+ denied, 0 failed\n$`).MatchString(out.String()) {
		t.Errorf("output: got %q, want the address and the sums", out.String())
	}
	for _, args := range [][]string{{"-listen", "nowhere:-1"}, {"-unknown"}} {
		if err := run(t.Context(), args, io.Discard); err == nil {
			t.Errorf("%v: got no error", args)
		}
	}
}
