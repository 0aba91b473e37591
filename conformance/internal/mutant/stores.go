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
	Name  string // the fault
	Rule  string // the rule of conformance.Run that it breaks
	Grade driver.Atomicity
	Races bool // whether the fault is a data race too
	alter func(*parts)
}

// Sound is the store without a fault.
var Sound = &Store{Name: "no fault"}

// telling alters decisions.
func telling(f func(c *quota.Charge, d *quota.Decision)) func(*parts) {
	return func(p *parts) {
		p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
			for i := range out {
				f(&cs[i], &out[i])
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
				f(&cs[i])
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
				if items[i].Write && err == nil {
					f(&items[i].State)
				}
			}
			return err
		}
	}
}

// keying alters keys.
func keying(f func(c *quota.Charge) string) func(*parts) {
	return func(p *parts) { p.key = f }
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

// splitting takes a list over several groups group by group, and sets the mark that it is told to set.
func splitting(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision, mark bool) error {
	var groups []string
	for i := range cs {
		if g := quota.Group(cs[i].Key); !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	if len(groups) == 1 {
		return s.once(ctx, cs, out)
	}
	// A peek of the whole list says whether it fits. It leaves out the charges that are never denied.
	peeks := slices.Clone(cs)
	for i := range peeks {
		if !cs[i].Op.Deniable() {
			peeks[i].Cost = 0
		}
		if cs[i].Op == quota.OpUpTo {
			peeks[i].Cost, peeks[i].Least = cs[i].Least, 0
		}
		peeks[i].Op, peeks[i].ID = quota.OpPeek, ""
	}
	if err := s.once(ctx, peeks, out); err != nil {
		return err
	}
	for i := range cs {
		if !cs[i].Op.Deniable() {
			out[i].Allowed, out[i].RetryAfter = true, 0
		}
	}
	if quota.Granted(out) {
		for _, g := range groups {
			var part []quota.Charge
			var places []int
			for i := range cs {
				if quota.Group(cs[i].Key) == g {
					part, places = append(part, cs[i]), append(places, i)
				}
			}
			decisions := make([]quota.Decision, len(part))
			if err := s.once(ctx, part, decisions); err != nil {
				return err
			}
			for j, i := range places {
				out[i] = decisions[j]
			}
		}
	}
	for i := range out {
		out[i].Split = mark
	}
	return nil
}

// Splitting is a store without a fault that takes a list over several groups in parts, and marks the decisions.
var Splitting = &Store{Name: "says one group, and splits with a mark", Grade: driver.OneGroup, alter: sent(
	func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
		return splitting(s, ctx, cs, out, true)
	})}

// Stores returns the broken stores.
func Stores() []*Store {
	return []*Store{
		// The answer.
		{Name: "Remaining is one too few", Rule: "S1", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.Remaining-- })},
		{Name: "RetryAfter is a tick early", Rule: "S1", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			if d.RetryAfter > 0 && d.RetryAfter < quota.Never {
				d.RetryAfter -= time.Microsecond
			}
		})},
		{Name: "RetryAfter is rounded up to milliseconds", Rule: "S1", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			if d.RetryAfter < quota.Never {
				d.RetryAfter = (d.RetryAfter + time.Millisecond - 1).Truncate(time.Millisecond)
			}
		})},
		{Name: "Delay is told as RetryAfter", Rule: "S1", alter: telling(func(_ *quota.Charge, d *quota.Decision) {
			d.RetryAfter, d.Delay = d.RetryAfter+d.Delay, 0
		})},
		{Name: "a take ahead is sent without the delay that is accepted", Rule: "S1", alter: charging(func(c *quota.Charge) { c.Within = 0 })},
		{Name: "a take ahead is sent as a debit", Rule: "S1", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpAhead {
				c.Op, c.Within = quota.OpDebit, 0
			}
		})},
		{Name: "a floor is not sent", Rule: "S1", alter: charging(func(c *quota.Charge) { c.Floor, c.FloorOf = 0, 0 })},
		{Name: "a floor is charged", Rule: "S1", alter: charging(func(c *quota.Charge) {
			r := c.Request()
			c.Cost, c.Floor, c.FloorOf = r.Need(), 0, 0
		})},
		{Name: "a floor that is a part is sent as tokens", Rule: "S1", alter: charging(func(c *quota.Charge) { c.FloorOf = 0 })},
		{Name: "a part of the capacity is rounded down", Rule: "S1", alter: charging(func(c *quota.Charge) {
			if capacity := c.Limit.Spec().Capacity; c.FloorOf > 0 && capacity < 1<<31 {
				c.Floor, c.FloorOf = capacity*c.Floor/int64(c.FloorOf), 0
			}
		})},
		{Name: "the floors of a list are lost", Rule: "S1", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if cs = slices.Clone(cs); len(cs) > 1 {
					for i := range cs {
						cs[i].Floor, cs[i].FloorOf = 0, 0
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a take of up to so many is sent as a take", Rule: "S1", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpUpTo {
				c.Op, c.Least = quota.OpTake, 0
			}
		})},
		{Name: "the least is not sent", Rule: "S1", alter: charging(func(c *quota.Charge) { c.Least = 0 })},
		{Name: "the most is told as Charged", Rule: "S1", alter: telling(func(c *quota.Charge, d *quota.Decision) {
			if c.Op == quota.OpUpTo && d.Allowed {
				d.Charged = c.Cost
			}
		})},
		{Name: "ResetAfter is in seconds", Rule: "S1", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.ResetAfter = d.ResetAfter.Truncate(time.Second) })},
		{Name: "Charged is told for a denial", Rule: "S1", alter: telling(func(c *quota.Charge, d *quota.Decision) { d.Charged = c.Cost })},
		{Name: "At is the process's time", Rule: "S1", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.At = quota.Micros(time.Now().UnixMicro()) })},
		{Name: "a denial is an error", Rule: "S1", alter: func(p *parts) {
			p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
				if err == nil && !quota.Granted(out) {
					return errors.New("rate limited")
				}
				return err
			}
		}},
		{Name: "the decisions of a list are in the order of their keys", Rule: "S1", alter: func(p *parts) {
			p.reply = func(cs []quota.Charge, out []quota.Decision, err error) error {
				if len(cs) > 1 && cs[0].Key > cs[1].Key {
					out[0], out[1] = out[1], out[0]
				}
				return err
			}
		}},
		// The decision.
		{Name: "the keys of a list get each other's costs", Rule: "S1", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if len(cs) > 1 && cs[0].Limit == cs[1].Limit {
					cs = slices.Clone(cs)
					cs[0].Cost, cs[1].Cost = cs[1].Cost, cs[0].Cost
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a cost is cut to 32 bits", Rule: "S1", alter: charging(func(c *quota.Charge) { c.Cost = int64(uint32(c.Cost)) })},
		{Name: "a state is kept in 32 bits", Rule: "S1", alter: holding(func(s *quota.State) { s.A = int64(int32(s.A)) })},
		{Name: "a state is kept in a float32", Rule: "S1", alter: holding(func(s *quota.State) { s.A = int64(float32(s.A)) })},
		{Name: "a state loses its last bit beyond 2^52", Rule: "S1", alter: holding(func(s *quota.State) {
			if s.A > 1<<52 || s.A < -1<<52 {
				s.A &^= 1
			}
		})},
		{Name: "negative numbers of a state are lost", Rule: "S1", alter: holding(func(s *quota.State) { s.A = max(s.A, 0) })},
		{Name: "the list of a state is cut", Rule: "S1", alter: holding(func(s *quota.State) { s.Tail = s.Tail[:min(len(s.Tail), 4)] })},
		{Name: "each handle has a clock of its own", Rule: "S1", alter: func(p *parts) {
			p.now = func(s *Handle) quota.Micros {
				return quota.Micros(s.clock().UnixMicro()) + quota.Micros(s.serial%2)*700_000
			}
		}},
		{Name: "the clock is in milliseconds", Rule: "S1", alter: func(p *parts) {
			p.now = func(s *Handle) quota.Micros { return quota.Micros(s.clock().UnixMilli() * 1000) }
		}},
		{Name: "a clock set back mints", Rule: "S1", alter: func(p *parts) {
			p.load = func(_ *Handle, it item, now quota.Micros) driver.Item {
				if it.until < now || it.State.B > int64(now) {
					return driver.Item{}
				}
				return it.Item
			}
		}},
		{Name: "no token comes back until all do", Rule: "S1", alter: func(p *parts) {
			p.load = func(_ *Handle, it item, now quota.Micros) driver.Item {
				if it.until < now {
					return driver.Item{}
				}
				if it.Rule.String() == "tb1" {
					it.State.B = int64(now)
				}
				return it.Item
			}
		}},
		{Name: "a debit is denied where it does not fit", Rule: "S1", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpDebit {
				c.Op = quota.OpTake
			}
		})},
		{Name: "a reset does nothing", Rule: "S1", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpReset {
				c.Op, c.Cost = quota.OpRefund, 0
			}
		})},
		{Name: "a refund is made twice", Rule: "S1", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpRefund {
				c.Cost = min(c.Cost, math.MaxInt64/2) * 2
			}
		})},
		{Name: "a refund is good for ever", Rule: "S1", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				cs = slices.Clone(cs)
				for i := range cs {
					cs[i].At = now
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "denies everything", Rule: "C5", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					out[i] = quota.Decision{Limit: cs[i].Limit.Spec().Capacity, RetryAfter: time.Second, At: now}
				}
				return nil
			}
		}},
		{Name: "allows everything", Rule: "C5", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					out[i] = quota.Decision{Allowed: true, Limit: cs[i].Limit.Spec().Capacity, Remaining: cs[i].Limit.Spec().Capacity, Charged: cs[i].Cost, At: now}
				}
				return nil
			}
		}},
		// Lists.
		{Name: "a refund gives back more than it says", Rule: "C5", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				more := slices.Clone(cs)
				for i := range more {
					if more[i].Op == quota.OpRefund {
						more[i].Cost *= 2
					}
				}
				err := driver.Apply(more, items, now, out)
				for i := range cs {
					out[i].Charged = max(out[i].Charged, -cs[i].Cost)
				}
				return err
			}
		}},
		{Name: "Charged does not say what came back", Rule: "S1", alter: telling(func(c *quota.Charge, d *quota.Decision) {
			if c.Op == quota.OpRefund || c.Op == quota.OpReset {
				d.Charged = 0
			}
		})},
		{Name: "a sliding window rounds the count before up", Rule: "C5", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				before := slices.Clone(items)
				err := driver.Apply(cs, items, now, out)
				if d := &out[0]; err == nil && len(cs) == 1 && cs[0].Op == quota.OpTake && cs[0].Cost > 0 && d.Allowed && d.Remaining == 0 &&
					items[0].Rule == (quota.Rule{'s', 'w', '1'}) && items[0].State.C > 0 {
					copy(items, before)
					d.Allowed, d.Remaining, d.Charged, d.RetryAfter = false, cs[0].Cost-1, 0, time.Second
				}
				return err
			}
		}},
		{Name: "each charge of a list is made that fits", Rule: "S2", alter: func(p *parts) { p.apply = oneByOne }},
		{Name: "a shadow denies its list", Rule: "S2", alter: func(p *parts) {
			charging(func(c *quota.Charge) { c.Shadow = false })(p)
			telling(func(c *quota.Charge, d *quota.Decision) { d.Shadow = c.Shadow })(p)
		}},
		{Name: "a shadow is not charged", Rule: "S2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					items[i].Write = items[i].Write && !cs[i].Shadow
				}
				return err
			}
		}},
		{Name: "a shadow that does not fit is charged", Rule: "S2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					if c := cs[i]; err == nil && c.Op == quota.OpTake && !out[i].Allowed && quota.Granted(out) {
						c.Op = quota.OpDebit
						driver.ApplyOne(&c, &items[i], now, new(quota.Decision))
					}
				}
				return err
			}
		}},
		{Name: "a denied list charges its shadows", Rule: "S2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					if cs[i].Shadow && err == nil && out[i].Allowed && !quota.Granted(out) {
						driver.ApplyOne(&cs[i], &items[i], now, new(quota.Decision))
					}
				}
				return err
			}
		}},
		{Name: "a decision does not say that it is of a shadow", Rule: "S2", alter: telling(func(_ *quota.Charge, d *quota.Decision) { d.Shadow = false })},
		{Name: "the last list that fits is taken", Rule: "S2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				n := len(cs)
				if cs[n-1].Alternative < 2 {
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
		{Name: "all lists that fit are charged", Rule: "S2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				_, to := driver.Made(out)
				for i := to; err == nil && to > 0 && i < len(cs); i++ {
					if driver.ApplyOne(&cs[i], &items[i], now, &out[i]) != nil {
						break
					}
				}
				return err
			}
		}},
		{Name: "alternatives are one list", Rule: "S2", alter: func(p *parts) {
			charging(func(c *quota.Charge) { c.Alternative = 0 })(p)
			telling(func(c *quota.Charge, d *quota.Decision) { d.Alternative = c.Alternative })(p)
		}},
		{Name: "the ninth charge of a list is not made", Rule: "S2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if len(cs) > 8 {
					items[8].Write = false
				}
				return err
			}
		}},
		{Name: "a list is charged key by key, with the lock given up between", Rule: "S2", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			peeks := slices.Clone(cs)
			for i := range peeks {
				if peeks[i].Op == quota.OpTake {
					peeks[i].Op = quota.OpPeek
				}
				peeks[i].ID = ""
			}
			if err := s.once(ctx, peeks, out); err != nil || !quota.Granted(out) || len(cs) == 1 || driver.OnlyPeeks(cs) {
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
		{Name: "a denial is charged", Rule: "S3", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if err == nil && len(cs) == 1 && !out[0].Allowed && cs[0].Op == quota.OpTake {
					more, told := slices.Clone(cs), [1]quota.Decision{}
					more[0].Op, more[0].Cost = quota.OpDebit, 1
					return driver.Apply(more, items, now, told[:])
				}
				return err
			}
		}},
		{Name: "a denied list keeps its first charge", Rule: "S3", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				if err == nil && len(cs) > 1 && !quota.Granted(out) && out[0].Allowed {
					var told [1]quota.Decision
					return driver.Apply(cs[:1], items[:1], now, told[:])
				}
				return err
			}
		}},
		{Name: "a peek is charged", Rule: "S3", alter: charging(func(c *quota.Charge) {
			if c.Op == quota.OpPeek {
				c.Op = quota.OpTake
			}
		})},
		{Name: "a peek makes the state last", Rule: "S3", alter: func(p *parts) {
			p.load = func(_ *Handle, it item, now quota.Micros) driver.Item { return it.Item }
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range items {
					if cs[i].Op == quota.OpPeek && items[i].State.Unit > 0 && items[i].Rule.String() == "tb1" {
						items[i].Write, items[i].State.B = true, int64(now)
					}
				}
				return err
			}
		}},
		// Faults.
		{Name: "a request whose reply was lost is sent again", Rule: "S4", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			for range 3 {
				if !errors.Is(err, quota.ErrIndeterminate) || ctx.Err() != nil {
					break
				}
				err = s.once(ctx, cs, out)
			}
			if errors.Is(err, quota.ErrIndeterminate) {
				return fmt.Errorf("mutant: %w: gave up", quota.ErrIndeterminate)
			}
			return err
		})},
		{Name: "a lost reply is ErrUnavailable", Rule: "S4", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if errors.Is(err, quota.ErrIndeterminate) {
				return fmt.Errorf("mutant: %w: %v", quota.ErrUnavailable, err)
			}
			return err
		})},
		{Name: "a panic of an algorithm leaves the lock held", Rule: "S4", alter: func(p *parts) {
			held := false
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				if held {
					select {}
				}
				held = true
				err := driver.Apply(cs, items, now, out)
				held = false
				return err
			}
		}},
		{Name: "a panic of an algorithm leaves the earlier charges of the list", Rule: "S4", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			defer func() {
				if r := recover(); r != nil {
					if len(cs) > 1 {
						s.once(ctx, cs[:1], out[:1])
					}
					panic(r)
				}
			}()
			return s.once(ctx, cs, out)
		})},
		{Name: "an error is a grant", Rule: "S4", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			if err := s.once(ctx, cs, out); err != nil && !errors.Is(err, quota.ErrMisconfigured) && !errors.Is(err, quota.ErrInvalid) {
				for i := range out {
					out[i] = quota.Decision{Allowed: true, Limit: cs[i].Limit.Spec().Capacity, Charged: cs[i].Cost, At: s.now(s)}
				}
				return nil
			} else {
				return err
			}
		})},
		{Name: "an error is a denial", Rule: "S4", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if errors.Is(err, quota.ErrIndeterminate) || errors.Is(err, quota.ErrUnavailable) {
				for i := range out {
					out[i] = quota.Decision{Limit: cs[i].Limit.Spec().Capacity, RetryAfter: time.Second, At: s.now(s)}
				}
				return nil
			}
			return err
		})},
		{Name: "an error of no known kind", Rule: "S4", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if errors.Is(err, quota.ErrUnavailable) {
				return errors.New("connection refused")
			}
			return err
		})},
		// Expiry.
		{Name: "a state is dropped at half its ResetAfter", Rule: "S5", alter: func(p *parts) {
			p.life = func(reset time.Duration) time.Duration { return reset / 2 }
		}},
		{Name: "a state is dropped a microsecond early", Rule: "S5", alter: func(p *parts) {
			p.life = func(reset time.Duration) time.Duration { return reset - 2*time.Microsecond }
		}},
		{Name: "a state lives in whole seconds, rounded down", Rule: "S5", alter: func(p *parts) {
			p.life = func(reset time.Duration) time.Duration { return reset.Truncate(time.Second) }
		}},
		{Name: "a state lives a day at most", Rule: "S5", alter: func(p *parts) {
			p.life = func(reset time.Duration) time.Duration { return min(reset, 24*time.Hour) }
		}},
		// Calls.
		{Name: "the context is ignored", Rule: "S6", alter: func(p *parts) {
			p.ready = func(s *Handle, _ context.Context) error { return sound().ready(s, context.Background()) }
		}},
		{Name: "a context that is done is ErrUnavailable", Rule: "S6", alter: func(p *parts) {
			p.ready = func(s *Handle, ctx context.Context) error {
				if err := sound().ready(s, ctx); err != nil {
					if ctx.Err() != nil {
						return fmt.Errorf("mutant: %w", quota.ErrUnavailable)
					}
					return err
				}
				return nil
			}
		}},
		{Name: "a call that was given up writes its decisions later", Rule: "S7", Races: true, alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			done := make(chan error, 1)
			cs = slices.Clone(cs)
			go func() {
				own := make([]quota.Decision, len(out))
				err := s.once(context.Background(), cs, own)
				if ctx.Done() != nil {
					time.Sleep(2 * time.Millisecond) // the way back
				}
				copy(out, own)
				done <- err
			}()
			select {
			case err := <-done:
				return err
			case <-ctx.Done():
				return fmt.Errorf("mutant: %w: %w", quota.ErrIndeterminate, ctx.Err())
			}
		})},
		{Name: "the decisions of a grant are kept, not copied", Rule: "S7", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				return grant{charges: slices.Clone(cs), decisions: out}, quota.Granted(out) && !driver.OnlyPeeks(cs)
			}
		}},
		{Name: "a goroutine outlives Close", Rule: "S8", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				if s.gate.Close() {
					go func() { time.Sleep(time.Minute) }()
				}
				return nil
			}
		}},
		{Name: "works after Close", Rule: "S8", alter: func(p *parts) { p.close = func(*Handle) error { return nil } }},
		{Name: "the second Close is an error", Rule: "S8", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				if !s.gate.Close() {
					return quota.ErrClosed
				}
				return nil
			}
		}},
		{Name: "Close empties the data that others use", Rule: "S8", alter: func(p *parts) {
			p.close = func(s *Handle) error {
				s.gate.Close()
				s.data.mu.Lock()
				defer s.data.mu.Unlock()
				clear(s.data.items)
				return nil
			}
		}},
		// Keys.
		{Name: "keys are alike but for case", Rule: "C1", alter: keying(func(c *quota.Charge) string { return strings.ToLower(c.Key) + ":" + c.Limit.Name() })},
		{Name: "spaces at a key's end are lost", Rule: "C1", alter: keying(func(c *quota.Charge) string { return strings.TrimRight(c.Key, " ") + ":" + c.Limit.Name() })},
		{Name: "keys are cleaned like paths", Rule: "C1", alter: keying(func(c *quota.Charge) string {
			return strings.Trim(strings.ReplaceAll(c.Key, "/./", "/"), "/.") + ":" + c.Limit.Name()
		})},
		{Name: "braces of a key are dropped", Rule: "C1", alter: keying(func(c *quota.Charge) string {
			return strings.NewReplacer("{", "", "}", "").Replace(c.Key) + ":" + c.Limit.Name()
		})},
		{Name: "keys end at a zero byte", Rule: "C1", alter: keying(func(c *quota.Charge) string {
			key, _, _ := strings.Cut(c.Key, "\x00")
			return key + ":" + c.Limit.Name()
		})},
		{Name: "keys end after 255 bytes", Rule: "C1", alter: keying(func(c *quota.Charge) string { return c.Key[:min(len(c.Key), 255)] + ":" + c.Limit.Name() })},
		{Name: "a key runs into its limit's name", Rule: "C1", alter: keying(func(c *quota.Charge) string { return c.Limit.Name() + c.Key })},
		{Name: "limits share a key's state", Rule: "C1", alter: keying(func(c *quota.Charge) string { return c.Limit.Spec().Rule.String() + c.Key })},
		{Name: "panics on a key with a line break", Rule: "C1", alter: keying(func(c *quota.Charge) string {
			if strings.Contains(c.Key, "\n") {
				panic("line break in key")
			}
			return plainKey(c)
		})},
		{Name: "request ids count across groups", Rule: "C1", alter: func(p *parts) {
			p.id = func(_ *Handle, c *quota.Charge) string { return c.ID }
		}},
		// Limits that change.
		{Name: "other numbers are another limit", Rule: "C2", alter: keying(func(c *quota.Charge) string { return plainKey(c) + fmt.Sprint(*c.Limit.Spec()) })},
		{Name: "state of other numbers is fresh", Rule: "C2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if items[i].State.Unit != cs[i].Limit.Spec().Unit && items[i].Rule == cs[i].Limit.Spec().Rule {
						items[i] = driver.Item{}
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		// Request ids.
		{Name: "a rule without state leaves the key fresh", Rule: "C2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					if cs[i].Limit.Spec().Unit == 0 && cs[i].Op == quota.OpReset {
						items[i] = driver.Item{Write: true}
					}
				}
				return err
			}
		}},
		{Name: "a rule without state is refused where another left state", Rule: "C2", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if rule := items[i].Rule; rule != (quota.Rule{}) && rule != cs[i].Limit.Spec().Rule {
						return fmt.Errorf("mutant: %w: another rule", quota.ErrMisconfigured)
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "ids are not remembered", Rule: "C3", alter: func(p *parts) {
			p.record = func([]quota.Charge, []quota.Decision) (grant, bool) { return grant{}, false }
		}},
		{Name: "a repeat of a take of up to so many tells the most", Rule: "C3", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range cs {
					if cs[i].Op == quota.OpUpTo && err == nil {
						out[i].Charged = cs[i].Cost
					}
				}
				return err
			}
		}},
		{Name: "a repeat tells that a shadow fitted", Rule: "C3", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					if out[i].Shadow {
						out[i].Allowed, out[i].RetryAfter = true, 0
					}
				}
				return err
			}
		}},
		{Name: "a repeat grants the first list, whichever was", Rule: "C3", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					if out[i].Alternative == 1 {
						out[i].Allowed, out[i].RetryAfter = true, 0
					}
				}
				return err
			}
		}},
		{Name: "a denial is repeated", Rule: "C3", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				return grant{charges: slices.Clone(cs), decisions: slices.Clone(out)}, !driver.OnlyPeeks(cs)
			}
		}},
		{Name: "a peek uses its id up", Rule: "C3", alter: func(p *parts) {
			p.record = func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
				return grant{charges: slices.Clone(cs), decisions: slices.Clone(out)}, quota.Granted(out)
			}
		}},
		{Name: "an id is good for other charges", Rule: "C3", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				return sound().recall(s, g, g.charges, out[:min(len(out), len(g.decisions))])
			}
		}},
		{Name: "an id is forgotten after four minutes", Rule: "C3", alter: func(p *parts) { p.window = 4 * time.Minute }},
		{Name: "an id is remembered by one handle alone", Rule: "C3", alter: func(p *parts) {
			p.id = func(s *Handle, c *quota.Charge) string {
				return fmt.Sprint(s.serial, "\n", quota.Group(c.Key), "\n", c.ID)
			}
		}},
		{Name: "a repeat is not marked", Rule: "C3", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				err := sound().recall(s, g, cs, out)
				for i := range out {
					out[i].Replayed = false
				}
				return err
			}
		}},
		{Name: "a repeat is decided by the tokens that remain now", Rule: "C3", alter: func(p *parts) {
			p.recall = func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
				if err := sound().recall(s, g, cs, out); err != nil {
					return err
				}
				for i := range out {
					out[i].At = s.now(s)
				}
				return nil
			}
		}},
		// At the same time.
		{Name: "an update is lost", Rule: "C4", alter: func(p *parts) {
			p.gap = func(d *Data) {
				d.mu.Unlock()
				runtime.Gosched()
				d.mu.Lock()
			}
		}},
		{Name: "a handle caches the states that it has read", Rule: "C4", alter: func(p *parts) {
			seen := map[string]driver.Item{}
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if it, ok := seen[plainKey(&cs[i])]; ok {
						items[i] = it
					}
				}
				err := driver.Apply(cs, items, now, out)
				for i := range cs {
					seen[plainKey(&cs[i])] = items[i]
				}
				return err
			}
		}},
		// The store's description of itself.
		{Name: "says one key, and decides a list as far as it fits", Rule: "C6", Grade: driver.OneKey, alter: func(p *parts) { p.apply = oneByOne }},
		{Name: "says one group, and splits without a mark", Rule: "C6", Grade: driver.OneGroup, alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			return splitting(s, ctx, cs, out, false)
		})},
		{Name: "says it is prompt, and waits for ever", Rule: "C7", alter: sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			return s.once(context.WithoutCancel(ctx), cs, out)
		})},
		{Name: "state of another rule is fresh", Rule: "C8", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if items[i].Rule != cs[i].Limit.Spec().Rule {
						items[i] = driver.Item{}
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
		{Name: "a reset clears state of another rule", Rule: "C8", alter: func(p *parts) {
			p.apply = func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error {
				for i := range cs {
					if cs[i].Op == quota.OpReset {
						items[i].Rule = cs[i].Limit.Spec().Rule
					}
				}
				return driver.Apply(cs, items, now, out)
			}
		}},
	}
}
