// Package sqlitestore keeps quotas in a SQLite file, which several processes of one machine share.
//
//	store, err := sqlitestore.Open(ctx, "quota.db", nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// A decision is one transaction. It takes the file's write lock before it reads (BEGIN IMMEDIATE), so no other
// transaction writes between its reads and its writes: charges to one key never conflict, they queue. A list that only
// peeks takes no lock. The file should hold quotas only, because SQLite has one write lock for the whole file.
//
// # Time
//
// The store's time is the clock of the machine. SQLite's locks work on one machine only, so all processes that share a
// file share that clock.
//
// # Durability
//
// A process that is killed loses no charge. A machine that loses power may lose the latest charges, but not the file:
// SQLite writes a log ahead, and syncs it from time to time (synchronous = NORMAL).
//
// # Errors
//
// If the call's context or Options.Timeout ends before the commit, the transaction is rolled back: the error is the
// context's own, or ErrUnavailable. Only a commit that fails is ErrIndeterminate. ErrConflict does not occur. A file
// that this program may not write, or that is no database, is ErrMisconfigured.
//
// Calls of one process that charge the same key while the file is busy go together in one transaction, see
// driver.NewTransactional.
package sqlitestore

import (
	"context"
	"database/sql"
	sqldriver "database/sql/driver"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/url"
	"time"

	"modernc.org/sqlite"
	sqlitecodes "modernc.org/sqlite/lib"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Options are the options of Open. The zero value, and nil, take the defaults.
type Options struct {
	// Clock returns the time. It is called concurrently. nil stands for time.Now.
	Clock func() time.Time
	// Timeout bounds a call whose context does not end earlier, and so its wait for the write lock. 0 stands for 5 s.
	Timeout time.Duration
}

// file is a driver.Transactor, of which the package makes a Store.
type file struct {
	db      *sql.DB
	sql     statements
	clock   func() time.Time
	timeout time.Duration
	closed  driver.Gate
}

// Open opens the file, or creates it. Stores on one file share its quotas, in one process or in several. An empty path
// and a negative timeout are ErrInvalid.
func Open(ctx context.Context, path string, o *Options) (quota.Store, error) {
	f, err := open(ctx, path, o)
	if err != nil {
		return nil, err
	}
	return driver.NewTransactional(f, nil)
}

func open(ctx context.Context, path string, o *Options) (*file, error) {
	switch {
	case path == "":
		return nil, fmt.Errorf(`sqlitestore: %w: path is ""; accepted: the path of a file`, quota.ErrInvalid)
	case o != nil && o.Timeout < 0:
		return nil, fmt.Errorf("sqlitestore: %w: Options.Timeout is %v; accepted: 0 or more", quota.ErrInvalid, o.Timeout)
	}
	c, err := sqlite.NewConnector(dsn(path))
	if err != nil {
		return nil, refused(err)
	}
	return connect(ctx, c, o)
}

// connect opens the file by a connector of package sql.
func connect(ctx context.Context, c sqldriver.Connector, o *Options) (*file, error) {
	if o == nil {
		o = &Options{}
	}
	s := &file{db: sql.OpenDB(c), clock: o.Clock, timeout: o.Timeout}
	if s.clock == nil {
		s.clock = time.Now
	}
	if s.timeout == 0 {
		s.timeout = 5 * time.Second
	}
	// SQLite lets one transaction write at a time. With one connection, the transactions of this process queue in the
	// pool, first come first served. SQLite has no queue for the lock of the file.
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

// create creates the table if it does not exist, and compiles the statements.
func (s *file) create(ctx context.Context) error {
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

// untilFree repeats f while the file is busy, until the context ends or the store is closed. SQLite has no queue: the
// first process that asks after the lock is free gets it. So untilFree asks every millisecond; SQLite's own wait
// (busy_timeout) soon asks only ten times a second, and may miss the lock for seconds.
func (s *file) untilFree(ctx context.Context, f func() error) error {
	for {
		err := f()
		if code(err) != sqlitecodes.SQLITE_BUSY || s.closed.Open() != nil {
			return err
		}
		select {
		case <-time.After(rand.N(2 * time.Millisecond)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Transact decides a list of charges, or several, in one transaction of the file.
func (s *file) Transact(ctx context.Context, a *driver.Access, decide driver.Decide) error {
	bounded, cancel := context.WithTimeout(ctx, s.timeout)
	defer cancel()
	complete, err := s.transact(bounded, a, decide, a.Peek)
	if err == nil && !complete { // the clock stepped back, and states are moved to it
		_, err = s.transact(bounded, a, decide, false)
	}
	switch {
	case err == nil, errors.Is(err, quota.ErrIndeterminate):
		return err
	case s.closed.Open() != nil:
		return s.closed.Open()
	case ctx.Err() != nil: // database/sql rolled back, and may have told a statement that the transaction was over
		return fmt.Errorf("sqlitestore: %w: %w: %w", quota.ErrUnavailable, ctx.Err(), err)
	case bounded.Err() != nil:
		return fmt.Errorf("sqlitestore: %w: no decision within %v", quota.ErrUnavailable, s.timeout)
	}
	return err
}

// transact makes a transaction, and reports whether it is complete: one that only reads is not if there is something to write.
// Unless its error is ErrIndeterminate, an error means that the transaction was rolled back.
func (s *file) transact(ctx context.Context, a *driver.Access, decide driver.Decide, reads bool) (complete bool, err error) {
	conn, err := s.db.Conn(ctx)
	if err != nil {
		return false, refused(err)
	}
	defer conn.Close() // returns it to the pool
	var tx *sql.Tx
	err = s.untilFree(ctx, func() (err error) {
		tx, err = conn.BeginTx(ctx, &sql.TxOptions{ReadOnly: reads})
		return err
	})
	if err != nil {
		return false, refused(err)
	}
	defer tx.Rollback() // does nothing after Commit
	// To interrupt a statement, the driver starts a goroutine that waits for the context, which takes longer than the
	// statement itself. It is enough that Commit checks the context.
	t := table{tx, s.sql, s.clock, context.WithoutCancel(ctx)}
	entries, now, err := t.load(a.Keys)
	if err != nil {
		return false, err
	}
	changes, err := decide(entries, now)
	switch {
	case err != nil, len(changes) == 0:
		return true, err
	case reads:
		return false, nil
	}
	if err := t.store(changes, now); err != nil {
		return false, err
	}
	return true, committed(ctx, tx.Commit())
}

// committed returns the caller's error for the result of Commit.
func committed(ctx context.Context, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrTxDone), ctx.Err() != nil && errors.Is(err, ctx.Err()): // before the commit
		return refused(err)
	}
	return fmt.Errorf("sqlitestore: %w: %w", quota.ErrIndeterminate, err)
}

// Close waits for the decisions in progress and closes the file. Calls that still wait for the lock get ErrClosed.
func (s *file) Close() error {
	s.closed.Close()
	return s.db.Close()
}

// refused wraps an error after which the database is unchanged.
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
