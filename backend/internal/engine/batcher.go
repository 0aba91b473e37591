package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// maxInFlight is how many calls a queue has in flight before items wait.
const maxInFlight = 4

// More than maxInFlight callers at once are a crowd, and crowdYields yields later it is over unless it was seen again.
const crowdYields = 8

// Batcher sends items that wait for one destination together. There is no timer: an item waits only while its
// queue has maxInFlight calls in flight, and when the first of these ends, the waiting items go, up to Max in a
// batch. Methods may be called concurrently.
type Batcher[T any] struct {
	// Max is the largest sum of the sizes of a batch; a larger item goes alone.
	Max int
	// Send sends the items of a batch and writes each answer into its item. The context ends at the latest
	// deadline of the callers that wait for the batch, or never if one of them has none. An error that all
	// items have in common should be shared with driver.WithRoundTrip under roundTrip, which identifies the batch.
	// The error that Send returns is for the queue: an error of the call refuses the waiting items if the
	// call timed out.
	Send func(ctx context.Context, items []T, roundTrip any) error

	batches sync.WaitGroup // that are in flight
}

// Queue holds the items that wait for one destination: a server, a slot or a node of a cluster. The zero
// Queue is empty and open.
type Queue[T any] struct {
	// mu guards all fields, and the fields of a batch until it is sent. It is never held across a round trip
	// or a function of the caller's. Whenever it is free:
	//
	//   - inFlight is at most maxInFlight.
	//   - If an item waits, inFlight is maxInFlight or a caller is filling: an event that sends the item is
	//     due.
	//   - The waiting batches are not sent, and each has its items in order of arrival. New items go to the last
	//     batch while it has room.
	//   - If the queue is closed, no item waits and no call begins.
	mu       sync.Mutex
	inFlight int
	filling  bool // a caller is about to send, and takes the waiting items along
	crowd    int  // how many callers may still yield before they send
	waiting  []*batch[T]
	closed   bool
}

// batch is items that go together. Its address identifies its round trip.
type batch[T any] struct {
	done      chan struct{} // closed when the items have their answers
	items     []T
	withdrawn []int // indexes of items whose callers left before the batch was sent
	size      int
	sent      bool  // from now on the batch is the sender's
	err       error // the items have no answers of their own

	deadline time.Time // the latest of the waiting callers
	endless  bool      // one of them has no deadline
}

// Do has an item of a size sent, and returns when it has its answer. If the queue has a call to spare, Do
// calls alone, which sends the item by itself, and returns its error. Otherwise the item that the function
// item makes waits and goes with others; then Do returns an error if the item will have no answer, and does
// not wait beyond the context. Neither function is called with a lock held.
//
// A caller in a crowd that is about to send while another call is in flight first yields to the goroutines that can run:
// callers that one reply woke come again together, and most would miss the call by a moment. A few callers send at once: a
// yield may move one to another processor, which costs it more than a third of a round trip on loopback.
func (b *Batcher[T]) Do(ctx context.Context, q *Queue[T], size int, alone func() error, item func() T) (err error) {
	free, filled, err := q.enter()
	if err != nil {
		return err
	}
	if free {
		defer func() { b.leave(ctx, q, err) }()
		return alone()
	}
	return b.join(ctx, q, item(), size, filled)
}

// enter reports whether a call is free; then it is the caller's, who must leave. Otherwise the caller must
// join, and say whether it is the one that filled.
func (q *Queue[T]) enter() (free, filled bool, err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.saw(q.inFlight + 1)
	if free = !q.closed && !q.filling && q.inFlight < maxInFlight; free && q.inFlight > 0 && q.crowd > 0 {
		q.crowd--
		q.filling = true
		q.mu.Unlock()
		runtime.Gosched()
		q.mu.Lock()
		free = len(q.waiting) == 0 && q.inFlight < maxInFlight
		filled = !free
		q.filling = filled && !q.closed
	}
	switch {
	case q.closed:
		return false, false, errClosed
	case free:
		q.inFlight++
	}
	return free, filled, nil
}

// saw notes that there are at least so many callers. The caller holds q.mu.
func (q *Queue[T]) saw(callers int) {
	if callers > maxInFlight {
		q.crowd = crowdYields
	}
}

// leave ends a call that enter gave. err is the call's error, ctx its context.
func (b *Batcher[T]) leave(ctx context.Context, q *Queue[T], err error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	b.start(q, q.next(timedOut(ctx, err)))
}

