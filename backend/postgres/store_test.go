package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// traffic notes the statements that a proxy sees, in short: their first word, or "read" and the like for the store's own.
type traffic struct {
	mu   sync.Mutex
	list []string
}

func watch(p *pgserver.Proxy) *traffic {
	n := &traffic{}
	p.Watch(func(s string) {
		n.mu.Lock()
		defer n.mu.Unlock()
		kind, sql, _ := strings.Cut(s, ": ")
		if kind, _, _ = strings.Cut(kind, " "); kind == "prepare" {
			return
		}
		word := strings.Fields(sql)[0]
		switch {
		case strings.HasPrefix(sql, "WITH run"):
			return // a sweep
		case word == "SELECT":
			word = "read"
		case word == "WITH":
			word = "swap"
		case strings.Contains(sql, "WHERE false"):
			word = "lock"
		}
		n.list = append(n.list, strings.ToLower(word))
	})
	return n
}

// took returns the statements since the last time.
func (n *traffic) took() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	defer func() { n.list = nil }()
	return strings.Join(n.list, " ")
}

// on makes a store on a pool at an address; the hook is called when a call has read its rows.
func on(t testing.TB, addr, table string, hook func()) *Store {
	t.Helper()
	o := &Options{Table: table}
	if hook != nil {
		o.Clock = func() time.Time {
			hook()
			return time.Now()
		}
	}
	s, err := New(newPool(t, addr), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestTraffic pins the statements of calls: a peek and a denial are one, a grant is two, and one that was overtaken
// goes on in a transaction with locks.
func TestTraffic(t *testing.T) {
	table := newTable()
	l, other := bucket("l", 10), bucket("other", 10)
	proxy := pgserver.StartProxy(t, serverAddr(t))
	second := on(t, serverAddr(t), table, nil)
	var overtake atomic.Pointer[func()]
	s := on(t, proxy.Addr(), table, func() {
		if f := overtake.Swap(nil); f != nil {
			(*f)()
		}
	})
	remaining(t, s, l, "warm")
	seen := watch(proxy)
	list := func(key string, n int64) []quota.Charge {
		return []quota.Charge{take(l, key, n), take(other, key, n)}
	}
	ahead := func(key string) func() { // another handle charges first
		return func() {
			if _, err := second.Charge(context.Background(), take(l, key, 1)); err != nil {
				t.Error(err)
			}
		}
	}
	for _, test := range []struct {
		name     string
		charges  []quota.Charge
		overtake func()
		want     string
		allowed  bool
		left     int64
	}{
		{"a peek", []quota.Charge{{Limit: l, Key: "a", Op: quota.OpPeek}}, nil, "read", true, 10},
		{"the first charge", []quota.Charge{take(l, "a", 1)}, nil, "read insert", true, 9},
		{"a charge", []quota.Charge{take(l, "a", 2)}, nil, "read update", true, 7},
		{"a denial", []quota.Charge{take(l, "a", 8)}, nil, "read", false, 7},
		{"a reset", []quota.Charge{{Limit: l, Key: "a", Op: quota.OpReset}}, nil, "read update", true, 10},
		{"a charge after it", []quota.Charge{take(l, "a", 2)}, nil, "read update", true, 8},
		{"a new list", list("b", 2), nil, "read swap", true, 8},
		{"a list", list("b", 2), nil, "read swap", true, 6},
		{"a denied list", list("b", 9), nil, "read", false, 6},
		{"an overtaken first charge", []quota.Charge{take(l, "c", 2)}, ahead("c"), "read insert begin lock read update commit", true, 7},
		{"an overtaken charge", []quota.Charge{take(l, "c", 2)}, ahead("c"), "read update begin lock read update commit", true, 4},
		{"an overtaken charge that is denied", []quota.Charge{take(l, "c", 4)}, ahead("c"), "read update begin lock read rollback", false, 3},
		{"an overtaken list", list("c", 1), ahead("c"), "read swap begin lock read swap commit", true, 1},
		{"an overtaken new list", list("d", 1), ahead("d"), "read swap begin lock read swap commit", true, 8},
	} {
		if test.overtake != nil {
			overtake.Store(&test.overtake)
		}
		out := make([]quota.Decision, len(test.charges))
		err := s.ChargeAll(t.Context(), test.charges, out)
		if err != nil || quota.Granted(out) != test.allowed || out[0].Remaining != test.left {
			t.Errorf("%s: got %v, %d left, %v; want %v, %d left", test.name, quota.Granted(out), out[0].Remaining, err, test.allowed, test.left)
		}
		if got := seen.took(); got != test.want {
			t.Errorf("%s: got the statements %q, want %q", test.name, got, test.want)
		}
	}
}

// TestLostCommit loses the reply to the write of a charge, on each way to it. The library's word that a repeat is
// safe is not to be believed: the charge was made.
func TestLostCommit(t *testing.T) {
	table := newTable()
	l, other := bucket("l", 10), bucket("other", 10)
	proxy := pgserver.StartProxy(t, serverAddr(t))
	second := on(t, serverAddr(t), table, nil)
	var overtaken atomic.Bool
	s := on(t, proxy.Addr(), table, func() {
		if overtaken.CompareAndSwap(true, false) {
			if _, err := second.Charge(context.Background(), take(l, "k", 1)); err != nil {
				t.Error(err)
			}
		}
	})
	left := int64(10)
	for i, test := range []struct {
		way     string
		charges []quota.Charge
		over    int64
		match   func(string) bool
	}{
		{"insert", []quota.Charge{take(l, "k", 1)}, 0, nil},
		{"update", []quota.Charge{take(l, "k", 1)}, 0, nil},
		{"swap", []quota.Charge{take(l, "k", 1), take(other, "k", 1)}, 0, nil},
		{"commit", []quota.Charge{take(l, "k", 1)}, 1, func(sql string) bool { return sql == "COMMIT" }},
	} {
		match := test.match
		if match == nil {
			match = writes
		}
		remaining(t, s, l, "k") // connects
		overtaken.Store(test.over > 0)
		proxy.Set(pgserver.LoseReply, match)
		err := s.ChargeAll(t.Context(), test.charges, make([]quota.Decision, len(test.charges)))
		proxy.Set(pgserver.Pass, nil)
		if !errors.Is(err, quota.ErrIndeterminate) {
			t.Errorf("lost reply to %s: got %v, want ErrIndeterminate", test.way, err)
		}
		left -= 1 + test.over
		if got := remaining(t, second, l, "k"); got != left || proxy.Lost() != i+1 {
			t.Errorf("after the lost reply to %s: got %d left, %d replies lost; want %d, %d", test.way, got, proxy.Lost(), left, i+1)
		}
	}
	// A lost reply to a read: not charged, and the call goes on by itself if the connection had been used before.
	proxy.Set(pgserver.Pass, nil)
	proxy.Cut()
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); err != nil {
		t.Errorf("a charge on connections that were cut: got %v, want a new connection", err)
	}
}

// TestCommitRefused has the commit fail after each statement succeeded.
func TestCommitRefused(t *testing.T) {
	table := newTable()
	l := bucket("l", 10)
	s := on(t, serverAddr(t), table, nil)
	remaining(t, s, l, "k")
	do(t, fmt.Sprintf(`CREATE FUNCTION %[1]s_no() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$;
		CREATE CONSTRAINT TRIGGER no AFTER INSERT ON %[1]s DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION %[1]s_no()`, table))
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); !errors.Is(err, quota.ErrUnavailable) || quota.Charged(err) != quota.NotCharged {
		t.Errorf("a commit that is refused: got %v, want ErrUnavailable", err)
	}
	if got := remaining(t, s, l, "k"); got != 10 {
		t.Errorf("remaining: got %d, want 10", got)
	}
}

