package engine

import (
	"context"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

// maxBatch is how much work goes in one script, see work, so that a server is not held up for long. A charge is 1 or more:
// no more than maxBatch charges go in one script.
const maxBatch = 64

// pieceSize is how many bytes of a state's list count as much as a charge.
const pieceSize = 2048

// work returns how much work a charge is in a script. The time of a kernel grows with the state's list. How long that is, is
// not known before a state is read, so the average of the states that were read lately must do, and at first what a
// driver.Listed says.
func (p *plan) work() int { return 1 + int(p.bytes.Load()/pieceSize) }

// work returns the work of a list: that of its charges, and as much as a charge for the record of a request id. One list may
// be more than maxBatch, for it must be decided in one step.
func (q *list) work() (n int) {
	if q.charges[0].ID != "" {
		n = 1
	}
	for i := range q.targets {
		n += q.targets[i].plan.work()
	}
	return n
}

// saw notes how many bytes the list of a state has that was read.
func (p *plan) saw(bytes int) {
	const weight = 8
	switch before := p.bytes.Load(); {
	case before > 0:
		p.bytes.Store(max(before+(int64(bytes)-before)/weight, 1))
	case bytes > 0:
		p.bytes.Store(int64(bytes))
	}
}

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

// list is charges that are granted or denied as a whole, or one charge with a request id, and the answer.
type list struct {
	charges   []quota.Charge
	targets   []target
	indexes   []int // of the charges' keys in a call
	decisions []quota.Decision
	err       error
	givesBack bool // it goes by itself: other calls, and the end of the queue, must not hold it up
	own       bool // the charges and decisions are the store's
}

// lone is a list of one charge, in one allocation.
type lone struct {
	list
	charge   [1]quota.Charge
	target   [1]target
	index    [1]int
	decision [1]quota.Decision
}

// queue returns the queue of a charge.
func (s *Store) queue(c *quota.Charge, t *target) *Queue[queued] {
	if s.anyKeys() && !s.o.Strict {
		return &s.all
	}
	s.locate(t, c)
	return s.slots.of(s.slotOf(t))
}

// slotQueues has a queue for each slot, which is made when it is needed: a store of one server needs none.
type slotQueues struct {
	blocks [Slots / slotBlock]atomic.Pointer[[slotBlock]Queue[queued]]

	// mu guards closed, and the making of blocks: once it is set, every queue is closed.
	mu     sync.Mutex
	closed bool
}

// slotBlock is how many queues are made at once.
const slotBlock = 64

// of returns the queue of a slot.
func (q *slotQueues) of(slot uint16) *Queue[queued] {
	p := &q.blocks[slot/slotBlock]
	block := p.Load()
	if block == nil {
		block = q.add(p)
	}
	return &block[slot%slotBlock]
}

func (q *slotQueues) add(p *atomic.Pointer[[slotBlock]Queue[queued]]) *[slotBlock]Queue[queued] {
	q.mu.Lock()
	defer q.mu.Unlock()
	if block := p.Load(); block != nil {
		return block
	}
	block := new([slotBlock]Queue[queued])
	for i := range block {
		block[i].closed = q.closed
	}
	p.Store(block)
	return block
}

// close closes all queues.
func (q *slotQueues) close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	for i := range q.blocks {
		if block := q.blocks[i].Load(); block != nil {
			for j := range block {
				block[j].Close()
			}
		}
	}
}

// gather decides a charge, alone if its queue has a call to spare, else with others.
func (s *Store) gather(ctx context.Context, c *quota.Charge, t *target) (d quota.Decision, err error) {
	if err := s.awaitNode(ctx, c, t); err != nil {
		return quota.Decision{}, err
	}
	var waited *single
	err = s.batcher.Do(ctx, s.queue(c, t), t.plan.work(),
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
	err := s.batcher.Do(ctx, s.queue(&q.charges[0], &q.targets[0]), q.work(),
		func() error { return s.send(ctx, []queued{{list: q}}, nil) },
		func() queued {
			if waited = q; q.own {
				return queued{list: q}
			}
			// A copy: the caller may leave, and use its charges and decisions again.
			waited = &list{charges: slices.Clone(q.charges), targets: q.targets, decisions: make([]quota.Decision, len(q.charges))}
			return queued{list: waited}
		})
	if waited != nil && err == nil {
		if waited != q {
			copy(q.decisions, waited.decisions)
		}
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
		if len(cs) == 1 && cs[0].ID == "" {
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
