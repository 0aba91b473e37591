package sqlitestore

import (
	"context"
	"database/sql"
	"errors"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const schema = `
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS quota (
	key     TEXT    NOT NULL PRIMARY KEY,
	value   TEXT    NOT NULL,
	expires INTEGER NOT NULL -- microseconds since 1970
) STRICT, WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS quota_expires ON quota (expires);
`

// statements are compiled once, and used by every transaction.
type statements struct {
	get, put, drop, sweep *sql.Stmt
}

func (s *statements) prepare(ctx context.Context, db *sql.DB) error {
	for _, p := range []struct {
		stmt **sql.Stmt
		text string
	}{
		{&s.get, "SELECT value, expires FROM quota WHERE key = ?"},
		{&s.put, "REPLACE INTO quota (key, value, expires) VALUES (?, ?, ?)"},
		{&s.drop, "DELETE FROM quota WHERE key = ?"},
		{&s.sweep, "DELETE FROM quota WHERE key IN (SELECT key FROM quota WHERE expires <= ? ORDER BY expires LIMIT ?)"},
	} {
		var err error
		if *p.stmt, err = db.PrepareContext(ctx, p.text); err != nil {
			return err
		}
	}
	return nil
}

// table is a driver.KV inside a transaction. The transaction has held the write lock since before Load, so Swap need not
// compare.
type table struct {
	tx    *sql.Tx
	sql   statements
	clock func() time.Time
}

// Load reads the keys. It reads the clock after the first row, which fixes the snapshot of a transaction that only reads,
// so that no row is newer than the time.
func (t *table) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	entries := make([]driver.Entry, len(keys))
	expires := make([]quota.Micros, len(keys))
	get := t.tx.StmtContext(ctx, t.sql.get)
	for i, key := range keys {
		entries[i].Key = key
		row := get.QueryRowContext(ctx, key)
		if err := row.Scan(&entries[i].Value, &expires[i]); err != nil && !errors.Is(err, sql.ErrNoRows) {
			return nil, 0, refused(err)
		}
	}
	now := t.now()
	for i := range entries {
		if expires[i] <= now {
			entries[i].Value = "" // an expired row counts as deleted
		}
	}
	return entries, now, nil
}

// Swap writes. Its errors are never indeterminate, because the transaction is rolled back.
func (t *table) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	now := t.now()
	put, drop := t.tx.StmtContext(ctx, t.sql.put), t.tx.StmtContext(ctx, t.sql.drop)
	for _, c := range changes {
		var err error
		switch c.Value {
		case c.Old.Value:
		case "":
			_, err = drop.ExecContext(ctx, c.Old.Key)
		default:
			_, err = put.ExecContext(ctx, c.Old.Key, c.Value, now+quota.Micros(c.TTL/time.Microsecond))
		}
		if err != nil {
			return false, refused(err)
		}
	}
	// Delete two rows for each row that this may have added: a backlog shrinks, and no call pays for all of it.
	if _, err := t.tx.StmtContext(ctx, t.sql.sweep).ExecContext(ctx, now, 2*len(changes)); err != nil {
		return false, refused(err)
	}
	return true, nil
}

// now is the store's time.
func (t *table) now() quota.Micros { return quota.Micros(t.clock().UnixMicro()) }
