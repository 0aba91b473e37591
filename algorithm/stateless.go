package algorithm

import (
	"math"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// stateless answers every request alike: it admits costs up to its capacity, and keeps no state.
type stateless struct {
	rule     quota.Rule
	capacity int64
}

// DenyAll and Unlimited keep no state: they decide beside the state of any other rule under the limit's name, and
// never change it. A limit that becomes one of them and later its old rule again goes on where it was, as far as time
// has not repaid it. A debit is allowed, and is forgotten; a refund gives nothing back; a reset leaves another rule's
// state as it is.
//
// DenyAll denies every cost above 0, for ever: RetryAfter is [quota.Never], and Capacity and Remaining are 0. A capacity
// of 0 of any other rule denies as much, and keeps the debits of that rule.
//
// Unlimited admits every cost, at once also where it is taken ahead. Capacity and Remaining of its decisions are
// math.MaxInt64, whatever was charged.
var (
	DenyAll   quota.Algorithm = &stateless{rule: quota.Rule{'d', 'e', 'n', 'y', 'a', 'l', 'l'}}
	Unlimited quota.Algorithm = &stateless{rule: quota.Rule{'u', 'n', 'l', 'i', 'm'}, capacity: math.MaxInt64}
)

var _ driver.OneSharer = (*stateless)(nil)

func (s *stateless) Spec() quota.Spec {
	return quota.Spec{Rule: s.rule, Capacity: s.capacity, Ahead: true, Params: [8]int64{min(s.capacity, 1)}}
}

func (s *stateless) Decide(_ quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	v := quota.Verdict{Outcome: quota.Outcome{Allowed: true}, Remaining: s.capacity}
	if r.Op.Deniable() && r.Need() > s.capacity {
		v.Allowed, v.RetryAfter = false, forever
	}
	return quota.State{}, v
}

// Share returns the rule itself: it has no number that instances could share.
func (s *stateless) Share(int64) (quota.Algorithm, error) { return s, nil }

// ShareAtLeastOne is Share.
func (s *stateless) ShareAtLeastOne(int64) (quota.Algorithm, error) { return s, nil }
