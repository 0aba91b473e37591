package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
)

// TestMain is the program itself where TestProcesses starts it.
func TestMain(m *testing.M) {
	if os.Getenv("FLEET_PROGRAM") == "1" {
		main()
		return
	}
	os.Exit(m.Run())
}

// TestProcesses runs the program as four processes at once, and checks their ledgers together.
func TestProcesses(t *testing.T) {
	redisserver.Require(t)
	nodes := redisserver.StartCluster(t).Addrs()
	// On a busy machine a server may need longer for an answer than a program should wait for it.
	const patient = "?timeout=30s"
	urls := map[string]string{
		"redis":         "redis://" + redisserver.Start(t).Addr() + patient,
		"redis+cluster": "redis+cluster://" + nodes[0] + patient + "&addr=" + strings.Join(nodes[1:], "&addr="),
	}
	length := 3 * time.Second
	if testenv.Full() {
		length = 20 * time.Second
		urls["redis, rueidis"] = urls["redis"] + "&client=rueidis"
		urls["redis+cluster, goredis"] = urls["redis+cluster"] + "&client=goredis"
	}
	for name, url := range urls {
		t.Run(name, func(t *testing.T) {
			code, out := runProcesses(t, url, length)
			if code != 0 || !strings.Contains(out, "No limit was exceeded") {
				t.Errorf("the ledgers together: got exit status %d, want 0 and no limit exceeded\n%s", code, out)
			}
			// All were charged to the same keys, and there was more to do than the fleet's limit allows.
			m := regexp.MustCompile(`(?m)^fleet +1 +(\d+) +\d+ +(\d+) of 1300$`).FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("got no line of the fleet, want one, in\n%s", out)
			}
			if peak, _ := strconv.Atoi(m[2]); peak < 1000 {
				t.Errorf("peak of the fleet: got %d of 1300, want 1000 or more, or the test shows too little", peak)
			}
		})
	}
	// Processes that share no store exceed the limits together, and the check says so.
	t.Run("memory", func(t *testing.T) {
		if code, out := runProcesses(t, "memory://", 1500*time.Millisecond); code != 1 || !strings.Contains(out, "EXCEEDED: limit fleet") {
			t.Errorf("four fleets that share no store: got exit status %d, want 1 and the fleet's limit exceeded\n%s", code, out)
		}
	})
}

// runProcesses runs four processes, each of which must succeed, and returns the verdict of a fifth on their
// ledgers.
func runProcesses(t *testing.T, url string, length time.Duration) (code int, out string) {
	t.Helper()
	program := func(args ...string) *exec.Cmd {
		cmd := exec.CommandContext(t.Context(), os.Args[0], args...)
		cmd.Env = append(os.Environ(), "FLEET_PROGRAM=1", "REDIS_URL="+url)
		return cmd
	}
	dir := t.TempDir()
	args := []string{"-check"}
	var all sync.WaitGroup
	for i := range 4 {
		ledger := filepath.Join(dir, fmt.Sprint(i, ".jsonl"))
		args = append(args, ledger)
		all.Go(func() {
			out, err := program("-for", length.String(), "-run", strings.ReplaceAll(t.Name(), "/", "-"), "-ledger", ledger).CombinedOutput()
			if err != nil || bytes.Contains(out, []byte("calls failed")) {
				t.Errorf("process %d: got %v, want success\n%s", i, err, out)
			}
		})
	}
	all.Wait()
	b, err := program(args...).CombinedOutput()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return exit.ExitCode(), string(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0, string(b)
}
