package bboltstore

import (
	"context"

	"github.com/fleetquota/fleetquota/quota"
)

// Load reads the keys in one transaction, which is one snapshot. The clock is read after the snapshot is
// fixed, so that no row in it is from the future.
func (t *table) Load(_ context.Context, keys []string) ([]quota.Entry, quota.Micros, error) {
	tx, err := t.db.Begin(false)
	if err != nil {
		return nil, 0, refused(err)
	}
	defer tx.Rollback()
	now, r := t.now(), rowsOf(tx)
	entries := make([]quota.Entry, len(keys))
	for i, key := range keys {
		value, err := r.get(key, now)
		if err != nil {
			return nil, 0, err
		}
		entries[i] = quota.Entry{Key: key, Value: value}
	}
	return entries, now, nil
}
