package lease

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// keep gives back what is idle, and removes entries that nobody uses, until Close.
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
	var rests []rest
	for e := range s.table.all {
		needed := false
		if rests, needed = e.tend(s.now(), s.window, rests); !needed {
			s.table.remove(e)
		}
	}
	if len(rests) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(s.patience))
		defer cancel()
		s.giveBack(ctx, rests)
	}
}

// tend ends the lease if it is over, or was not touched since the last time, and reports whether the entry is needed.
func (e *entry) tend(now, window int64, rests []rest) ([]rest, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	k := e.lease.Load()
	if k == nil {
		needed := e.touched || e.fetch != nil || e.returning > 0
		e.touched = false
		return rests, needed
	}
	if left := k.left.Load(); now < k.until && (e.seen != k || e.level != left) {
		e.seen, e.level = k, left
		return rests, true
	}
	e.tally(now, window)
	e.lease.Store(nil)
	e.seen = nil
	return e.yield(k, k.close(), quota.FromStore, rests), true
}

// giveBack refunds rests to the store below, some at a time, as far as ctx allows. What cannot be given back in time
// comes back by refill.
func (s *Store) giveBack(ctx context.Context, rests []rest) {
	if len(rests) == 0 {
		return
	}
	const atOnce = 16
	var next atomic.Int64
	var workers sync.WaitGroup
	for range min(atOnce, len(rests)) {
		workers.Go(func() {
			for i := next.Add(1) - 1; i < int64(len(rests)); i = next.Add(1) - 1 {
				s.refund(ctx, &rests[i])
			}
		})
	}
	workers.Wait()
}

func (s *Store) refund(ctx context.Context, r *rest) {
	defer r.entry.returned()
	n := r.chunk.worth(r.n, s.now()+s.backPatience)
	if n <= 0 || ctx.Err() != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(s.backPatience))
	defer cancel()
	// Whatever the error, it is not tried again: two refunds would mint quota.
	s.inner.Take(ctx, quota.Charge{
		Limit: r.chunk.limit, Key: r.entry.key, Cost: n, Op: quota.OpRefund, From: r.from, At: r.chunk.at,
	})
}
