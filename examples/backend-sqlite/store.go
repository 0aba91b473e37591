// Package sqlitestore keeps quotas in a SQLite file, which several processes of one machine share.
//
//	store, err := sqlitestore.Open(ctx, "quota.db", nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// A decision is one transaction. It takes the file's write lock before it reads (BEGIN IMMEDIATE), so
// nothing changes between what it reads and what it writes: charges to one key never conflict, they
// queue. A list that only peeks takes no lock. Use a file for quotas alone, its lock is one for
// everything in it.
//
// # Time
//
// The store's time is the clock of the machine. SQLite's locks work on one machine only, so all
// processes that share a file share that clock.
//
// # Durability
//
// A process that is killed loses nothing. A machine that loses power may lose the latest charges,
// but not the file: SQLite writes a log ahead, and syncs it now and then (synchronous = NORMAL).
//
// # Errors
//
// Where the call's context, or its time, ends before the commit, the transaction is rolled back: the
// error is the context's own, or ErrUnavailable. Only a commit that fails is ErrIndeterminate.
// ErrConflict does not occur. A file that this program may not write, or that is no database, is
// ErrMisconfigured.
package sqlitestore

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"sync/atomic"
	"time"

	"modernc.org/sqlite"
	sqlitecodes "modernc.org/sqlite/lib"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Options change what Open makes. The zero value, and nil, take the defaults.
type Options struct {
	// Clock tells the time. It is called concurrently. nil is time.Now.
	Clock func() time.Time
	// Timeout bounds a call whose context does not end earlier: above all how long it waits for the
	// write lock. 0 is 5 s.
	Timeout time.Duration
}

// Store is a quota.Store in a SQLite file. Its methods may be called concurrently.
type Store struct {
	db      *sql.DB
	sql     statements
	clock   func() time.Time
	timeout time.Duration
	closed  atomic.Bool
}

// Open opens the file, or makes it. Stores on one file share its quotas, in one process or in several.
// An empty path and a negative timeout are ErrInvalid.
func Open(ctx context.Context, path string, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case path == "":
		return nil, fmt.Errorf(`sqlitestore: %w: path is ""; accepted: the path of a file`, quota.ErrInvalid)
	case o.Timeout < 0:
		return nil, fmt.Errorf("sqlitestore: %w: Options.Timeout is %v; accepted: 0 or more", quota.ErrInvalid, o.Timeout)
	}
	s := &Store{clock: o.Clock, timeout: o.Timeout}
	if s.clock == nil {
		s.clock = time.Now
	}
	if s.timeout == 0 {
		s.timeout = 5 * time.Second
	}
	var err error
	if s.db, err = sql.Open("sqlite", dsn(path)); err != nil {
		return nil, refused(err)
	}
	// SQLite lets one transaction write at a time. With one connection, those of this process queue in
	// the pool, first come first served, and not for the lock of the file, which is had by luck.
	s.db.SetMaxOpenConns(1)
	if err := s.create(ctx); err != nil {
		s.db.Close()
		return nil, err
	}
	return s, nil
}

func dsn(path string) string {
	q := url.Values{"_txlock": {"immediate"}, "_synchronous": {"NORMAL"}}
	return "file:" + (&url.URL{Path: path}).EscapedPath() + "?" + q.Encode()
}

// create makes the table, unless it is there, and compiles the statements.
func (s *Store) create(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err := s.untilFree(ctx, func() error {
		if _, err := s.db.ExecContext(ctx, schema); err != nil {
			return err
		}
		return s.sql.prepare(ctx, s.db)
	})
	if err != nil {
		return refused(err)
	}
	return nil
}

// untilFree calls f again while the file is busy, until the context ends or the store is closed. SQLite
// has no queue: whoever asks in the right moment has the lock. So this asks every millisecond, where
// SQLite's own wait (busy_timeout) soon asks ten times a second and comes away empty for seconds.
func (s *Store) untilFree(ctx context.Context, f func() error) error {
	for {
		err := f()
		if code(err) != sqlitecodes.SQLITE_BUSY || s.closed.Load() {
			return err
		}
		select {
		case <-time.After(rand.N(2 * time.Millisecond)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Take decides one charge.
func (s *Store) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	if err := s.TakeAll(ctx, []quota.Charge{c}, out[:]); err != nil {
		return quota.Decision{}, err
	}
	return out[0], nil
}

// TakeAll decides a list of charges in one transaction.
func (s *Store) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	err := s.takeAll(bounded, cs, out)
	switch {
	case err == nil, errors.Is(err, quota.ErrIndeterminate):
		return err
	case s.closed.Load():
		return fmt.Errorf("sqlitestore: %w", quota.ErrClosed)
	case ctx.Err() != nil:
		return ctx.Err()
	case bounded.Err() != nil:
		return fmt.Errorf("sqlitestore: %w: no decision within %v", quota.ErrUnavailable, s.timeout)
	}
	return err
}

// takeAll decides the list. Unless its error is ErrIndeterminate, the transaction was rolled back.
func (s *Store) takeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return refused(err)
	}
	defer conn.Close() // gives it back
	var tx *sql.Tx
	err = s.untilFree(ctx, func() (err error) {
		tx, err = conn.BeginTx(ctx, &sql.TxOptions{ReadOnly: driver.OnlyPeeks(cs)})
		return err
	})
	if err != nil {
		return refused(err)
	}
	defer tx.Rollback() // does nothing after Commit
	cas, err := driver.NewCAS(&table{tx, s.sql, s.clock}, nil)
	if err != nil {
		return err
	}
	// To interrupt a statement takes a goroutine that waits for the context, and lasts longer than the
	// statement. It is enough that Commit asks the context.
	if err := cas.TakeAll(context.WithoutCancel(ctx), cs, out); err != nil {
		return err
	}
	return committed(ctx, tx.Commit())
}

// committed returns what the result of Commit means to the caller.
func committed(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrTxDone), ctx.Err() != nil && errors.Is(err, ctx.Err()):
		return refused(err) // the context ended before, and database/sql rolled back
	}
	return fmt.Errorf("sqlitestore: %w: %w", quota.ErrIndeterminate, err)
}

// Close closes the file when the decisions in progress are made; calls that still wait for the lock are
// ErrClosed.
func (s *Store) Close() error {
	s.closed.Store(true)
	return s.db.Close()
}

// refused wraps an error of the database that left everything as it was.
func refused(err error) error {
	sentinel := quota.ErrUnavailable
	switch code(err) {
	case sqlitecodes.SQLITE_READONLY, sqlitecodes.SQLITE_NOTADB, sqlitecodes.SQLITE_CORRUPT, sqlitecodes.SQLITE_ERROR, sqlitecodes.SQLITE_MISMATCH:
		sentinel = quota.ErrMisconfigured
	}
	return fmt.Errorf("sqlitestore: %w: %w", sentinel, err)
}

// code returns SQLite's result code without its details, or 0.
func code(err error) int {
	if e := (*sqlite.Error)(nil); errors.As(err, &e) {
		return e.Code() & 0xff
	}
	return 0
}
