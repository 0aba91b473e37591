package postgres

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/quota"
)

// writes reports whether a statement may commit a charge.
func writes(sql string) bool {
	return sql == "COMMIT" || strings.Contains(sql, "UPDATE \"") || strings.HasPrefix(sql, "INSERT")
}

// harness is that of the suite for stores on pools of the suite's own, at an address.
func harness(t *testing.T, name, addr string) conformance.Harness {
	t.Helper()
	pool := newPool(t, addr)
	modes := map[conformance.Fault]pgserver.Mode{conformance.NoFault: pgserver.Pass, conformance.Refused: pgserver.Refuse,
		conformance.LostReply: pgserver.LoseReply, conformance.Frozen: pgserver.Freeze}
	return conformance.Harness{
		Name: name,
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			s, err := New(pool, &Options{Table: o.Data, Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			return s
		},
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			proxy := pgserver.StartProxy(t, addr)
			s, err := New(newPool(t, proxy.Addr()), &Options{Table: o.Data, Clock: o.Clock})
			if err != nil {
				t.Fatal(err)
			}
			// The reply to a read is of no consequence: with those lost too, the store would never get to write.
			return s, func(f conformance.Fault) { proxy.Set(modes[f], writes) }
		},
		Process: func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, addrVariable+"="+addr) },
	}
}

func TestConformance(t *testing.T) {
	conformance.Run(t, harness(t, "postgres", serverAddr(t)))
}

const (
	childURL = "POSTGRES_TEST_URL" // makes a process of this test binary a spender on the store that it names
	ready    = "ready"             // its first line
	spenders = 4                   // goroutines in each process
	budget   = 400
)

var shared = bucket("shared", budget)

// child opens the store, prints that it is ready, waits for a line, and takes one token at a time until none is left. It
// prints a line for each token.
func child(rawURL string) int {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := backend.Open(ctx, rawURL)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer s.Close()
	fmt.Println(ready)
	if _, err := bufio.NewReader(os.Stdin).ReadString('\n'); err != nil {
		return 1
	}
	var group sync.WaitGroup
	failed := make(chan error, spenders)
	for range spenders {
		group.Go(func() {
			for {
				d, err := s.Charge(ctx, take(shared, "agent", 1))
				if err != nil {
					failed <- err
				}
				if err != nil || !d.Allowed {
					return
				}
				fmt.Println("granted with", d.Remaining, "remaining")
			}
		})
	}
	group.Wait()
	close(failed)
	for err := range failed {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// TestProcesses starts several processes, which spend one budget of a table that is not there yet. No token is granted
// twice, all are granted, and no process has a conflict. The first process that prints five grants is killed: the
// tokens that it did not print may be missing.
func TestProcesses(t *testing.T) {
	table := "table=" + newTable()
	type process struct {
		*exec.Cmd
		in  io.Writer
		out *bufio.Scanner
	}
	var processes []process
	for range 4 {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), childURL+"="+address(serverAddr(t), table))
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
		granted = map[string]int{}
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
	if n := remaining(t, openURL(t, address(serverAddr(t), table)), shared, "agent"); n != 0 {
		t.Errorf("remaining: got %d, want 0", n)
	}
}
