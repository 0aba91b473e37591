package engine

import (
	"context"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Placer is a Client of a cluster that knows which node has a slot.
type Placer interface {
	// Node returns the address of the node that has a slot, or "" if the client does not know. It does no I/O.
	Node(slot uint16) string
	// Refresh learns anew which node has which slots, and returns when that is known or the context ends.
	Refresh(ctx context.Context) error
}

// Node returns the address of the node that has the keys of a charge, or "" if it is not known or the only one.
func (s *Store) Node(c quota.Charge) string {
	if s.placer == nil {
		return ""
	}
	var buf [128]byte
	return s.placer.Node(slot(driver.AppendGroup(buf[:0], quota.Group(c.Key))))
}

// Refresh learns anew which node has which keys.
func (s *Store) Refresh(ctx context.Context) error {
	if s.placer == nil {
		return nil
	}
	return s.placer.Refresh(ctx)
}

// nodeOf returns the address of the node that has a slot.
func (s *Store) nodeOf(slot uint16) string {
	if s.placer == nil {
		return ""
	}
	return s.placer.Node(slot)
}

// SlotOf returns the slot of a key with a hash tag.
func SlotOf(key string) uint16 {
	for i := range len(key) {
		if key[i] == '{' {
			return slot(key[i:])
		}
	}
	return 0
}

const (
	// minPause and maxPause bound the time from one question that no caller waits for to the next. It
	// doubles while questions fail: a user may have no right to ask.
	minPause = 250 * time.Millisecond
	maxPause = 30 * time.Second
)

// Topology asks a cluster which node has which slots, one question at a time, which all callers share that come
// meanwhile. A question has a time of its own: a caller that leaves does not end it. Methods may be called
// concurrently.
type Topology struct {
	// Ask asks the cluster. It must return within some seconds.
	Ask func() error

	mu        sync.Mutex
	current   *question // nil if there is none
	next      time.Time // when Soon may ask
	pause     time.Duration
	closed    bool
	questions sync.WaitGroup
}

// question is a question under way. err is set before done is closed.
type question struct {
	done chan struct{}
	err  error
}

// Refresh asks, and returns when the answer is known or the context ends.
func (t *Topology) Refresh(ctx context.Context) error {
	t.mu.Lock()
	q := t.start()
	t.mu.Unlock()
	if q == nil {
		return errClosed
	}
	select {
	case <-q.done:
		return q.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Soon asks in the background, unless the last question was a moment ago.
func (t *Topology) Soon() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.current == nil && !time.Now().Before(t.next) {
		t.start()
	}
}

// start returns the question under way, or a new one. It returns nil once t is closed. The caller holds t.mu.
func (t *Topology) start() *question {
	if t.current != nil || t.closed {
		return t.current
	}
	q := &question{done: make(chan struct{})}
	t.current = q
	t.questions.Go(func() {
		q.err = errEnded
		defer t.ended(q)
		q.err = Catch("the client", true, t.Ask)
	})
	return q
}

// ended notes the answer to a question.
func (t *Topology) ended(q *question) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.current = nil
	t.pause = min(2*t.pause, maxPause)
	if q.err == nil || t.pause == 0 {
		t.pause = minPause
	}
	t.next = time.Now().Add(t.pause)
	close(q.done)
}

// Close refuses further questions. It does not end the one under way, whose connection other callers may wait for.
func (t *Topology) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.closed = true
}

// Wait returns when no question is under way. The topology must be closed.
func (t *Topology) Wait() { t.questions.Wait() }
