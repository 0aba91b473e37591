package postgres

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Transact implements driver.Transactor. It reads without locks, and writes, in one statement, if no row changed since.
// Where one did it begins again, in a transaction that locks the rows.
func (d *database) Transact(ctx context.Context, a *driver.Access, decide driver.Decide) error {
	const most = 3 // a connection that was broken, statements that were not prepared, a table that was dropped
	for n := 0; ; n++ {
		err := d.transact(ctx, a, decide)
		if n == most || err == nil || errors.Is(err, quota.ErrIndeterminate) || !d.mended(err) {
			return err
		}
	}
}

// mended reports whether the cause of an error, of a call that charged nothing, is out of the way.
func (d *database) mended(err error) bool {
	server := (*pgconn.PgError)(nil)
	if !errors.As(err, &server) {
		return errors.As(err, new(stale))
	}
	switch server.Code {
	case noStatement, statementTwice:
		// A proxy gave the connection to the server to another client in between.
		d.unnamed.Store(true)
		return true
	case undefinedTable:
		d.forget()
		return true
	}
	return errors.As(err, new(stale))
}

// stale is the error of a connection that was broken before its first use by a call.
type stale struct{ error }

func (e stale) Unwrap() error { return e.error }

// usedBefore marks a connection that a call has used.
const usedBefore = "fleetquota used"

