package engine

import (
	"context"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// alone decides a charge in a script of its own, see single.lua.
func (s *Store) alone(ctx context.Context, c *quota.Charge, t *target) (quota.Decision, error) {
	s.locate(t, c)
	args := make([]any, 0, 3+1+5+1)
	args = append(args, evalSHA, t.plan.script.sha, small[1], t.key, t.plan.header, t.plan.params, cost(c))
	if c.Op != quota.OpTake { // as arguments of their own: most numbers are boxed already
		args = append(args, small[c.Op], text(c.At))
	}
	r, err := s.run(ctx, t.plan.script, s.appendClock(args), 1)
	if err != nil {
		return quota.Decision{}, err
	}
	now, wrote, ok := stamp(r)
	held, text := r.Text(1)
	if !ok || !text || r.Len() != 2 {
		return quota.Decision{}, badReply(r)
	}
	it, err := unpack(held)
	if err != nil {
		return quota.Decision{}, err
	}
	var d quota.Decision
	err = driver.ApplyOne(c, &it, now, &d)
	if err == nil && it.Write != wrote {
		err = differs(t.plan)
	}
	return d, err
}
