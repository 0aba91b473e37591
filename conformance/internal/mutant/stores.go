package mutant

import (
	"context"
	"errors"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Store is a broken store.
type Store struct {
	Name   string // the fault
	Rule   string // the rule of conformance.Run that it breaks
	Clause string // the part of the rule's text that it breaks
	Case   string // the case of the rule that finds it
	Says   string // a part of the failure's text that names the fault; "a | b" is either, of a fault that shows in two ways
	Grade  driver.Atomicity
	// OwnClock says that the suite cannot set the store's clock.
	OwnClock bool
	// ClientClock says that the store goes by the clocks of its handles.
	ClientClock bool
	Races       bool // whether the fault is a data race too
	alter       func(*parts)
}

// Sound is the store without a fault.
var Sound = &Store{Name: "no fault"}

// telling alters decisions.
func telling(f func(c *quota.Charge, d *quota.Decision)) func(*parts) {
	return func(p *parts) {
		p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
			for i := range out {
				if p.fault {
					f(&cs[i], &out[i])
				}
			}
			return err
		}
	}
}

// charging alters charges on their way to Apply.
func charging(f func(c *quota.Charge)) func(*parts) {
	return func(p *parts) {
		p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
			cs = slices.Clone(cs)
			for i := range cs {
				if p.fault {
					f(&cs[i])
				}
			}
			return driver.Apply(cs, items, now, out)
		}
	}
}

// holding alters states on their way into the store.
func holding(f func(s *quota.State)) func(*parts) {
	return func(p *parts) {
		p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
			err := driver.Apply(cs, items, now, out)
			for i := range items {
				if p.fault && items[i].Write && err == nil {
					f(&items[i].State)
				}
			}
			return err
		}
	}
}

// living alters how long a state is kept.
func living(f func(reset time.Duration) time.Duration) func(*parts) {
	return func(p *parts) {
		p.life = func(reset time.Duration) time.Duration {
			if p.fault {
				return f(reset)
			}
			return sound().life(reset)
		}
	}
}

// keying alters keys.
func keying(f func(c *quota.Charge) string) func(*parts) {
	return func(p *parts) {
		p.key = func(c *quota.Charge) string {
			if p.fault {
				return f(c)
			}
			return plainKey(c)
		}
	}
}

func sent(f func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error) func(*parts) {
	return func(p *parts) { p.send = f }
}

func plainKey(c *quota.Charge) string { return string(driver.AppendKey(nil, c.Limit.Name(), c.Key)) }

// oneByOne decides each charge of a list alone, as if it were granted.
func oneByOne(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
	for i := range cs {
		if err := driver.Apply(cs[i:i+1], items[i:i+1], now, out[i:i+1]); err != nil {
			return err
		}
	}
	return nil
}

// apart decides lists oneByOne.
func apart(p *parts) {
	p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
		if p.fault {
			return oneByOne(cs, items, now, out)
		}
		return driver.Apply(cs, items, now, out)
	}
}

// manner is how a store takes a list in parts. The zero manner is right.
type manner struct {
	unmarked func(groups int, granted bool) bool // whether the decisions are not marked
	tell     func(c *quota.Charge, d *quota.Decision, granted bool)
	one      bool // all decisions tell the time of the first
	keep     bool // the grants of a denied list are not given back
	first    bool // alternatives are taken in parts too
	definite bool // the error of a part does not say that others are charged
}

// splitting takes a list over several groups group by group: first the charges that may be denied. If one is denied, the
// grants before it are given back. Then come the others, or peeks in their place.
func splitting(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision, how manner) error {
	groups := map[string]int{}
	var asked, firm [][]int
	for i := range cs {
		g := quota.Group(cs[i].Key)
		if _, known := groups[g]; !known {
			groups[g] = len(asked)
			asked, firm = append(asked, nil), append(firm, nil)
		}
		if n := groups[g]; cs[i].Op.Deniable() {
			asked[n] = append(asked[n], i)
		} else {
			firm[n] = append(firm[n], i)
		}
	}
	if cs[0].Alternative > 0 && len(groups) > 1 && !how.first {
		return fmt.Errorf("mutant: %w: alternatives of several groups", quota.ErrCrossSlot)
	}
	begun := false
	part := func(indexes []int, alter func(c *quota.Charge, d *quota.Decision), told func(d *quota.Decision, is quota.Decision)) error {
		if len(indexes) == 0 {
			return nil
		}
		charges, decisions := make([]quota.Charge, len(indexes)), make([]quota.Decision, len(indexes))
		for j, i := range indexes {
			charges[j] = cs[i]
			alter(&charges[j], &out[i])
		}
		if err := s.once(ctx, charges, decisions); err != nil && begun && !how.definite {
			return fmt.Errorf("mutant: %w: a part of the list may be charged: %v", quota.ErrIndeterminate, err)
		} else if err != nil {
			return err
		}
		begun = true
		for j, i := range indexes {
			told(&out[i], decisions[j])
		}
		return nil
	}
	as := func(*quota.Charge, *quota.Decision) {}
	all := func(d *quota.Decision, is quota.Decision) { *d = is }
	granted := true
	if len(groups) == 1 {
		if err := s.once(ctx, cs, out); err != nil {
			return err
		}
		granted = quota.Granted(out)
	} else {
		var made [][]int
		for _, indexes := range asked {
			if err := part(indexes, as, all); err != nil {
				return err
			}
			fits := true
			for _, i := range indexes {
				fits = fits && (out[i].Allowed || out[i].Shadow)
			}
			if granted = granted && fits; fits {
				made = append(made, indexes)
			}
		}
		for _, indexes := range firm {
			alter := as
			if !granted {
				alter = func(c *quota.Charge, _ *quota.Decision) {
					c.Op, c.Cost, c.MadeAt, c.Held, c.Until = quota.OpPeek, 0, 0, 0, 0
				}
			}
			err := part(indexes, alter, func(d *quota.Decision, is quota.Decision) {
				if *d = is; !granted {
					d.Allowed, d.RetryAfter = true, 0
				}
			})
			if err != nil {
				return err
			}
		}
		if !granted && !how.keep {
			for _, indexes := range made {
				refund := func(c *quota.Charge, d *quota.Decision) {
					if c.Op == quota.OpPeek {
						return
					}
					if c.Op == quota.OpRenew { // a renewal stays
						*c = quota.Charge{Limit: c.Limit, Key: c.Key, Op: quota.OpPeek}
						return
					}
					back := quota.Charge{Limit: c.Limit, Key: c.Key, Op: quota.OpRefund, Cost: d.Charged, MadeAt: d.At}
					if d.Held > 0 {
						back = quota.Charge{Limit: c.Limit, Key: c.Key, Op: quota.OpSpend, Held: d.Held, Until: d.Until}
					}
					*c = back
				}
				err := part(indexes, refund, func(d *quota.Decision, is quota.Decision) {
					d.Charged, d.Delay, d.Held, d.Until, d.Remaining, d.ResetAfter = 0, 0, 0, 0, is.Remaining, is.ResetAfter
				})
				if err != nil {
					return err
				}
			}
		}
	}
	for i := range out {
		out[i].Split = len(groups) > 1
		if how.one {
			out[i].At = out[0].At
		}
		if how.unmarked != nil && how.unmarked(len(groups), granted) {
			out[i].Split = !out[i].Split
		}
		if how.tell != nil && len(groups) > 1 {
			how.tell(&cs[i], &out[i], granted)
		}
	}
	return nil
}

