package quota

import (
	"context"
	"fmt"
	"slices"
	"time"
	"unique"
)

// giveBackTimeout bounds the refund of a grant whose caller has gone.
const giveBackTimeout = time.Second

// leastPause is how long a waiter pauses after a denial that does not say how long.
const leastPause = time.Millisecond

// queue holds the waiting callers of one limit and key, first come first served: the first one asks the store, the
// others wait for their turn.
type queue struct {
	waiters []*waiter
}

type queueKey struct {
	limit unique.Handle[string]
	key   string
}

type waiter struct {
	cost    int64
	head    chan struct{} // closed when the waiter becomes the first
	asking  bool          // the first waiter only: the store may have charged it; guarded by Limiter.mu
	counted bool          // the waiter is counted in Limiter.waiting; guarded by Limiter.mu
}

// Wait takes n tokens, waiting until they fit. The waiting callers of this limiter and key are served in the order in
// which they came; they hold up neither other processes nor calls of Take. A nil error means that the tokens were
// taken.
//
// It fails at once, and charges nothing, with ErrInvalid where n can never fit, with ErrOverloaded where
// Options.MaxWaiters callers wait already, and with an error that is [context.DeadlineExceeded] where the context's
// deadline comes before the quota; the queue ahead counts as far as the rule can tell, see [Forecaster]. A wait whose
// context ends gives a late grant back and fails with the context's error.
func (l *Limiter) Wait(ctx context.Context, key string, n int64) (Decision, error) {
	c := Charge{Limit: l.limit, Key: key, Cost: n}
	if err := c.check(); err != nil {
		return Decision{}, err
	}
	var err error
	if c.Limit, err = l.limitOf(key); err != nil {
		return Decision{}, err
	}
	if most := c.Limit.spec.Capacity; n > most {
		return Decision{}, invalid("cost", n, fmt.Sprintf("up to the capacity of limit %q, %d: more never fits", c.Limit.name, most))
	}
	if err := ctx.Err(); err != nil {
		return Decision{}, err
	}
	k := queueKey{c.Limit.handle, key}
	w, err := l.enqueue(k, n)
	if err != nil {
		return Decision{}, err
	}
	defer l.leave(k, w)
	select {
	case <-w.head:
		return l.waitFirst(ctx, c, w)
	default:
	}
	if err := l.forecast(ctx, c, k, w); err != nil {
		return Decision{}, err
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
		case d.RetryAfter == Never:
			return d, invalid("cost", c.Cost, fmt.Sprintf("a cost that limit %q can ever admit", c.Limit.name))
		}
		if err := inTime(ctx, d.RetryAfter); err != nil {
			return d, err
		}
		if err := l.rest(w); err != nil {
			return d, err
		}
		after := d.RetryAfter
		if after <= 0 {
			after = leastPause
		}
		timer := time.NewTimer(after)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return d, ctx.Err()
		}
		l.ask(w)
	}
}

// forecast fails if the deadline comes before the tokens ahead in the queue and the waiter's own are admitted.
func (l *Limiter) forecast(ctx context.Context, c Charge, k queueKey, w *waiter) error {
	if _, ok := ctx.Deadline(); !ok {
		return nil
	}
	const tries = 3
	for range tries {
		ahead := l.ahead(k, w)
		err := l.forecastAll(ctx, c, ahead+c.Cost)
		// A waiter that left the queue in between may have been counted twice: as waiting, and as charged.
		if err == nil || l.ahead(k, w) >= ahead {
			return err
		}
	}
	return nil
}

// forecastAll fails if the deadline comes before all tokens, the last of them those of c, are admitted.
func (l *Limiter) forecastAll(ctx context.Context, c Charge, all int64) error {
	own, most := c.Cost, c.Limit.spec.Capacity
	c.Op, c.Cost = OpPeek, min(all, most)
	d, err := l.store.Take(ctx, c)
	if err != nil {
		return err
	}
	after := d.RetryAfter
	if f, ok := c.Limit.algorithm.(Forecaster); ok {
		least := f.Forecast(d, all)
		if err := inTime(ctx, least); err != nil {
			return err
		}
		after = max(after, least)
	}
	if all == own || inTime(ctx, after) == nil {
		return inTime(ctx, after)
	}
	// All tokens fit at once only later, and yet may be admitted one after the other by then: a rule may forget some of
	// them on the way. But the waiter's own tokens must fit.
	c.Cost = own
	if d, err = l.store.Take(ctx, c); err != nil {
		return err
	}
	return inTime(ctx, d.RetryAfter)
}

// inTime fails if the context's deadline comes before the span after has passed.
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
	r := c.Refund(d, d.Charged)
	r.receipt = receipt{} // no caller has the receipt
	l.do(ctx, r)          // the observer gets an error; the tokens then come back by refill
}

// enqueue joins the queue of a key.
func (l *Limiter) enqueue(k queueKey, n int64) (*waiter, error) {
	w := &waiter{cost: n, head: make(chan struct{})}
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queues[k]
	switch {
	case q != nil:
		if err := l.count(w); err != nil {
			return nil, err
		}
	default:
		if l.queues == nil {
			l.queues = make(map[queueKey]*queue)
		}
		q = &queue{}
		l.queues[k] = q
		w.lead()
	}
	q.waiters = append(q.waiters, w)
	return w, nil
}

// ahead returns the tokens of the waiters before w, without those of the first waiter while the store may have charged
// them.
func (l *Limiter) ahead(k queueKey, w *waiter) (tokens int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, v := range l.queues[k].waiters {
		if v == w {
			break
		}
		if !v.asking {
			tokens += v.cost
		}
	}
	return tokens
}

// lead makes w the first of its queue, the one that asks the store next.
func (w *waiter) lead() {
	w.asking = true
	close(w.head)
}

// leave quits the queue, and lets the next waiter ask the store if this one was the first.
func (l *Limiter) leave(k queueKey, w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queues[k]
	i := slices.Index(q.waiters, w)
	q.waiters = slices.Delete(q.waiters, i, i+1)
	if len(q.waiters) == 0 {
		delete(l.queues, k)
	} else if i == 0 {
		q.waiters[0].lead()
	}
	if w.counted {
		l.waiting--
	}
}

// ask notes that the first waiter is about to ask the store.
func (l *Limiter) ask(w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.asking = true
}

// rest notes that the first waiter was denied, and counts it among the waiting callers.
func (l *Limiter) rest(w *waiter) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.asking = false
	return l.count(w)
}

// count counts a waiter, once, if there is room for it. The caller must hold Limiter.mu.
func (l *Limiter) count(w *waiter) error {
	if w.counted {
		return nil
	}
	if l.waiting >= l.maxWaiters {
		return fmt.Errorf("quota: %w: %d calls wait already, as many as MaxWaiters allows", ErrOverloaded, l.maxWaiters)
	}
	l.waiting++
	w.counted = true
	return nil
}
