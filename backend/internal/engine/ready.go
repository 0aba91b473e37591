package engine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Warmer is a Client that can connect to a node before a script is sent there. A store over such a client sends no
// script to a node that is not ready, so that no decision pays for a handshake, and none is given up with a half-made
// connection.
type Warmer interface {
	// Warm makes connections to a node and authenticates them, and charges nothing. node is the name that Placer.Node
	// gave for the slot of the key; "" is a single server, or the node of a cluster that is not known: then Warm
	// learns which node has which slots. Warm asks for the value of the key, which is among the rights of a user
	// and passes every proxy; an error reply shows a connection too, see WarmError. It returns soon after the
	// context ends.
	Warm(ctx context.Context, node, key string) error
	// Ping is one round trip to a node that is ready, over any of its connections.
	Ping(ctx context.Context, node, key string) error
}

const (
	// attemptTimeout bounds an attempt at making a node ready.
	attemptTimeout = 5 * time.Second
	// patience is how old an attempt may be for further calls to wait for it.
	patience = time.Second
	// firstAttemptPause and lastAttemptPause bound the pause after an attempt that failed, which doubles.
	firstAttemptPause = 50 * time.Millisecond
	lastAttemptPause  = 250 * time.Millisecond
	// maxReadiness bounds the nodes whose readiness is kept.
	maxReadiness = 1024
)

// readiness says whether a node is ready for scripts: connected, authenticated, and of a single server all else that a
// store must know before it decides. Making a node ready is one attempt that all calls share, under a time of its own:
// it goes on when a call gives up.
type readiness struct {
	node string
	// connected is nil while the node is not ready.
	connected atomic.Pointer[connections]
	// probed says that the node computes as the scripts need it, see probe.go. It stays for the life of the store, and
	// Health asks again: a node whose software is replaced by another is rare.
	probed atomic.Bool

	// mu guards the fields below. It is not held while an attempt is made.
	mu      sync.Mutex
	key     string        // that the latest attempt asked for
	current *attempt      // nil if there is none
	err     error         // of the latest attempt
	pause   time.Duration // after that attempt, if it failed
	next    time.Time     // when the next one may begin
}

// connections are those of a node from when it became ready to the first that broke. A script that ran on them is known
// to the node, as far as the store can tell: a connection breaks too when a server restarts or another takes its place.
type connections struct {
	scripts atomic.Pointer[map[*script]bool] // a map does not change once it is here
	mu      sync.Mutex                       // held while scripts is replaced
}

// attempt is an attempt at making a node ready. err is set before done is closed.
type attempt struct {
	began time.Time
	done  chan struct{}
	err   error
}

func newConnections() *connections {
	c := &connections{}
	c.scripts.Store(&map[*script]bool{})
	return c
}

// knows reports whether a script ran on the connections.
func (c *connections) knows(sc *script) bool { return (*c.scripts.Load())[sc] }

// learn notes that the node has a script. lost says that it had forgotten it, and so most likely all others.
func (c *connections) learn(sc *script, lost bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	scripts := *c.scripts.Load()
	switch {
	case lost:
		scripts = map[*script]bool{}
	case scripts[sc]:
		return
	default:
		scripts = maps.Clone(scripts)
	}
	scripts[sc] = true
	c.scripts.Store(&scripts)
}

