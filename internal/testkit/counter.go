package testkit

import "github.com/fleetquota/fleetquota/quota"

// Counter is the smallest rule: a quota that never comes back. A test sets its spec.
type Counter struct {
	Capacity int64
	Rule     quota.Rule
	Unit     int64
	Debt     int64
}

func (c Counter) Spec() quota.Spec {
	s := quota.Spec{Rule: quota.Rule{'c', 't', '1'}, Unit: 1, Capacity: c.Capacity, Debt: c.Debt}
	if c.Rule != (quota.Rule{}) {
		s.Rule = c.Rule
	}
	if c.Unit != 0 {
		s.Unit = c.Unit
	}
	return s
}

func (c Counter) Decide(s quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	v := quota.Verdict{Outcome: quota.Outcome{Allowed: true}}
	kept := s.A
	switch r.Op {
	case quota.OpTake, quota.OpPeek:
		if r.Need() > c.Capacity-s.A {
			v.Allowed, v.RetryAfter = false, quota.Forever
		} else if r.Op == quota.OpTake {
			kept += r.Cost
		}
	case quota.OpDebit:
		kept += min(r.Cost, c.Capacity+c.Debt-kept)
	case quota.OpRefund:
		kept = max(kept-r.Cost, 0)
	case quota.OpReset:
		kept = 0
	}
	if kept != s.A {
		v.Write, s = true, quota.State{}
		if kept > 0 {
			s = quota.State{Unit: 1, A: kept}
		}
	}
	v.Remaining = c.Capacity - kept
	if kept > 0 {
		v.ResetAfter = quota.Forever
	}
	return s, v
}
