package quota

import (
	"fmt"
	"strings"
	"time"
)

// Source says where a decision was made. The zero Source is the store.
type Source uint8

const (
	// FromStore: by the store, the only authority.
	FromStore Source = iota
	// FromFallback: by a fallback store, while the store could not be reached, or later on a hold that it made meanwhile.
	FromFallback
	// FromOpen: by a policy that admits while the store cannot be reached.
	FromOpen
	// FromClosed: by a policy that denies while the store cannot be reached.
	FromClosed
	// FromMemory: by a memory of an earlier denial.
	FromMemory
	// FromLease: by this process, out of quota that was charged to the store before.
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

// A Decision is the answer to a charge. A granted one is also its receipt, see [Limiter.Refund] and
// [Limiter.Settle].
type Decision struct {
	// Allowed says that the charge fits its own limit. A list is granted only if all of its decisions are allowed, but those
	// of shadows.
	Allowed bool
	// Source says where the decision was made.
	Source Source
	// Split says that the list was decided in several steps, because its keys live on several nodes: a denied list
	// may have held tokens for a moment.
	Split bool
	// Replayed says that the request id was granted before: this is the decision of that time.
	Replayed bool
	// Shadow says that the charge was a shadow, see Charge.Shadow: it denied no list, and was made only if it is Allowed.
	Shadow bool
	// Alternative is that of the charge. The charges of the first alternative that fits were made, and no others.
	Alternative uint8
	_           [2]byte
	// Capacity is the limit's capacity in tokens; 0 where the limit, or this process's share of it, admits no token.
	Capacity int64
	// Remaining is the tokens that can be taken after this call; negative in debt.
	Remaining int64
	// Charged is the tokens that this call charged: the cost where OpTake, OpAhead, OpDebit or OpSpend was granted, and up to that
	// where OpUpTo was. It is below 0 where OpRefund or OpReset gave tokens back: as many more can be taken. Otherwise it is 0.
	Charged int64
	// RetryAfter is 0 where allowed, else the time until the same charge fits, if no other charge comes in between.
	// It is Never, which is 292 years, if the charge can never fit: test for it before sleeping.
	RetryAfter time.Duration
	// ResetAfter is the time until the quota is whole again, if no other charge comes in between.
	ResetAfter time.Duration
	// Delay is the time until the tokens that OpAhead charged may be used, counted from At: until refill has repaid
	// the debt. It is at most Charge.Within, and 0 for other operations.
	Delay time.Duration
	// Held is the tokens that this call holds until Until: the cost of a granted OpHold, and Charge.Held of a granted OpRenew. It
	// is 0 for other operations. Held tokens are not charged: of OpHold Charged is 0, and of OpSpend the cost.
	Held int64
	// Until is the store's time at which the tokens of a granted OpHold or OpRenew come back by themselves, and which names the
	// hold to OpSpend and OpRenew, also after the limit's TTL was changed. It is 0 for other operations, and for a hold that
	// no store has made, because a policy admitted it.
	Until Micros
	// At is the store's time of the decision.
	At Micros
	// receipt is set by a Limiter. A decision is copied in pieces of 16 bytes, and a copy waits where smaller pieces were
	// written just before: so the receipt is one piece, and the size a multiple.
	receipt receipt
}

// RetryAt returns the store's time at which the same charge fits, if no other charge comes in between: At and RetryAfter,
// and At itself where the charge was allowed. The result is false where the charge can never fit, and where the decision
// does not tell the store's time, as those of policies that decide without a store.
func (d Decision) RetryAt() (at time.Time, ever bool) {
	if d.RetryAfter == Never || d.At == 0 {
		return time.Time{}, false
	}
	return d.At.Time().Add(d.RetryAfter), true
}

// timeForm is how texts write the store's time.
const timeForm = "2006-01-02T15:04:05.000000Z"

// String describes the decision in one line, such as
//
//	allowed by the store: charged 250, 750 of 1000 left, whole after 25s, at 2026-11-24T10:47:12.123456Z
//	denied by the store: 50 of 1000 left, retry after 20s, whole after 1m35s, at 2026-11-24T10:47:12.123456Z
func (d Decision) String() string {
	var b strings.Builder
	verdict := "denied"
	if d.Allowed {
		verdict = "allowed"
	}
	fmt.Fprintf(&b, "%s by the %s: ", verdict, d.Source)
	switch {
	case d.Charged > 0:
		fmt.Fprintf(&b, "charged %d, ", d.Charged)
	case d.Charged < 0:
		fmt.Fprintf(&b, "gave %d back, ", -d.Charged)
	}
	if d.Until != 0 {
		fmt.Fprintf(&b, "holds %d until %s, ", d.Held, d.Until.Time().Format(timeForm))
	}
	fmt.Fprintf(&b, "%d of %d left", d.Remaining, d.Capacity)
	for _, span := range [...]struct {
		name string
		d    time.Duration
	}{{"usable", d.Delay}, {"retry", d.RetryAfter}, {"whole", d.ResetAfter}} {
		switch span.d {
		case 0:
		case Never:
			fmt.Fprintf(&b, ", %s never", span.name)
		default:
			fmt.Fprintf(&b, ", %s after %v", span.name, span.d)
		}
	}
	if d.At != 0 {
		fmt.Fprintf(&b, ", at %s", d.At.Time().Format(timeForm))
	}
	if d.Split {
		b.WriteString(", split")
	}
	if d.Replayed {
		b.WriteString(", replayed")
	}
	if d.Shadow {
		b.WriteString(", shadow")
	}
	return b.String()
}