// TestHotKey: 64 goroutines on four handles spend one budget. None gets a conflict, and exactly the budget is
// granted; so too for lists whose keys come in different orders, some of them new, with request ids. The server
// detects no deadlock.
func TestHotKey(t *testing.T) {
	for name, charges := range map[string]func(l, m *quota.Limit, i int) []quota.Charge{
		"single": func(l, m *quota.Limit, i int) []quota.Charge { return []quota.Charge{take(l, "hot", 1)} },
		"lists": func(l, m *quota.Limit, i int) []quota.Charge {
			id := fmt.Sprint("id-", i)
			a, b := take(l, "hot", 1), take(m, fmt.Sprint("cold-", i%7), 1)
			a.ID, b.ID = id, id
			if i%2 == 0 {
				return []quota.Charge{a, b}
			}
			return []quota.Charge{b, a}
		},
	} {
		t.Run(name, func(t *testing.T) {
			table := newTable()
			l, m := bucket("l", 200), bucket("m", 1000)
			before := do(t, "SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'")
			var stores []*Store
			for range 4 {
				stores = append(stores, openURL(t, address(serverAddr(t), "table="+table)))
			}
			var serial, granted atomic.Int64
			var group sync.WaitGroup
			for g := range 64 {
				group.Go(func() {
					for range 5 {
						cs := charges(l, m, int(serial.Add(1)))
						out := make([]quota.Decision, len(cs))
						ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
						err := stores[g%len(stores)].ChargeAll(ctx, cs, out)
						cancel()
						if err != nil {
							t.Errorf("got %v, want no error", err)
							return
						}
						if quota.Granted(out) {
							granted.Add(1)
						}
					}
				})
			}
			group.Wait()
			if n := granted.Load(); n != 200 || remaining(t, stores[0], l, "hot") != 0 {
				t.Errorf("granted: got %d, want 200, and none left", n)
			}
			if after := do(t, "SELECT deadlocks FROM pg_stat_database WHERE datname = 'postgres'"); after != before {
				t.Errorf("deadlocks: got %s, want %s as before", after, before)
			}
		})
	}
}

