package driver_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// memTx is the Transactor that tests run NewTransactional on: a memKV whose transactions hold one lock. The hooks make it fail.
type memTx struct {
	*memKV
	one      sync.Mutex // the transaction in progress
	accesses []driver.Access
	repeat   int                                                 // how often decide is called before the last time
	err      error                                               // returned by Transact after the last decide, which is not committed
	around   func(transact func() error, a *driver.Access) error // called in place of a transaction
}

func (m *memTx) Transact(ctx context.Context, a *driver.Access, decide driver.Decide) error {
	transact := func() error {
		m.one.Lock()
		defer m.one.Unlock()
		m.accesses = append(m.accesses, driver.Access{Keys: slices.Clone(a.Keys), Peek: a.Peek})
		for range m.repeat {
			entries, now, err := m.Load(ctx, a.Keys)
			if err != nil {
				return err
			}
			if _, err := decide(entries, now); err != nil {
				return err
			}
		}
		entries, now, err := m.Load(ctx, a.Keys)
		if err != nil {
			return err
		}
		changes, err := decide(entries, now)
		if m.err != nil {
			return m.err
		}
		if err != nil || len(changes) == 0 {
			return err
		}
		swapped, err := m.Swap(ctx, changes)
		if err == nil && !swapped {
			return quota.ErrConflict
		}
		return err
	}
	if m.around != nil {
		return m.around(transact, a)
	}
	return transact()
}

func newTx(t testing.TB, tx driver.Transactor, o *driver.Options) quota.Store {
	t.Helper()
	return must[quota.Store](t)(driver.NewTransactional(tx, o))
}

func TestTransactionalRefuses(t *testing.T) {
	_, err := driver.NewTransactional(nil, nil)
	testkit.WantInvalid(t, err, "t", "nil")
	_, err = driver.NewTransactional(&memTx{}, &driver.Options{Attempts: -1})
	testkit.WantInvalid(t, err, "Options.Attempts", "-1", "0 or more")
}

// TestAccess checks what a transaction is told: its keys sorted and each once, and whether the call only peeks.
func TestAccess(t *testing.T) {
	l, m := testkit.Bucket("n", 100, time.Hour), testkit.Bucket("m", 100, time.Hour)
	for _, c := range []struct {
		cs   []quota.Charge
		keys []string
		peek bool
	}{
		{[]quota.Charge{{Limit: l, Key: "g", Cost: 1}}, []string{"{g}:n"}, false},
		{[]quota.Charge{{Limit: l, Key: "g", Op: quota.OpPeek}}, []string{"{g}:n"}, true},
		{[]quota.Charge{{Limit: l, Key: "g/b", Cost: 1, ID: "i"}, {Limit: m, Key: "g/b", Op: quota.OpPeek, ID: "i"}, {Limit: l, Key: "g/a", Cost: 1, ID: "i"}},
			[]string{"{g}#i", "{g}/a:n", "{g}/b:m", "{g}/b:n"}, false},
	} {
		tx := &memTx{memKV: newKV(testkit.NewClock().Micros)}
		out := make([]quota.Decision, len(c.cs))
		if err := newTx(t, tx, nil).ChargeAll(bg, c.cs, out); err != nil {
			t.Fatal(err)
		}
		if len(tx.accesses) != 1 || !slices.Equal(tx.accesses[0].Keys, c.keys) || tx.accesses[0].Peek != c.peek {
			t.Errorf("accesses of %s: got %+v, want one of %v, peek %v", testkit.Show(c.cs), tx.accesses, c.keys, c.peek)
		}
		for _, changes := range tx.swaps {
			if !slices.IsSortedFunc(changes, func(a, b driver.Change) int { return strings.Compare(a.Old.Key, b.Old.Key) }) {
				t.Errorf("changes of %s: got %+v, want them sorted by key", testkit.Show(c.cs), changes)
			}
		}
	}
}

// TestTransactionRepeats has decide called several times in a transaction: the last call counts, and charges once.
func TestTransactionRepeats(t *testing.T) {
	tx := &memTx{memKV: newKV(testkit.NewClock().Micros), repeat: 3}
	l := testkit.Bucket("n", 100, time.Hour)
	for i := range int64(3) {
		d, err := newTx(t, tx, nil).Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 10})
		if err != nil || d.Remaining != 90-10*i {
			t.Errorf("take %d of 10: got %v, %v, want %d left", i, d, err, 90-10*i)
		}
	}
}

