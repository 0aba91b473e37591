package quota

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash/maphash"
	"math/bits"
	"math/rand/v2"
	"slices"
	"sync"
	"time"
)

// correctionTime is how long a refund or settle may take where the caller's context ends sooner.
const correctionTime = 10 * time.Second

// receipt tells the decisions of a Limiter apart: a hash of limit and key, and a serial number. The zero receipt is of a
// decision that came from a Store itself. An array is copied whole, see Decision; a struct is copied number by number.
type receipt [2]uint64

// owner returns the hash of limit and key.
func (r receipt) owner() uint64 { return r[0] }

// receiptFor returns the receipt of a decision on a charge. The serial is drawn at random, for a counter would be shared
// by all callers. With a request id it is the id's: a repeat has the same receipt.
//
// A receipt is made before the store is asked: made after, it would be written and copied at once, at the price of a stall.
func receiptFor(c *Charge) receipt {
	serial := rand.Uint64()
	if c.ID != "" {
		serial = maphash.String(nameSeed, c.ID)
	}
	return receipt{c.hash(), serial | 1}
}

// hash returns a hash of the charge's limit and key, which begins with the secret one of the limit's name. It guards against
// mistakes and places no key in a table; the hash of package maphash takes twice as long.
func (c *Charge) hash() uint64 {
	h, rest := c.Limit.hash^uint64(len(c.Key)), c.Key
	for ; len(rest) >= 8; rest = rest[8:] {
		h = mix(h ^ word(rest))
	}
	last := uint64(0)
	for i := range len(rest) {
		last = last<<8 | uint64(rest[i])
	}
	return mix(h ^ last)
}

// mix returns a number of which every bit depends on every bit of x: both halves of a product, with 2^64 by the golden ratio.
func mix(x uint64) uint64 {
	hi, lo := bits.Mul64(x, 0x9e3779b97f4a7c15)
	return hi ^ lo
}

// Operations of corrections that no receipt allows.
const (
	opOfDenial  Op = 0xf0 + iota // the receipt is a denial, or gave tokens back itself
	opNegative                   // the actual cost or the refund is below 0
	opExcessive                  // the refund is above the receipt
)

// corrects returns the operation of a correction of d, unless it is not allowed.
func corrects(op Op, d *Decision, n int64) Op {
	switch {
	case !d.Allowed && !d.Shadow || d.Charged < 0:
		return opOfDenial
	case n < 0:
		return opNegative
	case op == OpRefund && n > d.Charged, op == OpSpend && n > d.Held:
		return opExcessive
	}
	return op
}

// checkCorrection returns the ErrInvalid of a correction that its receipt does not allow.
func (c *Charge) checkCorrection() error {
	switch c.Op {
	case opOfDenial:
		return invalid("receipt", "a denial or a refund", "a decision that charged or holds")
	case opNegative:
		return invalid("actual cost or refund", c.Cost, "0 or more")
	default:
		return invalid("refund", c.Cost, "at most Decision.Charged of the receipt, or Decision.Held of a hold")
	}
}

// checkLimit returns an ErrInvalid if the charge takes ahead or holds of a limit that cannot, or corrects a decision on another
// limit or key than its own. The limit must be the one that the limiter chose for the key.
func (c *Charge) checkLimit() error {
	if c.Op == OpAhead && !c.Limit.spec.Ahead {
		return invalid("operation", c.Op, fmt.Sprintf("OpTake, for the rule %s of limit %q forgets debt", c.Limit.spec.Rule, c.Limit))
	}
	if c.Op.Holds() && c.Limit.spec.TTL == 0 {
		return invalid("operation", c.Op, fmt.Sprintf("OpTake, for the rule %s of limit %q has no holds, see algorithm.Held", c.Limit.spec.Rule, c.Limit))
	}
	if c.receipt == (receipt{}) || c.receipt.owner() == c.hash() {
		return nil
	}
	return invalid("receipt", "a decision on another limit or key", fmt.Sprintf("one on limit %q and the key of the correction", c.Limit))
}

// correctionID returns the request id of the correction of a charge with an id. All corrections of a charge have the same,
// so that across processes the first is made and the others are refused.
func correctionID(id string) string {
	const suffix = "/correction"
	if id == "" {
		return ""
	}
	if len(id)+len(suffix) > maxID {
		sum := sha256.Sum256([]byte(id))
		id = hex.EncodeToString(sum[:])
	}
	return id + suffix
}

// correctsOnly reports whether a list only corrects receipts.
func correctsOnly(cs []Charge) bool {
	for i := range cs {
		if cs[i].receipt == (receipt{}) {
			return false
		}
	}
	return true
}

