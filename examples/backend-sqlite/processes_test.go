package sqlitestore

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// childFile is the variable that makes a process of this test binary a spender on the file it names.
const (
	childFile = "SQLITESTORE_TEST_FILE"
	ready     = "ready" // its first line
)

func TestMain(m *testing.M) {
	if file := os.Getenv(childFile); file != "" {
		if err := spend(file); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

const (
	budget   = 400
	spenders = 4 // goroutines in each process
)

var sharedLimit = quota.NewLimit("tokens", algorithm.TokenBucket(budget, 1, 24*time.Hour))

// spend opens the file, prints that it is ready, waits for a line, and takes one token at a time until none is left. It
// prints a line for each token.
func spend(file string) error {
	ctx := context.Background()
	store, err := Open(ctx, file, &Options{Timeout: time.Minute})
	if err != nil {
		return err
	}
	defer store.Close()
	fmt.Println(ready)
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return err
	}
	limiter := quota.Must(quota.NewLimiter(store, sharedLimit, nil))
	var group sync.WaitGroup
	errs := make(chan error, spenders)
	for range spenders {
		group.Go(func() {
			for {
				d, err := limiter.Take(ctx, "agent-1", 1)
				if err != nil {
					errs <- err
				}
				if err != nil || !d.Allowed {
					return
				}
				fmt.Println("granted with", d.Remaining, "remaining")
			}
		})
	}
	group.Wait()
	close(errs)
	return <-errs
}

// TestProcesses starts several processes, which open a new file at the same time and spend one budget. The first process
// that prints five grants is killed. Together the processes get no more than the budget; they report less only by the
// grants that the killed process did not print.
func TestProcesses(t *testing.T) {
	file := filepath.Join(t.TempDir(), "quota.db")
	type process struct {
		*exec.Cmd
		in  io.Writer
		out *bufio.Scanner
	}
	var processes []process
	for range 4 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childFile+"="+file)
		cmd.Stderr = os.Stderr
		in, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		processes = append(processes, process{cmd, in, bufio.NewScanner(out)})
	}
	for _, p := range processes {
		if !p.out.Scan() || p.out.Text() != ready {
			t.Fatalf("first line of a process: got %q, want %q", p.out.Text(), ready)
		}
	}
	var (
		group   sync.WaitGroup
		mu      sync.Mutex
		granted = map[string]int{} // by line: no token may be granted twice
		killed  *exec.Cmd
	)
	for _, p := range processes {
		fmt.Fprintln(p.in, "go")
		group.Go(func() {
			lines := 0
			for p.out.Scan() {
				lines++
				mu.Lock()
				granted[p.out.Text()]++
				if lines == 5 && killed == nil {
					killed = p.Cmd
					p.Process.Kill()
				}
				mu.Unlock()
			}
			if err := p.Wait(); err != nil && killed != p.Cmd {
				t.Errorf("end of a process: got %v, want no error", err)
			}
			t.Logf("%d grants to a process", lines)
		})
	}
	group.Wait()
	for line, n := range granted {
		if n > 1 {
			t.Errorf("%q: got %d times, want once", line, n)
		}
	}
	if n := len(granted); n > budget || n < budget-spenders {
		t.Errorf("granted: got %d, want %d to %d", n, budget-spenders, budget)
	}
	store := openStore(t, file, nil)
	d, err := store.Charge(t.Context(), quota.Charge{Limit: sharedLimit, Key: "agent-1", Op: quota.OpPeek})
	if err != nil || d.Remaining != 0 {
		t.Errorf("Peek in the end: got %+v, error %v, want 0 remaining", d, err)
	}
}
