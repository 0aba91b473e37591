package resilience

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// known is the primary's last word on a key. Times are since the fallback's base unless they are in
// quota.Micros.
//
// Invariant: the key is never taken for fuller than the latest decision of the primary left it. An answer
// that cannot be put in order may only raise used and whole.
type known struct {
	version  uint32 // the number of decisions recorded
	answered bool   // there is a decision; otherwise the fields below are zero

	limit int64         // the capacity
	used  int64         // the capacity less the tokens that remained
	at    quota.Micros  // the primary's time of the decision
	seen  time.Duration // when the decision arrived
	whole time.Duration // when the quota is whole again if no call charges it
}

// record takes over a decision of the primary. inOrder says that the primary was asked after the last
// recorded decision had arrived. Otherwise the primary's clock tells which of the two is later, and in doubt
// the one that leaves less counts.
func (k *known) record(d *quota.Decision, now time.Duration, inOrder bool) {
	used, whole := d.Capacity-d.Remaining, plus(now, d.ResetAfter)
	switch {
	case d.Replayed && k.answered && d.At <= k.at:
	case inOrder && !d.Replayed, !k.answered, d.At > k.at:
		k.used, k.limit, k.at, k.seen, k.whole, k.answered = used, d.Capacity, d.At, now, whole, true
	default:
		k.used, k.limit, k.whole = max(k.used, used), d.Capacity, max(k.whole, whole)
	}
	k.version++
}

// usedOf returns how much of the limit is used at a time, refill counted in.
func (k *known) usedOf(l *quota.Limit, now time.Duration) int64 {
	return usedAfter(l, k.used, k.at, now-k.seen)
}

// weight returns how much fuller a key without a state would be taken to be, at a time: 0 if not at all, else the part
// of the limit that was used, in parts of wholeUse and rounded up, and mustKeep after a debt.
func (k *known) weight(now time.Duration) int64 {
	switch {
	case !k.answered || now >= k.whole || k.used <= 0:
		return 0
	case k.used > k.limit:
		return mustKeep
	}
	return (k.used*wholeUse + k.limit - 1) / k.limit
}
