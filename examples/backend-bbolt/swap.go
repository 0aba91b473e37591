package bboltstore

import (
	"context"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Swap compares and writes in one transaction. In bbolt, transactions that write run one after the other.
func (t *table) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	tx, err := t.db.Begin(true) // waits for earlier writers
	if err != nil {
		return false, refused(err)
	}
	defer tx.Rollback() // does nothing after Commit
	if err := ctx.Err(); err != nil {
		return false, refused(err) // the caller left while this waited, and is not charged
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
	// Delete two rows for each row that this may have added: a backlog shrinks, and no call pays for all of it.
	if err := r.sweep(now, 2*len(changes)); err != nil {
		return false, refused(err)
	}
	// A commit that failed may be on the disk, or not. NewCAS turns an error that is not one of package quota's
	// into ErrIndeterminate.
	if err := tx.Commit(); err != nil {
		return false, err
	}
	return true, nil
}
