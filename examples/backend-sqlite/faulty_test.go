package sqlitestore

import (
	"context"
	"database/sql/driver"
	"errors"
	"sync"
	"testing"

	"modernc.org/sqlite"

	"github.com/fleetquota/fleetquota/conformance"
)

var (
	errRefused = errors.New("the disk refuses the request")
	errLost    = errors.New("the disk did not say whether it wrote")
)

// disk is a connector of package sql whose connections fail on command.
type disk struct {
	driver.Connector
	mu    sync.Mutex
	fault conformance.Fault
	mends chan struct{} // closed at the next call of set
}

func newDisk(t testing.TB, path string) *disk {
	t.Helper()
	c, err := sqlite.NewConnector(dsn(path))
	if err != nil {
		t.Fatal(err)
	}
	return &disk{Connector: c, mends: make(chan struct{})}
}

// set is the second result of a conformance.Harness.Fault.
func (d *disk) set(f conformance.Fault) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fault = f
	close(d.mends)
	d.mends = make(chan struct{})
}

// request is the way of a request to the disk: it waits while that is frozen, until the context ends.
func (d *disk) request(ctx context.Context) (conformance.Fault, error) {
	for {
		d.mu.Lock()
		f, mends := d.fault, d.mends
		d.mu.Unlock()
		if f != conformance.Frozen {
			return f, nil
		}
		select {
		case <-mends:
		case <-ctx.Done():
			return f, ctx.Err()
		}
	}
}

func (d *disk) Connect(ctx context.Context) (driver.Conn, error) {
	c, err := d.Connector.Connect(ctx)
	if err != nil {
		return nil, err
	}
	return &faultyConn{c.(conn), d}, nil
}

// conn is what the connections of the driver can do, and package sql uses.
type conn interface {
	driver.Conn
	driver.ConnBeginTx
	driver.ConnPrepareContext
	driver.ExecerContext
	driver.QueryerContext
	driver.Pinger
	driver.SessionResetter
	driver.Validator
}

type faultyConn struct {
	conn
	disk *disk
}

func (c *faultyConn) BeginTx(ctx context.Context, o driver.TxOptions) (driver.Tx, error) {
	switch f, err := c.disk.request(ctx); {
	case err != nil:
		return nil, err
	case f == conformance.Refused:
		return nil, errRefused
	}
	tx, err := c.conn.BeginTx(ctx, o)
	if err != nil {
		return nil, err
	}
	return &faultyTx{tx, c.disk, ctx}, nil
}

type faultyTx struct {
	driver.Tx
	disk *disk
	ctx  context.Context // of the transaction
}

// Commit of a disk that is frozen until the context ends is executed, as one whose answer is lost.
func (tx *faultyTx) Commit() error {
	f, _ := tx.disk.request(tx.ctx)
	if f == conformance.Refused {
		return errors.Join(errRefused, tx.Rollback())
	}
	if err := tx.Tx.Commit(); err != nil || f == conformance.NoFault {
		return err
	}
	return errLost
}
