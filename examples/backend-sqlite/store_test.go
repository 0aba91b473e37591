package sqlitestore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var tenAnHour = quota.NewLimit("tokens", algorithm.TokenBucket(10, 10, time.Hour))

func take(key string, n int64) quota.Charge {
	return quota.Charge{Limit: tenAnHour, Key: key, Cost: n}
}

func openStore(t *testing.T, path string, o *Options) quota.Store {
	t.Helper()
	s, _ := openFile(t, path, o)
	return s
}

// openFile returns a store, and what it is made of.
func openFile(t *testing.T, path string, o *Options) (quota.Store, *file) {
	t.Helper()
	f, err := open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	s := quota.Must(driver.NewTransactional(f, nil))
	t.Cleanup(func() { s.Close() })
	return s, f
}

func newFile(t *testing.T) string { return filepath.Join(t.TempDir(), "quota ?%23.db") }

// lock takes the write lock of a file, as another process would, and returns the function that frees it.
func lock(t *testing.T, file string) (free func()) {
	t.Helper()
	db, err := sql.Open("sqlite", dsn(file))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	tx, err := db.BeginTx(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := tx.Rollback(); err != nil {
			t.Error(err)
		}
	}
}

func remaining(t *testing.T, s quota.Store, key string) int64 {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	d, err := s.Charge(ctx, quota.Charge{Limit: tenAnHour, Key: key, Op: quota.OpPeek})
	if err != nil {
		t.Fatal(err)
	}
	return d.Remaining
}

// TestLocked checks calls while another program has the write lock: peeks are answered; charges wait until their context
// or the timeout ends, and charge no token.
func TestLocked(t *testing.T) {
	file := newFile(t)
	patient := openStore(t, file, &Options{Timeout: time.Hour})
	hasty, opened := openFile(t, file, nil)
	opened.timeout = 20 * time.Millisecond // for the calls, not for Open
	free := lock(t, file)
	if n := remaining(t, patient, "agent-1"); n != 10 {
		t.Errorf("remaining: got %d, want 10", n)
	}
	// The deadline is not the caller's, so the error does not carry it.
	if _, err := hasty.Charge(t.Context(), take("agent-1", 4)); !errors.Is(err, quota.ErrUnavailable) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Charge with a timeout of 20 ms: got %v, want ErrUnavailable alone", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := patient.Charge(ctx, take("agent-1", 4)); err != context.DeadlineExceeded {
		t.Errorf("Charge with a deadline in 20 ms: got %v, want the context's error", err)
	}

	answers := make(chan error)
	go func() {
		_, err := patient.Charge(t.Context(), take("agent-1", 4))
		answers <- err
	}()
	free()
	if err := <-answers; err != nil {
		t.Errorf("Charge once the lock is free: got %v, want no error", err)
	}
	if n := remaining(t, patient, "agent-1"); n != 6 {
		t.Errorf("remaining: got %d, want 6", n)
	}
}

// TestGoneBeforeCommit ends the call's context between the decision and the commit.
func TestGoneBeforeCommit(t *testing.T) {
	file := newFile(t)
	ctx, cancel := context.WithCancel(t.Context())
	times := 0
	s := openStore(t, file, &Options{Clock: func() time.Time {
		if times++; times == 1 {
			cancel()
		}
		return time.Now()
	}})
	if d, err := s.Charge(ctx, take("agent-1", 4)); err != context.Canceled || d.Allowed {
		t.Errorf("Charge: got %+v, error %v, want the context's error alone", d, err)
	}
	if times != 1 {
		t.Errorf("calls of the clock: got %d, want one, which ends the context", times)
	}
	if n := remaining(t, s, "agent-1"); n != 10 {
		t.Errorf("remaining: got %d, want 10", n)
	}
}

// TestCommitted checks that a commit that failed is indeterminate, unless database/sql rolled back instead.
func TestCommitted(t *testing.T) {
	done, cancel := context.WithCancel(t.Context())
	cancel()
	disk := errors.New("disk I/O error")
	for _, c := range []struct {
		ctx       context.Context
		err, want error
	}{
		{t.Context(), nil, nil},
		{done, nil, nil},
		{done, sql.ErrTxDone, quota.ErrUnavailable},
		{done, context.Canceled, quota.ErrUnavailable},
		{done, disk, quota.ErrIndeterminate},
		{t.Context(), disk, quota.ErrIndeterminate},
	} {
		if err := committed(c.ctx, c.err); !errors.Is(err, c.want) || !errors.Is(err, c.err) {
			t.Errorf("Commit %v with context %v: got %v, want %v", c.err, c.ctx.Err(), err, c.want)
		}
	}
}

