package quota

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

const (
	// giveBackTimeout bounds the refund of a grant whose caller has gone.
	giveBackTimeout = time.Second
	// leastPause is how long a waiter pauses after a denial that does not say how long.
	leastPause = time.Millisecond
	// askAgain is how long the first waiter of a key pauses at most, for other processes may have given quota back. For
	// each key that is waited for askAgainForKey is added, so that a limiter asks a thousand times a second at most.
	askAgain       = time.Second
	askAgainForKey = time.Millisecond
)

// queue holds the waiting callers of one key, first come first served: the first one asks the store, the others wait for
// their turn. It is guarded by Limiter.mu, and every step takes the same time in a queue of any length: other keys wait
// for that lock too.
type queue struct {
	first, last *waiter
	// The tokens of all waiters that ever joined, and of those that left or that the store may have charged.
	joined, gone int64
}

// tokens returns the tokens of all waiters.
func (q *queue) tokens() int64 {
	tokens := q.joined - q.gone
	if q.first.asking {
		tokens += q.first.cost
	}
	return tokens
}

// waiter is a caller in a queue. Its fields but turn are guarded by Limiter.mu.
type waiter struct {
	key        string
	cost       int64
	turn       chan struct{} // gets an element when the waiter becomes the first, and when the first must ask again; of size 1
	prev, next *waiter
	ahead      int64 // queue.joined when the waiter joined
	asking     bool  // the store may have charged the waiter, the first
	counted    bool  // the waiter is counted in Limiter.waiting
}

// Wait takes n tokens, waiting until they fit. A nil error means that the tokens were taken.
//
// The waiting callers of this limiter and key are served in the order in which they came, and only the first of them asks
// the store. Where the limit's rule carries debt over (Spec.Ahead, as token buckets have it), it takes ahead, see
// [OpAhead]: its tokens are charged at once, and it waits until refill has repaid them. So it comes in bounded time:
// after the first callers of other processes that were charged before, and before all others; calls of Take are denied
// meanwhile. Under other rules the first caller asks until its tokens fit; it holds up neither other processes nor calls
// of Take, and may wait for ever for many tokens beside callers that take few.
//
// Quota that this limiter gives back, by Settle, Refund or Reset, is there for the first waiting caller at once. It sees
// other changes, such as those that other processes make and a limit that LimitFor raised, within a second, and a
// millisecond more for each further key that is waited for. LimitFor chooses the limit anew each time the caller asks.
//
// It fails at once, and charges nothing, with ErrInvalid where n can never fit, with ErrOverloaded where
// Options.MaxWaiters callers wait already, or 2^63 tokens of the key are waited for, and with an error that is
// [context.DeadlineExceeded] where the context's deadline comes before the quota; the queue ahead counts as far as
// the rule can tell, see [Forecaster]. A wait whose context ends gives the tokens back and fails with the context's
// error, which is an ErrIndeterminate too where the store did not take them back.
func (l *Limiter) Wait(ctx context.Context, key string, n int64) (Decision, error) {
	c := Charge{Limit: l.limit, Key: key, Cost: n}
	o := l.began(&c)
	if o == nil {
		return l.wait(ctx, &c, nil)
	}
	d, err := l.wait(ctx, &o.charge[0], o)
	o.decision[0] = d
	l.over(ctx, o, err)
	return d, err
}

// wait joins the queue of the charge's key, and takes the tokens when its turn comes.
func (l *Limiter) wait(ctx context.Context, c *Charge, o *observed) (Decision, error) {
	if err := l.fill(c); err != nil {
		return Decision{}, err
	}
	if most := c.Limit.spec.Capacity; c.Cost > most {
		return Decision{}, invalid("cost", c.Cost, fmt.Sprintf("up to %d, the capacity of limit %q: more never fits", most, c.Limit))
	}
	if err := ctx.Err(); err != nil {
		return Decision{}, err
	}
	w, err := l.enqueue(c.Key, c.Cost)
	if err != nil {
		return Decision{}, err
	}
	defer l.leave(w)
	select {
	case <-w.turn:
		return l.waitFirst(ctx, c, w, o)
	default:
	}
	if err := l.forecast(ctx, *c, w, o); err != nil {
		return Decision{}, err
	}
	waited := o.waits()
	select {
	case <-w.turn:
		waited()
		return l.waitFirst(ctx, c, w, o)
	case <-ctx.Done():
		waited()
		return Decision{}, ctx.Err()
	}
}