// readinessOf returns the readiness of the node that has a slot.
func (s *Store) readinessOf(slot uint16) *readiness {
	node := s.nodeOf(slot)
	if node == "" {
		return &s.unnamed
	}
	if r := (*s.named.Load())[node]; r != nil {
		return r
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	named := *s.named.Load()
	if r := named[node]; r != nil {
		return r
	}
	if len(named) >= maxReadiness { // the nodes that are in use become ready anew
		named = nil
	}
	next := make(map[string]*readiness, len(named)+1)
	maps.Copy(next, named)
	r := &readiness{node: node}
	next[node] = r
	s.named.Store(&next)
	return r
}

// ready returns the readiness of the node that has a key, and its connections, as soon as the node is ready. If it
// returns an error, nothing was sent.
func (s *Store) ready(ctx context.Context, key string) (*readiness, *connections, error) {
	var slot uint16
	if s.placer != nil {
		slot = SlotOf(key)
	}
	const changes = 4 // the node becomes known, and may be another by the time it is ready
	for i := 0; ; i++ {
		r := s.readinessOf(slot)
		c := r.connected.Load()
		if c != nil {
			return r, c, nil
		}
		if err := s.await(ctx, r, key); err != nil {
			return nil, nil, err
		}
		if i == changes {
			return r, newConnections(), nil
		}
	}
}

// awaitNode returns when the node of a charge is ready. A charge waits for that before it enters a queue: among others in
// a batch, its caller could not leave and know that nothing was sent.
func (s *Store) awaitNode(ctx context.Context, c *quota.Charge, t *target) error {
	if s.warmer == nil || s.placer == nil && s.unnamed.connected.Load() != nil {
		return nil
	}
	s.locate(t, c)
	_, _, err := s.ready(ctx, t.key)
	return err
}

// await returns when a node is ready, or was for a moment. It makes an attempt or joins the one under way.
func (s *Store) await(ctx context.Context, r *readiness, key string) error {
	r.mu.Lock()
	if r.connected.Load() != nil {
		r.mu.Unlock()
		return nil
	}
	s.attempt(r, key)
	a, last := r.current, r.err
	r.mu.Unlock()
	if a == nil {
		if last == nil { // Close came first
			last = errClosed
		}
		return last
	}
	if time.Since(a.began) > patience {
		return stillConnecting(a, nil)
	}
	select {
	case <-a.done:
		return a.err
	case <-ctx.Done():
		return &gettingReady{stillConnecting(a, ctx.Err())}
	case <-s.life.Done():
		return errClosed
	}
}

// stillConnecting is the error of a call that does not wait for an attempt to end.
func stillConnecting(a *attempt, cause error) error {
	err := fmt.Errorf("redis: %w: nothing was sent: still connecting, since %v", quota.ErrUnavailable, time.Since(a.began).Round(time.Millisecond))
	if cause != nil {
		err = fmt.Errorf("%w: %w", err, cause)
	}
	return err
}

// gettingReady is a [driver.GettingReady].
type gettingReady struct{ error }

func (e *gettingReady) Unwrap() error      { return e.error }
func (e *gettingReady) GettingReady() bool { return true }

// attempt begins an attempt at making a node ready, unless one is under way, or the latest failed a moment ago, or the
// store is closed. The caller holds r.mu.
func (s *Store) attempt(r *readiness, key string) {
	if r.current != nil || time.Now().Before(r.next) {
		return
	}
	a := &attempt{began: time.Now(), done: make(chan struct{})}
	if s.attempts.Run(func() { s.makeReady(r, a, key) }) {
		r.current, r.key = a, key
	}
}

// makeReady makes an attempt.
func (s *Store) makeReady(r *readiness, a *attempt, key string) {
	ctx, cancel := context.WithTimeout(s.life, attemptTimeout)
	defer cancel()
	err := errEnded
	defer func() {
		if err != nil {
			err = s.ofAttempt(err)
		}
		if s.attempted(r, a, err) {
			Catch("the client", false, func() error { s.measure(ctx, r.node, key); return nil }) // calls will tell
		}
	}()
	err = Catch("the client", true, func() error { return s.prepare(ctx, r, key) })
}

// attempted notes the outcome of an attempt, and reports whether the node became ready.
func (s *Store) attempted(r *readiness, a *attempt, err error) (became bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case err != nil:
		r.pause = min(max(2*r.pause, firstAttemptPause), lastAttemptPause)
		r.next = time.Now().Add(r.pause)
		if !errors.Is(err, quota.ErrOverloaded) { // by calls that are under way
			r.connected.Store(nil)
		}
	default:
		r.pause, r.next = 0, time.Time{}
		if became = r.connected.Load() == nil; became {
			r.connected.Store(newConnections())
		}
	}
	a.err, r.err, r.current = err, err, nil
	close(a.done)
	return became
}

