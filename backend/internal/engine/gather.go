package engine

import (
	"context"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// maxBatch is how many charges go in one script.
const maxBatch = 64

// asking is what waits in a lane: a unit, or else a list.
type asking struct {
	unit *unit
	list *list
}

// unit is one charge of a batch and its answer.
type unit struct {
	plan     *plan
	charge   quota.Charge
	next     *unit // of the same key
	decision quota.Decision
	err      error
}

// lane returns the lane of a key.
func (s *Store) lane(key string) *Lane[asking] {
	if !s.cluster {
		return &s.lanes[0]
	}
	var buf [128]byte
	return &s.lanes[slot(driver.AppendEscaped(buf[:0], quota.Group(key)))]
}

// gather decides a charge, alone if its lane is free, else with others.
func (s *Store) gather(ctx context.Context, p *plan, c *quota.Charge) (d quota.Decision, err error) {
	l := s.lane(c.Key)
	free, err := l.Enter()
	if err != nil {
		return quota.Decision{}, err
	}
	if free {
		defer func() { s.carrier.Leave(ctx, l, err) }()
		return s.alone(ctx, p, c)
	}
	u := &unit{plan: p, charge: *c}
	if err := s.carrier.Join(ctx, l, asking{unit: u}, 1); err != nil {
		return quota.Decision{}, err
	}
	return u.decision, u.err
}

// gatherList is gather for a list.
func (s *Store) gatherList(ctx context.Context, q *list) error {
	l := s.lane(q.charges[0].Key)
	free, err := l.Enter()
	if err != nil {
		return err
	}
	if free {
		defer func() { s.carrier.Leave(ctx, l, q.err) }()
		s.sendLists(ctx, []*list{q})
		return q.err
	}
	// The caller may leave, and take its charges and decisions along.
	private := &list{plans: q.plans, charges: slices.Clone(q.charges), decisions: make([]quota.Decision, len(q.charges))}
	if err := s.carrier.Join(ctx, l, asking{list: private}, len(q.charges)); err != nil {
		return err
	}
	copy(q.decisions, private.decisions)
	return private.err
}

// fly sends charges in one script, and lists of charges in another.
func (s *Store) fly(ctx context.Context, items []asking, trip *Trip) error {
	units, lists := make([]*unit, 0, len(items)), []*list(nil)
	for _, i := range items {
		if i.unit != nil {
			units = append(units, i.unit)
		} else {
			lists = append(lists, i.list)
		}
	}
	if len(lists) == 0 {
		s.sendUnits(ctx, trip, units)
		return units[0].err
	}
	each(2, func(i int) {
		if i == 0 {
			s.sendUnits(ctx, trip, units)
			return
		}
		s.sendLists(ctx, lists)
		for _, q := range lists {
			if q.err != nil {
				q.err = trip.Shared(q.err)
			}
		}
	})
	if len(units) > 0 {
		return units[0].err
	}
	return lists[0].err
}

// Together decides lists as a batch, each alone: what becomes of those that wait, for tests.
func Together(ctx context.Context, s *Store, calls [][]quota.Charge) ([][]quota.Decision, []error) {
	items := make([]asking, len(calls))
	for i, cs := range calls {
		plans := make([]*plan, len(cs))
		for j := range cs {
			var err error
			if plans[j], err = s.plan(cs[j].Limit); err != nil {
				return nil, []error{err}
			}
		}
		if len(cs) == 1 {
			items[i].unit = &unit{plan: plans[0], charge: cs[0]}
		} else {
			items[i].list = &list{plans: plans, charges: cs, decisions: make([]quota.Decision, len(cs))}
		}
	}
	s.fly(ctx, items, &Trip{})
	decisions, errs := make([][]quota.Decision, len(calls)), make([]error, len(calls))
	for i := range calls {
		if u := items[i].unit; u != nil {
			decisions[i], errs[i] = []quota.Decision{u.decision}, u.err
		} else {
			decisions[i], errs[i] = items[i].list.decisions, items[i].list.err
		}
	}
	return decisions, errs
}
