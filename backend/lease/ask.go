package lease

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// request is a request for a chunk. The first caller starts it, and its cost is paid out of the chunk; later
// callers for the same key wait for it.
type request struct {
	charge quota.Charge // the charge sent to the store below
	cost   int64        // of the first caller
	sent   int64
	left   bool          // the first caller's context has ended; under entry.mu
	done   chan struct{} // closed when the fields below are set
	paid   bool          // the first caller's cost was taken out of the chunk, and d is its decision
	d      quota.Decision
	err    error
}

// ask decides a take that the lease cannot pay: with a new chunk if that is worth it, else on its own.
func (s *Store) ask(ctx context.Context, c *quota.Charge, h uint64, e *entry) (d quota.Decision, err error) {
	r, first := (*request)(nil), false
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
		if k := e.lease.Load(); k != nil && k.decide(c, now, &d) { // another caller received it meanwhile
			e.mu.Unlock()
			return d, nil
		}
		r = e.request
		if r == nil {
			if size := e.nextSize(c.Limit, instances, now, s.window); size > c.Cost {
				r, first = &request{charge: *c, cost: c.Cost, sent: now, done: make(chan struct{})}, true
				r.charge.Cost = size
				e.request = r
			}
		}
		e.mu.Unlock()
		break
	}
	switch {
	case r == nil:
		return s.single(ctx, c, e)
	case first && !s.start(func() { s.send(context.WithoutCancel(ctx), e, r) }):
		e.receive(r, d, s.gate.Open(), s)
		close(r.done)
	}
	select {
	case <-r.done:
	case <-ctx.Done():
		if first && !e.abandon(r) {
			return r.d, r.err
		}
		return d, ctx.Err() // no token was charged for this caller alone
	}
	if r.err != nil {
		return d, r.err
	}
	if first && r.paid {
		return r.d, nil
	}
	if k := e.lease.Load(); k != nil && k.decide(c, s.now(), &d) {
		return d, nil
	}
	return s.single(ctx, c, e) // a caller waits for one request of another caller, not for a second
}

// abandon notes that the first caller of r stops waiting, unless the decision is there.
func (e *entry) abandon(r *request) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	r.left = !r.paid
	return r.left
}

// send sends a request for a chunk, and waits for its answer for at most half a lifetime.
func (s *Store) send(ctx context.Context, e *entry, r *request) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.patience))
	defer cancel()
	d, err := s.inner.Take(ctx, r.charge)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, quota.ErrIndeterminate) {
			err = fmt.Errorf("lease: %w: the request was not sent within %v: %w", quota.ErrUnavailable, time.Duration(s.patience), err)
		}
		err = driver.Share(err, r)
	}
	refunds := e.receive(r, d, err, s)
	close(r.done)
	s.giveBack(context.WithoutCancel(ctx), refunds)
}

// receive makes the chunk that a request got the key's lease, and returns the tokens to be given back.
func (e *entry) receive(r *request, d quota.Decision, err error, s *Store) (refunds []refund) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.request = nil
	if err != nil {
		r.err = err
		return nil
	}
	now := s.now()
	e.learn(&d, now)
	if !d.Allowed {
		return nil
	}
	k := &chunk{
		limit: r.charge.Limit, size: r.charge.Cost, sent: r.sent, until: r.sent + s.lifetime,
		at: d.At, remaining: d.Remaining, whole: now + int64(d.ResetAfter),
	}
	o, old := e.lease.Load(), int64(0)
	if o != nil {
		e.tally(now, s.window)
		old = o.close()
		e.lease.Store(nil)
	}
	// Only the store's own chunk becomes a lease: policies below may have decided in the store's place.
	if s.gate.Open() != nil || now >= k.until || d.Source != quota.FromStore {
		if o != nil {
			refunds = e.appendRefund(refunds, o, old, quota.FromStore)
		}
		return e.appendRefund(refunds, k, k.size, d.Source)
	}
	left := k.size
	if !r.left {
		if old > 0 && now < o.until { // the older tokens are spent first
			paid := min(old, r.cost)
			left, old = left+paid, old-paid
			e.spent(paid, now, s.window)
		}
		left -= r.cost
		r.paid = true
		r.d = quota.Decision{Charged: r.cost}
		k.describe(&r.d, left, now)
	}
	k.left.Store(left)
	e.counted = 0
	e.lease.Store(k)
	return e.appendRefund(refunds, o, old, quota.FromStore)
}

// single has the store below decide a take on its own, together with the tokens left in the lease.
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
	case now >= k.until: // the held tokens may not be spent any more
		return s.inner.Take(ctx, *c)
	}
	e.note(&d, d.Charged, now, s.window)
	d.Charged += held
	d.Source = quota.FromLease
	return d, nil
}
