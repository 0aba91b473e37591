package rueidis

import (
	"context"
	"net"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// A call heeds its context while it waits for a reply, and while it connects. It does not while it waits for another
// call's connecting, nor for room among a connection's commands, which a server that hangs leaves unanswered. So while a
// connection may be missing or stuck, a call is made on a goroutine of its own, and left behind when its context ends.

// steadiness says whether calls may be made directly: every connection of a client has answered since the last failure.
type steadiness struct {
	steady  atomic.Bool
	shakes  atomic.Int64 // failures
	answers atomic.Int32 // to calls that were handed over, since the last failure
	handed  engine.Background
}

// shake notes that a connection may be missing or stuck.
func (s *steadiness) shake() {
	s.shakes.Add(1)
	s.steady.Store(false)
	s.answers.Store(0)
}

// answered notes an answer to a call that was handed over. As many as Warm makes reads have gone over every connection.
func (s *steadiness) answered() {
	if s.answers.Add(1) == warmReads {
		s.steady.Store(true)
	}
}

// handOver sends a script on a goroutine of its own, and returns when the context ends.
func (a *adapter) handOver(ctx context.Context, args []any, keys int) (engine.Reply, error) {
	type result struct {
		reply engine.Reply
		err   error
	}
	done := make(chan result, 1)
	call := func() {
		var r result
		r.err = engine.Catch("the client", true, func() (err error) {
			r.reply, err = a.do(ctx, args, keys)
			return err
		})
		done <- r
	}
	if !a.handed.Run(call) {
		return nil, errClientClosed
	}
	select {
	case r := <-done:
		if r.err == nil {
			a.answered()
		}
		return r.reply, r.err
	case <-ctx.Done():
		a.shake()
		return nil, engine.TransportError(ctx.Err())
	}
}

// watched is a connection whose end shakes its client before that makes another.
type watched struct {
	net.Conn
	shake func()
}

func (w watched) Close() error {
	w.shake()
	return w.Conn.Close()
}

// shake notes that a connection of the present client may be missing.
func (l *lazy) shake() {
	if a := l.made.Load(); a != nil {
		a.shake()
	}
}
