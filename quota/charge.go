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
	// receipt is that of the decision that the charge corrects; zero for none, and for one that is not a Limiter's.
	receipt receipt
	// At is, for OpRefund, the time of the charge that is refunded: Decision.At. Settle sets it for a debit too.
	At Micros
	// Within is, for OpAhead, the longest Decision.Delay that is accepted, in whole microseconds; any less is cut off. 0
	// accepts none, as OpTake does.
	Within time.Duration
	// ID makes the call exactly-once: a store grants an id once and answers a repeat with the first decision, for at
	// least [IDWindow]. Only grants are remembered; a repeat of a denial is decided anew. The charges of one list must
	// carry the same id and belong to one group. An id that comes back with other charges is ErrInvalid. Ids count
	// within their group. At most 128 bytes of UTF-8. Without an id the call is charged at most once, see
	// ErrIndeterminate.
	ID string
}

// Bounds of a call, and of a [State].
const (
	MaxCharges = 64              // the longest list of charges
	MaxKey     = 512             // the longest key, in bytes
	IDWindow   = 5 * time.Minute // how long a store remembers the id of a grant, at least

	// MaxCorrections is how many refunds and settles a Limiter remembers, in about 200 bytes each, so that a second
	// one of the same receipt is answered without asking the store.
	MaxCorrections = 1 << 16

	MaxTail   = 8192    // the most numbers of State.Tail
	MaxNumber = 1 << 53 // the largest magnitude of a number of a State: integers are exact in a double up to here

	maxID = 128
)

// Refund returns the charge that gives n tokens of c back, where d is the receipt, n at most d.Charged. A receipt is good
// for one Refund or Settle, see [Limiter.Refund]. If c has an ID, so has the refund, one of its own: then the receipt is
// good for one correction across processes, for [IDWindow]. The checks are those of [Check].
func (c Charge) Refund(d Decision, n int64) Charge {
	return Charge{Limit: c.Limit, Key: c.Key, Cost: n, Op: corrects(OpRefund, &d, n), From: d.Source, receipt: d.receipt, At: d.At, ID: correctionID(c.ID)}
}

// Settle returns the charge that corrects the receipt d to the actual cost, as [Charge.Refund] does: a refund of the
// surplus, or a debit of the shortfall.
func (c Charge) Settle(d Decision, actual int64) Charge {
	if actual > d.Charged {
		r := c.Refund(d, 0)
		r.Cost, r.Op = actual-d.Charged, corrects(OpDebit, &d, actual)
		return r
	}
	if actual < 0 {
		r := c.Refund(d, actual)
		r.Op = opNegative
		return r
	}
	return c.Refund(d, d.Charged-actual)
}

// Request returns the question to the limit's algorithm: the charge in numbers, of which OpAhead's Within goes where
// OpRefund has At. A store sends these numbers on.
func (c *Charge) Request() Request {
	r := Request{Op: c.Op, Cost: c.Cost, At: c.At}
	if c.Op == OpAhead {
		r.At = min(Micros(c.Within/time.Microsecond), MaxNumber)
	}
	return r
}

// String describes the charge, such as `take 250 of tokens for "team-7/agent-123"`. It shows the key.
func (c Charge) String() string {
	limit := "the limiter's limit"
	if c.Limit != nil {
		limit = c.Limit.name
	}
	text := fmt.Sprintf("%s %d of %s for %q", c.Op, c.Cost, limit, c.Key)
	if c.Op == OpAhead {
		text += fmt.Sprintf(" within %v", c.Within)
	}
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
		if err := cs[i].checkLimit(); err != nil {
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
	case c.Op >= opOfDenial && c.Op <= opExcessive:
		return c.checkCorrection()
	case c.Cost < 0:
		return invalid("cost", c.Cost, "0 or more")
	case c.At < 0 || c.At > MaxNumber:
		return invalid("time of the refunded charge", int64(c.At), "Decision.At")
	case c.Op >= opEnd:
		return invalid("operation", c.Op, "OpTake, OpPeek, OpDebit, OpRefund, OpReset or OpAhead")
	case c.Within != 0 && (c.Op != OpAhead || c.Within < 0):
		return invalid("Within of a "+c.Op.String(), c.Within, "0 or more for OpAhead, 0 for other operations")
	case c.ID != "" && (len(c.ID) > maxID || !utf8.ValidString(c.ID)):
		return invalid("request id", c.ID, "up to 128 bytes of UTF-8")
	}
	return nil
}
