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
	"runtime"
	"slices"
	"strings"
	"sync"
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
	if err := canPin(); err != nil {
		t.Skip(err)
	}
	page := filepath.Join(t.TempDir(), "performance.md")
	if err := os.WriteFile(page, []byte("before\n"+figuresBegin+"old\n"+figuresEnd+"after\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	dir, log := quick(t, "", "-docs", page)
	results := read(t, dir, "RESULTS.md")
	for _, subjects := range [][]subject{localSubjects, httpSubjects, redisSubjects, standardSubjects, jobSubjects(groupings[0]),
		localIDSubjects, redisIDSubjects, postgresSubjects} {
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
	check := func(subjects []subject, at *target, capacity int64) {
		for _, s := range subjects {
			if s.kind == floor {
				continue
			}
			take, end, err := s.open(numbers{capacity, time.Hour}, at)
			if err != nil {
				t.Errorf("%s: %v", s.name, err)
				continue
			}
			for i := range newKeyset(2).len() {
				for n := range 5 {
					got, err := take(t.Context(), newKeyset(2).at(i))
					if err != nil || got != (n < 3) {
						t.Errorf("%s: charge %d of 5, of which 3 fit: got %v, %v; want %v, no error", s.name, n+1, got, err, n < 3)
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
	check(localSubjects, nil, 3)
	check(localIDSubjects, nil, 3)
	at := &target{masters: []*redisserver.Server{redisserver.Start(t)}}
	check(redisSubjects, at, 3)
	check(standardSubjects, at, 3)
	check(redisIDSubjects, at, 3)
	for _, g := range groupings {
		check(jobSubjects(g), at, 4) // the third job needs an estimate of 2 where 2 are left
	}
	check(postgresSubjects, &target{postgres: pgserver.Start(t).URL("postgres")}, 3)
}

// TestJob checks that a job's owners are charged the actual cost, all of them or none.
func TestJob(t *testing.T) {
	of := ofOwners(numbers{4, time.Hour})
	of[1].capacity = 2 // the team's, so that a second job does not fit
	for _, job := range []struct {
		name    string
		charges charges
	}{{"one by one", oneByOne}, {"at once", allAtOnce}} {
		var mu sync.Mutex
		var used [3]int
		take := byKeys(groupings[0], job.charges, func(_ context.Context, i int, _ string, n int) (bool, error) {
			mu.Lock()
			defer mu.Unlock()
			if n > 0 && used[i]+n > int(of[i].capacity) {
				return false, nil
			}
			used[i] += n
			return true, nil
		})
		for i, want := range []bool{true, false, false} {
			got, err := take(t.Context(), newKeyset(1).at(0))
			if err != nil || got != want || used != [3]int{actual, actual, actual} {
				t.Errorf("%s, job %d: got %v, %v, used %v; want %v, no error, %d of each", job.name, i+1, got, err, used, want, actual)
			}
		}
	}
}

// TestPin checks that threads are kept on a processor each, and freed.
func TestPin(t *testing.T) {
	if err := canPin(); err != nil {
		t.Skip(err)
	}
	at := &target{masters: []*redisserver.Server{redisserver.Start(t)}}
	servers, err := at.processes()
	if err != nil {
		t.Fatal(err)
	}
	// processorsOf returns the processors that the threads of a process may use, as text.
	processorsOf := func(pid int) (list []string) {
		threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range threads {
			b, err := os.ReadFile(path)
			if errors.Is(err, os.ErrNotExist) {
				continue // the thread has ended
			}
			_, rest, _ := strings.Cut(string(b), "Cpus_allowed_list:")
			line, _, _ := strings.Cut(rest, "\n")
			if line = strings.TrimSpace(line); !slices.Contains(list, line) {
				list = append(list, line)
			}
		}
		return list
	}
	before, threads := processorsOf(os.Getpid()), runtime.GOMAXPROCS(0)
	for _, on := range []placement{onOne, onTwo} {
		undo, err := pin(on, servers)
		if err != nil {
			t.Fatal(err)
		}
		client, server := processorsOf(os.Getpid()), processorsOf(servers[0])
		if len(client) != 1 || len(server) != 1 || strings.ContainsAny(client[0]+server[0], "-,") || (client[0] == server[0]) != (on == onOne) {
			t.Errorf("%s: got client on %v and server on %v", on, client, server)
		}
		if err := undo(); err != nil {
			t.Fatal(err)
		}
		client, server = processorsOf(os.Getpid()), processorsOf(servers[0])
		if !slices.Equal(client, before) || !slices.Equal(server, before) || runtime.GOMAXPROCS(0) != threads {
			t.Errorf("%s, undone: got client on %v, server on %v, GOMAXPROCS %d; want both on %v, %d", on, client, server, runtime.GOMAXPROCS(0), before, threads)
		}
	}
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
	steps := r.closed(work{section: "local", keys: keys.len()}, 1)
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
		case want != "" && (row.err == nil || !strings.Contains(row.err.Error(), want) || row.failed != 2 || row.samples[0] != nil || row.samples[1] != nil):
			t.Errorf("%s: got error %v, %d failures, samples %v; want %q, 2 failures, no samples", row.subject, row.err, row.failed, row.samples, want)
		}
	}
	if n := hung.Load(); n != 1 {
		t.Errorf("tries of a subject that hangs: got %d, want 1", n)
	}
}

// TestOpenLoop checks that latencies count from when a decision was due, not from when it began.
func TestOpenLoop(t *testing.T) {
	l := &load{keys: newKeyset(1), goroutines: 1, every: 1, late: time.Hour, take: func(context.Context, string) (bool, error) {
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
	l.late = 50 * time.Millisecond
	s, err = l.openLoop(t.Context(), 5000, 20*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if _, has := s[p99]; has || s[decisions] == 0 || s[offered] != 5000 {
		t.Errorf("at least 80 ms behind: got %v, want no latencies", s)
	}
}

// TestOpenLoopPace checks that a decision is asked for when it is due, and not when the next one is.
func TestOpenLoopPace(t *testing.T) {
	l := &load{keys: newKeyset(1), goroutines: 4, every: 1, late: time.Hour, take: func(context.Context, string) (bool, error) { return true, nil }}
	s, err := l.openLoop(t.Context(), 20, 200*time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	if s[p50] > 40_000 {
		t.Errorf("p50 at a decision each 50 ms: got %v µs, want 40000 at most", s[p50])
	}
}

// TestBeside checks that rows are compared count by count.
func TestBeside(t *testing.T) {
	var all results
	w, own, other := work{section: "callers"}, subject{name: "own"}, subject{name: "other"}
	for _, rates := range [][2]float64{{10, 20}, {0, 5}, {40, 50}} { // the second count of the first one fails
		var err error
		if rates[0] == 0 {
			err = errors.New("broken")
		}
		all.add(w, own, sample{decisions: rates[0]}, err)
		all.add(w, other, sample{decisions: rates[1]}, nil)
	}
	table := all.table(w)
	if ratio, ok := table.row("own").beside(table.row("other"), decisions); !ok || ratio != 0.65 {
		t.Errorf("the median of 0.5 and 0.8: got %v, %v; want 0.65", ratio, ok)
	}
	if _, ok := table.row("own").beside(table.row("none"), decisions); ok {
		t.Error("beside a row without figures: got a ratio, want none")
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
	local := work{section: "local", keys: 1, goroutines: 64}
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
	paced := latencyWork(&full, 1000)
	add(paced, onRueidis, ours, sample{p99: 700, offered: 1000}, sample{decisions: 900, offered: 1000})
	add(paced, "redis_rate", peer, sample{p99: 750, offered: 1000})
	paced = latencyWork(&full, 10_000)
	add(paced, onRueidis, ours, sample{p99: 700, offered: 10_000}, sample{p99: 900, offered: 10_000})
	add(paced, "redis_rate", peer, sample{p99: 750, offered: 10_000}, sample{decisions: 9_000, offered: 10_000})
	paced = latencyWork(&full, 50_000)
	add(paced, onRueidis, ours, sample{p99: 1000, offered: 50_000})
	add(paced, "redis_rate", peer, sample{decisions: 40_000, offered: 50_000})
	for _, on := range []placement{onOne, onTwo} {
		lone := work{section: "callers", keys: full.redis, goroutines: 1, on: on}
		// The counts differ by more than the subjects: pairs tell these apart, and the medians do not.
		add(lone, goRedisScript, floor, rates(10_000, 20_000, 40_000)...)
		add(lone, onGoRedis, ours, rates(9_500, 19_000, 38_000)...)
		add(lone, standardGoRedis, ours, rates(8_000, 16_000, 32_000)...)
		add(lone, "redis_rate", peer, rates(6_000, 12_000, 24_000)...)
	}
	for _, section := range []string{"job", "cluster job"} {
		add(r.jobWork(section), onRueidis, ours, rates(60_000)...)
		add(r.jobWork(section), "redis_rate"+inSequence, peer, rates(14_000)...)
		add(r.jobWork(section), redisRateAuto+", at once", peer, rates(20_000)...)
	}
	ids := work{section: "ids", keys: full.job, goroutines: 64, how: "local"}
	add(ids, localNoIDs, ours, rates(4e6, 5e6)...)
	add(ids, localIDs, ours, rates(1e6, 3e6)...)
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
