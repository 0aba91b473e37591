package resilience

import "github.com/fleetquota/fleetquota/quota"

// debt is the quota of a key that was admitted in the primary's place and is not yet charged to the primary.
//
// Invariant: 0 ≤ reserved ≤ owed, and by is set exactly while reserved is above 0. Only the reconciliation
// that reserved a part may end it, so no token is charged twice and none is dropped.
type debt struct {
	owed     int64
	reserved int64           // the part that a reconciliation carries
	by       *reconciliation // that reconciliation: in flight, or of unknown outcome

	// Times of the fallback's store. Admissions after from and up to upTo are settled or reserved; those up
	// to from belong to a state of the key that was dropped.
	from, upTo quota.Micros

	settlements []settlement // the latest ones, the oldest first
}

// settlement is a reconciliation that was charged: of the admissions after one time and up to another, by the
// clock of the fallback's store, at a time of the primary's clock.
type settlement struct{ after, upTo, at quota.Micros }

// maxSettlements is how many settlements are remembered for refunds.
const maxSettlements = 4

// admit adds n to the debt.
func (d *debt) admit(n int64) { d.owed = plus(d.owed, n) }

// refund lowers the debt by up to n.
func (d *debt) refund(n int64) { d.owed -= min(n, d.owed-d.reserved) }

// forgive drops n of the debt, which the key owed before the primary reset it; a reserved part stays.
func (d *debt) forgive(n int64) { d.owed = max(d.owed-n, d.reserved) }

// reserve gives the whole debt, which must be above 0, to a reconciliation. That must end with settle or
// cancel. upTo is the time of the latest admission.
func (d *debt) reserve(by *reconciliation, upTo quota.Micros) (amount int64, s settlement) {
	s = settlement{after: d.upTo, upTo: upTo}
	d.by, d.reserved, d.upTo = by, d.owed, max(d.upTo, upTo)
	return d.owed, s
}

// settle removes the reserved part: the primary has charged it.
func (d *debt) settle(s settlement) {
	d.owed -= d.reserved
	d.by, d.reserved = nil, 0
	if len(d.settlements) >= maxSettlements {
		d.settlements = append(d.settlements[:0], d.settlements[1:]...)
	}
	d.settlements = append(d.settlements, s)
}

// cancel ends the reservation: the primary has not charged it.
func (d *debt) cancel(s settlement) { d.by, d.reserved, d.upTo = nil, 0, s.after }

// isSettled reports whether an admission was charged to the primary, or may have been.
func (d *debt) isSettled(admitted quota.Micros) bool { return admitted <= d.upTo }

// chargedAt returns the primary's time at which it charged an admission, and 0 if it never did or if that is
// no longer known. now is the time for an admission that is being charged.
func (d *debt) chargedAt(admitted, now quota.Micros) quota.Micros {
	settled := d.from
	for _, s := range d.settlements {
		if admitted > s.after && admitted <= s.upTo {
			return s.at
		}
		settled = s.upTo
	}
	if admitted > settled && d.owed > 0 {
		return now
	}
	return 0
}
