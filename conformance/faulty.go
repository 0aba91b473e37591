package conformance

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// FaultyOptions are the options of FaultyKV. The zero value, and nil, take the defaults.
type FaultyOptions struct {
	// Repeats says that the client library of the database repeats a write whose reply was lost: under LostReply every
	// second Swap is executed twice, and the reply to the second execution arrives. The other Swaps are lost.
	Repeats bool
}

// FaultyKV puts a connection that can be broken before a KV, and returns the function that breaks it: both are for
// [Harness].Fault. Under LostReply a Swap is executed, and its error says that the outcome is unknown. Under Refused
// neither method is executed. Under Frozen both wait for the end of the fault or of their context, and a Swap whose
// caller has left is executed when the fault ends.
func FaultyKV(kv driver.KV, o *FaultyOptions) (driver.KV, func(Fault)) {
	k := &faultyKV{KV: kv}
	if o != nil {
		k.options = *o
	}
	return k, k.set
}

type faultyKV struct {
	driver.KV
	connection
	options FaultyOptions
	lost    atomic.Int64
}

func (k *faultyKV) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	if err := k.request(ctx, func(context.Context) {}); err != nil {
		return nil, 0, err
	}
	return k.KV.Load(ctx, keys)
}

func (k *faultyKV) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	later := slices.Clone(changes)
	if err := k.request(ctx, func(ctx context.Context) { k.KV.Swap(ctx, later) }); err != nil {
		return false, err
	}
	swapped, err := k.KV.Swap(ctx, changes)
	if now, _ := k.now(); now != LostReply {
		return swapped, err
	}
	if k.options.Repeats && k.lost.Add(1)%2 == 0 {
		return k.KV.Swap(ctx, changes)
	}
	return false, errLost
}

// ListKeys lists the keys, if the KV is a driver.KeyLister.
func (k *faultyKV) ListKeys(ctx context.Context, prefix, cursor string, n int) ([]string, string, error) {
	lister, ok := k.KV.(driver.KeyLister)
	if !ok {
		return nil, "", fmt.Errorf("conformance: %w: the KV has no method ListKeys", errors.ErrUnsupported)
	}
	if err := k.request(ctx, func(context.Context) {}); err != nil {
		return nil, "", err
	}
	return lister.ListKeys(ctx, prefix, cursor, n)
}

// Close closes the KV, if it can be closed.
func (k *faultyKV) Close() error {
	if c, ok := k.KV.(interface{ Close() error }); ok {
		return c.Close()
	}
	return nil
}

// FaultyStore puts a connection that can be broken before a store, as [FaultyKV] does before a KV. It is for tests of
// wrappers, whose stores fail under them.
func FaultyStore(s quota.Store) (quota.Store, func(Fault)) {
	f := &faultyStore{Store: s}
	return f, f.set
}

type faultyStore struct {
	quota.Store
	connection
}

// Unwrap returns the store, for its optional interfaces.
func (s *faultyStore) Unwrap() quota.Store { return s.Store }

func (s *faultyStore) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.ChargeAll(ctx, []quota.Charge{c}, out[:])
	return out[0], err
}

func (s *faultyStore) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	later := slices.Clone(cs)
	err := s.request(ctx, func(ctx context.Context) { s.Store.ChargeAll(ctx, later, make([]quota.Decision, len(later))) })
	if errors.Is(err, errLost) {
		return fmt.Errorf("conformance: %w: %w", quota.ErrIndeterminate, err)
	}
	if err != nil {
		return err
	}
	err = s.Store.ChargeAll(ctx, cs, out)
	if now, _ := s.now(); now == LostReply && driver.Sentinel(err) != quota.ErrClosed {
		return fmt.Errorf("conformance: %w: %w", quota.ErrIndeterminate, errLost)
	}
	return err
}

// errLost is the error in place of a reply.
var errLost = errors.New("the connection was broken before the reply")

// connection is a connection that can be broken.
type connection struct {
	mu    sync.Mutex
	fault Fault
	thaw  chan struct{} // closed when a freeze ends
}

func (c *connection) set(f Fault) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.fault == Frozen && f != Frozen {
		close(c.thaw)
	}
	if f == Frozen && c.fault != Frozen {
		c.thaw = make(chan struct{})
	}
	c.fault = f
}

func (c *connection) now() (Fault, chan struct{}) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.fault, c.thaw
}

// request is the way of a request to the server. After an error the request was not executed, or, where the caller left
// a frozen connection, is executed by the function when the freeze ends.
func (c *connection) request(ctx context.Context, later func(context.Context)) error {
	switch f, thaw := c.now(); f {
	case Refused:
		return fmt.Errorf("conformance: %w: the connection is refused", quota.ErrUnavailable)
	case Frozen:
		select {
		case <-thaw:
		case <-ctx.Done():
			go func() {
				<-thaw
				later(context.WithoutCancel(ctx))
			}()
			return fmt.Errorf("%w: %w", errLost, ctx.Err())
		}
	}
	return nil
}