// TestTransactionErrors checks the class of each error of Transact: what decide returned last says whether a commit can have
// been made.
func TestTransactionErrors(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	lost := errors.New("connection lost")
	take, denied := quota.Charge{Limit: l, Key: "k", Cost: 1}, quota.Charge{Limit: l, Key: "k", Cost: 11}
	for _, c := range []struct {
		name    string
		charge  quota.Charge
		given   error
		want    error
		wantNot error
	}{
		{"error with changes", take, lost, quota.ErrIndeterminate, quota.ErrUnavailable},
		{"error without changes", denied, lost, quota.ErrUnavailable, quota.ErrIndeterminate},
		{"refused with changes", take, fmt.Errorf("rolled back: %w", quota.ErrUnavailable), quota.ErrUnavailable, quota.ErrIndeterminate},
		{"conflict every time", take, fmt.Errorf("rolled back: %w", quota.ErrConflict), quota.ErrConflict, quota.ErrIndeterminate},
		{"a lost commit after a conflict", take, fmt.Errorf("%w: %w", quota.ErrIndeterminate, quota.ErrConflict), quota.ErrIndeterminate, nil},
	} {
		synctest.Test(t, func(t *testing.T) {
			tx := &memTx{memKV: newKV(testkit.NewClock().Micros), err: c.given}
			d, err := newTx(t, tx, nil).Charge(bg, c.charge)
			if !errors.Is(err, c.want) || c.wantNot != nil && errors.Is(err, c.wantNot) || !errors.Is(err, c.given) || d != (quota.Decision{}) {
				t.Errorf("%s: got %v, %v, want an error that is %v and not %v, with its cause", c.name, d, err, c.want, c.wantNot)
			}
			want := 1
			if c.want == quota.ErrConflict {
				want = 16
			}
			if len(tx.accesses) != want {
				t.Errorf("%s: got %d attempts, want %d", c.name, len(tx.accesses), want)
			}
		})
	}

	ctx, cancel := context.WithCancel(bg)
	tx := &memTx{memKV: newKV(testkit.NewClock().Micros), around: func(func() error, *driver.Access) error { cancel(); return lost }}
	if _, err := newTx(t, tx, nil).Charge(ctx, take); err != context.Canceled {
		t.Errorf("context ends before decide: got %v, want context.Canceled itself", err)
	}
	tx.around = func(func() error, *driver.Access) error { return nil }
	if _, err := newTx(t, tx, nil).Charge(bg, take); !errors.Is(err, quota.ErrMisconfigured) {
		t.Errorf("Transact that does not call decide: got %v, want ErrMisconfigured", err)
	}
}

// account is a database with transactions, as an author's program sees one.
type account struct {
	mu   sync.Mutex
	rows map[string]string
}

func (a *account) Transact(_ context.Context, access *driver.Access, decide driver.Decide) error {
	a.mu.Lock() // BEGIN, and SELECT … FOR UPDATE in the order of the keys
	defer a.mu.Unlock()
	entries := make([]driver.Entry, len(access.Keys))
	for i, key := range access.Keys {
		entries[i] = driver.Entry{Key: key, Value: a.rows[key]}
	}
	changes, err := decide(entries, quota.Micros(time.Now().UnixMicro()))
	if err != nil {
		return err // ROLLBACK
	}
	for _, c := range changes { // with an expiry after c.TTL
		a.rows[c.Old.Key] = c.Value
	}
	return nil // COMMIT
}

// A store of one method has every algorithm, lists of charges and request ids.
func ExampleNewTransactional() {
	store := quota.Must(driver.NewTransactional(&account{rows: map[string]string{}}, nil))
	defer store.Close()
	limit := quota.NewLimit("jobs", algorithm.FixedWindow(10, 24*time.Hour))
	for range 2 {
		d, err := store.Charge(context.Background(), quota.Charge{Limit: limit, Key: "team-7", Cost: 6})
		fmt.Println(d.Allowed, d.Remaining, err)
	}
	// Output:
	// true 4 <nil>
	// false 4 <nil>
}
