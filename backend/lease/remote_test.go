package lease

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// remote stands for a store at a distance: it keeps a ledger of charges and refunds, takes its time, and
// fails as a test wants. It is prompt.
type remote struct {
	quota.Store
	// fault is asked about each call; nil lets all pass at once.
	fault func(c *quota.Charge) fault

	mu      sync.Mutex
	calls   []quota.Charge
	charged int64 // by takes and debits that the store granted, less refunds
	untold  int64 // the part of charged whose reply did not reach the caller
	kept    int64 // refunds that were asked for and not made
	closed  int
}

// fault is the fate of one call.
type fault struct {
	before, after time.Duration // on the way there and back
	refused       bool
	lost          bool // the reply
	frozen        bool // nothing is executed and nothing answered
	deaf          bool // it ignores the context
	panics        bool
}

func newRemote(t testing.TB) *remote {
	s := local.New()
	t.Cleanup(func() { s.Close() })
	return &remote{Store: s}
}

func (r *remote) Prompt() bool { return true }

func (r *remote) Close() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.closed++
	return nil
}

func (r *remote) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := r.ChargeAll(ctx, []quota.Charge{c}, out[:])
	return out[0], err
}

func (r *remote) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var f fault
	r.mu.Lock()
	if r.fault != nil {
		f = r.fault(&cs[0])
	}
	r.calls = append(r.calls, cs...)
	k, _ := ctx.Value(takerKey{}).(*taker)
	if k != nil && (k.refunds || cs[0].Op != quota.OpRefund) { // the lease gives back when the caller may have its answer
		k.sent, k.asked, k.untold = cs[0].Cost, time.Now(), 0
	}
	r.mu.Unlock()
	made, err := r.chargeAll(ctx, cs, out, f)
	r.mu.Lock()
	defer r.mu.Unlock()
	for i := range cs {
		switch refund := cs[i].Op == quota.OpRefund; {
		case refund && k != nil && k.refunds:
			if made && err != nil {
				r.untold -= cs[i].Cost
			}
		case refund && !made: // by the lease
			r.kept += cs[i].Cost
		case !refund && cs[i].Op != quota.OpPeek && made && err != nil:
			r.untold += cs[i].Cost
			if k != nil {
				k.untold += cs[i].Cost
			}
		}
	}
	return err
}

// taker is a caller of Charge, as the remote sees it through the context; remote.mu guards the fields of its calls.
type taker struct {
	sent   int64 // tokens that the latest call for it asked for
	asked  time.Time
	untold int64 // tokens charged by that call whose reply did not arrive

	refunds bool // it is a caller that gives tokens back
}

type takerKey struct{}

// decide has the store decide, and reports whether it changed the store's state.
func (r *remote) decide(cs []quota.Charge, out []quota.Decision) (made bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	err = r.Store.ChargeAll(bg, cs, out)
	if made = err == nil && quota.Granted(out); made {
		for i := range cs {
			switch cs[i].Op {
			case quota.OpTake, quota.OpDebit, quota.OpAhead:
				r.charged += cs[i].Cost
			case quota.OpRefund:
				r.charged -= cs[i].Cost
			}
		}
	}
	return made, err
}

// chargeAll makes a call, and reports whether it changed the store's state.
func (r *remote) chargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision, f fault) (made bool, err error) {
	if f.deaf {
		ctx = context.WithoutCancel(ctx)
	}
	if err := ctx.Err(); err != nil {
		return false, err
	}
	if f.refused {
		return false, fmt.Errorf("test: %w", quota.ErrUnavailable)
	}
	if f.frozen {
		f.before = time.Hour
	}
	if err := linger(ctx, f.before); err != nil {
		return false, fmt.Errorf("test: %w: %w", quota.ErrIndeterminate, err)
	}
	if f.panics {
		panic("test: a panic in the store")
	}
	if made, err = r.decide(cs, out); err != nil {
		return false, err
	}
	if err := linger(ctx, f.after); err != nil || f.lost {
		return made, fmt.Errorf("test: %w: the reply is lost", quota.ErrIndeterminate)
	}
	return made, nil
}

// linger waits, unless the context ends first.
func linger(ctx context.Context, d time.Duration) error {
	if d == 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// set changes the fate of later calls.
func (r *remote) set(fault func(c *quota.Charge) fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.fault = fault
}

// always is a fault of every call.
func always(f fault) func(*quota.Charge) fault { return func(*quota.Charge) fault { return f } }

// seen returns the calls since the last time.
func (r *remote) seen() []quota.Charge {
	r.mu.Lock()
	defer r.mu.Unlock()
	calls := r.calls
	r.calls = nil
	return calls
}

// net returns the tokens charged and not given back.
func (r *remote) net() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.charged
}

// gate keeps everything from a store once it is shut.
type gate struct {
	quota.Store
	shut atomic.Bool
}

func (g *gate) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if g.shut.Load() {
		return quota.Decision{}, fmt.Errorf("test: %w", quota.ErrUnavailable)
	}
	return g.Store.Charge(ctx, c)
}
