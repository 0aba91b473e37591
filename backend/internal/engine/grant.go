package engine

import (
	"fmt"
	"strconv"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A grant is remembered as recordHead, the time and, for each charge, the length and the bytes of the
// state it was decided on: what it takes to give the same decision again.

var idLifetime any = strconv.FormatInt(quota.IDWindow.Milliseconds(), 10)

// idKey returns the key of a request id: no limit's key has '#' behind its group.
func (s *Store) idKey(c *quota.Charge) string {
	return string(driver.AppendIDKey([]byte(s.o.Prefix), quota.Group(c.Key), c.ID))
}

// recordHead returns the bytes with which the record of a grant begins: the charges' fingerprint.
func recordHead(cs []quota.Charge) string {
	sum := driver.Fingerprint(cs)
	return string(sum[:])
}

const headSize = 16

// replay decides charges as they were decided when the id was granted.
func replay(grant string, cs []quota.Charge, out []quota.Decision) error {
	if len(grant) < headSize+numberSize || grant[:headSize] != recordHead(cs) {
		return fmt.Errorf("redis: %w: request id %q was granted to other charges; accepted: a new id", quota.ErrInvalid, cs[0].ID)
	}
	rest := grant[headSize:]
	now := quota.Micros(number(rest))
	rest = rest[numberSize:]
	items := make([]driver.Item, len(cs))
	for i := range items {
		if len(rest) < numberSize {
			return errState
		}
		n := number(rest)
		rest = rest[numberSize:]
		if n > int64(len(rest)) {
			return errState
		}
		var err error
		if items[i], err = unpack(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	if err := driver.Apply(cs, items, now, out); err != nil {
		return err
	}
	for i := range out {
		// The limit's numbers may have changed since; that it was granted has not.
		out[i].Allowed, out[i].RetryAfter, out[i].Replayed = true, 0, true
		if op := cs[i].Op; op == quota.OpTake || op == quota.OpDebit {
			out[i].Charged = cs[i].Cost
		}
	}
	return nil
}
