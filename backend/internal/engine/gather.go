package engine

import (
	"context"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// maxBatch is how many charges go in one script.
const maxBatch = 64

// queued is an item of a queue: a single charge, or else a list.
type queued struct {
	single *single
	list   *list
}

// single is one charge of a batch and its answer.
type single struct {
	plan     *plan
	charge   quota.Charge
	next     *single // of the same key
	decision quota.Decision
	err      error
}

// queue returns the queue of a key.
func (s *Store) queue(key string) *Queue[queued] {
	if !s.cluster {
		return &s.queues[0]
	}
	var buf [128]byte
	return &s.queues[slot(driver.AppendEscaped(buf[:0], quota.Group(key)))]
}

// gather decides a charge, alone if its queue has a call to spare, else with others.
func (s *Store) gather(ctx context.Context, p *plan, c *quota.Charge) (d quota.Decision, err error) {
	var waited *single
	err = s.batcher.Do(ctx, s.queue(c.Key), 1,
		func() (err error) {
			d, err = s.alone(ctx, p, c)
			return err
		},
		func() queued {
			waited = &single{plan: p, charge: *c}
			return queued{single: waited}
		})
	if waited != nil && err == nil {
		return waited.decision, waited.err
	}
	return d, err
}

// gatherList is gather for a list.
func (s *Store) gatherList(ctx context.Context, q *list) error {
	var waited *list
	err := s.batcher.Do(ctx, s.queue(q.charges[0].Key), len(q.charges),
		func() error {
			s.sendLists(ctx, []*list{q})
			return q.err
		},
		func() queued { // a copy: the caller may leave, and use its charges and decisions again
			waited = &list{plans: q.plans, charges: slices.Clone(q.charges), decisions: make([]quota.Decision, len(q.charges))}
			return queued{list: waited}
		})
	if waited != nil && err == nil {
		copy(q.decisions, waited.decisions)
		return waited.err
	}
	return err
}

// send sends single charges in one script, and lists of charges in another.
func (s *Store) send(ctx context.Context, items []queued, roundTrip any) error {
	singles, lists := make([]*single, 0, len(items)), []*list(nil)
	for _, i := range items {
		if i.single != nil {
			singles = append(singles, i.single)
		} else {
			lists = append(lists, i.list)
		}
	}
	if len(lists) == 0 {
		s.sendSingles(ctx, roundTrip, singles)
		return singles[0].err
	}
	each(2, func(i int) {
		if i == 0 {
			s.sendSingles(ctx, roundTrip, singles)
			return
		}
		s.sendLists(ctx, lists)
		for _, q := range lists {
			if q.err != nil {
				q.err = driver.Share(q.err, roundTrip)
			}
		}
	})
	if len(singles) > 0 {
		return singles[0].err
	}
	return lists[0].err
}

// Together decides lists as a batch, each alone: what becomes of those that wait, for tests.
func Together(ctx context.Context, s *Store, calls [][]quota.Charge) ([][]quota.Decision, []error) {
	items := make([]queued, len(calls))
	for i, cs := range calls {
		plans := make([]*plan, len(cs))
		for j := range cs {
			var err error
			if plans[j], err = s.plan(cs[j].Limit); err != nil {
				return nil, []error{err}
			}
		}
		if len(cs) == 1 {
			items[i].single = &single{plan: plans[0], charge: cs[0]}
		} else {
			items[i].list = &list{plans: plans, charges: cs, decisions: make([]quota.Decision, len(cs))}
		}
	}
	s.send(ctx, items, nil)
	decisions, errs := make([][]quota.Decision, len(calls)), make([]error, len(calls))
	for i := range calls {
		if u := items[i].single; u != nil {
			decisions[i], errs[i] = []quota.Decision{u.decision}, u.err
		} else {
			decisions[i], errs[i] = items[i].list.decisions, items[i].list.err
		}
	}
	return decisions, errs
}
