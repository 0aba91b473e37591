package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Charges that come while enough scripts are in flight wait for one to land, and then go together in the
// next: no timer, and no wait where there is no load. Before a script leaves, its goroutine lets those that
// can run do so: callers that one reply woke come again together, and most would miss it by a moment.
const (
	maxFlying = 4  // scripts in flight for one lane
	maxBatch  = 64 // charges in one script
)

// A lane is what gathers: a server, or a slot of a cluster. Its lock is never held across I/O.
type lane struct {
	mu       sync.Mutex
	flying   int
	boarding bool // a caller is about to send, and takes along who waits
	waiting  []*batch
	closed   bool
}

// A batch is what goes together: charges in one script, and lists of charges in another.
type batch struct {
	units []*unit
	lists []*list
	size  int           // charges
	sent  bool          // units and lists are the sender's from now on
	done  chan struct{} // closed when they hold their answers

	until   time.Time // the latest deadline of those who wait
	endless bool      // one of them has none
}

// unit is one charge of a batch and its answer.
type unit struct {
	plan     *plan
	charge   quota.Charge
	gone     bool  // withdrawn: not sent
	next     *unit // of the same key
	decision quota.Decision
	err      error
}

// lane returns the lane of a key.
func (s *Store) lane(key string) *lane {
	if !s.cluster {
		return &s.lanes[0]
	}
	var buf [128]byte
	return &s.lanes[slot(quota.AppendEscaped(buf[:0], quota.Group(key)))]
}

// gather decides a charge, alone if its lane is free, else with others.
func (s *Store) gather(ctx context.Context, p *plan, c *quota.Charge) (d quota.Decision, err error) {
	l := s.lane(c.Key)
	free, err := l.enter()
	if err != nil {
		return quota.Decision{}, err
	}
	if free {
		defer func() { s.landed(l, stuck(ctx, err)) }()
		return s.alone(ctx, p, c)
	}
	u := &unit{plan: p, charge: *c}
	b := l.batch(ctx, 1)
	b.units = append(b.units, u)
	s.depart(l)
	l.mu.Unlock()
	if err := l.wait(ctx, b, &u.gone); err != nil {
		return quota.Decision{}, err
	}
	return u.decision, u.err
}

// gatherList is gather for a list.
func (s *Store) gatherList(ctx context.Context, q *list) error {
	l := s.lane(q.charges[0].Key)
	free, err := l.enter()
	if err != nil {
		return err
	}
	if free {
		defer func() { s.landed(l, stuck(ctx, q.err)) }()
		s.sendLists(ctx, []*list{q})
		return q.err
	}
	// The caller may leave, and take its charges and decisions along.
	private := &list{plans: q.plans, charges: slices.Clone(q.charges), decisions: make([]quota.Decision, len(q.charges))}
	b := l.batch(ctx, len(q.charges))
	b.lists = append(b.lists, private)
	s.depart(l)
	l.mu.Unlock()
	if err := l.wait(ctx, b, &private.gone); err != nil {
		return err
	}
	copy(q.decisions, private.decisions)
	return private.err
}

// enter takes a free place in the lane for a caller that goes alone. Where there is none, or others wait, it
// leaves the lane locked, for who joins a batch.
func (l *lane) enter() (free bool, err error) {
	l.mu.Lock()
	if !l.closed && !l.boarding && l.flying < maxFlying {
		l.boarding = true
		l.mu.Unlock()
		runtime.Gosched()
		l.mu.Lock()
		l.boarding = false
		free = len(l.waiting) == 0 && l.flying < maxFlying
	}
	switch {
	case l.closed:
		free, err = false, errClosed
	case free:
		l.flying++
	default:
		return false, nil
	}
	l.mu.Unlock()
	return free, err
}

// depart sends what waits while places are free, but leaves it to a caller who is about to send.
func (s *Store) depart(l *lane) {
	for !l.boarding && l.flying < maxFlying && len(l.waiting) > 0 {
		l.flying++
		b := l.next(nil)
		s.flights.Go(func() { s.flyAll(l, b) })
	}
}

// batch returns the batch that so many charges join, which wait until the end of ctx.
func (l *lane) batch(ctx context.Context, charges int) *batch {
	var b *batch
	if n := len(l.waiting); n > 0 && l.waiting[n-1].size+charges <= maxBatch {
		b = l.waiting[n-1]
	} else {
		b = &batch{done: make(chan struct{})}
		l.waiting = append(l.waiting, b)
	}
	b.size += charges
	if end, set := ctx.Deadline(); !set {
		b.endless = true
	} else if end.After(b.until) {
		b.until = end
	}
	return b
}

