package mutant

import (
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// heldMark is where the first number of a tail of algorithm.Held begins, to which the number of pairs is added.
const heldMark = 1<<53 - 64

// lapses returns a state whose holds lapse so much later.
func lapses(s quota.State, by int64) quota.State {
	if len(s.Tail) > 0 && s.Tail[0] > heldMark {
		s.Tail = slices.Clone(s.Tail)
		for i := range s.Tail[0] - heldMark {
			s.Tail[2+2*i] += by
		}
	}
	return s
}

// heldAsked alters the input of a rule with holds, and another one of its name has other numbers.
func heldAsked(f func(a quota.Algorithm, s *quota.State, r *quota.Request, now quota.Micros)) func(bool) []quota.Algorithm {
	return func(fault bool) []quota.Algorithm {
		own, other := algorithm.Held(bucket(10), time.Second), algorithm.Held(bucket(10), 3*time.Second+time.Millisecond)
		return []quota.Algorithm{altered{own, fault, func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			if fault {
				f(a, &s, &r, now)
			}
			return a.Decide(s, r, now)
		}}, other}
	}
}

// holders are the mutants of A22.
func holders() []Algorithm {
	const (
		holds, spends, renews = "OpHold holds the tokens that a take would get", "OpSpend ends it by its receipt", "OpRenew moves the held tokens"
	)
	on := func(op quota.Op, f func(a quota.Algorithm, s *quota.State, r *quota.Request, now quota.Micros)) func(bool) []quota.Algorithm {
		return heldAsked(func(a quota.Algorithm, s *quota.State, r *quota.Request, now quota.Micros) {
			if r.Op == op {
				f(a, s, r, now)
			}
		})
	}
	return []Algorithm{
		{"a hold leaves a token", "A22", holds, "want: as a take", on(quota.OpHold, func(_ quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) { r.Floor++ })},
		{"a hold is charged", "A22", holds, "before a hold lapses", on(quota.OpHold, func(_ quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) { r.Op = quota.OpTake })},
		{"a peek does not count held tokens", "A22", holds, "before a hold lapses", on(quota.OpPeek, func(_ quota.Algorithm, s *quota.State, _ *quota.Request, _ quota.Micros) {
			if len(s.Tail) > 0 && s.Tail[0] > heldMark {
				s.Tail = nil
			}
		})},
		{"the list of the rule inside is lost when tokens are held", "A22", holds, "before a hold lapses", bend(algorithm.Held(log(), time.Second), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Op == quota.OpHold && v.Write {
				next.A, next.Tail = 0, next.Tail[:2+2*(next.Tail[0]-heldMark)]
			}
			return next, v
		})},
		{"a hold lapses a microsecond early", "A22", "until Spec.Lapse", "before a hold lapses", on(quota.OpPeek, func(_ quota.Algorithm, s *quota.State, _ *quota.Request, _ quota.Micros) { *s = lapses(*s, -1) })},
		{"a hold lapses a microsecond late", "A22", "no longer", "when a hold has lapsed", on(quota.OpPeek, func(_ quota.Algorithm, s *quota.State, _ *quota.Request, _ quota.Micros) { *s = lapses(*s, 1) })},
		{"a spend leaves the hold", "A22", spends, "as a debit without the hold", on(quota.OpSpend, func(_ quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) { r.Op = quota.OpDebit })},
		{"a spend ends the hold that lapses first", "A22", spends, "is ended by one until", on(quota.OpSpend, func(_ quota.Algorithm, s *quota.State, r *quota.Request, _ quota.Micros) {
			if len(s.Tail) > 0 && s.Tail[0] > heldMark {
				r.Arg = quota.Micros(s.Tail[2])
			}
		})},
		{"a hold is known by the time at which it was made, so not under another TTL", "A22", "at any TTL", "is released by", on(quota.OpSpend, func(a quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) {
			spec := a.Spec()
			r.Arg = spec.Lapse(r.Arg - quota.Micros(spec.TTL.Microseconds()))
		})},
		{"slots of another TTL are made those of the limit's own", "A22", "at any TTL", "is released by", heldAsked(func(a quota.Algorithm, s *quota.State, _ *quota.Request, _ quota.Micros) {
			spec := a.Spec()
			if len(s.Tail) > 0 && s.Tail[0] > heldMark {
				s.Tail = slices.Clone(s.Tail)
				for i := range s.Tail[0] - heldMark {
					until := &s.Tail[2+2*i]
					*until = int64(spec.Lapse(quota.Micros(*until - spec.TTL.Microseconds())))
				}
			}
		})},
		{"a spend is not charged", "A22", "charges its cost", "as a debit without the hold", on(quota.OpSpend, func(_ quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) { r.Cost = 0 })},
		{"a renewal moves nothing", "A22", renews, "is renewed 1 µs before", on(quota.OpRenew, func(_ quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) { r.Arg++ })},
		{"a renewal is granted and moves nothing", "A22", renews, "has not lapsed", on(quota.OpRenew, func(_ quota.Algorithm, _ *quota.State, r *quota.Request, _ quota.Micros) { r.Floor = 0 })},
		{"a renewal holds tokens that are not held", "A22", "brings nothing back", "are renewed after", bend(algorithm.Held(bucket(10), time.Second), func(fault bool, a quota.Algorithm, s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
			next, v := a.Decide(s, r, now)
			if fault && r.Op == quota.OpRenew && !v.Allowed {
				return a.Decide(s, quota.Request{Op: quota.OpHold, Cost: r.Floor}, now)
			}
			return next, v
		})},
	}
}

