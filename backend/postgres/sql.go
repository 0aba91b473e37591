package postgres

import (
	"context"
	"crypto/sha256"
	_ "embed"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/fleetquota/fleetquota/quota"
)

// layout is the version of the table that this release reads and writes.
const layout = 1

//go:embed migrations/1.sql
var migration string

// statement is a text of SQL, and the name under which connections prepare it. The name is a hash of the text: behind a
// proxy that shares connections, another process may have prepared a statement of that name, and it must be the same.
type statement struct{ name, text string }

// statements are those on one table.
type statements struct {
	// find looks for the table. It has the name as a parameter.
	find statement
	// readOne reads a key, and readAll some keys in their order: the server's time, the value and the expiry.
	readOne, readAll statement
	// insert and update write one row if it is still as it was read: absent, or with the old value. They wait for another
	// transaction that writes the row.
	insert, update statement
	// swap writes some rows if all are still as they were read, and fails if they are not. It inserts in the order of the
	// keys first, waiting for other transactions, and locks the other rows after that without waiting: so that
	// two transactions never wait for each other.
	swap statement
	// lock locks the rows of keys, in their order, and makes a row for each that is absent.
	lock statement
	// list reads some keys in their order, behind one and below another, that have not expired at a time, or by now for NULL.
	list statement
	// sweep deletes some expired rows of a few pages, which begin at a fraction of the table. It leaves rows alone that
	// another transaction has locked.
	sweep statement
}

// Rows of a table are expected to need 22 looks at a row by sweeps for each write.
const (
	sweepEvery = 16 // writes
	sweepPages = 8
	sweepRows  = 64
)

// lostSwap begins the message of the failure of swap.
const lostSwap = "fleetquota: a row changed"

func newStatements(table string) statements {
	literal := "'" + strings.ReplaceAll(table, "'", "''") + "'::regclass"
	with := func(text string) statement {
		text = strings.NewReplacer("{T}", table, "{regclass}", literal).Replace(text)
		sum := sha256.Sum256([]byte(text))
		return statement{"fleetquota_" + hex.EncodeToString(sum[:12]), text}
	}
	return statements{
		find:    with(`SELECT current_setting('server_version_num'), to_regclass($1::text) IS NOT NULL, obj_description(to_regclass($1::text), 'pg_class')`),
		readOne: with(`SELECT clock_timestamp(), q.value, q.expires FROM (VALUES (1)) o LEFT JOIN {T} q ON q.key = $1`),
		readAll: with(`SELECT clock_timestamp(), q.value, q.expires
FROM unnest($1::bytea[]) WITH ORDINALITY k (key, place) LEFT JOIN {T} q ON q.key = k.key ORDER BY k.place`),
		insert: with(`INSERT INTO {T} (key, value, expires) VALUES ($1, $2, $3) ON CONFLICT (key) DO NOTHING`),
		update: with(`UPDATE {T} SET value = $3, expires = $4 WHERE key = $1 AND value = $2`),
		swap: with(`WITH change AS (
	SELECT * FROM unnest($1::bytea[], $2::text[], $3::text[], $4::bigint[]) c (key, old, new, expires)
), inserted AS (
	INSERT INTO {T} (key, value, expires) SELECT c.key, c.new, c.expires FROM change c WHERE c.old IS NULL ORDER BY c.key
	ON CONFLICT (key) DO NOTHING RETURNING 1
), locked AS MATERIALIZED (
	SELECT q.key FROM {T} q JOIN change c ON q.key = c.key AND q.value = c.old WHERE (SELECT count(*) FROM inserted) >= 0
	ORDER BY q.key FOR UPDATE OF q SKIP LOCKED
), kept AS (
	SELECT (SELECT count(*) FROM inserted) + (SELECT count(*) FROM locked) AS rows
), updated AS (
	UPDATE {T} q SET value = c.new, expires = c.expires FROM change c, kept
	WHERE q.key = c.key AND c.new <> c.old AND kept.rows = cardinality($1)
)
SELECT CASE WHEN rows = cardinality($1) THEN 0 ELSE ('` + lostSwap + `, or is being changed: ' || rows || ' kept')::int END FROM kept`),
		lock: with(`INSERT INTO {T} (key, value, expires) SELECT k, '', 0 FROM unnest($1::bytea[]) k ORDER BY k
ON CONFLICT (key) DO UPDATE SET value = excluded.value WHERE false`),
		list: with(`SELECT key FROM {T} WHERE key > $1 AND key < $2
AND expires > coalesce($3::bigint, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint) ORDER BY key LIMIT $4::bigint`),
		sweep: with(fmt.Sprintf(`WITH run AS MATERIALIZED (
	SELECT floor($2::float8 * (pg_relation_size({regclass}) / current_setting('block_size')::int))::bigint AS page
)
DELETE FROM {T} WHERE ctid = ANY (ARRAY(
	SELECT q.ctid FROM {T} q
	WHERE q.ctid >= (SELECT format('(%%s,0)', page)::tid FROM run) AND q.ctid < (SELECT format('(%%s,0)', page + %d)::tid FROM run) AND q.expires <= $1
	LIMIT %d FOR UPDATE SKIP LOCKED
)) AND expires <= $1`, sweepPages, sweepRows)),
	}
}