// TestClosed closes a store while one call waits for the lock, and another call for the first.
func TestClosed(t *testing.T) {
	file := newFile(t)
	s, opened := openFile(t, file, &Options{Timeout: time.Hour})
	defer lock(t, file)()
	answers := make(chan error, 2)
	for i := range 2 {
		go func() {
			_, err := s.Charge(t.Context(), take(fmt.Sprint("agent-", i), 4))
			answers <- err
		}()
	}
	for i := 0; opened.db.Stats().WaitCount == 0; i++ { // until one waits for the lock and one for its turn
		if i == 30_000 {
			t.Fatal("calls that wait for the connection: got 0, want 1")
		}
		time.Sleep(time.Millisecond)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	for range 2 {
		select {
		case err := <-answers:
			if !errors.Is(err, quota.ErrClosed) {
				t.Errorf("Charge: got %v, want ErrClosed", err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("Charge on a closed store: got no answer within 30 s, want ErrClosed")
		}
	}
	if err := s.Close(); err != nil {
		t.Errorf("second Close: got %v, want no error", err)
	}
}

// TestRestart checks that quota stays spent after the file was closed.
func TestRestart(t *testing.T) {
	file := newFile(t)
	for _, want := range []int64{6, 2} {
		s := openStore(t, file, nil)
		if d, err := s.Charge(t.Context(), take("agent-1", 4)); err != nil || d.Remaining != want {
			t.Errorf("Charge: got %+v, error %v, want %d remaining", d, err, want)
		}
		s.Close()
	}
	if _, err := os.Stat(file); err != nil {
		t.Errorf("the file at the path: got %v, want no error", err)
	}
}

func count(t *testing.T, f *file) (n int) {
	t.Helper()
	if err := f.db.QueryRowContext(t.Context(), "SELECT count(*) FROM quota").Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// TestExpiredRowsGo lets many rows expire at once. Each charge then deletes a few of them, and no row that has not
// expired.
func TestExpiredRowsGo(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s, opened := openFile(t, newFile(t), &Options{Clock: func() time.Time { return now }})
	const backlog = 50
	for i := range backlog {
		if _, err := s.Charge(t.Context(), take(fmt.Sprintf("old-%d", i), 10)); err != nil {
			t.Fatal(err)
		}
	}
	now = now.Add(time.Hour + time.Second - time.Microsecond) // whole again, but kept for driver.ExpirySlack
	if _, err := s.Charge(t.Context(), take("new-0", 10)); err != nil || count(t, opened) != backlog+1 {
		t.Fatalf("rows before the others expire: got %d, error %v, want %d", count(t, opened), err, backlog+1)
	}
	now = now.Add(time.Microsecond)
	for i := 1; i <= backlog; i++ {
		if _, err := s.Charge(t.Context(), take(fmt.Sprintf("new-%d", i), 10)); err != nil {
			t.Fatal(err)
		}
		if n, want := count(t, opened), max(backlog+1-i, i+1); n != want {
			t.Fatalf("rows after %d charges: got %d, want %d", i, n, want)
		}
	}
	if err := quota.Must(quota.NewLimiter(s, tenAnHour, nil)).Reset(t.Context(), "new-1"); err != nil || count(t, opened) != backlog {
		t.Errorf("rows after Reset: got %d, error %v, want %d", count(t, opened), err, backlog)
	}
}

// TestExpiredRowIsGone checks that a row which has expired counts as deleted, though no charge came to delete it:
// another rule can use the limit's name.
func TestExpiredRowIsGone(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s := openStore(t, newFile(t), &Options{Clock: func() time.Time { return now }})
	if _, err := s.Charge(t.Context(), take("agent-1", 10)); err != nil {
		t.Fatal(err)
	}
	other := take("agent-1", 1)
	other.Limit = quota.NewLimit("tokens", algorithm.FixedWindow(5, time.Hour))
	if _, err := s.Charge(t.Context(), other); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("another rule by the same name: got %v, want ErrMisconfigured", err)
	}
	now = now.Add(time.Hour + driver.ExpirySlack)
	if d, err := s.Charge(t.Context(), other); err != nil || d.Remaining != 4 {
		t.Errorf("another rule once the row has expired: got %+v, error %v, want 4 remaining", d, err)
	}
}

// TestPeekLeavesExpiry peeks by a limit of the same name that refills faster, in a list that is granted:
// the row lives on as long as the charge before needs it.
func TestPeekLeavesExpiry(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	s := openStore(t, newFile(t), &Options{Clock: func() time.Time { return now }})
	if _, err := s.Charge(t.Context(), take("agent-1", 10)); err != nil {
		t.Fatal(err)
	}
	faster := quota.NewLimit("tokens", algorithm.TokenBucket(10, 10, time.Minute))
	list := []quota.Charge{take("agent-2", 1), {Limit: faster, Key: "agent-1", Op: quota.OpPeek}}
	if err := s.ChargeAll(t.Context(), list, make([]quota.Decision, 2)); err != nil {
		t.Fatal(err)
	}
	now = now.Add(2 * time.Minute)
	if n := remaining(t, s, "agent-1"); n != 0 {
		t.Errorf("remaining two minutes later: got %d, want 0", n)
	}
}

// TestErrors checks the errors that callers get for errors of the database.
func TestErrors(t *testing.T) {
	ctx := t.Context()
	other := newFile(t)
	if err := os.WriteFile(other, []byte("This is a text and no database, however long it may become in the end, or so it says."), 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := newFile(t)
	db, err := sql.Open("sqlite", dsn(foreign))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := db.ExecContext(ctx, "CREATE TABLE quota (name TEXT)"); err != nil {
		t.Fatal(err)
	}
	db.Close()

	for _, c := range []struct {
		path    string
		options *Options
		want    error
	}{
		{"", nil, quota.ErrInvalid},
		{newFile(t), &Options{Timeout: -1}, quota.ErrInvalid},
		{other, nil, quota.ErrMisconfigured},
		{foreign, nil, quota.ErrMisconfigured},
		{filepath.Join(t.TempDir(), "no", "folder"), nil, quota.ErrUnavailable},
	} {
		if _, err := Open(ctx, c.path, c.options); !errors.Is(err, c.want) {
			t.Errorf("Open(%q, %+v): got %v, want %v", c.path, c.options, err, c.want)
		}
	}
	canceled, cancel := context.WithCancel(ctx)
	cancel()
	if _, err := Open(canceled, newFile(t), nil); !errors.Is(err, context.Canceled) {
		t.Errorf("Open with a context that is done: got %v, want context.Canceled", err)
	}

	s, opened := openFile(t, newFile(t), nil)
	if _, err := opened.db.ExecContext(ctx, "DROP TABLE quota"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Charge(ctx, take("agent-1", 1)); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("Charge without the table: got %v, want ErrMisconfigured", err)
	}
}
