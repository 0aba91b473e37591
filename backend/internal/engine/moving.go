package engine

import (
	"context"
	"fmt"
	"math"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The numbers of a driver.Moving serve for some time of the server's clock, which the store must guess before it sends a charge.
// It guesses by the process's clock. Where the server's clock shows a time for which the numbers do not serve, the kernel decides
// nothing, and the store sends the charge again with the right ones, for the reply has the time. From then on it guesses by
// the difference of the two clocks.

// numbers are the numbers of a plan and the times of the server's clock for which they serve.
type numbers struct {
	params   any // the unit and p1 to p8, packed; without p7 and p8 where both are 0
	from, to quota.Micros
	until    quota.Micros // a guess of this time wants other numbers
}

// serve reports whether the numbers serve for a time.
func (n *numbers) serve(now quota.Micros) bool { return n.from <= now && now < n.to }

// packNumbers returns the arguments of a limit's numbers.
func packNumbers(unit int64, params [8]int64) any {
	packed := appendNumber(nil, unit)
	some := params[:]
	if [2]int64(some[fewParams:]) == [2]int64{} {
		some = some[:fewParams]
	}
	for _, n := range some {
		packed = appendNumber(packed, n)
	}
	return string(packed)
}

// setNumbers gives a plan the numbers of its limit. It fails if one of them is not exact in Lua.
func (p *plan) setNumbers(l *quota.Limit) error {
	spec := l.Spec()
	p.fixed = numbers{params: packNumbers(spec.Unit, spec.Params), from: math.MinInt64, to: math.MaxInt64}
	p.moving, _ = l.Algorithm().(driver.Moving)
	p.unit = spec.Unit
	for _, n := range spec.Params {
		if !exact(n) && p.script != nil {
			return fmt.Errorf("redis: %w: a parameter of rule %q is %d; accepted: a number that Lua holds exactly, within 2^53", quota.ErrMisconfigured, spec.Rule, n)
		}
	}
	return nil
}

// numbers returns the numbers of a plan for a call that is sent now.
func (s *Store) numbers(p *plan) *numbers {
	if p.moving == nil {
		return &p.fixed
	}
	guess := s.ownClock() + quota.Micros(s.ahead.Load())
	if n := p.moved.Load(); n != nil && n.from <= guess && guess < n.until {
		return n
	}
	params, from, to := p.moving.ParamsAt(guess)
	n := &numbers{params: packNumbers(p.unit, params), from: from, to: to, until: guess + (to-guess)/2}
	p.moved.Store(n)
	return n
}

// ownClock returns the time that the process's clock shows.
func (s *Store) ownClock() quota.Micros {
	now := time.Now
	if s.o.Clock != nil {
		now = s.o.Clock
	}
	return quota.Micros(now().UnixMicro() + s.skew.Load())
}

// Skew has the process's clock be wrong by d. It is for tests.
func Skew(s *Store, d time.Duration) { s.skew.Store(d.Microseconds()) }

// shows learns from a reply what the server's clock shows.
func (s *Store) shows(now quota.Micros) { s.ahead.Store(int64(now - s.ownClock())) }

// maxSends is how often a charge is sent whose numbers did not serve. The second time they do, unless the server's clock is
// moved in between.
const maxSends = 3

// errNotServed is the error of a charge that is to be sent again, and nothing else.
var errNotServed = fmt.Errorf("redis: %w: the server's clock was moved by more than a window of the limit during each of %d calls", quota.ErrUnavailable, maxSends)

// notServed returns the items of a call that are to be sent again.
func (c *call) notServed() (items []queued) {
	for i := range c.keys {
		for q := c.keys[i].first; q != nil && q.err == errNotServed; q = q.next {
			items = append(items, queued{single: q}) // all of a key, or none: they are linked in this order again
		}
	}
	for _, q := range c.lists {
		if q.err == errNotServed {
			items = append(items, queued{list: q})
		}
	}
	return items
}

// sendAgain sends the items of a call for which the numbers did not serve. Of the others the answer stands.
func (s *Store) sendAgain(ctx context.Context, c *call, roundTrip any) {
	if c.sent == maxSends-1 {
		return
	}
	for rest := c.notServed(); len(rest) > 0; {
		var next *call
		next, rest = s.newCall(rest)
		next.sent = c.sent + 1
		s.sendCall(ctx, next, roundTrip)
	}
}
