package quota

import (
	"fmt"
	"math/bits"
	"strconv"
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
	// Shadow makes the charge one that never denies its list: it is made if the list is granted and it fits by itself, and
	// else charges nothing. Its decision says Shadow, and whether it fits. So a limit can be tried on real traffic before it
	// denies anything. A denied list charges its shadows as little as its other charges; a shadow alone is always granted.
	Shadow bool
	// Alternative is set by [Charger.TakeFirst]: the number of the list that the charge belongs to, from 1. Of such lists the
	// first that fits is charged. 0 says that all charges are one list.
	Alternative uint8
	// FloorOf makes Floor a part of the limit's capacity: with a Floor of 20 and a FloorOf of 100 a fifth of it must be left,
	// rounded up. 0 makes it a number of tokens. It must be at least Floor otherwise.
	FloorOf uint32
	// receipt is that of the decision that the charge corrects; zero for none, and for one that is not a Limiter's.
	receipt receipt
	// MadeAt is, for OpRefund, the time at which the refunded charge was made: Decision.At. Settle sets it for a debit too.
	MadeAt Micros
	// Within is, for OpAhead, the longest Decision.Delay that is accepted, in whole microseconds; any less is cut off. 0
	// accepts none, as OpTake does.
	Within time.Duration
	// Floor is, for OpTake, OpPeek, OpUpTo and OpHold, how many tokens must be left after the charge, 0 or more, or it is denied.
	// Cost alone is charged. So one limit serves classes of callers: with a floor of 200 of 1000 tokens, free callers stop
	// where 200 are left, and paid callers, without a floor, may take these too. RetryAfter counts the floor; a cost and
	// floor above the capacity are denied with RetryAfter Never. On a share of the limit the floor is the same part of the
	// share, rounded up. OpAhead has no floor, because it charges tokens that are not there yet; other operations ignore it.
	Floor int64
	// Held is, for OpSpend and OpRenew, how many tokens the hold has: Decision.Held.
	Held int64
	// Until is, for OpSpend and OpRenew, when the hold lapses: Decision.Until of the hold, or of its last renewal.
	Until Micros
	// Least is, for OpUpTo, the fewest tokens that are taken, up to Cost. With 0 a charge may take none and be allowed.
	Least int64
	// ID makes the call exactly-once: a store grants an id once and answers a repeat with the first decision, for at
	// least [IDWindow]. Only grants are remembered; a repeat of a denial is decided anew. The charges of one list must
	// carry the same id and belong to one group. An id that comes back with other charges is ErrInvalid. Ids count
	// within their group. At most 128 bytes of UTF-8. Without an id the call is charged at most once, see
	// ErrIndeterminate. The id of a call with OpSpend or OpRenew is remembered until IDWindow after the hold lapses, and
	// an OpSpend with an id that comes later is denied, with RetryAfter Never, for it may be a repeat.
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

	MaxTail   = 8320    // the most numbers of State.Tail
	MaxNumber = 1 << 53 // the largest magnitude of a number of a State: integers are exact in a double up to here

	maxID = 128
)

// Refund returns the charge that gives n tokens of c back, where d is the receipt, n at most d.Charged. A receipt is good
// for one Refund or Settle, see [Limiter.Refund]. If c has an ID, so has the refund, one of its own: then the receipt is
// good for one correction across processes, for [IDWindow]. The checks are those of [Check]. Where d is a hold, the charge ends
// the hold of n tokens, at most d.Held: an [OpSpend] of 0.
func (c Charge) Refund(d Decision, n int64) Charge {
	r := Charge{Limit: c.Limit, Key: c.Key, Cost: n, From: d.Source, receipt: d.receipt, ID: correctionID(c.ID)}
	if d.Until == 0 {
		r.Op, r.MadeAt = corrects(OpRefund, &d, n), d.At
	} else if r.Op = corrects(OpSpend, &d, n); r.Op == OpSpend {
		r.Cost, r.Held, r.Until = 0, n, d.Until
	}
	return r
}

