package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// maxFlying is how many calls of a lane are under way before others wait.
const maxFlying = 4

// Lane is where calls to one place gather: a server, a slot, or a node of a cluster. What comes while enough
// calls are under way waits for one to land, and then goes together in the next: no timer, and no wait where
// there is no load. Before a call leaves, its goroutine lets those that can run do so: callers that one reply
// woke come again together, and most would miss it by a moment. Its lock is never held across I/O.
//
// The zero Lane is ready.
type Lane[T any] struct {
	mu       sync.Mutex
	flying   int
	boarding bool // a caller is about to send, and takes along who waits
	waiting  []*batch[T]
	closed   bool
}

// Carrier sends what gathers in lanes.
type Carrier[T any] struct {
	// Most is the largest sum of the sizes of what goes together; what is larger goes alone.
	Most int
	// Fly sends items, under a deadline of their own: the latest of those who wait for them. What becomes
	// of an item is written into it; errors that all have in common should be Shared with the trip. It
	// returns an error of the call, so that nobody waits behind a call that got stuck.
	Fly func(ctx context.Context, items []T, trip *Trip) error

	flights sync.WaitGroup
}

// Trip identifies a call that several share, or waited for.
type Trip struct{ done chan struct{} }

// Shared returns an error of a trip as one that several callers got from one call: resilience.Shared.
func (t *Trip) Shared(err error) error { return &sharedError{err, t} }

type sharedError struct {
	error
	trip *Trip
}

func (e *sharedError) Unwrap() error  { return e.error }
func (e *sharedError) RoundTrip() any { return e.trip }

// batch is what goes together.
type batch[T any] struct {
	Trip  // ends when the items hold their answers
	items []T
	gone  []int // of items: withdrawn, not sent
	size  int
	sent  bool  // the rest is the sender's from now on
	err   error // nothing was sent

	until   time.Time // the latest deadline of those who wait
	endless bool      // one of them has none
}

// Enter takes a free place in the lane for a caller that goes alone, who calls Leave when it has landed. Where
// there is none, or others wait, it leaves the lane locked, for a caller that goes on to Join.
func (l *Lane[T]) Enter() (free bool, err error) {
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

// Leave gives the place back of a call that ended with err, under ctx.
func (c *Carrier[T]) Leave(ctx context.Context, l *Lane[T], err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.next(stuck(ctx, err)); b != nil {
		c.flights.Go(func() { c.flyAll(l, b) })
	}
}

// Join has an item go with others, unlocks the lane, and returns when the item has its answer, or with an
// error if it will not have one.
func (c *Carrier[T]) Join(ctx context.Context, l *Lane[T], item T, size int) error {
	var b *batch[T]
	if n := len(l.waiting); n > 0 && l.waiting[n-1].size+size <= c.Most {
		b = l.waiting[n-1]
	} else {
		b = &batch[T]{Trip: Trip{make(chan struct{})}}
		l.waiting = append(l.waiting, b)
	}
	i := len(b.items)
	b.items = append(b.items, item)
	b.size += size
	if end, set := ctx.Deadline(); !set {
		b.endless = true
	} else if end.After(b.until) {
		b.until = end
	}
	for !l.boarding && l.flying < maxFlying && len(l.waiting) > 0 { // places became free meanwhile
		l.flying++
		b := l.next(nil)
		c.flights.Go(func() { c.flyAll(l, b) })
	}
	l.mu.Unlock()
	return l.wait(ctx, b, i)
}

// wait returns when the batch has its answers, or with an error when the context ends.
func (l *Lane[T]) wait(ctx context.Context, b *batch[T], i int) error {
	if ctx.Done() == nil {
		<-b.done
		return b.err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !b.sent {
		b.gone = append(b.gone, i)
		return b.Shared(ctx.Err()) // the context's own: nothing was sent
	}
	select {
	case <-b.done:
		return b.err
	default:
		return b.Shared(TransportError(ctx.Err()))
	}
}

// flyAll sends a batch, and those that follow it in its place.
func (c *Carrier[T]) flyAll(l *Lane[T], b *batch[T]) {
	for b != nil {
		stuck := c.fly(b)
		runtime.Gosched()
		l.mu.Lock()
		b = l.next(stuck)
		l.mu.Unlock()
	}
}

// fly sends a batch, and returns the error of a call that got stuck.
func (c *Carrier[T]) fly(b *batch[T]) error {
	defer close(b.done)
	ctx := context.Background()
	if !b.endless {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, b.until)
		defer cancel()
	}
	items := b.items
	if len(b.gone) > 0 {
		items = make([]T, 0, len(b.items)-len(b.gone))
		gone := make([]bool, len(b.items))
		for _, i := range b.gone {
			gone[i] = true
		}
		for i, item := range b.items {
			if !gone[i] {
				items = append(items, item)
			}
		}
	}
	if len(items) == 0 {
		return nil
	}
	return stuck(ctx, c.Fly(ctx, items, &b.Trip))
}

// next returns the batch that goes now; without one, a place is free. If the call before got stuck, nobody
// waits for the next one to: all who wait are told that nothing was sent.
func (l *Lane[T]) next(stuck error) *batch[T] {
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
func (l *Lane[T]) refuse(err error) {
	for _, b := range l.waiting {
		b.sent, b.err = true, b.Shared(err)
		close(b.done)
	}
	l.waiting = nil
}

// Close ends what waits; what is under way lands, see Wait.
func (l *Lane[T]) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	l.refuse(errClosed)
}

// Wait returns when nothing is under way that waited in lanes, all of which are closed.
func (c *Carrier[T]) Wait() { c.flights.Wait() }

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
