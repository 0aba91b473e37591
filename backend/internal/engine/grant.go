package engine

import (
	"fmt"
	"slices"
	"strconv"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The record of a grant under a request id is recordHead, the time and, for each charge, the length and the
// bytes of the state it was decided on. From these the same decisions are made again. Where it does not follow from the
// charges how much was charged, as of OpUpTo and of shadows, a number for each charge comes last: 0 if it was not made, and
// else 1, and more by the tokens of an OpUpTo.

var idLifetime any = strconv.FormatInt(quota.IDWindow.Milliseconds(), 10)

// idKey returns the key of a charge's request id in Redis. It is never the key of a limit.
func (s *Store) idKey(c *quota.Charge) string {
	return string(driver.AppendIDKey([]byte(s.o.Prefix), quota.Group(c.Key), c.ID))
}

// recordHead returns the first bytes of the record of a grant: the charges' fingerprint.
func recordHead(cs []quota.Charge) string {
	sum := driver.Fingerprint(cs)
	return string(sum[:])
}

const headSize = 16

// replay decides charges again as the record of their grant says. It fails with ErrInvalid if the record is
// of other charges, and with ErrMisconfigured if it is no record.
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
	if marked(cs) && len(rest) != numberSize*len(cs) {
		return errState
	}
	granted := quota.Granted(out)
	for i := range out {
		// The limit's numbers may have changed since, and deny; the charge was granted all the same.
		out[i].Replayed = true
		mark := int64(1)
		if marked(cs) {
			mark = number(rest[numberSize*i:])
		}
		if mark == 0 {
			out[i].Allowed, out[i].Charged, out[i].Delay = false, 0, 0
			continue
		}
		out[i].Allowed, out[i].RetryAfter = true, 0
		switch cs[i].Op {
		case quota.OpTake, quota.OpDebit:
			out[i].Charged = cs[i].Cost
		case quota.OpAhead:
			if out[i].Charged = cs[i].Cost; !granted {
				out[i].Delay = cs[i].Request().Arg.Duration() // it was no longer
			}
		case quota.OpUpTo:
			out[i].Charged = mark - 1
		}
	}
	return nil
}

// marked reports whether the record of a grant to some charges ends with a number for each.
func marked(cs []quota.Charge) bool {
	return slices.ContainsFunc(cs, func(c quota.Charge) bool { return c.Op == quota.OpUpTo || c.Shadow })
}
