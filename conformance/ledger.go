package conformance

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

// ledger sums up the answers to charges.
type ledger struct {
	charged, unknown atomic.Int64
}

// book adds the answer to a charge that fits.
func (l *ledger) book(t *trial, ctx context.Context, c quota.Charge, d quota.Decision, err error) {
	ds := []quota.Decision{d}
	switch {
	case err == nil && substituted(ds), errors.Is(err, quota.ErrIndeterminate):
		l.unknown.Add(c.Cost)
	case err != nil:
		t.wantKnown(ctx, c, err)
	case !d.Allowed || d.Charged != c.Cost || d.Replayed:
		t.fatalf("Charge%s:\n%s\n\twant a grant, or an error: there is enough left", show([]quota.Charge{c}), answer(ds, nil))
	default:
		l.charged.Add(c.Cost)
	}
}

// audit compares the ledger with the tokens that are charged.
func (l *ledger) audit(t *trial, h *handle, limit *quota.Limit, key string) {
	if t.lacks(Exact) {
		return
	}
	got := t.used(h, limit, key)
	least := l.charged.Load()
	if most := least + l.unknown.Load(); got < least || got > most {
		t.fatalf("got: %d tokens are charged; want: %d, for which calls returned nil, and up to %d more, for which the error was ErrIndeterminate", got, least, most-least)
	}
}
