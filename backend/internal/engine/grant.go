package engine

import (
	"fmt"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The record of a grant under a request id is recordHead, the time and, for each charge, the length and the
// bytes of the state it was decided on. From these the same decisions are made again. Where it does not follow from the
// charges how much was charged, as of OpUpTo, of shadows and of alternatives, a number for each charge comes last: 0 if it is
// of an alternative that was not taken, 1 if it is a shadow that was not made, and else 2, and more by the tokens of an OpUpTo, or by the time at which a hold lapses.
// A script knows of no more than maxCost tokens: see replay. A key that several alternatives have has one state.
//
// A batch has the ids of several calls. Each of its lists finds the record of its id, or is decided and recorded, with the
// states that the batch had come to by then. So a list finds also the record of a list before it in the batch.

// idKey returns the key of a charge's request id in Redis. It is never the key of a limit.
func (s *Store) idKey(c *quota.Charge) string {
	buf := make([]byte, 0, 128)
	return string(driver.AppendIDKey(append(buf, s.o.Prefix...), quota.Group(c.Key), c.ID))
}

// recordHead returns the first bytes of the record of a grant: the charges' fingerprint.
func recordHead(cs []quota.Charge) string {
	sum := driver.Fingerprint(cs)
	return string(sum[:])
}

const headSize = 16

// head returns the beginning of the record of a list's grant, as batch.lua reads it.
func (q *list) head() any {
	switch {
	case driver.OnlyPeeks(q.charges):
		return none
	case marked(q.charges):
		return recordHead(q.charges) + "+"
	}
	return recordHead(q.charges)
}

// replay gives a list with a request id the decisions of its record, element i of a reply, and reports whether there is one.
// An error is about the reply.
func (q *list) replay(r Reply, i int) (found bool, err error) {
	grant, text := r.Text(i)
	if n, ok := r.Int(i); !text && (!ok || n != 0) {
		return false, badReply(r)
	}
	switch {
	case !text:
		q.err = errType
	case grant == "":
		return false, nil
	default:
		q.err = Catch("an algorithm", true, func() error { return replay(grant, q.charges, q.decisions) })
	}
	return true, nil
}

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
		if j := slices.IndexFunc(cs[:i], func(c quota.Charge) bool {
			return c.Alternative != cs[i].Alternative && c.Key == cs[i].Key && c.Limit.Handle() == cs[i].Limit.Handle()
		}); j >= 0 {
			items[i] = items[j]
			continue
		}
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
		mark := int64(2)
		if marked(cs) {
			mark = number(rest[numberSize*i:])
		}
		if mark < 2 {
			if out[i].Charged, out[i].Delay, out[i].Held, out[i].Until = 0, 0, 0, 0; mark == 1 {
				out[i].Allowed = false // also where the limit's numbers admit it now
			}
			continue
		}
		out[i].Allowed, out[i].RetryAfter = true, 0
		switch cs[i].Op {
		case quota.OpTake, quota.OpDebit, quota.OpSpend:
			out[i].Charged = cs[i].Cost
		case quota.OpHold, quota.OpRenew: // also where the limit's TTL is another now
			out[i].Held, out[i].Until = cs[i].Cost+cs[i].Held, quota.Micros(mark-2)
		case quota.OpAhead:
			if out[i].Charged = cs[i].Cost; !granted {
				out[i].Delay = cs[i].Request().Arg.Duration() // it was no longer
			}
		case quota.OpUpTo:
			switch taken := mark - 2; {
			case taken < maxCost:
				out[i].Charged = taken
			case out[i].Charged < maxCost: // the limit was one without end, which keeps no state, and is no longer
				out[i].Charged = cs[i].Cost
			}
		}
	}
	if cs[0].Alternative > 0 {
		denyBefore(rest, out)
	}
	return nil
}

// denyBefore has the alternatives before the one that was taken be denied, as they were: the limits' numbers may have changed.
func denyBefore(marks string, out []quota.Decision) {
	for range out {
		from, to := driver.Made(out)
		for i := from; i < to; i++ {
			if number(marks[numberSize*i:]) > 0 {
				return
			}
			out[i].Allowed = false
		}
	}
}

// marked reports whether the record of a grant to some charges ends with a number for each.
func marked(cs []quota.Charge) bool {
	return slices.ContainsFunc(cs, func(c quota.Charge) bool {
		return c.Op == quota.OpUpTo || c.Op == quota.OpHold || c.Op == quota.OpRenew || c.Shadow || c.Alternative > 0
	})
}
