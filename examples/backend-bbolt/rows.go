package bboltstore

import (
	"encoding/binary"
	"fmt"

	"go.etcd.io/bbolt"

	"github.com/fleetquota/fleetquota/quota"
)

// The two buckets. The second one lists the same rows in the order in which they expire.
var (
	rowsBucket   = []byte("quota:rows")   // key -> expiry, value
	expiryBucket = []byte("quota:expiry") // expiry, key -> no value
)

// An expiry is eight bytes, the most significant first, so that bytes sort in the order of the times.
const expirySize = 8

// rows are the buckets in one transaction.
type rows struct {
	byKey, byExpiry *bbolt.Bucket
}

func rowsOf(tx *bbolt.Tx) rows {
	return rows{tx.Bucket(rowsBucket), tx.Bucket(expiryBucket)}
}

// get returns the value of a key at a time, or "". A row that has expired counts as deleted.
func (r rows) get(key string, now quota.Micros) (string, error) {
	row := r.byKey.Get([]byte(key))
	switch {
	case row == nil:
		return "", nil
	case len(row) < expirySize:
		return "", fmt.Errorf("bboltstore: %w: a row has %d bytes; accepted: a row that this package wrote", quota.ErrMisconfigured, len(row))
	case quota.Micros(binary.BigEndian.Uint64(row)) <= now:
		return "", nil
	}
	return string(row[expirySize:]), nil
}

// put stores a value until a time, or deletes it if it is "".
func (r rows) put(key, value string, expires quota.Micros) error {
	if old := r.byKey.Get([]byte(key)); old != nil {
		if err := r.byExpiry.Delete(append(old[:expirySize:expirySize], key...)); err != nil {
			return err
		}
	}
	if value == "" {
		return r.byKey.Delete([]byte(key))
	}
	expiry := binary.BigEndian.AppendUint64(nil, uint64(expires))
	if err := r.byExpiry.Put(append(expiry[:expirySize:expirySize], key...), nil); err != nil {
		return err
	}
	return r.byKey.Put([]byte(key), append(expiry, value...))
}

// sweep deletes at most n rows that have expired, the oldest first.
func (r rows) sweep(now quota.Micros, n int) error {
	for range n {
		first, _ := r.byExpiry.Cursor().First()
		if first == nil || quota.Micros(binary.BigEndian.Uint64(first)) > now {
			return nil
		}
		if err := r.put(string(first[expirySize:]), "", 0); err != nil {
			return err
		}
	}
	return nil
}