// measure reports the time of a round trip to a node: the shortest of some, because the others may have waited for a
// connection.
func (s *Store) measure(ctx context.Context, node, key string) {
	reports := s.reporting()
	if len(reports) == 0 || node == "" && s.cluster {
		return
	}
	const pings = 3
	shortest := attemptTimeout
	for range pings {
		began := time.Now()
		if s.warmer.Ping(ctx, node, key) != nil {
			return
		}
		shortest = min(shortest, time.Since(began))
	}
	for _, r := range reports {
		if r.RoundTrip != nil {
			r.RoundTrip(node, shortest)
		}
	}
}

// prepare takes the steps by which a node becomes ready. Scripts of theirs go by invoke, which does not wait for the node
// to be ready.
func (s *Store) prepare(ctx context.Context, r *readiness, key string) error {
	if err := s.warmer.Warm(ctx, r.node, key); err != nil {
		return err
	}
	s.learnReady(ctx)
	if r.probed.Load() || s.placer != nil && r.node == "" { // of a cluster, where the node becomes ready by its name
		return nil
	}
	err := s.probe(ctx, key)
	if _, lost := errors.AsType[*connectionError](err); lost || isWrongServer(err) {
		return err
	}
	r.probed.Store(err == nil)
	return nil
}

// ofAttempt returns the error of an attempt: no charge was sent.
func (s *Store) ofAttempt(err error) error {
	switch {
	case s.life.Err() != nil:
		return errClosed
	case errors.Is(err, quota.ErrIndeterminate), driver.Sentinel(err) == nil:
		return fmt.Errorf("redis: %w: nothing was sent: no connection: %v", quota.ErrUnavailable, err)
	}
	return err
}

// failed notes the error of a call that was sent on these connections. A connection that broke makes the node not
// ready; after a timeout it stays ready, but an attempt finds out whether it is.
func (s *Store) failed(r *readiness, c *connections, key string, err error) {
	broken, is := errors.AsType[*connectionError](err)
	if !is {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if !broken.timeout && !r.connected.CompareAndSwap(c, nil) {
		return // the error is of earlier connections
	}
	s.attempt(r, key)
}

// Lost notes that a connection to a node ended, also while no call was on it: the node is not ready, and becomes so
// again before a call finds out. addr is the node's address, which only a cluster's have as their names.
func (s *Store) Lost(addr string) {
	r := &s.unnamed
	if s.placer != nil {
		if r = (*s.named.Load())[addr]; r == nil {
			return
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.key == "" || r.connected.Swap(nil) == nil {
		return // it was not ready
	}
	s.attempt(r, r.key)
}

// ConnectAll calls connect so many times at once, and returns one of the errors if there are any.
func ConnectAll(times int, connect func() error) error {
	return worst(Each(times, func(int) error { return connect() }))
}

// connectionError is the error of a call that got no reply.
type connectionError struct {
	error
	timeout bool // the call ran out of time, or its context ended
}

func (e *connectionError) Unwrap() error { return e.error }

// noReply marks an error of a call that got no reply; cause is the client's error.
func noReply(err, cause error) error {
	timeout := errors.Is(cause, context.Canceled)
	if n, ok := errors.AsType[net.Error](cause); ok {
		timeout = timeout || n.Timeout()
	}
	return &connectionError{err, timeout}
}

// Broken reports whether an error is of a connection that was made and broke before it ran out of time.
func Broken(err error) bool {
	broken, is := errors.AsType[*connectionError](err)
	return is && !broken.timeout && errors.Is(err, quota.ErrIndeterminate)
}

var _ driver.GettingReady = (*gettingReady)(nil)
