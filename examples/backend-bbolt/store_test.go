package bboltstore

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.etcd.io/bbolt"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var tenAnHour = quota.NewLimit("tokens", algorithm.TokenBucket(10, 10, time.Hour))

func openDB(t *testing.T) *bbolt.DB {
	t.Helper()
	db, err := bbolt.Open(filepath.Join(t.TempDir(), "quota.db"), 0o600, &bbolt.Options{NoSync: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	return db
}

func limiterOn(t *testing.T, db *bbolt.DB, clock func() time.Time) *quota.Limiter {
	t.Helper()
	store, err := New(db, &Options{Clock: clock})
	if err != nil {
		t.Fatal(err)
	}
	return quota.Must(quota.NewLimiter(store, tenAnHour, nil))
}

// count returns how many rows there are by key and by expiry.
func count(t *testing.T, db *bbolt.DB) (byKey, byExpiry int) {
	t.Helper()
	err := db.View(func(tx *bbolt.Tx) error {
		byKey, byExpiry = tx.Bucket(rowsBucket).Stats().KeyN, tx.Bucket(expiryBucket).Stats().KeyN
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return byKey, byExpiry
}

// TestExpiredRowsGo uses each of many keys once. Charges to other keys delete the rows that have expired, and
// no row that has not.
func TestExpiredRowsGo(t *testing.T) {
	ctx := context.Background()
	db := openDB(t)
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	limiter := limiterOn(t, db, func() time.Time { return now })

	const (
		keys  = 2000
		apart = 6 * time.Second // one token is back in 6 minutes and a row goes 1 s after: 61 rows live at a time
	)
	for i := range keys {
		if _, err := limiter.Take(ctx, fmt.Sprintf("agent-%d", i), 1); err != nil {
			t.Fatal(err)
		}
		byKey, byExpiry := count(t, db)
		if live := min(i+1, 61); byKey != live || byExpiry != live {
			t.Fatalf("rows after %d keys: got %d by key and %d by expiry, want %d", i+1, byKey, byExpiry, live)
		}
		now = now.Add(apart)
	}
	if d, err := limiter.Peek(ctx, fmt.Sprintf("agent-%d", keys-1), 0); err != nil || d.Remaining != 9 {
		t.Errorf("Peek of the last key: got %+v, error %v, want 9 remaining", d, err)
	}
	if info, err := os.Stat(db.Path()); err != nil || info.Size() > 1<<20 {
		t.Errorf("size of the file: got %d bytes, error %v, want at most %d", info.Size(), err, 1<<20)
	}
}

// TestBacklogShrinks leaves many rows to expire at once. Each charge then deletes a few of them.
func TestBacklogShrinks(t *testing.T) {
	ctx := context.Background()
	db := openDB(t)
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	limiter := limiterOn(t, db, func() time.Time { return now })
	const backlog = 100
	for i := range backlog {
		if _, err := limiter.Take(ctx, fmt.Sprintf("old-%d", i), 10); err != nil {
			t.Fatal(err)
		}
	}
	now = now.Add(2 * time.Hour)
	for i := range backlog {
		if _, err := limiter.Take(ctx, fmt.Sprintf("new-%d", i), 10); err != nil {
			t.Fatal(err)
		}
		want := max(backlog-(i+1), i+1) // one comes and two go, while there are any
		if byKey, byExpiry := count(t, db); byKey != want || byExpiry != want {
			t.Fatalf("rows after %d charges: got %d by key and %d by expiry, want %d", i+1, byKey, byExpiry, want)
		}
	}
}

// TestExpiredRowIsGone checks that a row which has expired counts as deleted, though no charge came to delete
// it: another rule can use the limit's name.
func TestExpiredRowIsGone(t *testing.T) {
	ctx := context.Background()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	limiter := limiterOn(t, openDB(t), func() time.Time { return now })
	if _, err := limiter.Take(ctx, "agent-1", 10); err != nil {
		t.Fatal(err)
	}
	window := quota.NewLimit("tokens", algorithm.FixedWindow(5, time.Hour))
	other := quota.Charge{Limit: window, Key: "agent-1", Cost: 1}
	if _, err := limiter.ChargeAll(ctx, other); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("another rule by the same name: got %v, want ErrMisconfigured", err)
	}
	now = now.Add(time.Hour + driver.ExpirySlack)
	if r, err := limiter.ChargeAll(ctx, other); err != nil || r.Decisions[0].Remaining != 4 {
		t.Errorf("another rule once the row has expired: got %+v, error %v, want 4 remaining", r, err)
	}
}

// TestPeekLeavesExpiry peeks by a limit of the same name that refills faster, in a list that is granted:
// the row lives on as long as the charge before needs it.
func TestPeekLeavesExpiry(t *testing.T) {
	ctx := context.Background()
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	limiter := limiterOn(t, openDB(t), func() time.Time { return now })
	if _, err := limiter.Take(ctx, "agent-1", 10); err != nil {
		t.Fatal(err)
	}
	faster := quota.NewLimit("tokens", algorithm.TokenBucket(10, 10, time.Minute))
	r, err := limiter.ChargeAll(ctx, quota.Charge{Key: "agent-2", Cost: 1}, quota.Charge{Limit: faster, Key: "agent-1", Op: quota.OpPeek})
	if err != nil || !r.Granted {
		t.Fatalf("ChargeAll: got %+v, error %v, want a grant", r, err)
	}
	now = now.Add(2 * time.Minute)
	if d, err := limiter.Peek(ctx, "agent-1", 0); err != nil || d.Remaining != 0 {
		t.Errorf("Peek two minutes later: got %+v, error %v, want 0 remaining", d, err)
	}
}

// TestRewrittenRows checks that a row which is written again and again stays one row, and that a reset deletes
// it.
func TestRewrittenRows(t *testing.T) {
	ctx := context.Background()
	db := openDB(t)
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	limiter := limiterOn(t, db, func() time.Time { return now })
	for range 10 {
		if _, err := limiter.Take(ctx, "agent-1", 1); err != nil {
			t.Fatal(err)
		}
		if byKey, byExpiry := count(t, db); byKey != 1 || byExpiry != 1 {
			t.Fatalf("rows: got %d by key and %d by expiry, want 1", byKey, byExpiry)
		}
		now = now.Add(time.Second)
	}
	if err := limiter.Reset(ctx, "agent-1"); err != nil {
		t.Fatal(err)
	}
	if byKey, byExpiry := count(t, db); byKey != 0 || byExpiry != 0 {
		t.Errorf("rows after Reset: got %d by key and %d by expiry, want 0", byKey, byExpiry)
	}
}

// TestCallerGone ends the caller's context between Load and Swap: no token is charged, and the error says so.
func TestCallerGone(t *testing.T) {
	db := openDB(t)
	ctx, cancel := context.WithCancel(context.Background())
	leaving := limiterOn(t, db, func() time.Time {
		cancel() // Load asks for the time
		return time.Now()
	})
	_, err := leaving.Take(ctx, "agent-1", 4)
	if err != context.Canceled {
		t.Errorf("Charge: got %v, want context.Canceled itself", err)
	}
	d, err := limiterOn(t, db, nil).Peek(context.Background(), "agent-1", 0)
	if err != nil || d.Remaining != 10 {
		t.Errorf("Peek: got %+v, error %v, want 10 remaining", d, err)
	}
}

// TestErrors checks the errors that callers get for errors of the database.
func TestErrors(t *testing.T) {
	ctx := context.Background()
	if _, err := New(nil, nil); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("New(nil): got %v, want ErrInvalid", err)
	}

	db := openDB(t)
	limiter := limiterOn(t, db, nil)
	err := db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(rowsBucket).Put([]byte("{agent-1}:tokens"), []byte("short"))
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := limiter.Take(ctx, "agent-1", 1); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("Charge on a row of another program: got %v, want ErrMisconfigured", err)
	}

	file := db.Path()
	db.Close()
	if _, err := limiter.Take(ctx, "agent-2", 1); !errors.Is(err, quota.ErrUnavailable) {
		t.Errorf("Charge on a closed database: got %v, want ErrUnavailable", err)
	}
	readOnly, err := bbolt.Open(file, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	if _, err := New(readOnly, nil); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("New on a database opened read-only: got %v, want ErrMisconfigured", err)
	}
}

// TestURL opens a file by its URL. The store owns the file: after Close it can be opened again.
func TestURL(t *testing.T) {
	ctx := context.Background()
	file := filepath.Join(t.TempDir(), "quota.db")
	for _, want := range []int64{6, 2} {
		store, err := backend.Open(ctx, "bbolt://"+file)
		if err != nil {
			t.Fatal(err)
		}
		d, err := store.Charge(ctx, quota.Charge{Limit: tenAnHour, Key: "agent-1", Cost: 4})
		if err != nil || d.Remaining != want {
			t.Errorf("Charge: got %+v, error %v, want %d remaining", d, err, want)
		}
		if want == 2 { // and while it is open, it cannot
			if _, err := backend.Open(ctx, "bbolt://"+file); !errors.Is(err, quota.ErrUnavailable) {
				t.Errorf("opening the file twice: got %v, want ErrUnavailable", err)
			}
		}
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	}

	other := filepath.Join(t.TempDir(), "other")
	if err := os.WriteFile(other, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	for url, want := range map[string]error{
		"bbolt://":                        quota.ErrInvalid,
		"bbolt://quota.db":                quota.ErrInvalid,
		"bbolt://" + file + "?timeout=1s": quota.ErrInvalid,
		"bbolt://" + other:                quota.ErrMisconfigured,
		"bbolt:///no/such/folder/q.db":    quota.ErrUnavailable,
	} {
		if _, err := backend.Open(ctx, url); !errors.Is(err, want) {
			t.Errorf("Open(%q): got %v, want %v", url, err, want)
		}
	}
}

// TestExactBudget has many goroutines on two stores spend one key: together they are granted the budget.
func TestExactBudget(t *testing.T) {
	ctx := context.Background()
	db := openDB(t)
	noon := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	var (
		group   sync.WaitGroup
		mu      sync.Mutex
		granted int
	)
	for range 2 {
		limiter := limiterOn(t, db, func() time.Time { return noon })
		for range 4 {
			group.Go(func() {
				for {
					d, err := limiter.Take(ctx, "agent-1", 1)
					if errors.Is(err, quota.ErrConflict) {
						continue
					}
					if err != nil || !d.Allowed {
						if err != nil {
							t.Error(err)
						}
						return
					}
					mu.Lock()
					granted++
					mu.Unlock()
				}
			})
		}
	}
	group.Wait()
	if granted != 10 {
		t.Errorf("granted: got %d, want 10", granted)
	}
}
