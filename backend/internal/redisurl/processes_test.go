package redisurl_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
)

// The example is tested here and not where it is, for only what is in backend may start servers with redisserver.

// TestFleetOfProcesses runs examples/fleet as four processes at once, and checks their ledgers together.
func TestFleetOfProcesses(t *testing.T) {
	redisserver.Require(t)
	fleet := filepath.Join(t.TempDir(), "fleet")
	if runtime.GOOS == "windows" {
		fleet += ".exe"
	}
	build := exec.Command("go", "build", "-o", fleet, "../../../examples/fleet")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	server, cluster := redisserver.Start(t), redisserver.StartCluster(t)
	urls := map[string]string{
		"redis":         "redis://" + server.Addr(),
		"redis+cluster": clusterURL(cluster, "", ""),
	}
	length := 3 * time.Second
	if os.Getenv("FLEETQUOTA_FULL") == "1" {
		length = 20 * time.Second
		urls["redis, rueidis"] = by(urls["redis"], "rueidis")
		urls["redis+cluster, goredis"] = by(urls["redis+cluster"], "goredis")
	}
	for name, url := range urls {
		t.Run(name, func(t *testing.T) {
			code, out := runFleet(t, fleet, url, length)
			if code != 0 || !strings.Contains(out, "No limit was exceeded") {
				t.Errorf("the ledgers together: exit status %d\n%s", code, out)
			}
			// All were charged to the same keys, and there was more to do than the fleet's limit allows.
			m := regexp.MustCompile(`(?m)^fleet +1 +(\d+) +\d+ +(\d+) of 1300$`).FindStringSubmatch(out)
			if m == nil {
				t.Fatalf("no line of the fleet in\n%s", out)
			}
			if peak, _ := strconv.Atoi(m[2]); peak < 1000 {
				t.Errorf("the fleet used %d of 1300: too little to show anything", peak)
			}
			t.Logf("\n%s", out)
		})
	}
	// Processes that share nothing exceed the limits together, and the check says so.
	t.Run("memory", func(t *testing.T) {
		if code, out := runFleet(t, fleet, "memory://", 1500*time.Millisecond); code != 1 || !strings.Contains(out, "EXCEEDED: limit fleet") {
			t.Errorf("four fleets that share nothing: exit status %d\n%s", code, out)
		}
	})
}

// runFleet runs four processes, each of which must succeed, and returns what a fifth says to their ledgers.
func runFleet(t *testing.T, fleet, url string, length time.Duration) (code int, out string) {
	t.Helper()
	dir := t.TempDir()
	args := []string{"-check"}
	var all sync.WaitGroup
	for i := range 4 {
		ledger := filepath.Join(dir, fmt.Sprint(i, ".jsonl"))
		args = append(args, ledger)
		all.Go(func() {
			cmd := exec.CommandContext(t.Context(), fleet, "-for", length.String(), "-run", plain(t), "-ledger", ledger)
			cmd.Env = append(os.Environ(), "REDIS_URL="+url)
			if out, err := cmd.CombinedOutput(); err != nil || bytes.Contains(out, []byte("calls failed")) {
				t.Errorf("process %d: %v\n%s", i, err, out)
			}
		})
	}
	all.Wait()
	b, err := exec.CommandContext(t.Context(), fleet, args...).CombinedOutput()
	exit := (*exec.ExitError)(nil)
	if errors.As(err, &exit) {
		return exit.ExitCode(), string(b)
	}
	if err != nil {
		t.Fatal(err)
	}
	return 0, string(b)
}