// call is a statement with its parameters.
type call struct {
	statement statement
	params    [][]byte
}

// binaryFormat has all parameters and results in their binary format.
var binaryFormat = []int16{1}

// These have no name: the server need not plan them.
var (
	begin    = call{statement: statement{text: "BEGIN ISOLATION LEVEL READ COMMITTED"}}
	commit   = call{statement: statement{text: "COMMIT"}}
	rollback = call{statement: statement{text: "ROLLBACK"}}
)

// send executes calls in one round trip and, unless one of them begins a transaction, in one transaction. Either all of
// them have results, or there is an error. Before a connection's first use of a statement it prepares it, which takes
// another round trip; behind a proxy that does not know prepared statements it does not.
func (d *database) send(ctx context.Context, c *pgconn.PgConn, calls ...call) ([]*pgconn.Result, error) {
	named := !d.unnamed.Load()
	prepared := make([]*pgconn.StatementDescription, len(calls))
	for i, call := range calls {
		if !named || call.statement.name == "" {
			continue
		}
		known, ok := c.CustomData()[call.statement.name].(*pgconn.StatementDescription)
		if !ok {
			var err error
			if known, err = c.Prepare(ctx, call.statement.name, call.statement.text, nil); err != nil {
				return nil, notSent{err}
			}
			c.CustomData()[call.statement.name] = known
		}
		prepared[i] = known
	}
	if len(calls) == 1 {
		var r *pgconn.Result
		if prepared[0] != nil {
			r = c.ExecStatement(ctx, prepared[0], calls[0].params, binaryFormat, binaryFormat).Read()
		} else {
			r = c.ExecParams(ctx, calls[0].statement.text, calls[0].params, nil, binaryFormat, binaryFormat).Read()
		}
		return []*pgconn.Result{r}, r.Err
	}
	var batch pgconn.Batch
	for i, call := range calls {
		if prepared[i] != nil {
			batch.ExecStatement(prepared[i], call.params, binaryFormat, binaryFormat)
		} else {
			batch.ExecParams(call.statement.text, call.params, nil, binaryFormat, binaryFormat)
		}
	}
	results, err := c.ExecBatch(ctx, &batch).ReadAll()
	if err == nil && len(results) != len(calls) {
		err = fmt.Errorf("got %d results of %d statements", len(results), len(calls))
	}
	return results, err
}

// notSent is an error that came before the statements were sent.
type notSent struct{ error }

func (e notSent) Unwrap() error { return e.error }

// The parameters and results below are in PostgreSQL's binary format.

func int8Param(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }

// arrayParam returns an array of one dimension; a nil element is NULL.
func arrayParam(oid uint32, elements [][]byte) []byte {
	size := 20
	for _, e := range elements {
		size += 4 + len(e)
	}
	b := make([]byte, 0, size)
	for _, n := range [...]uint32{1, 1, oid, uint32(len(elements)), 1} { // dimensions, may have NULL, type, length, first index
		b = binary.BigEndian.AppendUint32(b, n)
	}
	for _, e := range elements {
		if e == nil {
			b = binary.BigEndian.AppendUint32(b, 1<<32-1)
			continue
		}
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(e))), e...)
	}
	return b
}

const (
	byteaOID = 17
	int8OID  = 20
	textOID  = 25
)

// timestamp reads a timestamptz: microseconds since 2000.
func timestamp(b []byte) (quota.Micros, error) {
	if len(b) != 8 {
		return 0, fmt.Errorf("a timestamp has %d bytes", len(b))
	}
	const year2000 = 946_684_800_000_000
	return quota.Micros(int64(binary.BigEndian.Uint64(b)) + year2000), nil
}
