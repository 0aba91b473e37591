// Package bboltstore keeps quotas in a bbolt file.
//
//	db, err := bbolt.Open("quota.db", 0o600, nil)
//	store, err := bboltstore.New(db, nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// The quotas survive the process. A bbolt file belongs to one process at a time: this is a store for a single
// program that must remember the spent quota when it restarts.
//
// A charge that is granted costs a sync of the disk, unless the database was opened with NoSync. Denials and
// peeks only read.
package bboltstore

import (
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
	bbolterrors "go.etcd.io/bbolt/errors"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// Clock returns the time. It is called concurrently. nil stands for time.Now.
	Clock func() time.Time
}

// New returns a store in the database. Stores on one database share its quotas. New adds two buckets of its
// own to the database. The caller still owns the database, and must close it after its stores.
//
// New returns ErrInvalid for a nil database, and ErrMisconfigured for a database that was opened read-only.
func New(db *bbolt.DB, o *Options) (quota.Store, error) {
	t, err := newTable(db, o)
	if err != nil {
		return nil, err
	}
	return driver.NewCAS(t, nil)
}

// table is the driver.KV: it loads values, and compares and swaps them.
type table struct {
	db    *bbolt.DB
	clock func() time.Time
}

func newTable(db *bbolt.DB, o *Options) (*table, error) {
	if db == nil {
		return nil, fmt.Errorf("bboltstore: %w: db is nil; accepted: an open database", quota.ErrInvalid)
	}
	t := &table{db: db, clock: time.Now}
	if o != nil && o.Clock != nil {
		t.clock = o.Clock
	}
	err := db.Update(func(tx *bbolt.Tx) error {
		for _, name := range [][]byte{rowsBucket, expiryBucket} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, refused(err)
	}
	return t, nil
}

// now is the store's time.
func (t *table) now() quota.Micros { return quota.Micros(t.clock().UnixMicro()) }

// refused wraps an error after which the database is unchanged.
func refused(err error) error {
	sentinel := quota.ErrUnavailable
	for _, setup := range [...]error{bbolterrors.ErrDatabaseReadOnly, bbolterrors.ErrInvalid, bbolterrors.ErrVersionMismatch, bbolterrors.ErrChecksum} {
		if errors.Is(err, setup) {
			sentinel = quota.ErrMisconfigured
		}
	}
	return fmt.Errorf("bboltstore: %w: %w", sentinel, err)
}
