package postgres

import (
	"context"

	"github.com/fleetquota/fleetquota/quota/driver"
)

// ListKeys implements driver.KeyLister, in the order of the keys: a page is a range of the table's index.
func (d *database) ListKeys(ctx context.Context, prefix, cursor string, n int) (keys []string, next string, err error) {
	const most = 3 // as Transact
	for tries := 0; ; tries++ {
		keys, err = d.list(ctx, prefix, cursor, n)
		if tries == most || err == nil || !d.mended(err) {
			break
		}
	}
	if len(keys) == n {
		next = keys[n-1]
	}
	return keys, next, err
}

func (d *database) list(ctx context.Context, prefix, cursor string, n int) (keys []string, err error) {
	conn, err := d.acquire(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Release()
	// No key is a prefix: it begins with the brace of a hash tag, and a key ends with its limit.
	var now []byte
	if d.clock != nil {
		now = int8Param(d.clock().UnixMicro())
	}
	results, err := d.send(ctx, conn.Conn().PgConn(), call{d.statements.list, [][]byte{[]byte(max(prefix, cursor)), behind(prefix), now, int8Param(int64(n))}})
	if err != nil {
		return nil, d.refused(ctx, err)
	}
	for _, row := range results[0].Rows {
		keys = append(keys, string(row[0]))
	}
	return keys, nil
}

// behind returns the first text behind all that begin with a prefix, which has a byte other than 0xff.
func behind(prefix string) []byte {
	end := []byte(prefix)
	for end[len(end)-1] == 0xff {
		end = end[:len(end)-1]
	}
	end[len(end)-1]++
	return end
}

var _ driver.KeyLister = (*database)(nil)