// unrecorded is a mutant that does not remember the ids of some calls that end or renew holds.
func unrecorded(name string, some func(c *quota.Charge, d *quota.Decision) bool) *Store {
	return &Store{Name: name, Rule: "C3", Clause: "a request id is granted once", Case: "finishes", Says: "the id was granted to", alter: func(p *parts) {
		p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
			g, keep := sound().record(cs, out)
			return g, keep && !(p.fault && some(&cs[0], &out[0]))
		}
	}}
}

// heldStores are the mutants of stores that concern holds.
func heldStores() []*Store {
	const verdicts = "verdicts are those of Apply"
	return []*Store{
		{Name: "a hold is sent as a take", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpHold {
				c.Op = quota.OpTake
			}
		})},
		{Name: "the floor of a hold is not sent", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpHold {
				c.Floor, c.FloorOf = 0, 0
			}
		})},
		{Name: "the time of lapse is rounded to milliseconds", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in", alter: charging(func(c *quota.Charge) { c.Until -= c.Until % 1000 })},
		{Name: "a spend gives back as many tokens as it costs", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpSpend {
				c.Held = min(c.Held, c.Cost)
			}
		})},
		{Name: "a renewal is sent as another hold", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpRenew {
				c.Op, c.Cost, c.Held, c.Until = quota.OpHold, c.Held, 0, 0
			}
		})},
		{Name: "a hold's receipt is the time at which it was made", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in Until", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			if d.Until > 0 {
				d.Until = d.At
			}
		})},
		{Name: "a hold is told as charged", Rule: "S1", Clause: verdicts, Case: "holds", Says: "differing in Charged", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.Charged += d.Held })},
		{Name: "a denied renewal in a list is told as the peek in its place", Rule: "S2", Clause: "a list is charged whole", Case: "holds", Says: "differing in Allowed", alter: telling(func(c *quota.Charge, d *quota.Decision) {
			if c.Op == quota.OpRenew && !d.Allowed {
				d.Allowed, d.RetryAfter = true, 0
			}
		})},
		{Name: "a limit that gets holds begins anew", Rule: "C2", Clause: "limits with one name and different numbers share their consumption", Case: "a limit gets holds", Says: "differing in Remaining", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range items {
					if p.fault && items[i].Rule != (quota.Rule{}) && items[i].Rule == cs[i].Limit.Spec().Reads {
						items[i] = driver.Item{}
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a repeated hold lapses by the limit's TTL of now", Rule: "C3", Clause: "repeated faithfully", Case: "holds of another TTL", Says: "differing in Until", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					if p.fault && err == nil && out[i].Until > 0 && cs[i].Limit.TTL() > 0 {
						out[i].Until = cs[i].Limit.Spec().Lapse(out[i].At)
					}
				}
				return err
			}
		}},
		unrecorded("a release that is repeated gives back another's tokens", func(c *quota.Charge, d *quota.Decision) bool {
			return c.Op == quota.OpSpend && d.At < c.Until
		}),
		unrecorded("a renewal that is repeated moves another's tokens", func(c *quota.Charge, _ *quota.Decision) bool { return c.Op == quota.OpRenew }),
		unrecorded("a spend after the lapse is charged again by its repeat", func(c *quota.Charge, d *quota.Decision) bool {
			return c.Op == quota.OpSpend && d.At >= c.Until
		}),
		{Name: "the id of a finish is forgotten before another call can no longer end the hold", Rule: "C3", Clause: "a request id is granted once", Case: "lives of finishes", Says: "the id was granted to", alter: func(p *parts) {
			if p.fault {
				p.lifetime = func([]quota.Charge, quota.Micros) time.Duration { return 0 }
			}
		}},
		{Name: "the id of a renewal is forgotten IDWindow after it", Rule: "C3", Clause: "a request id is granted once", Case: "lives of finishes", Says: "the id was granted to", alter: func(p *parts) {
			p.lifetime = func(cs []quota.Charge, now quota.Micros) time.Duration {
				if p.fault && cs[0].Op == quota.OpRenew {
					return 0
				}
				return sound().lifetime(cs, now)
			}
		}},
	}
}
