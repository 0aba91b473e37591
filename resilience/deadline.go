package resilience

import (
	"context"
	"sync"
	"sync/atomic"
	"time"
)

// deadline is a context that ends at a time, or with its parent. A policy makes it, and ended finds it through
// contexts derived from it, so that its end is not taken for the caller's. It behaves as one of context.WithDeadline,
// but takes one allocation, and starts a timer only if Done is called.
type deadline struct {
	context.Context // the parent
	at              time.Time

	end atomic.Uint32 // how it ended: one of the following, once
	// hasDone says that done was made. Done sets it before it reads end, and finish reads it after it has set
	// end: so at least one of the two closes done.
	hasDone atomic.Bool

	mu     sync.Mutex
	done   chan struct{}
	closed bool
	timer  *time.Timer
	stop   func() bool // ends the wait for the parent
}

// How a deadline ended.
const (
	live uint32 = iota
	expired
	released
	orphaned // its parent ended
)

// deadlineKey is the key under which a context finds the innermost deadline that a policy set.
type deadlineKey struct{}

// Value returns the deadline itself for deadlineKey, and else the parent's value.
func (d *deadline) Value(key any) any {
	if _, ok := key.(deadlineKey); ok {
		return d
	}
	return d.Context.Value(key)
}

// Deadline returns when the context ends at the latest.
func (d *deadline) Deadline() (time.Time, bool) { return d.at, true }

// Err returns why the context ended, or nil. It reads the clock, because there is no timer before Done is
// called.
func (d *deadline) Err() error {
	if d.end.Load() == live {
		if d.Context.Err() != nil {
			d.finish(orphaned)
		} else if time.Until(d.at) <= 0 {
			d.finish(expired)
		}
	}
	switch d.end.Load() {
	case expired:
		return context.DeadlineExceeded
	case released:
		return context.Canceled
	case orphaned:
		return d.Context.Err()
	}
	return nil
}

// Done returns a channel that is closed when the context ends.
func (d *deadline) Done() <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.done != nil {
		return d.done
	}
	d.done = make(chan struct{})
	d.hasDone.Store(true)
	if d.end.Load() != live {
		d.close()
		return d.done
	}
	d.timer = time.AfterFunc(time.Until(d.at), func() { d.finish(expired) })
	if d.Context.Done() != nil {
		d.stop = context.AfterFunc(d.Context, func() { d.finish(orphaned) })
	}
	return d.done
}

// release ends the context when its call is over.
func (d *deadline) release() { d.finish(released) }

func (d *deadline) finish(how uint32) {
	if d.end.CompareAndSwap(live, how) && d.hasDone.Load() {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.close()
	}
}

// close closes done, once. The caller holds the lock.
func (d *deadline) close() {
	if d.closed {
		return
	}
	d.closed = true
	close(d.done)
	if d.timer != nil {
		d.timer.Stop()
	}
	if d.stop != nil {
		d.stop()
	}
}

// after returns the time that is a span after now. It reads the monotonic clock alone, which takes half as
// long as time.Now.
func after(base time.Time, span time.Duration) time.Time { return base.Add(time.Since(base) + span) }
