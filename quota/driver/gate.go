package driver

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

// A Gate makes the two checks with which every call of a store begins: the context has not ended, and the store is open.
// The zero Gate is open. Methods may be called concurrently.
type Gate struct{ closed atomic.Bool }

// Ready returns the context's own error if it has ended, an ErrClosed if the gate is closed, and else nil. A store
// returns either error as it is: nothing was sent.
func (g *Gate) Ready(ctx context.Context) (err error) {
	if err = ctx.Err(); err == nil && g.closed.Load() { // short enough to be inlined
		err = errClosed
	}
	return
}

// Open returns an ErrClosed if the gate is closed, and else nil.
func (g *Gate) Open() error {
	if g.closed.Load() {
		return errClosed
	}
	return nil
}

// Close closes the gate, and reports whether it was open: only the first call of a store's Close ends the store.
func (g *Gate) Close() (first bool) { return !g.closed.Swap(true) }

var errClosed = fmt.Errorf("quota: the store is %w", quota.ErrClosed)
