package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/resilience"
)

// TestMain is the program itself where TestNoServer starts it.
func TestMain(m *testing.M) {
	if os.Getenv("OUTAGE_PROGRAM") == "1" {
		main()
		return
	}
	os.Exit(m.Run())
}

var row = regexp.MustCompile(`(?m)^ (\d\.\ds)  (up|killed)  +([-?X]) ([-?X]) ([-?X]) ([-?X])  +(\d+)  +(\d+)  +(\d+)  +(\d+)  +(\d+\.\d)ms$`)

func TestRun(t *testing.T) {
	redisserver.Require(t)
	var stdout, stderr bytes.Buffer
	p := plan{3 * time.Second, []time.Duration{500 * time.Millisecond, 1100 * time.Millisecond, 1600 * time.Millisecond, 2 * time.Second}}
	if code := run(t.Context(), &stdout, &stderr, p, ownShare); code != 0 || stderr.Len() > 0 {
		t.Errorf("exit status %d, stderr %q", code, &stderr)
	}
	out := stdout.String()
	rows := row.FindAllStringSubmatch(out, -1)
	if len(rows) != 30 || !strings.HasSuffix(out, "\nThe bound holds.\n") {
		t.Fatalf("%d rows in\n%s", len(rows), out)
	}
	sums := map[string]int{}
	var all, most int
	for _, r := range rows {
		store, _ := strconv.Atoi(r[7])
		fallback, _ := strconv.Atoi(r[8])
		all += store + fallback
		if got, _ := strconv.Atoi(r[9]); got != all {
			t.Errorf("at %s %d were admitted so far, the lines together say %d", r[1], got, all)
		}
		n, _ := strconv.Atoi(r[10])
		if n < most || n < all {
			t.Errorf("at %s at most %d, before that %d", r[1], n, most)
		}
		most = n
		sums[r[2]+" store"] += store
		sums[r[2]+" fallback"] += fallback
		sums[r[2]+" open"] += strings.Count(strings.Join(r[3:7], ""), "X")
	}
	if sums["up store"] == 0 || sums["killed fallback"] == 0 || sums["killed open"] == 0 {
		t.Errorf("%v in\n%s", sums, out)
	}
	if last := rows[len(rows)-1]; strings.Join(last[3:7], "") != "----" {
		t.Errorf("a second after the server is back the breakers are %v", last[3:7])
	}
}

// TestExceeded runs a fleet that admits everything while the server is away.
func TestExceeded(t *testing.T) {
	redisserver.Require(t)
	var out bytes.Buffer
	p := plan{1500 * time.Millisecond, []time.Duration{200 * time.Millisecond}}
	code := run(t.Context(), &out, &out, p, func() resilience.Policy { return resilience.FailOpen(nil) })
	if code != 1 || !strings.Contains(out.String(), "EXCEEDED") || strings.Contains(out.String(), "The bound holds") {
		t.Errorf("exit status %d\n%s", code, &out)
	}
}

func TestInterrupt(t *testing.T) {
	redisserver.Require(t)
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	var out bytes.Buffer
	start := time.Now()
	if run(ctx, &out, &out, standard, ownShare); time.Since(start) > 4*time.Second {
		t.Errorf("it ended after %v\n%s", time.Since(start), &out)
	}
}

// TestNoServer starts the program where there is no redis-server.
func TestNoServer(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), "OUTAGE_PROGRAM=1", "PATH=", "FLEETQUOTA_REDIS_SERVER=")
	out, err := cmd.CombinedOutput()
	exit := (*exec.ExitError)(nil)
	if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(string(out), "needs redis-server 7 or later") {
		t.Errorf("%v\n%s", err, out)
	}
}
