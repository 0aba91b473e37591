package quota

import (
	"context"
	"fmt"
	"slices"
	"time"
	"unique"
)

// giveBackTimeout bounds the refund of a grant that nobody waits for any more.
const giveBackTimeout = time.Second

// queue is the waiters of one limit and key, first come first served: the first one asks the store, the
// others wait for their turn.
type queue struct {
	waiters []*waiter
	cost    int64 // of all waiters together
}

type queueKey struct {
	limit unique.Handle[string]
	key   string
}

type waiter struct {
	cost    int64
	head    chan struct{} // closed when the waiter is the first
	counted bool          // in Limiter.waiting; under its lock
}

// Wait takes n tokens, waiting until they fit. The waiters of this limiter and key are served in the
// order in which they came; other processes, and calls of Take, are not held up by them. A nil error
// means that the tokens were taken.
//
// It fails at once, charging nothing, with ErrInvalid where n exceeds the capacity, with ErrOverloaded
// where Options.MaxWaiters wait already, and with an error that is [context.DeadlineExceeded] where the
// context's deadline comes before the quota would, the queue ahead counted in. A wait whose context
// ends gives back what was granted meanwhile and fails with the context's error.
func (l *Limiter) Wait(ctx context.Context, key string, n int64) (Decision, error) {
	c := Charge{Limit: l.limit, Key: key, Cost: n}
	if err := c.check(); err != nil {
		return Decision{}, err
	}
	c.Limit = l.limitOf(key)
	if most := c.Limit.spec.Capacity; n > most {
		return Decision{}, invalid("cost", n, fmt.Sprintf("up to the capacity of limit %q, %d: more never fits", c.Limit.name, most))
	}
	if err := ctx.Err(); err != nil {
		return Decision{}, err
	}
	k := queueKey{c.Limit.handle, key}
	w, ahead, err := l.enqueue(k, n)
	if err != nil {
		return Decision{}, err
	}
	defer l.leave(k, w)
	select {
	case <-w.head:
		return l.waitFirst(ctx, c, w)
	default:
	}
	if d, err := l.forecast(ctx, c, ahead); err != nil {
		return d, err
	}
	select {
	case <-w.head:
		return l.waitFirst(ctx, c, w)
	case <-ctx.Done():
		return Decision{}, ctx.Err()
	}
}

// waitFirst asks the store until it grants.
func (l *Limiter) waitFirst(ctx context.Context, c Charge, w *waiter) (Decision, error) {
	for {
		d, err := l.do(ctx, c)
		switch {
		case err != nil:
			return d, err
		case d.Allowed && ctx.Err() == nil:
			return d, nil
		case d.Allowed:
			l.giveBack(ctx, c, d)
			return Decision{}, ctx.Err()
		}
		if err := inTime(ctx, d.RetryAfter); err != nil {
			return d, err
		}
		if err := l.count(w); err != nil {
			return d, err
		}
		timer := time.NewTimer(d.RetryAfter)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return d, ctx.Err()
		}
	}
}

// forecast fails if the deadline comes before the tokens ahead in the queue and the waiter's own can.
func (l *Limiter) forecast(ctx context.Context, c Charge, ahead int64) (Decision, error) {
	if _, ok := ctx.Deadline(); !ok {
		return Decision{}, nil
	}
	all, most := ahead+c.Cost, c.Limit.spec.Capacity
	peek := c
	peek.Op, peek.Cost = OpPeek, min(all, most)
	d, err := l.store.Take(ctx, peek)
	if err != nil {
		return d, err
	}
	if f, ok := c.Limit.algorithm.(Forecaster); ok && all > most {
		d.RetryAfter = max(d.RetryAfter, f.Forecast(d, all))
	}
	return d, inTime(ctx, d.RetryAfter)
}

// inTime fails if the context's deadline comes before after has passed.
func inTime(ctx context.Context, after time.Duration) error {
	deadline, ok := ctx.Deadline()
	if left := time.Until(deadline); ok && left < after {
		return fmt.Errorf("quota: the quota comes in %v, the deadline in %v: %w", after, left, context.DeadlineExceeded)
	}
	return nil
}

// giveBack refunds a grant that came too late for its caller.
func (l *Limiter) giveBack(ctx context.Context, c Charge, d Decision) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
	defer cancel()
	l.do(ctx, c.Refund(d, d.Charged)) // an error is the observer's; the tokens come back by refill
}

// enqueue joins the queue of a key and returns the tokens ahead in it.
func (l *Limiter) enqueue(k queueKey, n int64) (w *waiter, ahead int64, err error) {
	w = &waiter{cost: n, head: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queues[k]
	if q == nil {
		if l.queues == nil {
			l.queues = make(map[queueKey]*queue)
		}
		q = &queue{}
		l.queues[k] = q
		close(w.head)
	}
	if len(q.waiters) > 0 {
		if err := l.countLocked(w); err != nil {
			return nil, 0, err
		}
	}
	ahead = q.cost
	q.waiters = append(q.waiters, w)
	q.cost += n
	return w, ahead, nil
}

// leave quits the queue, and lets the next waiter ask the store if this one was the first.
func (l *Limiter) leave(k queueKey, w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queues[k]
	i := slices.Index(q.waiters, w)
	q.waiters = slices.Delete(q.waiters, i, i+1)
	q.cost -= w.cost
	if len(q.waiters) == 0 {
		delete(l.queues, k)
	} else if i == 0 {
		close(q.waiters[0].head)
	}
	if w.counted {
		l.waiting--
	}
}

// count makes room for a waiter, once.
func (l *Limiter) count(w *waiter) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.countLocked(w)
}

func (l *Limiter) countLocked(w *waiter) error {
	if w.counted {
		return nil
	}
	if l.waiting >= l.maxWaiters {
		return fmt.Errorf("quota: %w: %d calls wait already, which is all that MaxWaiters allows", ErrOverloaded, l.maxWaiters)
	}
	l.waiting++
	w.counted = true
	return nil
}