// parting is a store that takes lists over several groups in parts, and does it in a wrong manner.
func parting(wrong manner) func(*parts) {
	return sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
		if !s.fault {
			return splitting(s, ctx, cs, out, manner{})
		}
		return splitting(s, ctx, cs, out, wrong)
	})
}

// Splitting is a store without a fault that takes a list over several groups in parts, and marks the decisions.
var Splitting = &Store{Name: "says one group, and splits with a mark", Grade: driver.OneGroup, alter: parting(manner{})}

// Stores returns the broken stores.
func Stores() []*Store {
	return slices.Concat(unclocked(), usual(), ids(), handles(), sizes(), closing(), splits(), panicking(), interrupted(), listings(), heldStores())
}

// usual are the mutants of all kinds.
func usual() []*Store {
	return []*Store{
		// The answer.
		{Name: "Remaining is one too few", Rule: "S1", Clause: "verdicts are those of Apply", Case: "lists", Says: "differing in Remaining", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.Remaining-- })},
		{Name: "RetryAfter is a tick early", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in RetryAfter", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			if d.RetryAfter > 0 && d.RetryAfter < quota.Never {
				d.RetryAfter -= time.Microsecond
			}
		})},
		{Name: "RetryAfter is rounded up to milliseconds", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in RetryAfter", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			if d.RetryAfter < quota.Never {
				d.RetryAfter = (d.RetryAfter + time.Millisecond - 1).Truncate(time.Millisecond)
			}
		})},
		{Name: "Delay is told as RetryAfter", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in RetryAfter, Delay", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			d.RetryAfter, d.Delay = d.RetryAfter+d.Delay, 0
		})},
		{Name: "a take ahead is sent without the delay that is accepted", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "take-ahead", alter: charging(func(c *quota.Charge) { c.Within = 0 })},
		{Name: "a take ahead is sent as a debit", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "take-ahead", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpAhead {
				c.Op, c.Within = quota.OpDebit, 0
			}
		})},
		{Name: "a floor is not sent", Rule: "S1", Clause: "verdicts are those of Apply", Case: "floors", Says: "differing in", alter: charging(func(c *quota.Charge) { c.Floor, c.FloorOf = 0, 0 })},
		{Name: "a floor is charged", Rule: "S1", Clause: "verdicts are those of Apply", Case: "floors", Says: "differing in", alter: charging(func(c *quota.Charge) {
			r := c.Request()
			c.Cost, c.Floor, c.FloorOf = r.Need(), 0, 0
		})},
		{Name: "a floor that is a part is sent as tokens", Rule: "S1", Clause: "verdicts are those of Apply", Case: "floors", Says: "differing in", alter: charging(func(c *quota.Charge) { c.FloorOf = 0 })},
		{Name: "a part of the capacity is rounded down", Rule: "S1", Clause: "verdicts are those of Apply", Case: "floors", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if capacity := c.Limit.Spec().Capacity; c.FloorOf > 0 && capacity < 1<<31 {
				c.Floor, c.FloorOf = capacity*c.Floor/int64(c.FloorOf), 0
			}
		})},
		{Name: "the floors of a list are lost", Rule: "S1", Clause: "verdicts are those of Apply", Case: "floors", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if cs = slices.Clone(cs); p.fault && len(cs) > 1 {
					for i := range cs {
						cs[i].Floor, cs[i].FloorOf = 0, 0
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a take of up to so many is sent as a take", Rule: "S1", Clause: "verdicts are those of Apply", Case: "up to", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpUpTo {
				c.Op, c.Least = quota.OpTake, 0
			}
		})},
		{Name: "the least is not sent", Rule: "S1", Clause: "verdicts are those of Apply", Case: "up to", Says: "differing in", alter: charging(func(c *quota.Charge) { c.Least = 0 })},
		{Name: "the most is told as Charged", Rule: "S1", Clause: "verdicts are those of Apply", Case: "up to", Says: "differing in", alter: telling(func(c *quota.Charge, d *quota.Decision) {
			if c.Op == quota.OpUpTo && d.Allowed {
				d.Charged = c.Cost
			}
		})},
		{Name: "ResetAfter is in seconds", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in ResetAfter", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.ResetAfter = d.ResetAfter.Truncate(time.Second) })},
		{Name: "Charged is told for a denial", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in Charged", alter: telling(func(c *quota.Charge, d *quota.Decision) { d.Charged = c.Cost })},
		{Name: "At is the process's time", Rule: "S1", Clause: "the store's", Case: "TokenBucket", Says: "at the time of Opening.Clock", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.At = quota.Micros(time.Now().UnixMicro()) })},
		{Name: "a denial is an error", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "rate limited", alter: func(p *parts) {
			p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
				if p.fault && err == nil && !quota.Granted(out) {
					return errors.New("rate limited")
				}
				return err
			}
		}},
		{Name: "the decisions of a list are in the order of their keys", Rule: "S1", Clause: "verdicts are those of Apply", Case: "lists", Says: "differing in", alter: func(p *parts) {
			p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
				if p.fault && len(cs) > 1 && cs[0].Key > cs[1].Key {
					out[0], out[1] = out[1], out[0]
				}
				return err
			}
		}},
		{Name: "the charges of a list are decided a microsecond apart", Rule: "S1", Clause: "at one time", Case: "own clock", Says: "want one time for all", alter: func(p *parts) {
			p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
				for i := range out {
					if p.fault {
						out[i].At += quota.Micros(i)
					}
				}
				return err
			}
		}},
		// The decision.
		{Name: "the keys of a list get each other's costs", Rule: "S1", Clause: "verdicts are those of Apply", Case: "lists", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if p.fault && len(cs) > 1 && cs[0].Limit == cs[1].Limit {
					cs = slices.Clone(cs)
					cs[0].Cost, cs[1].Cost = cs[1].Cost, cs[0].Cost
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a cost is cut to 32 bits", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in", alter: charging(func(c *quota.Charge) { c.Cost = int64(uint32(c.Cost)) })},
		{Name: "a state is kept in 32 bits", Rule: "S1", Clause: "on the stored states", Case: "big numbers", Says: "differing in", alter: holding(func(s *quota.State) { s.A = int64(int32(s.A)) })},
		{Name: "a state is kept in a float32", Rule: "S1", Clause: "on the stored states", Case: "big numbers", Says: "differing in", alter: holding(func(s *quota.State) { s.A = int64(float32(s.A)) })},
		{Name: "a state loses its last bit beyond 2^52", Rule: "S1", Clause: "on the stored states", Case: "an algorithm in Go only", Says: "Remaining", alter: holding(func(s *quota.State) {
			if s.A > 1<<52 || s.A < -1<<52 {
				s.A &^= 1
			}
		})},
		{Name: "negative numbers of a state are lost", Rule: "S1", Clause: "on the stored states", Case: "an algorithm in Go only", Says: "remaining -9223372036854775808", alter: holding(func(s *quota.State) { s.A = max(s.A, 0) })},
		{Name: "the list of a state is cut", Rule: "S1", Clause: "on the stored states", Case: "SlidingWindowLog", Says: "differing in", alter: holding(func(s *quota.State) { s.Tail = s.Tail[:min(len(s.Tail), 4)] })},
		{Name: "each handle has a clock of its own", Rule: "S1", Clause: "the store's", Case: "lists", Says: "at the time of Opening.Clock", alter: func(p *parts) {
			p.now = func(s *Handle) quota.Micros {
				now := quota.Micros(s.clock().UnixMicro())
				if p.fault {
					now += quota.Micros(s.serial%2) * 700_000
				}
				return now
			}
		}},
		{Name: "the clock is in milliseconds", Rule: "S1", Clause: "the store's", Case: "lists", Says: "at the time of Opening.Clock", alter: func(p *parts) {
			p.now = func(s *Handle) quota.Micros {
				now := quota.Micros(s.clock().UnixMicro())
				if p.fault {
					now -= now % 1000
				}
				return now
			}
		}},
		{Name: "a clock set back mints", Rule: "S1", Clause: "the store's", Case: "clock steps back", Says: "wait -", alter: func(p *parts) {
			p.load = func(_ *Handle, it item, now quota.Micros) driver.Item {
				if it.until < now || p.fault && it.Rule.String() == "tb1" && it.State.B > int64(now) {
					return driver.Item{}
				}
				return it.Item
			}
		}},
		{Name: "no token comes back until all do", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in", alter: func(p *parts) {
			p.load = func(_ *Handle, it item, now quota.Micros) driver.Item {
				if it.until < now {
					return driver.Item{}
				}
				if p.fault && it.Rule.String() == "tb1" {
					it.State.B = int64(now)
				}
				return it.Item
			}
		}},
		{Name: "a debit is denied where it does not fit", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "[debit", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpDebit {
				c.Op = quota.OpTake
			}
		})},
		{Name: "a reset does nothing", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "[reset", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpReset {
				c.Op, c.Cost = quota.OpRefund, 0
			}
		})},
		{Name: "a refund is made twice", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "[refund", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpRefund {
				c.Cost = min(c.Cost, math.MaxInt64/2) * 2
			}
		})},
		{Name: "a refund is good for ever", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "[refund", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				cs = slices.Clone(cs)
				for i := range cs {
					if p.fault {
						cs[i].MadeAt = now
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "denies everything", Rule: "C5", Clause: "never less", Case: "total", Says: "got: 0 of 120 single tokens were granted", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if !p.fault {
					return driver.Apply(cs, items, now, out)
				}
				for i := range cs {
					out[i] = quota.Decision{Capacity: cs[i].Limit.Spec().Capacity, RetryAfter: time.Second, At: now}
				}
				return nil
			}
		}},
		{Name: "allows everything", Rule: "C5", Clause: "never more is admitted than the limit allows", Case: "rate", Says: "more was granted", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if !p.fault {
					return driver.Apply(cs, items, now, out)
				}
				for i := range cs {
					out[i] = quota.Decision{Allowed: true, Capacity: cs[i].Limit.Spec().Capacity, Remaining: cs[i].Limit.Spec().Capacity, Charged: cs[i].Cost, At: now}
				}
				return nil
			}
		}},
		// Lists.
		{Name: "a refund gives back more than it says", Rule: "C5", Clause: "never more is admitted than the limit allows", Case: "refunds", Says: "more was charged", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				more := slices.Clone(cs)
				for i := range more {
					if p.fault && more[i].Op == quota.OpRefund {
						more[i].Cost *= 2
					}
				}
				err := driver.Apply(more, items, now, out)
				for i := range cs {
					if cs[i].Op == quota.OpRefund {
						out[i].Charged = max(out[i].Charged, -cs[i].Cost)
					}
				}
				return err
			}
		}},
		{Name: "Charged does not say what came back", Rule: "S1", Clause: "verdicts are those of Apply", Case: "TokenBucket", Says: "differing in Charged", alter: telling(func(c *quota.Charge, d *quota.Decision) {
			if c.Op == quota.OpRefund || c.Op == quota.OpReset {
				d.Charged = 0
			}
		})},
		{Name: "a sliding window rounds the count before up", Rule: "C5", Clause: "never less", Case: "even pace", Says: "differing in Allowed", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				before := slices.Clone(items)
				err := driver.Apply(cs, items, now, out)
				if d := &out[0]; p.fault && err == nil && len(cs) == 1 && cs[0].Op == quota.OpTake && cs[0].Cost > 0 && d.Allowed && d.Remaining == 0 &&
					items[0].Rule == (quota.Rule{'s', 'w', '1'}) && items[0].State.C > 0 {
					copy(items, before)
					d.Allowed, d.Remaining, d.Charged, d.RetryAfter = false, cs[0].Cost-1, 0, time.Second
				}
				return err
			}
		}},
		{Name: "each charge of a list is made that fits", Rule: "S2", Clause: "not at all", Case: "lists", Says: "Charged", alter: apart},
		{Name: "a shadow denies its list", Rule: "S2", Clause: "a list is charged whole", Case: "shadows", Says: "differing in", alter: func(p *parts) {
			charging(func(c *quota.Charge) { c.Shadow = false })(p)
			telling(func(c *quota.Charge, d *quota.Decision) { d.Shadow = c.Shadow })(p)
		}},
		{Name: "a shadow is not charged", Rule: "S2", Clause: "a list is charged whole", Case: "shadows", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					items[i].Write = items[i].Write && !(p.fault && cs[i].Shadow)
				}
				return err
			}
		}},
		{Name: "a shadow that does not fit is charged", Rule: "S2", Clause: "a list is charged whole", Case: "shadows", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					if c := cs[i]; p.fault && err == nil && c.Op == quota.OpTake && !out[i].Allowed && quota.Granted(out) {
						c.Op = quota.OpDebit
						driver.ApplyOne(&c, &items[i], now, new(quota.Decision))
					}
				}
				return err
			}
		}},
		{Name: "a denied list charges its shadows", Rule: "S2", Clause: "not at all", Case: "shadows", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					if p.fault && cs[i].Shadow && err == nil && out[i].Allowed && !quota.Granted(out) {
						driver.ApplyOne(&cs[i], &items[i], now, new(quota.Decision))
					}
				}
				return err
			}
		}},
		{Name: "a decision does not say that it is of a shadow", Rule: "S2", Clause: "a list is charged whole", Case: "shadows", Says: "differing in", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.Shadow = false })},
		{Name: "the last list that fits is taken", Rule: "S2", Clause: "of alternatives the first that fits alone", Case: "alternatives", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				n := len(cs)
				if !p.fault || cs[n-1].Alternative < 2 {
					return driver.Apply(cs, items, now, out)
				}
				turned := slices.Clone(cs)
				slices.Reverse(turned)
				for i := range turned {
					turned[i].Alternative = cs[n-1].Alternative + 1 - turned[i].Alternative
				}
				slices.Reverse(items)
				err := driver.Apply(turned, items, now, out[:n])
				slices.Reverse(items)
				slices.Reverse(out[:n])
				for i := range cs {
					out[i].Alternative = cs[i].Alternative
				}
				return err
			}
		}},
		{Name: "all lists that fit are charged", Rule: "S2", Clause: "of alternatives the first that fits alone", Case: "alternatives", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				_, to := driver.Made(out)
				for i := to; p.fault && err == nil && to > 0 && i < len(cs); i++ {
					if driver.ApplyOne(&cs[i], &items[i], now, &out[i]) != nil {
						break
					}
				}
				return err
			}
		}},
		{Name: "alternatives are one list", Rule: "S2", Clause: "of alternatives the first that fits alone", Case: "alternatives", Says: "differing in", alter: func(p *parts) {
			charging(func(c *quota.Charge) { c.Alternative = 0 })(p)
			telling(func(c *quota.Charge, d *quota.Decision) { d.Alternative = c.Alternative })(p)
		}},
		{Name: "the ninth charge of a list is not made", Rule: "S2", Clause: "a list is charged whole", Case: "longest list", Says: "Remaining", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if p.fault && len(cs) > 8 {
					items[8].Write = false
				}
				return err
			}
		}},
		{Name: "a list is charged key by key, with the lock given up between", Rule: "S2", Clause: "not at all", Case: "pairs", Says: "charged", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			if !s.fault || len(cs) == 1 || driver.OnlyPeeks(cs) {
				return s.once(ctx, cs, out)
			}
			peeks := slices.Clone(cs)
			for i := range peeks {
				if !cs[i].Op.Deniable() {
					peeks[i].Cost = 0
				}
				peeks[i].Op, peeks[i].Within, peeks[i].ID = quota.OpPeek, 0, ""
			}
			if err := s.once(ctx, peeks, out); err != nil {
				return err
			}
			if !quota.Granted(out) {
				return s.once(ctx, cs, out)
			}
			for i := range cs {
				runtime.Gosched()
				if err := s.once(ctx, cs[i:i+1], out[i:i+1]); err != nil {
					return err
				}
			}
			return nil
		})},
		// Traces.
		{Name: "a denial is charged", Rule: "S3", Clause: "a denied list", Case: "single charges", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if p.fault && err == nil && len(cs) == 1 && !out[0].Allowed && cs[0].Op == quota.OpTake {
					more, told := slices.Clone(cs), [1]quota.Decision{}
					more[0].Op, more[0].Cost = quota.OpDebit, 1
					return driver.Apply(more, items, now, told[:])
				}
				return err
			}
		}},
		{Name: "a denied list keeps its first charge", Rule: "S3", Clause: "a denied list", Case: "lists", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if p.fault && err == nil && len(cs) > 1 && !quota.Granted(out) && out[0].Allowed {
					var told [1]quota.Decision
					return driver.Apply(cs[:1], items[:1], now, told[:])
				}
				return err
			}
		}},
		{Name: "a peek is charged", Rule: "S3", Clause: "a peek change nothing", Case: "single charges", Says: "differing in", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpPeek {
				c.Op = quota.OpTake
			}
		})},
		{Name: "a peek makes the state last", Rule: "S3", Clause: "a peek change nothing", Case: "single charges", Says: "differing in", alter: func(p *parts) {
			p.load = func(_ *Handle, it item, now quota.Micros) driver.Item { return it.Item }
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range items {
					if p.fault && cs[i].Op == quota.OpPeek && items[i].State.Unit > 0 && items[i].Rule.String() == "tb1" {
						items[i].Write, items[i].State.B = true, int64(now)
					}
				}
				return err
			}
		}},
		// Faults.
		{Name: "a request whose reply was lost is sent again", Rule: "S4", Clause: "the error is ErrIndeterminate", Case: "faults", Says: "tokens are charged; want", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			for range 3 {
				if !s.fault || !errors.Is(err, quota.ErrIndeterminate) || ctx.Err() != nil {
					break
				}
				err = s.once(ctx, cs, out)
			}
			if errors.Is(err, quota.ErrIndeterminate) {
				return fmt.Errorf("mutant: %w: gave up", quota.ErrIndeterminate)
			}
			return err
		})},
		{Name: "a lost reply is ErrUnavailable", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "faults", Says: "tokens are charged; want", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if s.fault && errors.Is(err, quota.ErrIndeterminate) {
				return fmt.Errorf("mutant: %w: %v", quota.ErrUnavailable, err)
			}
			return err
		})},
		{Name: "a panic of an algorithm leaves the lock held", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics", Says: "no call has returned", alter: func(p *parts) {
			held := false
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if held {
					select {}
				}
				held = true
				if !p.fault {
					defer func() { held = false }()
				}
				err := driver.Apply(cs, items, now, out)
				held = false
				return err
			}
		}},
		{Name: "a panic of an algorithm leaves the earlier charges of the list", Rule: "S4", Clause: "one that returns an error charged nothing", Case: "panics", Says: "want it allowed, with", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			defer func() {
				if r := recover(); r != nil {
					if s.fault && len(cs) > 1 {
						s.once(ctx, cs[:1], out[:1])
					}
					panic(r)
				}
			}()
			return s.once(ctx, cs, out)
		})},
		{Name: "an error is a grant", Rule: "S4", Clause: "a call that returns nil charged once", Case: "faults", Says: "tokens are charged; want", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if s.fault && err != nil && !errors.Is(err, quota.ErrMisconfigured) && !errors.Is(err, quota.ErrInvalid) {
				for i := range out {
					out[i] = quota.Decision{Allowed: true, Capacity: cs[i].Limit.Spec().Capacity, Charged: cs[i].Cost, At: s.now(s)}
				}
				return nil
			}
			return err
		})},
		{Name: "an error is a denial", Rule: "S4", Clause: "a call that returns nil charged once", Case: "faults", Says: "there is enough left", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if s.fault && (errors.Is(err, quota.ErrIndeterminate) || errors.Is(err, quota.ErrUnavailable)) {
				for i := range out {
					out[i] = quota.Decision{Capacity: cs[i].Limit.Spec().Capacity, RetryAfter: time.Second, At: s.now(s)}
				}
				return nil
			}
			return err
		})},
		{Name: "an error of no known kind", Rule: "S4", Clause: "the error is ErrIndeterminate", Case: "faults", Says: "want an error of package quota", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if s.fault && errors.Is(err, quota.ErrUnavailable) {
				return errors.New("connection refused")
			}
			return err
		})},
		// Expiry.
		{Name: "a state is dropped at half its ResetAfter", Rule: "S5", Clause: "state is kept at least until its ResetAfter has passed", Case: "clock", Says: "differing in", alter: living(func(reset time.Duration) time.Duration { return reset / 2 })},
		{Name: "a state is dropped a microsecond early", Rule: "S5", Clause: "state is kept at least until its ResetAfter has passed", Case: "clock", Says: "differing in", alter: living(func(reset time.Duration) time.Duration { return reset - 2*time.Microsecond })},
		{Name: "a state lives in whole seconds, rounded down", Rule: "S5", Clause: "state is kept at least until its ResetAfter has passed", Case: "clock", Says: "differing in", alter: living(func(reset time.Duration) time.Duration { return reset.Truncate(time.Second) })},
		{Name: "a state lives a day at most", Rule: "S5", Clause: "state is kept at least until its ResetAfter has passed", Case: "clock", Says: "differing in", alter: living(func(reset time.Duration) time.Duration { return min(reset, 24*time.Hour) })},
		// Calls.
		{Name: "the context is ignored", Rule: "S6", Clause: "a context that ended before the charge was sent", Case: "done before", Says: "want error: context", alter: func(p *parts) {
			p.ready = func(s *Handle, ctx context.Context) error {
				if p.fault {
					ctx = context.Background()
				}
				return sound().ready(s, ctx)
			}
		}},
		{Name: "a context that is done is ErrUnavailable", Rule: "S6", Clause: "gives the context's error", Case: "done before", Says: "want error: context", alter: func(p *parts) {
			p.ready = func(s *Handle, ctx context.Context) error {
				if err := sound().ready(s, ctx); err != nil {
					if p.fault && ctx.Err() != nil {
						return fmt.Errorf("mutant: %w", quota.ErrUnavailable)
					}
					return err
				}
				return nil
			}
		}},
		{Name: "a call that was given up writes its decisions later", Rule: "S7", Clause: "nor writes the decisions", Case: "decisions", Says: "decisions were written after ChargeAll had returned", Races: true, alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			type reply struct {
				out      []quota.Decision
				err      error
				panicked any
			}
			done := make(chan reply, 1)
			cs = slices.Clone(cs)
			go func() {
				defer func() {
					if v := recover(); v != nil { // of an algorithm: it is the caller's, and would end the process here
						done <- reply{panicked: v}
					}
				}()
				own := make([]quota.Decision, len(cs))
				err := s.once(context.Background(), cs, own)
				if ctx.Done() != nil {
					time.Sleep(2 * time.Millisecond) // the way back
				}
				if s.fault {
					copy(out, own)
				}
				done <- reply{own, err, nil}
			}()
			select {
			case r := <-done:
				if r.panicked != nil {
					panic(r.panicked)
				}
				copy(out, r.out)
				return r.err
			case <-ctx.Done():
				return fmt.Errorf("mutant: %w: %w", quota.ErrIndeterminate, ctx.Err())
			}
		})},
		{Name: "the decisions of a grant are kept, not copied", Rule: "S7", Clause: "after it returned, a store neither reads the charges", Case: "charges", Says: "overwritten after every call before", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				kept := out
				if !p.fault {
					kept = slices.Clone(out)
				}
				return grant{charges: slices.Clone(cs), decisions: kept}, quota.Granted(out) && !driver.OnlyPeeks(cs)
			}
		}},
		{Name: "a goroutine outlives Close", Rule: "S8", Clause: "no goroutine is left", Case: "goroutines", Says: "goroutines more", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				if s.gate.Close() && s.fault {
					go func() { time.Sleep(time.Minute) }()
				}
				return nil
			}
		}},
		{Name: "works after Close", Rule: "S8", Clause: "afterwards every call is ErrClosed", Case: "closed", Says: "want quota.ErrClosed", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				if !s.fault {
					s.gate.Close()
				}
				return nil
			}
		}},
		{Name: "the second Close is an error", Rule: "S8", Clause: "afterwards every call is ErrClosed", Case: "closed", Says: "call 2 of Close", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				if !s.gate.Close() && s.fault {
					return quota.ErrClosed
				}
				return nil
			}
		}},
		{Name: "Close empties the data that others use", Rule: "S8", Clause: "afterwards every call is ErrClosed", Case: "another handle", Says: "another handle was closed", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				s.gate.Close()
				s.data.mu.Lock()
				defer s.data.mu.Unlock()
				if s.fault {
					clear(s.data.items)
				}
				return nil
			}
		}},
		// Keys.
		{Name: "keys are alike but for case", Rule: "C1", Clause: "whatever bytes the key has", Case: "keys", Says: "Remaining", alter: keying(func(c *quota.Charge) string { return strings.ToLower(c.Key) + ":" + c.Limit.Name() })},
		{Name: "spaces at a key's end are lost", Rule: "C1", Clause: "whatever bytes the key has", Case: "keys", Says: "Remaining", alter: keying(func(c *quota.Charge) string { return strings.TrimRight(c.Key, " ") + ":" + c.Limit.Name() })},
		{Name: "keys are cleaned like paths", Rule: "C1", Clause: "whatever bytes the key has", Case: "keys", Says: "Remaining", alter: keying(func(c *quota.Charge) string {
			return strings.Trim(strings.ReplaceAll(c.Key, "/./", "/"), "/.") + ":" + c.Limit.Name()
		})},
		{Name: "braces of a key are dropped", Rule: "C1", Clause: "whatever bytes the key has", Case: "keys", Says: "Remaining", alter: keying(func(c *quota.Charge) string {
			return strings.NewReplacer("{", "", "}", "").Replace(c.Key) + ":" + c.Limit.Name()
		})},
		{Name: "keys end at a zero byte", Rule: "C1", Clause: "whatever bytes the key has", Case: "keys", Says: "Remaining", alter: keying(func(c *quota.Charge) string {
			key, _, _ := strings.Cut(c.Key, "\x00")
			return key + ":" + c.Limit.Name()
		})},
		{Name: "keys end after 255 bytes", Rule: "C1", Clause: "key has a quota of its own", Case: "keys", Says: "Remaining", alter: keying(func(c *quota.Charge) string { return c.Key[:min(len(c.Key), 255)] + ":" + c.Limit.Name() })},
		{Name: "a key runs into its limit's name", Rule: "C1", Clause: "every limit", Case: "limits", Says: "Remaining", alter: keying(func(c *quota.Charge) string { return c.Limit.Name() + c.Key })},
		{Name: "limits share a key's state", Rule: "C1", Clause: "every limit", Case: "limits", Says: "Remaining", alter: keying(func(c *quota.Charge) string { return c.Limit.Spec().Rule.String() + c.Key })},
		{Name: "panics on a key with a line break", Rule: "C1", Clause: "whatever bytes the key has", Case: "keys", Says: "line break in key", alter: keying(func(c *quota.Charge) string {
			if strings.Contains(c.Key, "\n") {
				panic("line break in key")
			}
			return plainKey(c)
		})},
		{Name: "request ids count across groups", Rule: "C1", Clause: "key has a quota of its own", Case: "ids", Says: "the id was granted to", alter: func(p *parts) {
			p.id = func(s *Handle, c *quota.Charge) string {
				if p.fault {
					return c.ID
				}
				return sound().id(s, c)
			}
		}},
		// Limits that change.
		{Name: "other numbers are another limit", Rule: "C2", Clause: "limits with one name and different numbers share their consumption", Case: "numbers", Says: "differing in", alter: keying(func(c *quota.Charge) string { return plainKey(c) + fmt.Sprint(*c.Limit.Spec()) })},
		{Name: "state of other numbers is fresh", Rule: "C2", Clause: "limits with one name and different numbers share their consumption", Case: "numbers", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if p.fault && items[i].State.Unit != cs[i].Limit.Spec().Unit && items[i].Rule == cs[i].Limit.Spec().Rule {
						items[i] = driver.Item{}
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		// Request ids.
		{Name: "a rule without state leaves the key fresh", Rule: "C2", Clause: "a rule that keeps no state leaves it", Case: "no state", Says: "differing in", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					if p.fault && cs[i].Limit.Spec().Unit == 0 && cs[i].Op == quota.OpReset {
						items[i] = driver.Item{Write: true}
					}
				}
				return err
			}
		}},
		{Name: "a rule without state is refused where another left state", Rule: "C2", Clause: "a rule that keeps no state leaves it", Case: "no state", Says: "another rule", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if rule := items[i].Rule; p.fault && rule != (quota.Rule{}) && rule != cs[i].Limit.Spec().Rule {
						return fmt.Errorf("mutant: %w: another rule", quota.ErrMisconfigured)
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "ids are not remembered", Rule: "C3", Clause: "a request id is granted once", Case: "repeats", Says: "the id was granted to", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				g, keep := sound().record(cs, out)
				return g, keep && !p.fault
			}
		}},
		{Name: "a repeat of a take of up to so many tells the most", Rule: "C3", Clause: "repeated faithfully", Case: "up to", Says: "differing in Charged", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range cs {
					if p.fault && cs[i].Op == quota.OpUpTo && err == nil {
						out[i].Charged = cs[i].Cost
					}
				}
				return err
			}
		}},
		{Name: "a record keeps no more than 2^52 tokens", Rule: "C3", Clause: "repeated faithfully", Case: "large", Says: "differing in Charged", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				g, keep := sound().record(cs, out)
				for i := range g.decisions {
					if p.fault {
						g.decisions[i].Charged = min(g.decisions[i].Charged, 1<<52)
					}
				}
				return g, keep
			}
		}},
		{Name: "a repeat tells that a shadow fitted", Rule: "C3", Clause: "repeated faithfully", Case: "shadows", Says: "differing in", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					if p.fault && out[i].Shadow {
						out[i].Allowed, out[i].RetryAfter = true, 0
					}
				}
				return err
			}
		}},
		{Name: "a repeat grants the first list, whichever was", Rule: "C3", Clause: "repeated faithfully", Case: "alternatives", Says: "differing in", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					if p.fault && out[i].Alternative == 1 {
						out[i].Allowed, out[i].RetryAfter = true, 0
					}
				}
				return err
			}
		}},
		{Name: "an id covers the list that was granted alone", Rule: "C3", Clause: "a request id is granted once", Case: "alternatives", Says: "want quota.ErrInvalid", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				if p.fault && len(cs) == len(g.charges) {
					granted := slices.Clone(cs)
					from, to := driver.Made(g.decisions)
					copy(granted[:from], g.charges[:from])
					copy(granted[to:], g.charges[to:])
					cs = granted
				}
				return sound().recall(s, g, cs, out)
			}
		}},
		{Name: "a denial is repeated", Rule: "C3", Clause: "denials", Case: "repeats", Says: "with id", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				g, keep := sound().record(cs, out)
				return g, keep || p.fault && !driver.OnlyPeeks(cs)
			}
		}},
		{Name: "a peek uses its id up", Rule: "C3", Clause: "peeks are not remembered", Case: "repeats", Says: "[peek", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				g, keep := sound().record(cs, out)
				return g, keep || p.fault && quota.Granted(out)
			}
		}},
		{Name: "an id is good for other charges", Rule: "C3", Clause: "a request id is granted once", Case: "repeats", Says: "want quota.ErrInvalid", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				if p.fault {
					cs, out = g.charges, out[:min(len(out), len(g.decisions))]
				}
				return sound().recall(s, g, cs, out)
			}
		}},
		{Name: "an id is forgotten after four minutes", Rule: "C3", Clause: "a request id is granted once", Case: "repeats", Says: "the id was granted to", alter: func(p *parts) {
			if p.fault {
				p.window = 4 * time.Minute
			}
		}},
		{Name: "ids are forgotten when the clock steps back", Rule: "C3", Clause: "a request id is granted once", Case: "clock steps back", Says: "the id was granted to", alter: func(p *parts) {
			p.now = func(s *Handle) quota.Micros {
				now := sound().now(s)
				if p.fault && now < s.data.latest {
					clear(s.data.grants)
				}
				s.data.latest = max(s.data.latest, now)
				return now
			}
		}},
		{Name: "an id is remembered by one handle alone", Rule: "C3", Clause: "a request id is granted once", Case: "repeats", Says: "by another handle", alter: func(p *parts) {
			p.id = func(s *Handle, c *quota.Charge) string {
				if p.fault {
					return fmt.Sprint(s.serial, "\n", quota.Group(c.Key), "\n", c.ID)
				}
				return sound().id(s, c)
			}
		}},
		{Name: "a repeat is not marked", Rule: "C3", Clause: "repeated faithfully", Case: "repeats", Says: "differing in Replayed", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					out[i].Replayed = !p.fault
				}
				return err
			}
		}},
		{Name: "a repeat is told at the time of the repeat", Rule: "C3", Clause: "repeated faithfully", Case: "repeats", Says: "differing in At", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				if err := sound().recall(s, g, cs, out); err != nil {
					return err
				}
				for i := range out {
					if p.fault {
						out[i].At = s.now(s)
					}
				}
				return nil
			}
		}},
		// At the same time.
		{Name: "an update is lost", Rule: "C4", Clause: "calls at the same time are decided as in some order, one after the other", Case: "budget", Says: "goroutines were granted", alter: func(p *parts) {
			p.gap = func(d *Data) {
				if p.fault {
					d.mu.Unlock()
					runtime.Gosched()
					d.mu.Lock()
				}
			}
		}},
		caching("a handle caches the states that it has read", "linearizable", func(quota.Op) bool { return true }),
		caching("a handle makes, ends and renews holds on the states that it has read", "linearizable holds", quota.Op.Holds),
		// The store's description of itself.
		{Name: "says one key, and decides a list as far as it fits", Rule: "C6", Clause: "decided in one step all the same", Case: "beyond", Says: "where the right answer", Grade: driver.OneKey, alter: apart},
		{Name: "says one group, and splits without a mark", Rule: "C6", Clause: "marked Split", Case: "marked", Says: "Split set", Grade: driver.OneGroup, alter: parting(manner{unmarked: func(int, bool) bool { return true }})},
		{Name: "says it is prompt, and returns seconds later", Rule: "C7", Clause: "a store that says it is prompt returns by its context's deadline", Case: "frozen", Says: "had not returned 2s after", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			if s.fault {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), 3500*time.Millisecond)
				defer cancel()
			}
			return s.once(ctx, cs, out)
		})},
		{Name: "state of another rule is fresh", Rule: "C8", Clause: "state of another rule under a limit's name is ErrMisconfigured", Case: "rules", Says: "want quota.ErrMisconfigured", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if p.fault && items[i].Rule != cs[i].Limit.Spec().Rule {
						items[i] = driver.Item{}
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a reset clears state of another rule", Rule: "C8", Clause: "stays as it is", Case: "rules", Says: "[reset", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if p.fault && cs[i].Op == quota.OpReset {
						items[i].Rule = cs[i].Limit.Spec().Rule
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
	}
}

// caching is a mutant of which a handle decides some operations on the latest states that it has seen.
func caching(name, of string, some func(quota.Op) bool) *Store {
	return &Store{Name: name, Rule: "C4", Clause: "calls at the same time are decided as in some order, one after the other", Case: of, Says: "No order of these calls explains the answers", alter: func(p *parts) {
		seen := map[string]driver.Item{}
		p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
			for i := range cs {
				if it, ok := seen[plainKey(&cs[i])]; ok && p.fault && some(cs[i].Op) {
					items[i] = it
				}
			}
			err := driver.Apply(cs, items, now, out)
			for i := range cs {
				seen[plainKey(&cs[i])] = items[i]
			}
			return err
		}
	}}
}
