package engine

import (
	"context"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
)

// maxBatch is how many charges go in one script.
const maxBatch = 64

// queued is an item of a queue: a single charge, or else a list.
type queued struct {
	single *single
	list   *list
}

// single is a charge that is decided by itself, and its answer.
type single struct {
	charge   quota.Charge
	target   target
	next     *single // to the same key in a call
	decision quota.Decision
	err      error
}

// list is charges that are granted or denied as a whole, and the answer.
type list struct {
	charges   []quota.Charge
	targets   []target
	indexes   []int // of the charges' keys in a call
	decisions []quota.Decision
	err       error
}

// queue returns the queue of a charge.
func (s *Store) queue(c *quota.Charge, t *target) *Queue[queued] {
	if !s.cluster {
		return &s.queues[0]
	}
	s.locate(t, c)
	return &s.queues[t.slot]
}

// gather decides a charge, alone if its queue has a call to spare, else with others.
func (s *Store) gather(ctx context.Context, c *quota.Charge, t *target) (d quota.Decision, err error) {
	if err := s.awaitNode(ctx, c, t); err != nil {
		return quota.Decision{}, err
	}
	var waited *single
	err = s.batcher.Do(ctx, s.queue(c, t), 1,
		func() (err error) {
			d, err = s.alone(ctx, c, t)
			return err
		},
		func() queued {
			waited = &single{charge: *c, target: *t}
			return queued{single: waited}
		})
	if waited != nil && err == nil {
		return waited.decision, waited.err
	}
	return d, err
}

// gatherList is gather for a list.
func (s *Store) gatherList(ctx context.Context, q *list) error {
	if err := s.awaitNode(ctx, &q.charges[0], &q.targets[0]); err != nil {
		return err
	}
	var waited *list
	err := s.batcher.Do(ctx, s.queue(&q.charges[0], &q.targets[0]), len(q.charges),
		func() error { return s.send(ctx, []queued{{list: q}}, nil) },
		func() queued { // a copy: the caller may leave, and use its charges and decisions again
			waited = &list{charges: slices.Clone(q.charges), targets: q.targets, decisions: make([]quota.Decision, len(q.charges))}
			return queued{list: waited}
		})
	if waited != nil && err == nil {
		copy(q.decisions, waited.decisions)
		return waited.err
	}
	return err
}

// Together decides lists as one batch, each by itself, as if they had waited together. It is for tests.
func Together(ctx context.Context, s *Store, calls [][]quota.Charge) ([][]quota.Decision, []error) {
	items := make([]queued, len(calls))
	for i, cs := range calls {
		targets := make([]target, len(cs))
		for j := range cs {
			var err error
			if targets[j].plan, err = s.plan(cs[j].Limit); err != nil {
				return nil, []error{err}
			}
			s.locate(&targets[j], &cs[j])
		}
		if len(cs) == 1 {
			items[i].single = &single{charge: cs[0], target: targets[0]}
		} else {
			items[i].list = &list{charges: cs, targets: targets, decisions: make([]quota.Decision, len(cs))}
		}
	}
	s.send(ctx, items, &batch[queued]{})
	decisions, errs := make([][]quota.Decision, len(calls)), make([]error, len(calls))
	for i := range calls {
		if q := items[i].single; q != nil {
			decisions[i], errs[i] = []quota.Decision{q.decision}, q.err
		} else {
			decisions[i], errs[i] = items[i].list.decisions, items[i].list.err
		}
	}
	return decisions, errs
}
