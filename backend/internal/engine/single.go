package engine

import (
	"context"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// applyOne is driver.ApplyOne, with a panic as an error.
func applyOne(c *quota.Charge, it *driver.Item, now quota.Micros, d *quota.Decision) error {
	return Catch("an algorithm", false, func() error { return driver.ApplyOne(c, it, now, d) })
}

// alone decides a charge in a script of its own, see single.lua.
func (s *Store) alone(ctx context.Context, c *quota.Charge, t *target) (quota.Decision, error) {
	s.locate(t, c)
	n := s.numbers(t.plan)
	args := make([]any, 0, 3+1+6+1)
	args = append(args, evalSHA, t.plan.script.sha, small[1], t.key, t.plan.header, n.params, cost(c))
	if c.Op != quota.OpTake || c.Floor != 0 { // as arguments of their own: most numbers are boxed already
		r := c.Request()
		if args = append(args, small[c.Op], text(r.Arg)); r.Floor > 0 {
			args = append(args, text(min(r.Floor, maxCost)))
		}
	}
	r, err := s.run(ctx, t.plan.script, s.appendClock(args), 1, 1)
	if isForeign(err) {
		// Nothing was charged. The script of several charges returns the state, and so the error can tell whose
		// it is.
		return s.aloneAgain(ctx, c, t)
	}
	if err != nil {
		return quota.Decision{}, err
	}
	text, ok := r.Text(0)
	if !ok || r.Len() != 1 || len(text) < numberSize {
		return quota.Decision{}, badReply(r)
	}
	now, wrote, ok := stamp(signed(text), true)
	if !ok {
		return quota.Decision{}, badReply(r)
	}
	held := text[numberSize:]
	if !n.serve(now) && !wrote {
		s.shows(now)
		return s.aloneAgain(ctx, c, t)
	}
	it, err := unpack(held)
	t.plan.saw(numberSize * len(it.State.Tail))
	var d quota.Decision
	if err == nil {
		err = applyOne(c, &it, now, &d)
	}
	switch {
	case err != nil && wrote: // the script took the state for one of its rule
		err = uncertain("the script charged, and no decision can be made on the state that it found: %v", err)
	case err == nil && (it.Write != wrote || !n.serve(now)):
		err = differs(t.plan)
	}
	return d, err
}

// aloneAgain decides a charge that alone did not.
func (s *Store) aloneAgain(ctx context.Context, c *quota.Charge, t *target) (quota.Decision, error) {
	q := &single{charge: *c, target: *t}
	err := s.send(ctx, []queued{{single: q}}, nil)
	return q.decision, err
}
