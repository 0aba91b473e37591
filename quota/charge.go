package quota

import (
	"fmt"
	"time"
	"unicode/utf8"
)

// A Charge is one request against one limit and key.
type Charge struct {
	// Limit is the rule. In a list given to a Limiter, nil stands for the limiter's own limit.
	Limit *Limit
	// Key is whose quota it is: a path, see the package documentation.
	Key string
	// Cost is in the limit's tokens, 0 or more.
	Cost int64
	// Op is what to do; the zero value takes.
	Op Op
	// From is, for a charge that Refund or Settle made, where the charge it corrects was made:
	// Decision.Source of the receipt. Stores ignore it; a policy sends the correction where it belongs.
	From Source
	// At is, for OpRefund, the time of the charge that is refunded: Decision.At.
	At Micros
	// ID makes the call exactly-once: a store grants an id once and answers a repeat with the first
	// decision, for at least [IDWindow]. Only grants are remembered; a repeat of a denial is decided
	// anew. The charges of one list carry the same id, belong to one group, and an id that comes back
	// with other charges is ErrInvalid. Ids count within their group. Empty: at most once, see
	// ErrIndeterminate. At most 128 bytes of UTF-8.
	ID string
}

// Bounds of calls.
const (
	MaxCharges = 64              // the longest list of charges
	MaxKey     = 512             // the longest key, in bytes
	IDWindow   = 5 * time.Minute // how long a store remembers the id of a grant, at least

	maxID = 128
)

// Source says where a decision was made.
type Source uint8

const (
	// FromStore: by the store, the only authority.
	FromStore Source = iota
	// FromFallback: by a fallback store, while the store could not be reached.
	FromFallback
	// FromOpen: by nobody; the store could not be reached and the policy admits then.
	FromOpen
	// FromClosed: by nobody; the store could not be reached and the policy denies then.
	FromClosed
	// FromMemory: by a memory of an earlier denial.
	FromMemory
	// FromLease: by this process, out of quota charged to the store before.
	FromLease
)

var sourceNames = [...]string{"store", "fallback", "open", "closed", "memory", "lease"}

// String returns the source's name in lower case.
func (s Source) String() string {
	if int(s) < len(sourceNames) {
		return sourceNames[s]
	}
	return "unknown"
}

// A Decision is the answer to a charge. A granted one is also its receipt: see [Charge.Refund] and
// [Charge.Settle].
type Decision struct {
	// Allowed says that the charge fits its own limit. In a list, the call is granted only if all are allowed.
	Allowed bool
	// Source says where the decision was made.
	Source Source
	// Split says that the list was decided in several steps, because its keys live apart: a denied
	// list may have held tokens for a moment.
	Split bool
	// Replayed says that the id was granted before, and this is the decision of that time.
	Replayed bool
	// Limit is the limit's capacity in tokens.
	Limit int64
	// Remaining is what can be taken now, after this call, in tokens; negative in debt.
	Remaining int64
	// Charged is what this call charged, in tokens: the cost where OpTake or OpDebit was granted, else 0.
	Charged int64
	// RetryAfter is 0 where allowed, else how long until the same charge fits if nobody else charges;
	// Never if it cannot.
	RetryAfter time.Duration
	// ResetAfter is how long until the quota is whole again if nobody charges.
	ResetAfter time.Duration
	// At is the store's time of the decision.
	At Micros
	_  [8]byte // whole 16s are copied without overlap, and so without a stall
}

// Refund returns the charge that gives n tokens of c back, where d is the receipt. Give a receipt back
// once only: nothing else keeps account. It carries no ID.
func (c Charge) Refund(d Decision, n int64) Charge {
	return Charge{Limit: c.Limit, Key: c.Key, Cost: n, Op: OpRefund, From: d.Source, At: d.At}
}

// Settle returns the charge that corrects what d charged to the actual cost: a refund of what was too
// much, or a debit of what was missing.
func (c Charge) Settle(d Decision, actual int64) Charge {
	if actual > d.Charged {
		return Charge{Limit: c.Limit, Key: c.Key, Cost: actual - d.Charged, Op: OpDebit, From: d.Source}
	}
	return c.Refund(d, d.Charged-actual)
}

// Check returns an ErrInvalid, or ErrCrossSlot for an ID over several groups, unless the charges are
// such as a Store takes: 1 to [MaxCharges] of them, valid keys, costs of at least 0, known operations,
// no limit and key twice, one ID for all.
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
