package quota

import (
	"fmt"
	"time"
	"unicode/utf8"
)

// A Charge is one request against one limit and key. Its zero value is not valid: it needs a key, and, given to a
// [Store], a limit.
type Charge struct {
	// Limit is the rule. In a list given to a Limiter, nil stands for the limiter's own limit.
	Limit *Limit
	// Key names the quota's owner: a path, see the package documentation; 1 to MaxKey bytes of UTF-8.
	Key string
	// Cost is in the limit's tokens, 0 or more.
	Cost int64
	// Op is the operation; the zero value takes.
	Op Op
	// From is set by Refund and Settle to Decision.Source of the receipt: where the corrected charge was made. Stores
	// ignore it; a policy sends the correction to that place.
	From Source
	// At is, for OpRefund, the time of the charge that is refunded: Decision.At.
	At Micros
	// ID makes the call exactly-once: a store grants an id once and answers a repeat with the first decision, for at
	// least [IDWindow]. Only grants are remembered; a repeat of a denial is decided anew. The charges of one list must
	// carry the same id and belong to one group. An id that comes back with other charges is ErrInvalid. Ids count
	// within their group. At most 128 bytes of UTF-8. Without an id the call is charged at most once, see
	// ErrIndeterminate.
	ID string
}

// Bounds of a call.
const (
	MaxCharges = 64              // the longest list of charges
	MaxKey     = 512             // the longest key, in bytes
	IDWindow   = 5 * time.Minute // how long a store remembers the id of a grant, at least

	maxID = 128
)

// Refund returns the charge that gives n tokens of c back, where d is the receipt. A receipt must be given back once
// only, and for no more than d.Charged: a list does not check it. The charge carries no ID.
func (c Charge) Refund(d Decision, n int64) Charge {
	return Charge{Limit: c.Limit, Key: c.Key, Cost: n, Op: OpRefund, From: d.Source, At: d.At}
}

// Settle returns the charge that corrects the receipt d to the actual cost: a refund of the surplus, or a debit of
// the shortfall.
func (c Charge) Settle(d Decision, actual int64) Charge {
	if actual > d.Charged {
		return Charge{Limit: c.Limit, Key: c.Key, Cost: actual - d.Charged, Op: OpDebit, From: d.Source}
	}
	return c.Refund(d, d.Charged-actual)
}

// String describes the charge, such as `take 250 of tokens for "team-7/agent-123"`. It shows the key.
func (c Charge) String() string {
	limit := "the limiter's limit"
	if c.Limit != nil {
		limit = c.Limit.name
	}
	text := fmt.Sprintf("%s %d of %s for %q", c.Op, c.Cost, limit, c.Key)
	if c.ID != "" {
		text += fmt.Sprintf(", id %q", c.ID)
	}
	return text
}

// Check returns an ErrInvalid unless the charges are valid for a [Store]: 1 to [MaxCharges] of them, valid keys, costs
// of 0 or more, known operations, no limit and key twice, and one ID for all. An ID over several groups is
// ErrCrossSlot. A [Limiter] checks its charges before the store sees them.
func Check(cs []Charge) error {
	if len(cs) == 0 || len(cs) > MaxCharges {
		return invalid("number of charges", len(cs), fmt.Sprintf("1 to %d", MaxCharges))
	}
	for i := range cs {
		if err := cs[i].check(); err != nil {
			return err
		}
		for j := range i {
			if cs[j].Key == cs[i].Key && cs[j].Limit.handle == cs[i].Limit.handle {
				return invalid("key of a second charge to limit "+cs[i].Limit.name, cs[i].Key, "each limit and key once in a call")
			}
		}
		if cs[i].ID != cs[0].ID {
			return invalid("request id of charge "+cs[i].Limit.name, cs[i].ID, "the id of the first charge")
		}
		if cs[i].ID != "" && Group(cs[i].Key) != Group(cs[0].Key) {
			return fmt.Errorf("quota: %w: a request id holds within one group", ErrCrossSlot)
		}
	}
	return nil
}

func (c *Charge) check() error {
	switch {
	case c.Limit == nil || c.Limit.algorithm == nil:
		return invalid("limit", "nil", "a limit that NewLimit made")
	case !validKey(c.Key):
		return invalid("key", c.Key, keyForm)
	case c.Cost < 0:
		return invalid("cost", c.Cost, "0 or more")
	case c.At < 0 || c.At > MaxNumber:
		return invalid("time of the refunded charge", int64(c.At), "Decision.At")
	case c.Op >= opEnd:
		return invalid("operation", c.Op, "OpTake, OpPeek, OpDebit, OpRefund or OpReset")
	case c.ID != "" && (len(c.ID) > maxID || !utf8.ValidString(c.ID)):
		return invalid("request id", c.ID, "up to 128 bytes of UTF-8")
	}
	return nil
}