// outlive returns a context in which a correction is made though the caller's context ends: the tokens are used or not,
// whoever still waits for the answer.
func outlive(ctx context.Context) (context.Context, context.CancelFunc) {
	end := time.Now().Add(correctionTime)
	if deadline, ok := ctx.Deadline(); ok && deadline.After(end) {
		end = deadline
	}
	return context.WithDeadline(context.WithoutCancel(ctx), end)
}

// corrections remembers the corrections of receipts, the latest MaxCorrections. The zero value is ready to use.
type corrections struct {
	mu    sync.Mutex
	made  map[correctionKey]*correction
	order []correctionKey // oldest first, from next on
	next  int
}

type correctionKey struct {
	receipt receipt
	at      Micros
	hash    uint64
}

// correction is a refund or settle that was made, or is being made. decision, denied and err are set before done is closed.
type correction struct {
	op       Op
	cost     int64
	done     chan struct{}
	decision Decision
	denied   bool // its list was denied: it was not made
	err      error
}

// remembered reports whether a charge corrects a receipt of a Limiter, and only this process can tell whether it is the
// first to do so. With a request id the store tells.
func (c *Charge) remembered() bool { return c.receipt != (receipt{}) && c.ID == "" }

func (c *Charge) correctionKey() correctionKey { return correctionKey{c.receipt, c.MadeAt, c.hash()} }

// begin notes the corrections among some charges, and returns them by the charges' indexes, nil for the others. If a receipt
// was corrected before, it notes none, and returns those corrections as earlier.
func (m *corrections) begin(cs []Charge) (begun, earlier []*correction) {
	m.mu.Lock()
	defer m.mu.Unlock()
	begun, earlier = make([]*correction, len(cs)), make([]*correction, len(cs))
	any := false
	for i := range cs {
		if cs[i].remembered() {
			earlier[i] = m.made[cs[i].correctionKey()]
			any = any || earlier[i] != nil
		}
	}
	if any {
		return nil, earlier
	}
	for i := range cs {
		if cs[i].remembered() {
			begun[i] = &correction{op: cs[i].Op, cost: cs[i].Cost, done: make(chan struct{})}
			m.add(cs[i].correctionKey(), begun[i])
		}
	}
	return begun, nil
}

// add adds a correction, in the place of the oldest if there are too many. The caller holds m.mu.
func (m *corrections) add(k correctionKey, c *correction) {
	if m.made == nil {
		m.made = make(map[correctionKey]*correction)
	}
	if len(m.order) < MaxCorrections {
		m.order = append(m.order, k)
	} else {
		delete(m.made, m.order[m.next])
		m.order[m.next] = k
		m.next = (m.next + 1) % MaxCorrections
	}
	m.made[k] = c
}

// end notes what became of corrections. One that was certainly not made may be made again.
func (m *corrections) end(cs []Charge, begun []*correction, ds []Decision, err error) {
	granted := Granted(ds)
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, c := range begun {
		if c == nil {
			continue
		}
		if c.err, c.denied = err, err == nil && !granted; err == nil && granted {
			c.decision = ds[i]
		} else if c.denied || Charged(err) == NotCharged {
			if k := cs[i].correctionKey(); m.made[k] == c {
				delete(m.made, k)
			}
		}
		close(c.done)
	}
}

// repeated answers charges of which some were corrected before: with the answers of that time if all were, and alike. It
// reports true where a list that was to correct one of them has just been denied, so that it must be tried again.
func repeated(ctx context.Context, cs []Charge, earlier []*correction, ds []Decision) (again bool, err error) {
	for _, c := range earlier {
		if c == nil {
			continue
		}
		select {
		case <-c.done:
		case <-ctx.Done():
			return false, ctx.Err()
		}
		if c.denied {
			return true, nil
		}
	}
	for i, c := range earlier {
		if c == nil { // the list does more than it did before
			i = slices.IndexFunc(earlier, func(c *correction) bool { return c != nil })
			return false, invalid("receipt of a charge to limit "+cs[i].Limit.name, "corrected already", "a receipt once")
		}
	}
	for i, c := range earlier {
		if c.op != cs[i].Op || c.cost != cs[i].Cost {
			return false, invalid("receipt", fmt.Sprintf("corrected already, by a %s of %d", c.op, c.cost), "a receipt once")
		}
		if c.err != nil {
			return false, c.err
		}
		ds[i] = c.decision
		ds[i].Replayed = true
	}
	return false, nil
}
