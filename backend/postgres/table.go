package postgres

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/fleetquota/fleetquota/quota"
)

// oldest is the oldest server whose scans of pages the sweeps can use.
const oldest = 140000

// attempt is one at making the table ready, for which several callers may wait.
type attempt struct {
	done chan struct{}
	err  error
}

// makeReady returns when the table is known to be there, in a layout of this release. The callers at a time share one
// attempt, which goes on when they leave.
func (d *database) makeReady(ctx context.Context) error {
	d.mu.Lock()
	if d.ready {
		d.mu.Unlock()
		return nil
	}
	if d.closed {
		d.mu.Unlock()
		return errClosed
	}
	a := d.current
	if a == nil {
		a = &attempt{done: make(chan struct{})}
		d.current = a
		d.wg.Go(func() {
			const patience = 10 * time.Second
			ctx, cancel := context.WithTimeout(d.life, patience)
			defer cancel()
			a.err = d.prepare(ctx)
			d.mu.Lock()
			d.ready, d.current = a.err == nil, nil
			d.mu.Unlock()
			close(a.done)
		})
	}
	d.mu.Unlock()
	select {
	case <-a.done:
		if a.err != nil && d.life.Err() != nil {
			return errClosed
		}
		return a.err
	case <-ctx.Done():
		return &gettingReady{fmt.Errorf("postgres: %w: the table is not known to be there yet: %w", quota.ErrUnavailable, ctx.Err())}
	}
}

// forget has the next call look for the table again.
func (d *database) forget() {
	d.mu.Lock()
	d.ready = false
	d.mu.Unlock()
}

// prepare looks for the table, and creates it if that is allowed.
func (d *database) prepare(ctx context.Context) error {
	conn, err := d.connect(ctx)
	if err != nil {
		return err
	}
	defer conn.Release()
	c := conn.Conn().PgConn()
	// Of two processes that look for a table at once, both may create it.
	for range 3 {
		there, err := d.look(ctx, c)
		if there || err != nil {
			return err
		}
		if d.noMigrate {
			return fmt.Errorf("postgres: %w: there is no table %s, and Options.NoMigrate is set%s", quota.ErrMisconfigured, d.name, d.tableCure())
		}
		if err = d.create(ctx, c); err != nil {
			return err
		}
	}
	return fmt.Errorf("postgres: %w: the table %s is not there after it was created", quota.ErrMisconfigured, d.name)
}

// look reports whether the table is there. A table that is not one of this release is an error.
func (d *database) look(ctx context.Context, c *pgconn.PgConn) (there bool, err error) {
	result := c.ExecParams(ctx, d.statements.find.text, [][]byte{[]byte(d.name)}, nil, nil, nil).Read()
	if result.Err != nil {
		return false, d.refused(ctx, result.Err)
	}
	if len(result.Rows) != 1 || len(result.Rows[0]) != 3 {
		return false, fmt.Errorf("postgres: %w: the search for the table has %d rows", quota.ErrUnavailable, len(result.Rows))
	}
	row := result.Rows[0]
	if version, err := strconv.Atoi(string(row[0])); err != nil || version < oldest {
		return false, fmt.Errorf("postgres: %w: the server's version is %.20q; accepted: PostgreSQL 14 or newer", quota.ErrMisconfigured, row[0])
	}
	if string(row[1]) != "t" {
		return false, nil
	}
	text, ours := strings.CutPrefix(string(row[2]), "fleetquota layout ")
	n, err := strconv.Atoi(text)
	switch {
	case !ours || err != nil:
		return false, fmt.Errorf("postgres: %w: the table %s has no comment with fleetquota's layout; accepted: a table that Migration made", quota.ErrMisconfigured, d.name)
	case n != layout:
		return false, fmt.Errorf("postgres: %w: the table %s has layout %d; accepted by this release: %d", quota.ErrMisconfigured, d.name, n, layout)
	}
	return true, nil
}

// madeTwice are the SQLSTATEs of a table that two transactions create at once: of its name, its type, and rows of the catalog.
var madeTwice = []string{"42P07", "42710", "23505"}

// create creates the table, unless another process does at this moment: one store after the other. The statements of one
// text are one transaction.
func (d *database) create(ctx context.Context, c *pgconn.PgConn) error {
	hash := fnv.New64a()
	hash.Write([]byte(d.name))
	_, err := c.Exec(ctx, fmt.Sprintf("SELECT pg_advisory_xact_lock(%d);\n%s", int64(hash.Sum64()), d.migration)).ReadAll()
	if server := (*pgconn.PgError)(nil); errors.As(err, &server) && slices.Contains(madeTwice, server.Code) {
		return nil // an operator created it at the same time
	}
	if err != nil {
		return d.refused(ctx, err)
	}
	return nil
}
