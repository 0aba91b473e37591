package lease

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// fetch is a request for a chunk. Who starts it has a cost that is paid out of the chunk; others wait for it.
type fetch struct {
	charge quota.Charge // what is asked of the store
	cost   int64        // of who started it
	sent   int64
	left   bool          // who started it has gone; under entry.mu
	done   chan struct{} // closed when the following are set
	paid   bool          // cost was taken out of the chunk, and d is the decision
	d      quota.Decision
	err    error
}

// ask decides a take that the lease cannot pay: with a new chunk if that is worth it, else on its own.
func (s *Store) ask(ctx context.Context, c *quota.Charge, h uint64, e *entry) (d quota.Decision, err error) {
	f, first := (*fetch)(nil), false
	instances := s.instances()
	for {
		if e == nil {
			if e = s.table.add(h, c, s.now()); e == nil {
				return s.inner.Take(ctx, *c)
			}
		}
		e.mu.Lock()
		if e.dead {
			e.mu.Unlock()
			e = nil
			continue
		}
		e.touched = true
		now := s.now()
		if k := e.lease.Load(); k != nil && k.decide(c, now, &d) { // somebody fetched it meanwhile
			e.mu.Unlock()
			return d, nil
		}
		f = e.fetch
		if f == nil {
			if want := e.want(c.Limit, instances, now, s.window); want > c.Cost {
				f, first = &fetch{charge: *c, cost: c.Cost, sent: now, done: make(chan struct{})}, true
				f.charge.Cost = want
				e.fetch = f
			}
		}
		e.mu.Unlock()
		break
	}
	switch {
	case f == nil:
		return s.single(ctx, c, e)
	case first && !s.start(func() { s.fetch(context.WithoutCancel(ctx), e, f) }):
		e.land(f, d, s.gate.Open(), s)
		close(f.done)
	}
	select {
	case <-f.done:
	case <-ctx.Done():
		if first && !e.abandon(f) {
			return f.d, f.err
		}
		return d, ctx.Err() // nothing was charged for this caller alone
	}
	if f.err != nil {
		return d, f.err
	}
	if first && f.paid {
		return f.d, nil
	}
	if k := e.lease.Load(); k != nil && k.decide(c, s.now(), &d) {
		return d, nil
	}
	return s.single(ctx, c, e) // one wait for others is enough
}

// abandon notes that who started f has gone, unless the decision is there.
func (e *entry) abandon(f *fetch) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	f.left = !f.paid
	return f.left
}

// fetch asks for a chunk, for as long as half a lifetime.
func (s *Store) fetch(ctx context.Context, e *entry, f *fetch) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.patience))
	defer cancel()
	d, err := s.inner.Take(ctx, f.charge)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, quota.ErrIndeterminate) {
			err = fmt.Errorf("lease: %w: nothing was sent within %v: %w", quota.ErrUnavailable, time.Duration(s.patience), err)
		}
		err = driver.Share(err, f)
	}
	rests := e.land(f, d, err, s)
	close(f.done)
	s.giveBack(context.WithoutCancel(ctx), rests)
}

// land makes a chunk the lease, and returns what is to go back.
func (e *entry) land(f *fetch, d quota.Decision, err error, s *Store) (rests []rest) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.fetch = nil
	if err != nil {
		f.err = err
		return nil
	}
	now := s.now()
	e.learn(&d, now)
	if !d.Allowed {
		return nil
	}
	k := &chunk{
		limit: f.charge.Limit, size: f.charge.Cost, sent: f.sent, until: f.sent + s.lifetime,
		at: d.At, remaining: d.Remaining, whole: now + int64(d.ResetAfter),
	}
	o, old := e.lease.Load(), int64(0)
	if o != nil {
		e.tally(now, s.window)
		old = o.close()
		e.lease.Store(nil)
	}
	// A chunk is leased only if it is the store's own: policies below may have decided in its place.
	if s.gate.Open() != nil || now >= k.until || d.Source != quota.FromStore {
		if o != nil {
			rests = e.yield(o, old, quota.FromStore, rests)
		}
		return e.yield(k, k.size, d.Source, rests)
	}
	left := k.size
	if !f.left {
		if old > 0 && now < o.until { // the older tokens are spent first
			paid := min(old, f.cost)
			left, old = left+paid, old-paid
			e.spent(paid, now, s.window)
		}
		left -= f.cost
		f.paid = true
		f.d = quota.Decision{Charged: f.cost}
		k.describe(&f.d, left, now)
	}
	k.left.Store(left)
	e.counted = 0
	e.lease.Store(k)
	return e.yield(o, old, quota.FromStore, rests)
}

// single has a take decided on its own: by the store, together with what is left of the lease.
func (s *Store) single(ctx context.Context, c *quota.Charge, e *entry) (quota.Decision, error) {
	k, held := e.lease.Load(), int64(0)
	if k != nil && s.now() < k.until && *k.limit.Spec() == *c.Limit.Spec() && c.Cost <= c.Limit.Spec().Capacity {
		held = k.claim(c.Cost - 1)
	}
	part := *c
	part.Cost -= held
	d, err := s.inner.Take(ctx, part)
	now := s.now()
	if held == 0 {
		if err == nil {
			e.note(&d, d.Charged, now, s.window)
		}
		return d, err
	}
	switch {
	case err != nil:
		k.put(held)
		return d, err
	case !d.Allowed:
		e.note(&d, 0, now, s.window)
		if left, ok := k.put(held); ok {
			d.Remaining += left
		}
		return d, nil
	case now >= k.until: // what was held may not be spent any more
		return s.inner.Take(ctx, *c)
	}
	e.note(&d, d.Charged, now, s.window)
	d.Charged += held
	d.Source = quota.FromLease
	return d, nil
}