// TestSweep: writes delete expired rows of other keys, a bounded number at a time, and pass over locked ones.
func TestSweep(t *testing.T) {
	table := newTable()
	l := plenty
	s := on(t, serverAddr(t), table, nil)
	remaining(t, s, l, "k")
	do(t, fmt.Sprintf(`INSERT INTO %s SELECT convert_to('old-' || i, 'UTF8'), repeat('x', 60), 1 FROM generate_series(1, 2000) i`, table))
	count := func() string { return do(t, "SELECT count(*) FROM "+table+" WHERE expires = 1") }
	pool := newPool(t, serverAddr(t))
	tx, err := pool.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := tx.Exec(t.Context(), "SELECT 1 FROM "+table+" WHERE key = 'old-1000' FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	write := func(n int) {
		t.Helper()
		for range n {
			if _, err := s.Charge(t.Context(), take(l, "k", 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	write(sweepEvery)
	var left int
	if fmt.Sscan(count(), &left); left == 2000 || left < 2000-sweepRows {
		t.Errorf("expired rows after one sweep: got %d of 2000, want up to %d fewer", left, sweepRows)
	}
	for range 100 {
		if count() == "1" {
			break
		}
		write(10 * sweepEvery)
	}
	if n := count(); n != "1" {
		t.Errorf("expired rows at last: got %s, want 1, which is locked", n)
	}
	sums := map[driver.Metric]int64{}
	driver.Readings(s, func(r driver.Reading) { sums[r.Metric] += r.Value })
	if sums[driver.MetricSweptKeys] != 1999 || sums[driver.MetricBatches] == 0 || sums[driver.MetricBatches] != sums[driver.MetricBatchedCalls] {
		t.Errorf("readings: got %d rows swept, %d transactions of %d calls; want 1999, and as many calls as transactions", sums[driver.MetricSweptKeys],
			sums[driver.MetricBatches], sums[driver.MetricBatchedCalls])
	}
	if got := remaining(t, s, l, "k"); got == most {
		t.Error("the row of the living key was deleted")
	}
}

// TestHeapOnly: updates touch no index, but a few that must move to another page.
func TestHeapOnly(t *testing.T) {
	table := newTable()
	l := plenty
	s := openURL(t, address(serverAddr(t), "table="+table))
	for i := range 400 {
		if _, err := s.Charge(t.Context(), take(l, fmt.Sprint("k", i%20), 1)); err != nil {
			t.Fatal(err)
		}
	}
	s.Close() // the server's processes report when they end
	query := "SELECT n_tup_upd || ' ' || n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = '" + table + "'"
	var all, hot int
	for range 200 {
		if fmt.Sscan(do(t, query), &all, &hot); all >= 380 {
			break
		}
		time.Sleep(25 * time.Millisecond)
	}
	if all < 380 || hot < all*9/10 {
		t.Errorf("updates: got %d, of which %d heap-only; want 380, and nine of ten", all, hot)
	}
	if n := do(t, "SELECT count(*) FROM pg_index WHERE indrelid = '"+table+"'::regclass"); n != "1" {
		t.Errorf("indexes: got %s, want 1", n)
	}
}

// TestMigration checks the table's creation: by the store, by an operator, by many at once, and where it is not allowed.
func TestMigration(t *testing.T) {
	l := bucket("l", 10)
	addr := serverAddr(t)
	do(t, `DO $$ BEGIN CREATE ROLE limited LOGIN; EXCEPTION WHEN duplicate_object THEN NULL; END $$; CREATE SCHEMA IF NOT EXISTS "Own";
		REVOKE CREATE ON SCHEMA public FROM PUBLIC`)
	asLimited := func(parameters ...string) string {
		return strings.Join(append([]string{pgserver.URL("limited", addr)}, parameters...), "&")
	}
	wants := func(name, rawURL string, sentinel error, says ...string) {
		t.Helper()
		_, err := openURL(t, rawURL).Charge(t.Context(), take(l, "k", 1))
		if !errors.Is(err, sentinel) {
			t.Errorf("%s: got %v, want %v", name, err, sentinel)
		}
		for _, text := range says {
			if err == nil || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: got %v, want an error that says %q", name, err, text)
			}
		}
	}
	works := func(name, rawURL string) {
		t.Helper()
		if _, err := openURL(t, rawURL).Charge(t.Context(), take(l, "k", 1)); err != nil {
			t.Errorf("%s: got %v, want no error", name, err)
		}
	}
	table := newTable()
	wants("no table, and none may be created", address(addr, "migrate=false", "table="+table), quota.ErrMisconfigured, "NoMigrate", "Migration")
	wants("a user who may not create", asLimited("table="+table), quota.ErrMisconfigured, "SELECT, INSERT, UPDATE and DELETE", "CREATE", table)
	sql, err := Migration(&Options{Table: table})
	if err != nil {
		t.Fatal(err)
	}
	do(t, sql)
	do(t, sql) // it may be run again
	works("a table of an operator", address(addr, "migrate=false", "table="+table))
	wants("a user without rights", asLimited("table="+table), quota.ErrMisconfigured, "SELECT, INSERT, UPDATE and DELETE")
	do(t, "GRANT SELECT, INSERT, UPDATE, DELETE ON "+table+" TO limited")
	works("a user with rights", asLimited("table="+table))
	do(t, "COMMENT ON TABLE "+table+" IS 'fleetquota layout 2'")
	wants("a table of a newer release", address(addr, "table="+table), quota.ErrMisconfigured, "layout 2", "accepted by this release: 1")
	do(t, "COMMENT ON TABLE "+table+" IS NULL")
	wants("a table of others", address(addr, "table="+table), quota.ErrMisconfigured, "no comment")
	wants("no schema", address(addr, "schema=missing", "table="+table), quota.ErrMisconfigured, "schema")
	works("a schema", address(addr, "schema=Own", "table=Mine"))
	if n := do(t, `SELECT count(*) FROM "Own"."Mine"`); n != "1" {
		t.Errorf("rows of the table in a schema: got %s, want 1", n)
	}
	// At once.
	table = newTable()
	var group sync.WaitGroup
	for range 8 {
		s := openURL(t, address(addr, "table="+table))
		group.Go(func() {
			if _, err := s.Charge(t.Context(), take(l, "k", 1)); err != nil {
				t.Errorf("one of eight that create the table: got %v, want no error", err)
			}
		})
	}
	group.Wait()
	// A table that is dropped is made again.
	s := openURL(t, address(addr, "table="+table))
	remaining(t, s, l, "k")
	do(t, "DROP TABLE "+table)
	if got := remaining(t, s, l, "k"); got != 10 {
		t.Errorf("remaining in a new table: got %d, want 10", got)
	}
}

// TestLogin checks errors of connecting: their class, and that they hold neither password nor user.
func TestLogin(t *testing.T) {
	addr := serverAddr(t)
	const password = "correct-horse"
	do(t, "CREATE ROLE "+pgserver.PasswordUser+" LOGIN PASSWORD '"+password+"'; GRANT CREATE ON SCHEMA public TO "+pgserver.PasswordUser+
		"; CREATE ROLE crowd LOGIN CONNECTION LIMIT 0")
	l := bucket("l", 10)
	login := func(user, password, rest string) string {
		return "postgres://" + user + ":" + password + "@" + rest
	}
	if _, err := openURL(t, login(pgserver.PasswordUser, password, addr+"/postgres?sslmode=disable&table="+newTable())).Charge(t.Context(), take(l, "k", 1)); err != nil {
		t.Errorf("the right password: got %v, want no error", err)
	}
	for _, test := range []struct {
		name, url string
		want      error
		says      string
	}{
		{"wrong password", login(pgserver.PasswordUser, "battery-staple", addr+"/postgres?sslmode=disable"), quota.ErrMisconfigured, "28P01"},
		{"no such database", login(pgserver.PasswordUser, password, addr+"/nowhere?sslmode=disable"), quota.ErrMisconfigured, "nowhere"},
		{"unknown setting", login("postgres", password, addr+"/postgres?sslmode=disable&options=-c%20no_such=1"), quota.ErrMisconfigured, "no_such"},
		{"too many connections", login("crowd", password, addr+"/postgres?sslmode=disable"), quota.ErrUnavailable, "53300"},
		{"no server", login("postgres", password, "127.0.0.1:1/postgres?sslmode=disable"), quota.ErrUnavailable, "refused"},
		{"no TLS", login("postgres", password, addr+"/postgres?sslmode=require"), quota.ErrMisconfigured, "TLS"},
	} {
		_, err := openURL(t, test.url).Charge(t.Context(), take(l, "k", 1))
		if !errors.Is(err, test.want) || !strings.Contains(fmt.Sprint(err), test.says) {
			t.Errorf("%s: got %v, want %v that says %q", test.name, err, test.want, test.says)
		}
		for _, secret := range []string{password, "battery", pgserver.PasswordUser} {
			if strings.Contains(fmt.Sprintf("%v %+v", err, err), secret) {
				t.Errorf("%s: got %v, want an error without %q", test.name, err, secret)
			}
		}
	}
}

// TestTimeouts checks calls that meet a row which another transaction has locked. They charge once it is free, and
// an error says whether they may have.
func TestTimeouts(t *testing.T) {
	table := newTable()
	l := bucket("l", 10)
	addr := serverAddr(t)
	if _, err := on(t, addr, table, nil).Charge(t.Context(), take(l, "k", 1)); err != nil {
		t.Fatal(err)
	}
	tx, err := newPool(t, addr).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer tx.Rollback(context.Background())
	if _, err := tx.Exec(t.Context(), "SELECT 1 FROM "+table+" FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		parameter string
		want      error
	}{
		{"lock_timeout=5", quota.ErrConflict},
		{"statement_timeout=300", quota.ErrUnavailable},
		{"application_name=patient", quota.ErrIndeterminate}, // the context ends while the write waits
	} {
		ctx, cancel := context.WithCancel(t.Context())
		s := openURL(t, address(addr, "table="+table, test.parameter))
		if got := remaining(t, s, l, "k"); got != 9 { // a peek needs no lock
			t.Errorf("remaining: got %d, want 9", got)
		}
		if test.want == quota.ErrIndeterminate {
			ctx, cancel = context.WithTimeout(ctx, 300*time.Millisecond)
		}
		began := time.Now()
		_, err := s.Charge(ctx, take(l, "k", 1))
		if !errors.Is(err, test.want) || time.Since(began) > 20*time.Second {
			t.Errorf("%s: got %v after %v, want %v", test.parameter, err, time.Since(began), test.want)
		}
		cancel()
	}
	if err := tx.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := remaining(t, on(t, addr, table, nil), l, "k"); got != 9 && got != 8 {
		t.Errorf("remaining: got %d, want 9, or 8 after the unknown outcome", got)
	}
}

// TestStandby: a server that is a standby answers peeks, takes no charges, and is left for the next connection.
func TestStandby(t *testing.T) {
	pgserver.Require(t)
	server := pgserver.Start(t)
	l := bucket("l", 10)
	s := openURL(t, address(server.Addr(), "pool_max_conns=1"))
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); err != nil {
		t.Fatal(err)
	}
	h, err := backend.Health(t.Context(), s)
	if err != nil || h.Kind != "postgresql" || h.Version == "" || strings.Contains(h.Version, " ") {
		t.Errorf("health: got %+v, %v; want postgresql and its version", h, err)
	}
	server.Kill()
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("a call while the server is down: got %v, want ErrUnavailable", err)
	}
	signal := server.File("data/standby.signal")
	if err := errors.Join(os.WriteFile(signal, nil, 0o600), os.Chmod(signal, 0o666)); err != nil {
		t.Fatal(err)
	}
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	if got := remaining(t, s, l, "k"); got != 9 {
		t.Errorf("remaining on a standby: got %d, want 9", got)
	}
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); !errors.Is(err, quota.ErrUnavailable) || !strings.Contains(err.Error(), readOnly) {
		t.Errorf("a charge to a standby: got %v, want ErrUnavailable with SQLSTATE 25006", err)
	}
	for end := time.Now().Add(10 * time.Second); s.database.pool.Stat().TotalConns() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the connection to a standby stays in the pool, want it closed")
		}
	}
	if _, err := backend.Health(t.Context(), s); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("health of a standby: got %v, want ErrUnavailable", err)
	}
}

