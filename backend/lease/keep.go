package lease

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// keep gives back idle leases and removes unused entries, four times in each lifetime, until Close.
func (s *Store) keep() {
	ticker := time.NewTicker(time.Duration(s.window))
	defer ticker.Stop()
	for {
		select {
		case <-s.stop:
			return
		case <-ticker.C:
			s.tidy()
		}
	}
}

func (s *Store) tidy() {
	defer func() { recover() }() // of the clock, which panics in callers too
	now := s.now()
	var refunds []refund
	for e := range s.table.all {
		needed := false
		if refunds, needed = e.tend(now, s.window, refunds); !needed {
			s.table.remove(e)
		}
	}
	if len(refunds) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(s.patience))
		defer cancel()
		s.giveBack(ctx, refunds)
	}
}

// tend ends the lease if its time is over or no token was spent since the last call, and reports whether the
// entry is needed.
func (e *entry) tend(now, window int64, refunds []refund) ([]refund, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k := e.lease.Load()
	if k == nil {
		needed := e.touched || e.request != nil || e.refunding > 0
		e.touched = false
		return refunds, needed
	}
	if left := k.left.Load(); now < k.until && (e.seen != k || e.level != left) {
		e.seen, e.level = k, left
		return refunds, true
	}
	e.tally(now, window)
	e.lease.Store(nil)
	e.seen = nil
	return e.appendRefund(refunds, k, k.close(), quota.FromStore), true
}

// giveBackAndEnd gives refunds back on a goroutine that no caller's context ends, and then calls end. The channel is
// closed when they are given back.
func (s *Store) giveBackAndEnd(ctx context.Context, refunds []refund) <-chan struct{} {
	if len(refunds) == 0 {
		s.end()
		return nil
	}
	given := make(chan struct{})
	go func() {
		defer s.end()
		defer close(given)
		s.giveBack(context.WithoutCancel(ctx), refunds)
	}()
	return given
}

// giveBack sends refunds to the store below, some at a time, until ctx ends. Tokens that cannot be given back
// by then come back by refill.
func (s *Store) giveBack(ctx context.Context, refunds []refund) {
	if len(refunds) == 0 {
		return
	}
	const atOnce = 16
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(atOnce, len(refunds)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(refunds)); i = next.Add(1) - 1 {
				s.refund(ctx, &refunds[i])
			}
		})
	}
	workers.Wait()
}

func (s *Store) refund(ctx context.Context, r *refund) {
	// It must not be tried again after any error or panic: two refunds would mint quota.
	defer func() { recover() }() // on a goroutine of this package, whose panic would end the process
	defer r.entry.refunded()
	n := r.chunk.refundable(r.n, s.now()+s.backPatience)
	if n <= 0 || ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.backPatience))
	defer cancel()
	d, err := s.inner.Charge(ctx, quota.Charge{
		Limit: r.chunk.limit, Key: r.entry.key, Cost: n, Op: quota.OpRefund, From: r.from, MadeAt: r.chunk.at,
	})
	if err == nil {
		s.returned.Add(-d.Charged)
	}
}