// join adds an item to the waiting ones and returns when it has its answer.
func (b *Batcher[T]) join(ctx context.Context, q *Queue[T], item T, size int, filled bool) error {
	q.mu.Lock()
	if filled {
		q.filling = false
	}
	if q.closed {
		q.mu.Unlock()
		return errClosed
	}
	var w *batch[T]
	if n := len(q.waiting); n > 0 && q.waiting[n-1].size+size <= b.Max {
		w = q.waiting[n-1]
	} else {
		w = &batch[T]{done: make(chan struct{})}
		q.waiting = append(q.waiting, w)
	}
	i := len(w.items)
	w.items = append(w.items, item)
	w.size += size
	if end, set := ctx.Deadline(); !set {
		w.endless = true
	} else if end.After(w.deadline) {
		w.deadline = end
	}
	for !q.filling && q.inFlight < maxInFlight && len(q.waiting) > 0 { // calls ended meanwhile
		q.inFlight++
		b.start(q, q.next(nil))
	}
	q.mu.Unlock()
	return q.wait(ctx, w, i)
}

// wait returns when the items of a batch have their answers, or with an error when the context ends.
func (q *Queue[T]) wait(ctx context.Context, w *batch[T], i int) error {
	if ctx.Done() == nil {
		<-w.done
		return w.err
	}
	select {
	case <-w.done:
		return w.err
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if !w.sent {
		w.withdrawn = append(w.withdrawn, i)
		return driver.WithRoundTrip(ctx.Err(), w) // the context's own error: nothing was sent
	}
	select {
	case <-w.done:
		return w.err
	default:
		return driver.WithRoundTrip(TransportError(ctx.Err()), w)
	}
}

// next ends a call and returns the batch to send in its place; if there is none, one call fewer is in flight.
// If the call timed out, the waiting items are refused: the next call would probably time out as well, and
// its callers have waited already. The caller holds q.mu.
func (q *Queue[T]) next(timeout error) *batch[T] {
	if timeout != nil {
		q.refuse(fmt.Errorf("redis: %w: nothing was sent, for a call before got no answer: %v", quota.ErrUnavailable, timeout))
	}
	if len(q.waiting) == 0 {
		q.inFlight--
		return nil
	}
	w := q.waiting[0]
	q.waiting[0] = nil
	if q.waiting = q.waiting[1:]; len(q.waiting) == 0 {
		q.waiting = nil
	}
	w.sent = true
	q.saw(q.inFlight - 1 + len(w.items))
	return w
}

// start sends a batch in a goroutine of its own, if there is one.
func (b *Batcher[T]) start(q *Queue[T], w *batch[T]) {
	if w != nil {
		b.batches.Go(func() { b.sendAll(q, w) })
	}
}

// sendAll sends a batch, and then those that wait when it ends.
func (b *Batcher[T]) sendAll(q *Queue[T], w *batch[T]) {
	defer func() {
		if w != nil { // Send ended the goroutine
			b.leave(context.Background(), q, nil)
		}
	}()
	for w != nil {
		timeout := b.send(w)
		runtime.Gosched()
		q.mu.Lock()
		w = q.next(timeout)
		q.mu.Unlock()
	}
}

// send sends a batch, and returns the call's error if it timed out. If Send panics, that is the answer to all items.
func (b *Batcher[T]) send(w *batch[T]) (timeout error) {
	w.err = errEnded
	defer func() {
		if v := recover(); v != nil {
			w.err = panics.Error("redis", "a function", v, true)
		}
		if w.err != nil {
			w.err = driver.WithRoundTrip(w.err, w)
		}
		close(w.done)
	}()
	ctx := context.Background()
	if !w.endless {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, w.deadline)
		defer cancel()
	}
	items := w.items
	if len(w.withdrawn) > 0 {
		withdrawn := make([]bool, len(w.items))
		for _, i := range w.withdrawn {
			withdrawn[i] = true
		}
		items = make([]T, 0, len(w.items)-len(w.withdrawn))
		for i, item := range w.items {
			if !withdrawn[i] {
				items = append(items, item)
			}
		}
	}
	if len(items) > 0 {
		timeout = timedOut(ctx, b.Send(ctx, items, w))
	}
	w.err = nil
	return timeout
}

// refuse ends the waiting items with an error. The caller holds q.mu.
func (q *Queue[T]) refuse(err error) {
	for _, w := range q.waiting {
		w.sent, w.err = true, driver.WithRoundTrip(err, w)
		close(w.done)
	}
	q.waiting = nil
}

// Close refuses the waiting items, and those to come, with ErrClosed. Calls in flight go on, see
// Batcher.Wait.
func (q *Queue[T]) Close() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.closed = true
	q.refuse(errClosed)
}

// Wait returns when no batch is in flight. The queues must be closed.
func (b *Batcher[T]) Wait() { b.batches.Wait() }

// timedOut returns the error of a call that ended by a timeout of the client's and not by its context, or nil
// for any other call.
func timedOut(ctx context.Context, err error) error {
	if err == nil || ctx.Err() != nil {
		return nil
	}
	if end, set := ctx.Deadline(); set && !time.Now().Before(end) { // a client may be ahead of the context's timer
		return nil
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return err
	}
	return nil
}