// Settle returns the charge that corrects the receipt d to the actual cost, as [Charge.Refund] does: a refund of the
// surplus, or a debit of the shortfall. The settle of a shadow that was not charged changes nothing. Where d is a hold, the
// charge is the [OpSpend] of the actual cost.
func (c Charge) Settle(d Decision, actual int64) Charge {
	if d.Until != 0 && actual >= 0 {
		r := c.Refund(d, d.Held)
		r.Cost = actual
		return r
	}
	if d.Shadow && !d.Allowed && actual >= 0 {
		return c.Refund(d, 0)
	}
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

// Renew returns the charge that renews the hold of the receipt d, or of its last renewal: an [OpRenew]. It has no request id:
// renewed twice, a hold of this time of lapse is found no more, or another one in its place, so renew with the latest
// decision.
func (c Charge) Renew(d Decision) Charge {
	return Charge{Limit: c.Limit, Key: c.Key, Op: OpRenew, From: d.Source, Held: d.Held, Until: d.Until}
}

// Request returns the question to the limit's algorithm: the charge in numbers, of which OpAhead's Within, OpUpTo's Least and
// Until go where OpRefund has MadeAt, Held where others have the floor, and the floor is in tokens. A store sends these
// numbers on.
func (c *Charge) Request() Request {
	r := Request{Op: c.Op, Cost: c.Cost, Arg: c.MadeAt}
	switch c.Op {
	case OpAhead:
		r.Arg = min(Micros(c.Within/time.Microsecond), MaxNumber)
		return r
	case OpUpTo:
		r.Arg = Micros(min(c.Least, MaxNumber))
	case OpSpend, OpRenew:
		r.Arg, r.Floor = c.Until, c.Held
		return r
	case OpTake, OpPeek, OpHold:
	default:
		return r
	}
	if r.Floor = c.Floor; c.FloorOf != 0 {
		r.Floor = partOf(c.Limit.spec.Capacity, c.Floor, int64(c.FloorOf))
	}
	return r
}

// OnShare returns the charge on a share of its limit, or on the same limit with other numbers: a floor in tokens becomes
// the same part of the share's capacity, rounded up. A policy that decides on shares calls it.
func (c Charge) OnShare(share *Limit) Charge {
	if whole := c.Limit.spec.Capacity; c.Floor > 0 && c.FloorOf == 0 && c.Floor <= whole {
		c.Floor = partOf(share.spec.Capacity, c.Floor, whole)
	}
	c.Limit = share
	return c
}

// partOf returns n of all parts of a capacity, rounded up, for an n of at least 0 and at most all.
func partOf(capacity, n, all int64) int64 {
	hi, lo := bits.Mul64(uint64(capacity), uint64(n))
	part, rest := bits.Div64(hi, lo, uint64(all))
	if rest > 0 {
		part++
	}
	return int64(part)
}

// String describes the charge, such as `take 250 of tokens for "team-7/agent-123"`. It shows the key.
func (c Charge) String() string {
	limit := "the limiter's limit"
	if c.Limit != nil {
		limit = c.Limit.name
	}
	shadow := ""
	if c.Shadow {
		shadow = "shadow "
	}
	text := shadow + fmt.Sprintf("%s %d of %s for %q", c.Op, c.Cost, limit, c.Key)
	if c.Op == OpAhead {
		text += fmt.Sprintf(" within %v", c.Within)
	}
	if c.Op == OpUpTo {
		text += fmt.Sprintf(", at least %d,", c.Least)
	}
	if c.Op == OpSpend || c.Op == OpRenew {
		text += fmt.Sprintf(", of %d held until %s", c.Held, c.Until.Time().Format(timeForm))
	}
	switch {
	case c.Floor == 0:
	case c.FloorOf == 0:
		text += fmt.Sprintf(" above %d", c.Floor)
	default:
		text += fmt.Sprintf(" above %d of %d parts", c.Floor, c.FloorOf)
	}
	if c.ID != "" {
		text += fmt.Sprintf(", id %q", c.ID)
	}
	return text
}

// Check returns an ErrInvalid unless the charges are valid for a [Store]: 1 to [MaxCharges] of them, valid keys, costs
// of 0 or more, known operations, no limit and key twice, and one ID for all. An ID over several groups is
// ErrCrossSlot. Alternatives are numbered in order, have only charges that may be denied, and each limit and key once in
// each, with the same numbers of the limit. A [Limiter] checks its charges before the store sees them.
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
		if err := checkAlternative(cs, i); err != nil {
			return err
		}
		for j := range i {
			if cs[j].Key != cs[i].Key || cs[j].Limit.handle != cs[i].Limit.handle {
				continue
			}
			if cs[j].Alternative == cs[i].Alternative {
				return invalid("key of a second charge to limit "+cs[i].Limit.name, cs[i].Key, "each limit and key once in a call")
			}
			if cs[j].Limit.spec != cs[i].Limit.spec {
				return invalid("limit "+cs[i].Limit.name+" of an alternative", cs[i].Limit.spec.Capacity, "one limit of a name for a key in all alternatives")
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

// checkAlternative checks the number of charge i, and that it may be an alternative.
func checkAlternative(cs []Charge, i int) error {
	a, before := cs[i].Alternative, uint8(0)
	if i > 0 {
		before = cs[i-1].Alternative
	}
	switch {
	case a == 0 && before == 0:
	case a == 0, i > 0 && (before == 0 || a != before && a != before+1), i == 0 && a != 1:
		return invalid("alternative of charge "+strconv.Itoa(i), a, "0 for all charges, or numbers from 1 in order")
	case !cs[i].Op.Deniable():
		return invalid("operation of an alternative", cs[i].Op, "OpTake, OpPeek, OpAhead, OpUpTo, OpHold or OpRenew, which may be denied")
	}
	return nil
}

func (c *Charge) check() error {
	switch {
	case c.Limit == nil || c.Limit.algorithm == nil || c.Limit.err != nil:
		return c.Limit.Err()
	case !validKey(c.Key):
		return invalid("key", c.Key, keyForm)
	case c.Op >= opOfDenial && c.Op <= opExcessive:
		return c.checkCorrection()
	case c.Cost < 0:
		return invalid("cost", c.Cost, "0 or more")
	case c.MadeAt < 0 || c.MadeAt > MaxNumber:
		return invalid("time of the refunded charge", int64(c.MadeAt), "Decision.At")
	case c.Op >= opEnd:
		return invalid("operation", c.Op, "OpTake, OpPeek, OpDebit, OpRefund, OpReset, OpAhead, OpUpTo, OpHold, OpSpend or OpRenew")
	case c.Within != 0 && (c.Op != OpAhead || c.Within < 0):
		return invalid("Within of a "+c.Op.String(), c.Within, "0 or more for OpAhead, 0 for other operations")
	case c.Floor != 0 && (c.Floor < 0 || c.Op == OpAhead):
		return invalid("Floor of a "+c.Op.String(), c.Floor, "0 or more for OpTake, OpPeek, OpUpTo and OpHold, 0 for OpAhead")
	case c.Least != 0 && (c.Op != OpUpTo || c.Least < 0 || c.Least > c.Cost):
		return invalid("Least of a "+c.Op.String(), c.Least, "0 to the cost for OpUpTo, 0 for other operations")
	case c.FloorOf != 0 && c.Floor > int64(c.FloorOf):
		return invalid("Floor", c.Floor, fmt.Sprintf("up to FloorOf, %d", c.FloorOf))
	case c.ID != "" && (len(c.ID) > maxID || !utf8.ValidString(c.ID)):
		return invalid("request id", c.ID, "up to 128 bytes of UTF-8")
	case c.Op == OpSpend || c.Op == OpRenew:
		return c.checkHold()
	case c.Held != 0:
		return invalid("Held of a "+c.Op.String(), c.Held, "0 but for OpSpend and OpRenew")
	case c.Until != 0:
		return invalid("Until of a "+c.Op.String(), int64(c.Until), "0 but for OpSpend and OpRenew")
	}
	return nil
}

// checkHold checks the numbers of an OpSpend or OpRenew.
func (c *Charge) checkHold() error {
	switch {
	case c.Held < 0 || c.Held > MaxNumber:
		return invalid("Held of a "+c.Op.String(), c.Held, "Decision.Held of the hold")
	case c.Until <= 0 || c.Until > MaxNumber:
		return invalid("Until of a "+c.Op.String(), int64(c.Until), "Decision.Until of the hold")
	case c.Op == OpRenew && c.Cost != 0:
		return invalid("Cost of a renew", c.Cost, "0: Held says how many tokens are renewed")
	}
	return nil
}
