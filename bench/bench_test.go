package main

import (
	"bytes"
	"context"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/internal/redisserver"
)

// asCommand in the environment makes the test's program the command.
const asCommand = "FLEETQUOTA_BENCH_COMMAND=1"

func TestMain(m *testing.M) {
	if name, value, _ := strings.Cut(asCommand, "="); os.Getenv(name) == value {
		main()
		return
	}
	flag.Parse()
	os.Exit(m.Run())
}

// quick runs the command in its short form and returns the directory with what it wrote.
func quick(t *testing.T, env string, args ...string) (dir, log string) {
	t.Helper()
	dir = t.TempDir()
	cmd := exec.CommandContext(t.Context(), os.Args[0], append([]string{"-quick", "-out", dir}, args...)...)
	cmd.Env = append(os.Environ(), asCommand, env)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir, string(out)
}

func read(t *testing.T, path ...string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(path...))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestQuick(t *testing.T) {
	redisserver.Require(t)
	pgserver.Require(t)
	page := filepath.Join(t.TempDir(), "performance.md")
	if err := os.WriteFile(page, []byte("before\n"+figuresBegin+"old\n"+figuresEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir, log := quick(t, "", "-docs", page)
	results := read(t, dir, "RESULTS.md")
	for _, subjects := range [][]subject{localSubjects, httpSubjects, redisSubjects, postgresSubjects} {
		for _, s := range subjects {
			if !strings.Contains(results, s.name) {
				t.Errorf("no figures of %s", s.name)
			}
		}
	}
	for _, v := range views {
		if v.section == "benchmark" {
			if _, err := exec.LookPath("redis-benchmark"); err != nil {
				continue
			}
		}
		if !strings.Contains(results, "\n## "+v.title+"\n") {
			t.Errorf("no section %q", v.title)
		}
	}
	if strings.Contains(log, "FAILED") || strings.Contains(results, "failed") || strings.Contains(results, "| not measured |") {
		t.Errorf("got failures or missing figures, want none; the log:\n%s\nRESULTS.md:\n%s", log, results)
	}
	r := &report{machine: machine{size: small}}
	for _, h := range append(r.headlines(), headline{name: "growth"}) {
		if err := xml.Unmarshal([]byte(read(t, dir, "charts", h.name+".svg")), new(struct{})); err != nil {
			t.Errorf("%s.svg: %v", h.name, err)
		}
		if !strings.Contains(results, "(charts/"+h.name+".svg)") {
			t.Errorf("RESULTS.md does not show %s.svg", h.name)
		}
	}
	got := read(t, page)
	if !strings.HasPrefix(got, "before\n"+figuresBegin) || !strings.HasSuffix(got, figuresEnd+"after\n") || strings.Contains(got, "old") ||
		!strings.Contains(got, "with leases") {
		t.Errorf("the page: got\n%s\nwant the text around the markers unchanged, and between them new figures, with leases", got)
	}
}

func TestQuickWithoutRedis(t *testing.T) {
	dir, log := quick(t, "FLEETQUOTA_REDIS_SERVER=/nonexistent")
	results := read(t, dir, "RESULTS.md")
	if !strings.Contains(results, "Not measured: Redis: there is no redis-server") || !strings.Contains(log, "NOT MEASURED") ||
		!strings.Contains(results, "\n## Local\n") || strings.Contains(results, "\n## Growth\n") {
		t.Errorf("without redis-server: got the log\n%s\nand RESULTS.md\n%s\nwant local figures only, and a line that says so", log, results)
	}
}

func TestArguments(t *testing.T) {
	for _, args := range []string{"-only nothing", "-count 0", "-time 0s", "-limit -1s", "more", "-unknown"} {
		if err := run(t.Context(), append(strings.Fields(args), "-out", t.TempDir()), io.Discard); err == nil {
			t.Errorf("%s: got no error, want one", args)
		}
	}
}

// TestSameWork checks that all subjects do the work that is compared.
func TestSameWork(t *testing.T) {
	check := func(subjects []subject, at *target) {
		for _, s := range subjects {
			if s.kind == floor {
				continue
			}
			take, end, err := s.open(numbers{3, time.Hour}, at)
			if err != nil {
				t.Errorf("%s: %v", s.name, err)
				continue
			}
			for i := range newKeyset(2).len() {
				for n := range 5 {
					got, err := take(t.Context(), newKeyset(2).at(i))
					if err != nil || got != (n < 3) {
						t.Errorf("%s: charge %d of 5 to a bucket of 3: got %v, %v; want %v, no error", s.name, n+1, got, err, n < 3)
					}
				}
			}
			end()
			if at != nil {
				if err := at.flush(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	check(localSubjects, nil)
	check(redisSubjects, &target{masters: []*redisserver.Server{redisserver.Start(t)}})
	check(postgresSubjects, &target{postgres: pgserver.Start(t).URL("postgres")})
}

func newRunner(t *testing.T) *runner {
	return &runner{ctx: t.Context(), log: io.Discard, counts: 1, long: time.Millisecond, limit: time.Minute, endless: map[string]error{}}
}

// fake returns a subject that only calls a function.
func fake(name string, f take) subject {
	return subject{name, peer, func(numbers, *target) (take, func(), error) { return f, func() {}, nil }}
}

// TestFailures checks that a subject that fails is reported and the others are measured.
func TestFailures(t *testing.T) {
	r := newRunner(t)
	keys := newKeyset(1)
	good := func(context.Context, string) (bool, error) { return true, nil }
	first := func(later take) take { // fill asks once
		filled := false
		return func(ctx context.Context, key string) (bool, error) {
			if !filled {
				filled = true
				return true, nil
			}
			return later(ctx, key)
		}
	}
	hang := make(chan struct{})
	var hung atomic.Int32
	defer close(hang)
	subjects := []subject{
		fake("good", good),
		fake("error", first(func(context.Context, string) (bool, error) { return false, errors.New("broken") })),
		fake("panic", first(func(context.Context, string) (bool, error) { panic("broken") })),
		fake("wrong", first(func(context.Context, string) (bool, error) { return false, nil })),
		fake("unfilled", func(context.Context, string) (bool, error) { return false, nil }),
		{"unopened", peer, func(numbers, *target) (take, func(), error) { return nil, nil, errors.New("closed") }},
		fake("slow", first(func(ctx context.Context, _ string) (bool, error) { <-ctx.Done(); return false, ctx.Err() })),
		fake("hung", first(func(context.Context, string) (bool, error) { hung.Add(1); <-hang; return true, nil })),
	}
	steps := r.closed("local", keys, false, []int{1})
	for _, s := range subjects {
		r.limit = time.Minute
		if s.name == "slow" || s.name == "hung" {
			r.limit = 500 * time.Millisecond
		}
		for range 2 {
			r.visit(s, nil, keys, false, steps)
		}
	}
	for i, want := range []string{"", "broken", "panic: broken", "are wrong", "allowed: false", "closed", "came to no end", "came to no end"} {
		row := r.results[0].row(subjects[i].name)
		switch {
		case want == "" && (row.err != nil || len(row.samples) != 2):
			t.Errorf("%s: got error %v and %d samples, want no error and 2 samples", row.subject, row.err, len(row.samples))
		case want != "" && (row.err == nil || !strings.Contains(row.err.Error(), want) || row.failed != 2 || len(row.samples) != 0):
			t.Errorf("%s: got error %v, %d failures, %d samples; want %q, 2 failures, no samples", row.subject, row.err, row.failed, len(row.samples), want)
		}
	}
	if n := hung.Load(); n != 1 {
		t.Errorf("tries of a subject that hangs: got %d, want 1", n)
	}
}

// TestOpenLoop checks that latencies count from when a decision was due, not from when it began.
func TestOpenLoop(t *testing.T) {
	l := &load{keys: newKeyset(1), goroutines: 1, every: 1, take: func(context.Context, string) (bool, error) {
		for start := time.Now(); time.Since(start) < time.Millisecond; {
		}
		return true, nil
	}}
	s, err := l.openLoop(t.Context(), 5000, 20*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	// 100 are due within 20 ms and take 100 ms, so that half of them wait for 40 ms or more.
	if s[p50] < 30_000 || s[p50] > s[p99] || s[p99] > s[p999] {
		t.Errorf("p50, p99 and p99.9: got %v, %v and %v µs, want 30000 or more, rising", s[p50], s[p99], s[p999])
	}
	if s[decisions] > 1000 || s[offered] != 5000 {
		t.Errorf("got %v decisions/s of %v/s offered, want at most 1000 of 5000", s[decisions], s[offered])
	}
}

func TestHistogram(t *testing.T) {
	var a, b histogram
	for i := range 1000 {
		d := time.Duration(i+1) * time.Microsecond
		if i < 500 {
			a.add(d)
		} else {
			b.add(d)
		}
	}
	a.add(-1)
	a.add(1 << 62)
	a.merge(&b)
	for q, want := range map[float64]time.Duration{0.5: 500 * time.Microsecond, 0.99: 990 * time.Microsecond, 0: 0} {
		if got := a.quantile(q); got < want*96/100 || got > want*104/100 {
			t.Errorf("quantile %v: got %v, want %v", q, got, want)
		}
	}
	if got := a.quantile(1); got < time.Minute {
		t.Errorf("quantile 1: got %v, want a minute or more", got)
	}
}

func TestNumber(t *testing.T) {
	for want, v := range map[string]float64{"0": 0, "0.12": 0.1234, "3": 3, "9.99": 9.99, "12.3": 12.34, "123": 123.4, "1235": 1234.6, "10k": 10_000,
		"12.3k": 12_345, "123k": 123_456, "1M": 1_000_000, "1.23M": 1_234_567, "1.00M": 999_999} {
		if got := number(v); got != want {
			t.Errorf("%v: got %s, want %s", v, got, want)
		}
	}
}

var update = flag.Bool("update", false, "write the files that reports are compared with")

// TestReport compares a report of invented figures with the files in testdata.
func TestReport(t *testing.T) {
	r := &report{results: &results{}, missed: []string{"the moon"}, machine: machine{
		date: "2026-01-02", cpu: "2 processors, Abacus", system: "linux/amd64", goVersion: "go1.26", redis: "7.0.15",
		modules: []string{"example.com/peer v1.2.3"}, took: 90 * time.Second, counts: 3, size: full,
	}}
	add := func(w work, name string, k kind, samples ...sample) {
		for _, s := range samples {
			r.results.add(w, subject{name: name, kind: k}, s, nil)
		}
	}
	rates := func(list ...float64) (samples []sample) {
		for _, v := range list {
			samples = append(samples, sample{decisions: v, p50: 1e6 / v, serverCPU: 5e5 / v, allocs: 0})
		}
		return samples
	}
	local := work{"local", 1, false, 64}
	add(local, localStore, ours, rates(9e6, 10e6, 11e6)...)
	add(local, localLimiter, ours, rates(7e6)...)
	add(local, sethvargo, peer, rates(8e6)...)
	add(local, xtimeKeyed, peer, rates(5e6, 6e6)...)
	broken := subject{name: "broken", kind: peer}
	r.results.add(local, broken, nil, fmt.Errorf("a|b\n%s", strings.Repeat("long ", 40)))
	many := r.busiest("redis", full.redis)
	add(many, onRueidis, ours, rates(250_000)...)
	add(many, leasedRueidis, leased, rates(240_000)...)
	add(many, "redis_rate", peer, rates(100_000)...)
	add(many, "this & that", peer, rates(50_000)...)
	add(many, rueidisINCR, floor, rates(400_000)...)
	r.results.add(many, broken, nil, errors.New("broken"))
	hot := r.busiest("redis", 1)
	add(hot, onRueidis, ours, rates(900_000)...)
	add(hot, leasedRueidis, leased, rates(40_000_000)...)
	add(hot, "redis_rate", peer, rates(100_000)...)
	paced := r.busiest("latency", full.redis)
	add(paced, onRueidis, ours, sample{p99: 900, offered: 70_000})
	add(paced, "redis_rate", peer, sample{p99: 800, offered: 30_000})
	add(work{section: "memory", keys: full.local}, localStore, ours, sample{heapBytes: 90, objects: 1})
	add(work{section: "memory", keys: full.local}, xtimeKeyed, peer, sample{heapBytes: 200, objects: 4.4})
	for i, keys := range full.growth {
		add(r.busiest("growth", keys), onRueidis, ours, sample{decisions: 300_000 - 20_000*float64(i), keyBytes: 96})
	}
	page := filepath.Join(t.TempDir(), "performance.md")
	if err := os.WriteFile(page, []byte(figuresBegin+figuresEnd), 0o600); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := write(dir, page, r); err != nil {
		t.Fatal(err)
	}
	for path, golden := range map[string]string{
		filepath.Join(dir, "RESULTS.md"):                 "RESULTS.md",
		filepath.Join(dir, "charts/redis-many-keys.svg"): "chart.svg",
		page: "performance.md",
	} {
		got := []byte(read(t, path))
		golden = filepath.Join("testdata", golden)
		if *update {
			if err := os.WriteFile(golden, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want := []byte(read(t, golden)); !bytes.Equal(got, want) {
			t.Errorf("%s: got\n%s\nwant the text of %s, which -update writes", filepath.Base(path), got, golden)
		}
	}
	if err := write(dir, filepath.Join(dir, "RESULTS.md"), r); err == nil {
		t.Error("a page without the markers: got no error, want one")
	}
}
