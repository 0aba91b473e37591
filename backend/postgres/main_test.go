package postgres

import (
	"context"
	"flag"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/quota"
)

// common is the server of the tests that leave it running, or nil where PostgreSQL is not installed. A process that
// the suite starts uses the server of its parent, whose address is in the environment.
var common *pgserver.Server

const addrVariable = "POSTGRES_TEST_ADDR"

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	flag.Parse()
	if table := os.Getenv(childURL); table != "" {
		return child(table)
	}
	if pgserver.Available() == nil && os.Getenv(addrVariable) == "" {
		var err error
		if common, err = pgserver.Launch("fsync=off", "full_page_writes=off", "max_prepared_transactions=2"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer common.Stop()
	}
	servers := goleak.IgnoreCurrent()
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(servers); err != nil {
			fmt.Fprintln(os.Stderr, "goroutines left behind:", err)
			return 1
		}
	}
	return code
}

var tables atomic.Int64

// newTable returns the name of a table that no other test has.
func newTable() string { return fmt.Sprint("t", tables.Add(1)) }

// serverAddr returns the address of the common server.
func serverAddr(t testing.TB) string {
	t.Helper()
	if addr := os.Getenv(addrVariable); addr != "" {
		return addr
	}
	pgserver.Require(t)
	return common.Addr()
}

// address returns a URL for a store at an address, with further parameters such as "pool_max_conns=2".
func address(addr string, parameters ...string) string {
	return strings.Join(append([]string{pgserver.URL("postgres", addr)}, parameters...), "&")
}

// openURL opens a store and closes it with the test.
func openURL(t testing.TB, rawURL string) *Store {
	t.Helper()
	s, err := backend.Open(t.Context(), rawURL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s.(*Store)
}

// newPool makes a pool on the common server, or on the address of a proxy before it, and closes it with the test.
func newPool(t testing.TB, addr string) *pgxpool.Pool {
	t.Helper()
	pool, err := pgxpool.New(t.Context(), address(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pool.Close)
	return pool
}

// do executes SQL on the common server, and returns the first column of the last row as text.
func do(t testing.TB, sql string) string { t.Helper(); return doAt(t, address(serverAddr(t)), sql) }

func doAt(t testing.TB, rawURL, sql string) string {
	t.Helper()
	config, err := pgxpool.ParseConfig(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	pool, err := pgxpool.NewWithConfig(context.Background(), config)
	if err != nil {
		t.Fatal(err)
	}
	defer pool.Close()
	conn, err := pool.Acquire(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Release()
	results, err := conn.Conn().PgConn().Exec(context.Background(), sql).ReadAll()
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	last := results[len(results)-1]
	if len(last.Rows) == 0 {
		return ""
	}
	return string(last.Rows[len(last.Rows)-1][0])
}

// parsed parses a URL as backend.Open does.
func parsed(t testing.TB, rawURL string) *url.URL {
	t.Helper()
	u, err := url.Parse(rawURL)
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// bucket is a limit of so many tokens, of which none comes back while a test runs.
func bucket(name string, tokens int64) *quota.Limit {
	return quota.NewLimit(name, algorithm.TokenBucket(tokens, 1, 24*time.Hour))
}

const most = 1 << 40

// plenty is a limit that no test uses up.
var plenty = quota.NewLimit("l", algorithm.FixedWindowFromFirst(most, 24*time.Hour))

func take(l *quota.Limit, key string, n int64) quota.Charge {
	return quota.Charge{Limit: l, Key: key, Cost: n}
}

// remaining peeks.
func remaining(t testing.TB, s quota.Store, l *quota.Limit, key string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	d, err := s.Charge(ctx, quota.Charge{Limit: l, Key: key, Op: quota.OpPeek})
	if err != nil {
		t.Fatal(err)
	}
	return d.Remaining
}