// waitFirst asks the store until it grants.
func (l *Limiter) waitFirst(ctx context.Context, c *Charge, w *waiter, o *observed) (Decision, error) {
	for {
		l.ask(w)
		var err error
		if c.Limit, err = l.limitOf(c.Key); err != nil {
			return Decision{}, err
		}
		d, err := l.decide(ctx, *c, o)
		switch {
		case err != nil:
			return d, err
		case d.Allowed && ctx.Err() == nil:
			return d, nil
		case d.Allowed:
			return Decision{}, l.giveBack(ctx, *c, d, ctx.Err())
		case d.RetryAfter == Never:
			return d, invalid("cost", c.Cost, fmt.Sprintf("a cost that limit %q can ever admit", c.Limit))
		}
		if err := inTime(ctx, d.RetryAfter); err != nil {
			return d, err
		}
		longest, err := l.rest(w)
		if err != nil {
			return d, err
		}
		after := d.RetryAfter
		if c.Limit.spec.Ahead && after > 0 {
			if d, err = l.waitAhead(ctx, *c, w, longest, o); err != nil || d.Allowed {
				return d, err
			}
			after = d.RetryAfter
		}
		if !w.pause(ctx, after, longest, o) {
			return d, ctx.Err()
		}
	}
}

// waitAhead takes ahead for the first waiter, and waits until it may use its tokens. The decision is not allowed where the
// waiter must ask anew: the store denied, or the key has another limit or rule.
func (l *Limiter) waitAhead(ctx context.Context, c Charge, w *waiter, longest time.Duration, o *observed) (d Decision, err error) {
	c.Op, c.Within = OpAhead, Never
	if deadline, ok := ctx.Deadline(); ok {
		c.Within = max(time.Until(deadline), 0)
	}
	l.ask(w)
	if d, err = l.decide(ctx, c, o); err != nil {
		return d, err
	}
	if !d.Allowed {
		l.rest(w)
		return d, nil
	}
	for left := d.Delay; left > 0; {
		start := time.Now()
		if err = inTime(ctx, left); err != nil || !w.pause(ctx, left, longest, o) {
			break
		}
		if left -= time.Since(start); left <= 0 {
			break
		}
		limit, wrong := l.limitOf(c.Key)
		if err = wrong; err != nil {
			break
		}
		if limit.handle != c.Limit.handle || limit.spec.Rule != c.Limit.spec.Rule {
			l.rest(w)
			return Decision{}, l.giveBack(ctx, c, d, nil)
		}
		// Refill has repaid all debt as soon as a cost of 0 fits. Where the store fails, the tokens are charged all
		// the same.
		if p, err := l.store.Take(ctx, Charge{Limit: limit, Key: c.Key, Op: OpPeek}); err == nil {
			left = min(left, p.RetryAfter)
		}
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return Decision{}, l.giveBack(ctx, c, d, err)
	}
	d.Delay = 0
	return d, nil
}

// pause waits for a time, at most longest and with some jitter, or until the waiter must ask again. It reports false if
// the context ended.
func (w *waiter) pause(ctx context.Context, after, longest time.Duration, o *observed) bool {
	defer o.waits()()
	if after <= 0 {
		after = leastPause
	}
	longest -= rand.N(longest / 2).Truncate(time.Microsecond) // the store counts whole ones
	timer := time.NewTimer(min(after, longest))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-w.turn:
	case <-ctx.Done():
		return false
	}
	return true
}

