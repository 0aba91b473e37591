package engine

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// giveBackTimeout bounds the refund of charges that one slot granted and another denied, also where the caller
// has left. A refund that fails is repeated, at first after giveBackPause, which doubles up to giveBackMaxPause.
const (
	giveBackTimeout  = time.Second
	giveBackPause    = 2 * time.Millisecond
	giveBackMaxPause = 100 * time.Millisecond
)

// part is the charges of a list that go together.
type part struct {
	indexes []int // of the charges in the list
}

// partsOf returns the parts of a list whose keys go together, in the order of their first charges.
func (s *Store) partsOf(q *list, together func(a, b *target) bool) []part {
	for i := range q.charges {
		s.locate(&q.targets[i], &q.charges[i])
	}
	var parts []part
next:
	for i := range q.targets {
		for j := range parts {
			if together(&q.targets[parts[j].indexes[0]], &q.targets[i]) {
				parts[j].indexes = append(parts[j].indexes, i)
				continue next
			}
		}
		parts = append(parts, part{[]int{i}})
	}
	return parts
}

// takeSplit decides a list slot by slot, in parallel. Takes, also ahead, and peeks come first. If one slot denies, the
// charges that the others granted are given back. Debits, refunds and resets follow a grant. They are never
// denied, and could not be taken back: a debit may have charged less than its cost.
func (s *Store) takeSplit(ctx context.Context, q *list, parts []part) error {
	firm := make([]part, 0, len(parts))
	ask := make([]part, 0, len(parts))
	for _, p := range parts {
		var f, a part
		for _, i := range p.indexes {
			if q.charges[i].Op.Deniable() {
				a.indexes = append(a.indexes, i)
			} else {
				f.indexes = append(f.indexes, i)
			}
		}
		if len(f.indexes) > 0 {
			firm = append(firm, f)
		}
		if len(a.indexes) > 0 {
			ask = append(ask, a)
		}
	}
	granted, err := s.takeParts(ctx, q, ask)
	switch {
	case err != nil:
		return err
	case granted:
		made, errs := s.decideParts(ctx, q, firm)
		if err := worst(errs); err != nil {
			if made || len(ask) > 0 {
				err = partly(err)
			}
			return err
		}
	default:
		if err := s.peekParts(ctx, q, firm); err != nil {
			return err
		}
	}
	for i := range q.decisions {
		q.decisions[i].Split = true
	}
	return nil
}

// decideParts decides parts in parallel. It returns an error for each, which is nil if the part was decided,
// and whether any part was decided.
func (s *Store) decideParts(ctx context.Context, q *list, parts []part) (any bool, errs []error) {
	errs = Each(len(parts), func(i int) error {
		first := parts[i].indexes[0]
		node := s.nodeOf(s.slotOf(&q.targets[first]))
		if c, t := &q.charges[first], &q.targets[first]; len(parts[i].indexes) == 1 && c.ID == "" && t.plan.script != nil {
			d, err := s.one(ctx, c, t)
			if err == nil {
				q.decisions[first] = d
			}
			return driver.AtNode(err, node)
		}
		p := parts[i].of(q)
		if err := s.decide(ctx, p); err != nil {
			return driver.AtNode(err, node)
		}
		for j, k := range parts[i].indexes {
			q.decisions[k] = p.decisions[j]
		}
		return nil
	})
	for _, err := range errs {
		any = any || err == nil
	}
	return any, errs
}

// worst returns an ErrIndeterminate if there is one, else any error.
func worst(errs []error) (err error) {
	for _, e := range errs {
		if e != nil && (err == nil || errors.Is(e, quota.ErrIndeterminate)) {
			err = e
		}
	}
	return err
}

// takeParts decides parts in parallel, and reports whether all were granted. Otherwise it gives the granted
// parts back.
func (s *Store) takeParts(ctx context.Context, q *list, parts []part) (granted bool, err error) {
	_, errs := s.decideParts(ctx, q, parts)
	err = worst(errs)
	granted = err == nil
	var back []part
	for i, p := range parts {
		if errs[i] == nil && p.granted(q.decisions) {
			back = append(back, p)
		} else {
			granted = false
		}
	}
	if !granted {
		if e := s.giveBack(ctx, q, back); e != nil {
			if err == nil {
				err = e
			}
			err = partly(err)
		}
	}
	return granted, err
}

// partly returns an error of a list of which a part may be charged: the error must not say 'not charged'.
func partly(err error) error {
	if errors.Is(err, quota.ErrIndeterminate) {
		return err
	}
	node := driver.NodeOf(err)
	if node != "" {
		err = errors.Unwrap(err)
	}
	return driver.AtNode(fmt.Errorf("redis: %w: the list was not granted, and a part of it may be charged: %v", quota.ErrIndeterminate, err), node)
}

