package bboltstore

import (
	"context"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Swap compares and writes in one transaction; bbolt lets one write at a time.
func (t *table) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	tx, err := t.db.Begin(true) // waits for the writers before this one
	if err != nil {
		return false, refused(err)
	}
	defer tx.Rollback() // does nothing after Commit
	if err := ctx.Err(); err != nil {
		return false, refused(err) // the caller has gone meanwhile, and is not charged
	}
	now, r := t.now(), rowsOf(tx)
	for _, c := range changes {
		if value, err := r.get(c.Old.Key, now); err != nil || value != c.Old.Value {
			return false, err
		}
	}
	for _, c := range changes {
		if c.Value == c.Old.Value {
			continue
		}
		if err := r.put(c.Old.Key, c.Value, now+quota.Micros(c.TTL/time.Microsecond)); err != nil {
			return false, refused(err)
		}
	}
	// Two for each row that this may have added: a backlog shrinks, and no call pays for all of it.
	if err := r.sweep(now, 2*len(changes)); err != nil {
		return false, refused(err)
	}
	// Whether a commit that fails is on the disk nobody can say. NewCAS makes ErrIndeterminate of an error
	// that is none of package quota's.
	if err := tx.Commit(); err != nil {
		return false, err
	}
	return true, nil
}
