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

// table is the rows in a transaction.
type table struct {
	tx    *sql.Tx
	sql   statements
	clock func() time.Time
	ctx   context.Context // of the statements
}

// load reads the keys. It reads the clock after the first row, which fixes the snapshot of a transaction that only reads,
// so that no row is newer than the time.
func (t *table) load(keys []string) ([]driver.Entry, quota.Micros, error) {
	entries := make([]driver.Entry, len(keys))
	expires := make([]quota.Micros, len(keys))
	get := t.tx.StmtContext(t.ctx, t.sql.get)
	for i, key := range keys {
		entries[i].Key = key
		row := get.QueryRowContext(t.ctx, key)
		if err := row.Scan(&entries[i].Value, &expires[i]); err != nil && !errors.Is(err, sql.ErrNoRows) {
			return nil, 0, refused(err)
		}
	}
	now := quota.Micros(t.clock().UnixMicro())
	for i := range entries {
		if expires[i] <= now {
			entries[i].Value = "" // an expired row counts as deleted
		}
	}
	return entries, now, nil
}

// store makes the changes, which were decided at a time. The transaction has held the write lock since before load, so store
// need not compare.
func (t *table) store(changes []driver.Change, now quota.Micros) error {
	put, drop := t.tx.StmtContext(t.ctx, t.sql.put), t.tx.StmtContext(t.ctx, t.sql.drop)
	for _, c := range changes {
		var err error
		switch c.Value {
		case c.Old.Value:
		case "":
			_, err = drop.ExecContext(t.ctx, c.Old.Key)
		default:
			_, err = put.ExecContext(t.ctx, c.Old.Key, c.Value, now+quota.Micros(c.TTL/time.Microsecond))
		}
		if err != nil {
			return refused(err)
		}
	}
	// Delete two rows for each row that this may have added: a backlog shrinks, and no call pays for all of it.
	if _, err := t.tx.StmtContext(t.ctx, t.sql.sweep).ExecContext(t.ctx, now, 2*len(changes)); err != nil {
		return refused(err)
	}
	return nil
}