// giveBack refunds the charges of parts and corrects their decisions. It returns when the caller's context ends;
// then the refunds go on, and the error says that they are not known to be made. Each refund has a request id,
// so that it may be repeated whatever became of it, and mints no quota.
func (s *Store) giveBack(ctx context.Context, q *list, parts []part) error {
	// Nothing of the list is used once the caller may have left.
	var refunds []*list
	var places [][]int
	for _, p := range parts {
		groups := map[string]int{} // an id holds in one group
		for _, i := range p.indexes {
			n := max(q.decisions[i].Charged, q.decisions[i].Held)
			if n == 0 || q.charges[i].Op == quota.OpRenew { // a renewal stays: nobody else may take its place
				continue
			}
			c := q.charges[i].Refund(q.decisions[i], n)
			c.ID = s.giveBackID()
			g := quota.Group(c.Key)
			k, known := groups[g]
			if !known {
				k = len(refunds)
				groups[g] = k
				refunds, places = append(refunds, &list{givesBack: true}), append(places, nil)
			}
			r := refunds[k]
			if len(r.charges) > 0 {
				c.ID = r.charges[0].ID
			}
			r.charges, r.targets, places[k] = append(r.charges, c), append(r.targets, q.targets[i]), append(places[k], i)
		}
	}
	if len(refunds) == 0 {
		return nil
	}
	var errs []error
	done := make(chan struct{})
	refund := func() {
		defer close(done)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
		defer cancel()
		errs = Each(len(refunds), func(k int) error { return s.refund(ctx, refunds[k]) })
	}
	if !s.backs.Run(refund) { // the client is closed, and the refunds end by themselves
		go refund()
	}
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("redis: %w: the context ended before the grants of other slots were given back: %v", quota.ErrIndeterminate, ctx.Err())
	}
	for k, r := range refunds {
		for j, i := range places[k] {
			d := &q.decisions[i]
			if d.Charged, d.Delay, d.Held, d.Until = 0, 0, 0, 0; errs[k] == nil {
				q.decisions[i].Remaining, q.decisions[i].ResetAfter = r.decisions[j].Remaining, r.decisions[j].ResetAfter
			}
		}
	}
	return worst(errs)
}

// refund makes a list of refunds, and repeats it while it fails and may succeed, until the context ends.
func (s *Store) refund(ctx context.Context, q *list) (err error) {
	q.decisions = make([]quota.Decision, len(q.charges))
	for pause := giveBackPause; ; pause = min(2*pause, giveBackMaxPause) {
		e := s.decide(ctx, q)
		if e == nil {
			return nil
		}
		if ctx.Err() == nil || err == nil {
			err = e
		}
		switch driver.Sentinel(e) {
		case quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrOverloaded, quota.ErrConflict:
		default:
			return err
		}
		wait := time.NewTimer(pause)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return err
		}
	}
}

// giveBackID returns a request id that no other call has.
func (s *Store) giveBackID() string {
	return s.origin + strconv.FormatInt(s.givenBack.Add(1), 36)
}

// peekParts fills in the decisions of charges that were not made because the list was denied.
func (s *Store) peekParts(ctx context.Context, q *list, parts []part) error {
	peeks := make([]quota.Charge, len(q.charges))
	for i := range q.charges {
		peeks[i] = quota.Charge{Limit: q.charges[i].Limit, Key: q.charges[i].Key, Op: quota.OpPeek}
	}
	_, errs := s.decideParts(ctx, &list{charges: peeks, targets: q.targets, decisions: q.decisions}, parts)
	for _, p := range parts {
		for _, i := range p.indexes {
			q.decisions[i].Allowed, q.decisions[i].RetryAfter, q.decisions[i].Shadow = true, 0, q.charges[i].Shadow
		}
	}
	return worst(errs)
}

// granted reports whether all decisions of the part are allowed, but those of shadows.
func (p part) granted(decisions []quota.Decision) bool {
	for _, i := range p.indexes {
		if !decisions[i].Allowed && !decisions[i].Shadow {
			return false
		}
	}
	return true
}

// of returns the part of a list as a list of its own.
func (p part) of(q *list) *list {
	n := len(p.indexes)
	of := &list{charges: make([]quota.Charge, n), targets: make([]target, n), decisions: make([]quota.Decision, n)}
	for j, i := range p.indexes {
		of.charges[j], of.targets[j] = q.charges[i], q.targets[i]
	}
	return of
}

// Background is functions that go on when their callers leave.
type Background struct {
	// mu guards closed: once it is set, no function joins the running ones.
	mu      sync.Mutex
	closed  bool
	running sync.WaitGroup
}

// Run calls f in a goroutine of its own, unless Wait came first, and reports whether it does.
func (b *Background) Run(f func()) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.closed {
		b.running.Go(f)
	}
	return !b.closed
}

// Wait returns when all functions have returned that began before it.
func (b *Background) Wait() {
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.running.Wait()
}
