package bboltstore

import (
	"context"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Load reads the keys in one transaction, which is one snapshot. It reads the clock after the snapshot is
// fixed, so that no row of the snapshot is newer than the time.
func (t *table) Load(_ context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	tx, err := t.db.Begin(false)
	if err != nil {
		return nil, 0, refused(err)
	}
	defer tx.Rollback()
	now, r := t.now(), rowsOf(tx)
	entries := make([]driver.Entry, len(keys))
	for i, key := range keys {
		value, err := r.get(key, now)
		if err != nil {
			return nil, 0, err
		}
		entries[i] = driver.Entry{Key: key, Value: value}
	}
	return entries, now, nil
}