// TestOutage stops the server under Standard with a fallback, and starts it again: every call is answered, and no more is
// admitted than the limit and the share.
func TestOutage(t *testing.T) {
	pgserver.Require(t)
	server := pgserver.Start(t)
	s := openURL(t, address(server.Addr()))
	const budget, instances = 100, 4
	l := bucket("l", budget)
	store := quota.Must(resilience.Standard(s, resilience.Fallback(local.New(), resilience.Instances(instances), nil),
		&resilience.StandardOptions{Timeout: 5 * time.Second, Breaker: &resilience.BreakerOptions{Delay: 50 * time.Millisecond}}))
	defer store.Close()
	admitted := map[quota.Source]int{}
	until := func(want quota.Source) {
		t.Helper()
		for end := time.Now().Add(30 * time.Second); ; {
			d, err := store.Charge(t.Context(), take(l, "k", 1))
			if err != nil {
				t.Fatalf("got %v, want a decision", err)
			}
			if d.Allowed {
				admitted[d.Source]++
			}
			if d.Source == want {
				return
			}
			if time.Now().After(end) {
				t.Fatalf("decisions in 30 s: got %v, want one by %v", admitted, want)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	until(quota.FromStore)
	server.Kill()
	until(quota.FromFallback)
	for range 40 {
		until(quota.FromFallback)
	}
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	for range 150 {
		until(quota.FromStore)
	}
	if n := admitted[quota.FromFallback]; n > budget/instances+1 {
		t.Errorf("admitted by the fallback: got %d, want %d at most", n, budget/instances+1)
	}
	if n := admitted[quota.FromStore] + admitted[quota.FromFallback]; n < budget || n > budget+budget/instances+2 {
		t.Errorf("admitted: got %v, want %d to %d in all", admitted, budget, budget+budget/instances+2)
	}
}

// TestRestart: a server that was restarted between two calls is no error of the second one.
func TestRestart(t *testing.T) {
	pgserver.Require(t)
	server := pgserver.Start(t)
	s := openURL(t, address(server.Addr(), "pool_max_conns=4"))
	l := bucket("l", 1000)
	busy := func() { // all connections of the pool
		var group sync.WaitGroup
		for i := range 16 {
			group.Go(func() {
				if _, err := s.Charge(t.Context(), take(l, fmt.Sprint(i), 1)); err != nil {
					t.Errorf("got %v, want no error", err)
				}
			})
		}
		group.Wait()
	}
	busy()
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	for i := range 8 {
		if _, err := s.Charge(t.Context(), take(l, fmt.Sprint(i), 1)); err != nil {
			t.Errorf("call %d after a restart: got %v, want no error", i, err)
		}
	}
}

// TestTerminated: connections that the server ended while they were idle are no error of the next call.
func TestTerminated(t *testing.T) {
	s := openURL(t, address(serverAddr(t), "application_name=victim", "pool_max_conns=2", "table="+newTable()))
	l := bucket("l", 10)
	remaining(t, s, l, "k")
	if n := do(t, "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE application_name = 'victim'"); n == "0" {
		t.Fatal("found no connection to end")
	}
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); err != nil {
		t.Errorf("a call after the server ended the connections: got %v, want no error", err)
	}
}

// TestEncoding: keys are bytes, whatever the encoding of the database.
func TestEncoding(t *testing.T) {
	do(t, "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
	l := bucket("l", 10)
	rawURL := strings.Replace(address(serverAddr(t)), "/postgres?", "/latin?", 1)
	s := openURL(t, rawURL)
	for _, key := range []string{"日本/\U0001F600", "a'b\"c\\d", "%00/\u00ff", strings.Repeat("é", 100)} {
		if _, err := s.Charge(t.Context(), take(l, key, 3)); err != nil {
			t.Errorf("%+q: got %v, want no error", key, err)
		} else if got := remaining(t, s, l, key); got != 7 {
			t.Errorf("%+q: got %d left, want 7", key, got)
		}
	}
	if n := doAt(t, rawURL, "SELECT count(*) FROM fleetquota WHERE expires > 0"); n != "4" {
		t.Errorf("rows: got %s, want 4", n)
	}
}

// TestClose: a store closes its own pool, even while the server hangs, and leaves the pool of others open.
func TestClose(t *testing.T) {
	l := bucket("l", 10)
	proxy := pgserver.StartProxy(t, serverAddr(t))
	s := openURL(t, address(proxy.Addr(), "table="+newTable()))
	remaining(t, s, l, "k")
	proxy.Set(pgserver.Freeze, nil)
	answer := make(chan error, 1)
	seen := watch(proxy)
	go func() {
		_, err := s.Charge(context.Background(), take(l, "k", 1))
		answer <- err
	}()
	for seen.took() == "" {
		time.Sleep(time.Millisecond)
	}
	began := time.Now()
	s.Close()
	if err := <-answer; err == nil {
		t.Error("a call to a server that hangs: got no error from it when the store was closed, want one")
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("Close: took %v, want about a second", took)
	}
	if _, err := s.Charge(t.Context(), take(l, "k", 1)); !errors.Is(err, quota.ErrClosed) {
		t.Errorf("a call after Close: got %v, want ErrClosed", err)
	}
	proxy.Set(pgserver.Pass, nil)
	pool := newPool(t, serverAddr(t))
	given := quota.Must(New(pool, nil))
	given.Close()
	if err := pool.Ping(t.Context()); err != nil {
		t.Errorf("the caller's pool after Close: got %v, want no error", err)
	}
}

// TestIsolation: the store is right whatever isolation the server has for transactions by default.
func TestIsolation(t *testing.T) {
	for _, level := range []string{"repeatable%20read", "serializable"} {
		table, l := newTable(), bucket("l", 60)
		var group sync.WaitGroup
		var granted atomic.Int64
		for range 3 {
			s := openURL(t, address(serverAddr(t), "table="+table, "options=-c%20default_transaction_isolation="+strings.ReplaceAll(level, "%20", "%5C%20")))
			for range 4 {
				group.Go(func() {
					for range 8 {
						d, err := s.Charge(t.Context(), take(l, "k", 1))
						if err != nil {
							t.Errorf("%s: got %v, want no error", level, err)
						}
						if d.Allowed {
							granted.Add(1)
						}
					}
				})
			}
		}
		group.Wait()
		if n := granted.Load(); n != 60 {
			t.Errorf("%s: got %d granted, want 60", level, n)
		}
	}
}

// TestColdStart: the first calls leave by their deadline while the server is silent, with an error that says that
// the store was still connecting; the attempt goes on, and the next call finds the connection.
func TestColdStart(t *testing.T) {
	proxy := pgserver.StartProxy(t, serverAddr(t))
	proxy.Set(pgserver.Freeze, nil)
	s := openURL(t, address(proxy.Addr(), "table="+newTable()))
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	_, err := s.Charge(ctx, take(bucket("l", 10), "k", 1))
	if !errors.Is(err, context.DeadlineExceeded) || quota.Charged(err) != quota.NotCharged {
		t.Errorf("a call while the server is silent: got %v, want its deadline, and no charge", err)
	}
	if early, ok := errors.AsType[driver.GettingReady](err); !ok || !early.GettingReady() {
		t.Errorf("a call while the server is silent: got %v, want a GettingReady", err)
	}
	proxy.Set(pgserver.Pass, nil)
	if got := remaining(t, s, bucket("l", 10), "k"); got != 10 {
		t.Errorf("remaining: got %d, want 10", got)
	}
	if n := proxy.Dialed(); n != 1 {
		t.Errorf("connections: got %d, want the one that the first call began", n)
	}
}