// forecast fails if the deadline comes before the tokens ahead in the queue and the waiter's own are admitted.
func (l *Limiter) forecast(ctx context.Context, c Charge, w *waiter, o *observed) error {
	if _, ok := ctx.Deadline(); !ok {
		return nil
	}
	o.ask()
	const tries = 3
	for range tries {
		ahead := l.ahead(w)
		err := l.forecastAll(ctx, c, ahead+c.Cost)
		// A waiter that left the queue in between may have been counted twice: as waiting, and as charged.
		if err == nil || l.ahead(w) >= ahead {
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

// giveBack refunds a grant that came too late for its caller, who gets the error why. If the refund fails, so that the
// tokens come back by refill, the error says so and is an ErrIndeterminate too.
func (l *Limiter) giveBack(ctx context.Context, c Charge, d Decision, why error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
	defer cancel()
	r := c.Refund(d, d.Charged)
	r.receipt = receipt{} // no caller has the receipt
	_, err := l.decide(ctx, r, nil)
	if err == nil {
		return why
	}
	err = fmt.Errorf("quota: %w: the %d tokens of limit %q may stay charged, for giving them back failed: %w", ErrIndeterminate, d.Charged, c.Limit, err)
	if why != nil {
		err = fmt.Errorf("%w; %w", why, err)
	}
	return err
}

// enqueue joins the queue of a key.
func (l *Limiter) enqueue(key string, n int64) (*waiter, error) {
	w := &waiter{key: key, cost: n, turn: make(chan struct{}, 1)}
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queues[key]
	if q == nil {
		if l.queues == nil {
			l.queues = make(map[string]*queue)
		}
		q = &queue{first: w}
		l.queues[key] = q
		l.queued.Add(1)
		w.wake()
	} else {
		if q.tokens() > math.MaxInt64-n {
			return nil, fmt.Errorf("quota: %w: callers wait for as many tokens of %q already as can be counted, with these %d", ErrOverloaded, key, n)
		}
		if err := l.count(w); err != nil {
			return nil, err
		}
		q.last.next, w.prev = w, q.last
	}
	q.last = w
	w.ahead = q.joined
	q.joined += n
	return w, nil
}

// ahead returns the tokens of the waiters before w, without those of the first waiter while the store may have charged
// them. It is less where waiters behind w have left, a bound that errs on the side of waiting.
func (l *Limiter) ahead(w *waiter) int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return max(w.ahead-l.queues[w.key].gone, 0)
}

// wake has a waiter ask the store, or ask again. The caller must hold Limiter.mu.
func (w *waiter) wake() {
	select {
	case w.turn <- struct{}{}:
	default: // it is about to ask
	}
}

// gaveBack wakes the first waiting caller of a key to which tokens came back.
func (l *Limiter) gaveBack(key string) {
	if l.queued.Load() == 0 { // a caller that begins to wait now asks after this give-back
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if q := l.queues[key]; q != nil {
		q.first.wake()
	}
}

// leave quits the queue, and lets the next waiter ask the store if this one was the first.
func (l *Limiter) leave(w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	q := l.queues[w.key]
	if w.next != nil {
		w.next.prev = w.prev
	} else {
		q.last = w.prev
	}
	if w.prev != nil {
		w.prev.next = w.next
	} else if q.first = w.next; w.next != nil {
		w.next.wake()
	} else {
		delete(l.queues, w.key)
		l.queued.Add(-1)
	}
	if !w.asking {
		q.gone += w.cost
	}
	if w.counted {
		l.waiting--
	}
}

// ask notes that the first waiter is about to ask the store, which may charge it.
func (l *Limiter) ask(w *waiter) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !w.asking {
		w.asking = true
		l.queues[w.key].gone += w.cost
	}
	select {
	case <-w.turn: // for all that happened so far
	default:
	}
}

// rest notes that the first waiter was denied, and counts it among the waiting callers. It returns how long the waiter may
// pause.
func (l *Limiter) rest(w *waiter) (longest time.Duration, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if w.asking {
		w.asking = false
		l.queues[w.key].gone -= w.cost
	}
	return askAgain + time.Duration(len(l.queues)-1)*askAgainForKey, l.count(w)
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