func (d *database) transact(ctx context.Context, a *driver.Access, decide driver.Decide) error {
	conn, err := d.acquire(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	t := &transaction{database: d, conn: conn.Conn().PgConn(), keys: a.Keys, decide: decide}
	used := t.conn.CustomData()[usedBefore] != nil
	t.conn.CustomData()[usedBefore] = true
	defer func() {
		// The server was a primary when this connection was made: a new one may find the new primary.
		if server := (*pgconn.PgError)(nil); errors.As(err, &server) && server.Code == readOnly {
			_ = conn.Conn().Close(ctx)
		}
	}()
	err = t.optimistic(ctx)
	if err != nil && used && !t.met && t.conn.IsClosed() && ctx.Err() == nil {
		if d.own != nil {
			d.pool.Reset() // the others are most likely broken too
		}
		return stale{err}
	}
	return err
}

// transaction is one on some keys.
type transaction struct {
	*database
	conn   *pgconn.PgConn
	keys   []string
	decide driver.Decide
	met    bool // the connection has answered

	rows    []row // as they were read last, in the order of the keys
	entries []driver.Entry
	now     quota.Micros
}

// row is a row of the table as it is stored; its value is nil where there is none.
type row struct {
	value   []byte
	expires int64
}

// read returns the statement that reads the keys.
func (t *transaction) read() call {
	if len(t.keys) == 1 {
		return call{t.statements.readOne, [][]byte{[]byte(t.keys[0])}}
	}
	return call{t.statements.readAll, [][]byte{t.keysParam()}}
}

func (t *transaction) keysParam() []byte {
	keys := make([][]byte, len(t.keys))
	for i, key := range t.keys {
		keys[i] = []byte(key)
	}
	return arrayParam(byteaOID, keys)
}

// take keeps the result of read.
func (t *transaction) take(result *pgconn.Result) (err error) {
	t.met = true
	if len(result.Rows) != len(t.keys) {
		return fmt.Errorf("postgres: %w: got %d rows of %d keys", quota.ErrUnavailable, len(result.Rows), len(t.keys))
	}
	t.rows, t.entries = make([]row, len(t.keys)), make([]driver.Entry, len(t.keys))
	for i, columns := range result.Rows {
		if t.now, err = timestamp(columns[0]); err != nil {
			return fmt.Errorf("postgres: %w: %w", quota.ErrUnavailable, err)
		}
		t.entries[i].Key = t.keys[i]
		if columns[1] != nil && len(columns[2]) == 8 {
			t.rows[i] = row{columns[1], int64(binary.BigEndian.Uint64(columns[2]))}
		}
	}
	if t.clock != nil {
		t.now = quota.Micros(t.clock().UnixMicro())
	}
	for i := range t.rows {
		if t.rows[i].expires > int64(t.now) {
			t.entries[i].Value = string(t.rows[i].value)
		}
	}
	return nil
}

// optimistic decides on rows that it does not lock.
func (t *transaction) optimistic(ctx context.Context) error {
	results, err := t.send(ctx, t.conn, t.read())
	if err != nil {
		return t.refused(ctx, err)
	}
	if err := t.take(results[0]); err != nil {
		return err
	}
	changes, err := t.decide(t.entries, t.now)
	if err != nil || len(changes) == 0 {
		return err
	}
	if err := ctx.Err(); err != nil {
		return t.refused(ctx, err)
	}
	writes, count := t.writes(changes)
	results, err = t.send(ctx, t.conn, writes...)
	switch {
	case err == nil && (!count || results[0].CommandTag.RowsAffected() == 1):
		t.noteSwept(results, len(writes))
		return nil
	case err == nil || overtaken(err):
		return t.locked(ctx)
	}
	return t.unanswered(ctx, err)
}

// overtaken reports whether a write failed because another transaction changed a row, and was rolled back.
func overtaken(err error) bool {
	server := (*pgconn.PgError)(nil)
	return errors.As(err, &server) && rolledBack(server) &&
		(class(server.Code) == quota.ErrConflict || server.Code == badText && strings.Contains(server.Message, lostSwap))
}

// locked decides on rows that it has locked: no other transaction can overtake it.
func (t *transaction) locked(ctx context.Context) (err error) {
	if err := ctx.Err(); err != nil {
		return t.refused(ctx, err)
	}
	defer func() {
		// Where this fails, the pool closes the connection, and the server rolls back.
		if err != nil && t.conn.TxStatus() != 'I' && !t.conn.IsClosed() {
			_, _ = t.send(ctx, t.conn, rollback)
		}
	}()
	results, err := t.send(ctx, t.conn, begin, call{t.statements.lock, [][]byte{t.keysParam()}}, t.read())
	if err != nil {
		return t.refused(ctx, err)
	}
	if err := t.take(results[2]); err != nil {
		return err
	}
	changes, err := t.decide(t.entries, t.now)
	if err != nil {
		return err
	}
	if len(changes) == 0 {
		if _, err := t.send(ctx, t.conn, rollback); err != nil {
			return t.refused(ctx, err)
		}
		return nil
	}
	if err := ctx.Err(); err != nil {
		return t.refused(ctx, err)
	}
	writes, count := t.writes(changes)
	results, err = t.send(ctx, t.conn, append(writes, commit)...)
	switch {
	case err != nil:
		return t.unanswered(ctx, err)
	case count && results[0].CommandTag.RowsAffected() != 1 || results[len(results)-1].CommandTag.String() != "COMMIT":
		return fmt.Errorf("postgres: %w: a row that was locked has changed", quota.ErrIndeterminate)
	}
	t.noteSwept(results, len(writes))
	return nil
}

// noteSwept counts the rows that the last of some writes removed, if it is a sweep.
func (t *transaction) noteSwept(results []*pgconn.Result, writes int) {
	if writes > 1 {
		t.swept.Add(results[writes-1].CommandTag.RowsAffected())
	}
}

// writes returns the statements that make the changes to the rows, and whether the first one must affect one row; if it
// must not, it fails where a row has changed.
func (t *transaction) writes(changes []driver.Change) (calls []call, count bool) {
	keys, olds, news, expiries := make([][]byte, len(changes)), make([][]byte, len(changes)), make([][]byte, len(changes)), make([][]byte, len(changes))
	place := 0
	for i, c := range changes { // in the order of the keys
		for t.keys[place] != c.Old.Key {
			place++
		}
		old := t.rows[place]
		value, expires := old.value, old.expires
		switch {
		case c.Value == c.Old.Value:
			// The row stays, even if it has expired. An absent one gets a row that counts as absent, so that no other
			// transaction can insert one.
			if value == nil {
				value = []byte{}
			}
		case c.Value == "":
			value, expires = []byte{}, 0
		default:
			value, expires = []byte(c.Value), int64(t.now)+int64(c.TTL/time.Microsecond)
		}
		keys[i], olds[i], news[i], expiries[i] = []byte(c.Old.Key), old.value, value, int8Param(expires)
	}
	switch {
	case len(changes) > 1:
		calls = []call{{t.statements.swap, [][]byte{arrayParam(byteaOID, keys), arrayParam(textOID, olds), arrayParam(textOID, news), arrayParam(int8OID, expiries)}}}
	case olds[0] == nil:
		calls, count = []call{{t.statements.insert, [][]byte{keys[0], news[0], expiries[0]}}}, true
	default:
		calls, count = []call{{t.statements.update, [][]byte{keys[0], olds[0], news[0], expiries[0]}}}, true
	}
	if n := t.written.Add(uint64(len(changes))); n/sweepEvery != (n-uint64(len(changes)))/sweepEvery {
		fraction := binary.BigEndian.AppendUint64(nil, math.Float64bits(rand.Float64()))
		calls = append(calls, call{t.statements.sweep, [][]byte{int8Param(int64(t.now)), fraction}})
	}
	return calls, count
}