// wait returns when the batch has its answers, or with an error when the context ends.
func (l *lane) wait(ctx context.Context, b *batch, gone *bool) error {
	if ctx.Done() == nil {
		<-b.done
		return nil
	}
	select {
	case <-b.done:
		return nil
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !b.sent {
		*gone = true
		return b.shared(ctx.Err()) // the context's own: nothing was sent
	}
	select {
	case <-b.done:
		return nil
	default:
		return b.shared(TransportError(ctx.Err()))
	}
}

// stuck returns the error of a call that the client gave up by its own patience, which those who wait behind
// it would try again; nil for any other.
func stuck(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return nil
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return err
	}
	return nil
}

// landed is called when a script has landed: the next batch takes its place.
func (s *Store) landed(l *lane, stuck error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.next(stuck); b != nil {
		s.flights.Go(func() { s.flyAll(l, b) })
	}
}

// flyAll sends a batch, and those that follow it in its place.
func (s *Store) flyAll(l *lane, b *batch) {
	for b != nil {
		stuck := s.fly(b)
		runtime.Gosched()
		l.mu.Lock()
		b = l.next(stuck)
		l.mu.Unlock()
	}
}

// next returns the batch that goes now; without one, a place is free. If the call before got stuck, nobody
// waits for the next one to: all who wait are told that nothing was sent.
func (l *lane) next(stuck error) *batch {
	if stuck != nil {
		l.refuse(fmt.Errorf("redis: %w: nothing was sent, for a call before got no answer: %v", quota.ErrUnavailable, stuck))
	}
	if len(l.waiting) == 0 {
		l.flying--
		return nil
	}
	b := l.waiting[0]
	l.waiting[0] = nil
	if l.waiting = l.waiting[1:]; len(l.waiting) == 0 {
		l.waiting = nil
	}
	b.sent = true
	return b
}

// refuse ends what waits.
func (l *lane) refuse(err error) {
	for _, b := range l.waiting {
		b.sent = true
		err := b.shared(err)
		for _, u := range b.units {
			u.err = err
		}
		for _, q := range b.lists {
			q.err = err
		}
		close(b.done)
	}
	l.waiting = nil
}

// close ends what waits; what is in flight lands.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.refuse(errClosed)
}

// fly sends a batch under a deadline of its own: the latest of those who wait for it. It returns the error of
// a call that got stuck.
func (s *Store) fly(b *batch) error {
	defer close(b.done)
	ctx := context.Background()
	if !b.endless {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, b.until)
		defer cancel()
	}
	units := slices.DeleteFunc(b.units, func(u *unit) bool { return u.gone })
	lists := slices.DeleteFunc(b.lists, func(q *list) bool { return q.gone })
	if len(lists) == 0 {
		s.sendUnits(ctx, b, units)
	} else {
		each(2, func(i int) {
			if i == 0 {
				s.sendUnits(ctx, b, units)
				return
			}
			s.sendLists(ctx, lists)
			for _, q := range lists {
				if q.err != nil {
					q.err = b.shared(q.err)
				}
			}
		})
	}
	switch {
	case len(units) > 0:
		return stuck(ctx, units[0].err)
	case len(lists) > 0:
		return stuck(ctx, lists[0].err)
	}
	return nil
}

// Together decides lists as a batch, each alone: what becomes of those that wait, for tests.
func Together(ctx context.Context, s *Store, calls [][]quota.Charge) ([][]quota.Decision, []error) {
	l, b := &lane{}, (*batch)(nil)
	units, lists := make([]*unit, len(calls)), make([]*list, len(calls))
	for i, cs := range calls {
		plans := make([]*plan, len(cs))
		for j := range cs {
			var err error
			if plans[j], err = s.plan(cs[j].Limit); err != nil {
				return nil, []error{err}
			}
		}
		b = l.batch(ctx, 0)
		if len(cs) == 1 {
			units[i] = &unit{plan: plans[0], charge: cs[0]}
			b.units = append(b.units, units[i])
		} else {
			lists[i] = &list{plans: plans, charges: cs, decisions: make([]quota.Decision, len(cs))}
			b.lists = append(b.lists, lists[i])
		}
	}
	s.fly(b)
	decisions, errs := make([][]quota.Decision, len(calls)), make([]error, len(calls))
	for i := range calls {
		if u := units[i]; u != nil {
			decisions[i], errs[i] = []quota.Decision{u.decision}, u.err
		} else {
			decisions[i], errs[i] = lists[i].decisions, lists[i].err
		}
	}
	return decisions, errs
}

// batchError is the error of a round trip that several calls shared, or waited for: resilience.Shared.
type batchError struct {
	error
	trip chan struct{}
}

func (e *batchError) Unwrap() error  { return e.error }
func (e *batchError) RoundTrip() any { return e.trip }

func (b *batch) shared(err error) error { return &batchError{err, b.done} }
