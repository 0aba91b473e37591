package postgres

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/pgserver"
)

// startBouncer starts a PgBouncer in the mode transaction before a server, with further settings, and returns its
// address.
func startBouncer(t *testing.T, target string, settings string) string {
	t.Helper()
	binary, err := exec.LookPath("pgbouncer")
	if err != nil {
		binary = "/usr/sbin/pgbouncer"
	}
	if _, err := os.Stat(binary); err != nil {
		text := "NOT TESTED: " + t.Name() + " needs PgBouncer. Get it with: apt-get install pgbouncer"
		if os.Getenv("FLEETQUOTA_REQUIRE_PGBOUNCER") == "1" {
			t.Fatal(text)
		}
		t.Skip(text)
	}
	dir, attributes, err := pgserver.Unprivileged()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	_, port, err := net.SplitHostPort(target)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		own, err := pgserver.FreePort()
		if err != nil {
			t.Fatal(err)
		}
		ini := filepath.Join(dir, "pgbouncer.ini")
		text := fmt.Sprintf("[databases]\npostgres = host=127.0.0.1 user=postgres port=%s\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = %d\nunix_socket_dir =\n"+
			"auth_type = any\npool_mode = transaction\n%s\n", port, own, settings)
		if err := os.WriteFile(ini, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		cmd := exec.Command(binary, ini)
		cmd.SysProcAttr = attributes
		log, err := os.Create(filepath.Join(dir, "log"))
		if err != nil {
			t.Fatal(err)
		}
		cmd.Stdout, cmd.Stderr = log, log
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			_ = cmd.Wait()
			log.Close()
			close(ended)
		}()
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			<-ended
		})
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(own))
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
			if c, err := net.Dial("tcp", addr); err == nil {
				c.Close()
				return addr
			}
			select {
			case <-ended:
				end = time.Now()
			default:
			}
		}
		said, _ := os.ReadFile(filepath.Join(dir, "log"))
		t.Logf("PgBouncer does not run: %s", said)
	}
	t.Fatal("PgBouncer does not run")
	return ""
}

// TestBouncer: behind a PgBouncer that gives the server's connections to another client after each transaction, no
// call fails, whether the store begins with prepared statements or without. Calls that are overtaken hold a
// connection for a transaction.
func TestBouncer(t *testing.T) {
	addr := startBouncer(t, serverAddr(t), "default_pool_size = 3")
	for _, mode := range []string{"cache_statement", "exec"} {
		t.Run(mode, func(t *testing.T) {
			table, l := newTable(), bucket("l", 100)
			var stores []*Store
			for range 2 {
				stores = append(stores, openURL(t, address(addr, "table="+table, "default_query_exec_mode="+mode, "pool_max_conns=6")))
			}
			var group sync.WaitGroup
			granted := make(chan bool, 12*20)
			for g := range 12 {
				group.Go(func() {
					for i := range 20 {
						d, err := stores[g%2].Charge(t.Context(), take(l, []string{"hot", fmt.Sprint(g)}[i%2], 1))
						if err != nil {
							t.Errorf("got %v, want no error", err)
							return
						}
						granted <- d.Allowed && i%2 == 0
					}
				})
			}
			group.Wait()
			close(granted)
			n := 0
			for hot := range granted {
				if hot {
					n++
				}
			}
			if n != 100 {
				t.Errorf("granted on the hot key: got %d, want 100", n)
			}
			if !stores[0].database.unnamed.Load() {
				t.Error("the store goes on preparing statements, which the proxy does not keep")
			}
		})
	}
}
