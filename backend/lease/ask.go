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
	instances := s.instances()
	if e == nil {
		e = s.table.add(h, c, s.now())
	}
	for e != nil {
		r, first, answer := s.join(c, e, instances, &d)
		switch answer {
		case decided:
			s.hits.add(h)
			return d, nil
		case removed:
			e = s.table.add(h, c, s.now())
			continue
		case alone:
			return s.single(ctx, c, e)
		}
		if first && !s.start(func() { s.send(context.WithoutCancel(ctx), e, r) }) {
			s.receive(e, r, d, s.gate.Open())
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
			s.hits.add(h)
			return d, nil
		}
		return s.single(ctx, c, e) // a caller waits for one request of another caller, not for a second
	}
	return s.inner.Charge(ctx, *c)
}

// The answers of join.
const (
	decided = iota // by a lease that another caller received meanwhile
	removed        // the entry is no longer in the table
	alone          // no request is worth it
	joined         // a request: a new one if first is set
)

// join finds the request for a chunk that a take may wait for, or begins one.
func (s *Store) join(c *quota.Charge, e *entry, instances int64, d *quota.Decision) (r *request, first bool, answer int) {
	e.mu.Lock()
	defer e.mu.Unlock() // even if the clock or the limit's rule panics
	if e.dead {
		return nil, false, removed
	}
	e.touched = true
	now := s.now()
	if k := e.lease.Load(); k != nil && k.decide(c, now, d) {
		return nil, false, decided
	}
	if e.request != nil {
		return e.request, false, joined
	}
	size := e.nextSize(c.Limit, instances, now, s.window)
	if size <= c.Cost {
		return nil, false, alone
	}
	r = &request{charge: *c, cost: c.Cost, sent: now, done: make(chan struct{})}
	r.charge.Cost = size
	e.request = r
	return r, true, joined
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
	d, err := s.takeBelow(ctx, r.charge)
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, quota.ErrIndeterminate) {
			err = fmt.Errorf("lease: %w: the request was not sent within %v: %w", quota.ErrUnavailable, time.Duration(s.patience), err)
		}
		err = driver.WithRoundTrip(err, r)
	}
	s.giveBack(context.WithoutCancel(ctx), s.receive(e, r, d, err))
}

// takeBelow calls the store below on a goroutine of this package, whose panic would end the process: it is an error.
func (s *Store) takeBelow(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	defer func() {
		if v := recover(); v != nil {
			err = panicked(v)
		}
	}()
	return s.inner.Charge(ctx, c)
}

// panicked returns the error of a request that ended in a panic.
func panicked(v any) error {
	return fmt.Errorf("lease: %w, %w: a request for a chunk panicked: %v", quota.ErrIndeterminate, quota.ErrMisconfigured, v)
}

// receive ends a request: the chunk that it got pays its first caller and becomes the key's lease. It returns the
// tokens to be given back.
func (s *Store) receive(e *entry, r *request, d quota.Decision, err error) (refunds []refund) {
	e.mu.Lock()
	defer e.mu.Unlock()
	defer close(r.done)
	defer func() {
		if v := recover(); v != nil { // of the clock
			r.err = panicked(v)
		}
	}()
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
	// Only the store's own chunk becomes a lease: policies below may have decided in the store's place. Any other, and
	// one that came late, pays its first caller all the same, for whom it was charged.
	if s.gate.Open() != nil || now >= k.until || d.Source != quota.FromStore {
		rest := d.Charged // 0 where a policy below admitted without a charge
		if !r.left {
			r.paid, r.d = true, d
			r.d.Charged = min(r.cost, rest)
			rest -= r.d.Charged
			e.spent(r.cost, now, s.window)
		}
		refunds = e.appendRefund(refunds, o, old, quota.FromStore)
		return e.appendRefund(refunds, k, rest, d.Source)
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
	s.chunks.Add(1)
	s.chunkTokens.Add(k.size)
	return e.appendRefund(refunds, o, old, quota.FromStore)
}

// single has the store below decide a take on its own, together with the tokens left in the lease. Those are spent
// when the store is asked, so its answer may come after the lease has ended.
func (s *Store) single(ctx context.Context, c *quota.Charge, e *entry) (d quota.Decision, err error) {
	k, held := s.hold(c, e)
	if held == 0 {
		if d, err = s.inner.Charge(ctx, *c); err == nil {
			e.note(&d, d.Charged, s.now(), s.window)
		}
		return d, err
	}
	granted := false // remains so if the store panics
	defer func() {
		if granted {
			s.end()
			return
		}
		left, refunds := e.restore(k, held)
		if err == nil {
			d.Remaining += left
		}
		s.giveBackAndEnd(ctx, refunds)
	}()
	part := *c
	part.Cost -= held
	if d, err = s.inner.Charge(ctx, part); err != nil {
		return quota.Decision{}, err
	}
	if granted = d.Allowed; granted {
		d.Charged += held
		d.Source = quota.FromLease
	}
	e.note(&d, max(d.Charged-held, 0), s.now(), s.window)
	return d, nil
}

// hold takes the tokens out of the lease that are a part of a take's cost, and returns how many. Where they are more
// than 0, Close waits until the caller has called end.
func (s *Store) hold(c *quota.Charge, e *entry) (k *chunk, held int64) {
	k = e.lease.Load()
	if k == nil || s.now() >= k.until || *k.limit.Spec() != *c.Limit.Spec() || c.Cost > c.Limit.Spec().Capacity || !s.begin() {
		return k, 0
	}
	if held = k.claim(c.Cost - 1); held == 0 {
		s.end()
	}
	return k, held
}
