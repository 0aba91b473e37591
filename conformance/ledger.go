package conformance

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

// ledger sums up the answers to charges. admitted are those that a fallback decided in the store's place: each is charged to
// the store afterwards, and may be charged there already, for the reply may have been lost.
type ledger struct {
	charged, unknown, admitted atomic.Int64
}

// book adds the answer to a charge that fits.
func (l *ledger) book(t *trial, ctx context.Context, c quota.Charge, d quota.Decision, err error) {
	ds := []quota.Decision{d}
	switch {
	case err == nil && d.Source == quota.FromFallback && d.Charged > 0:
		l.admitted.Add(d.Charged)
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
	if least, more := l.bounds(); got < least || got > least+more {
		t.fatalf("got: %d tokens are charged; want: %d, for which calls returned nil, and up to %d more, whose outcome is unknown", got, least, more)
	}
}

// bounds returns how many tokens are charged at least, and how many more there may be, while a fallback has not charged the
// store all that it admitted.
func (l *ledger) bounds() (least, more int64) {
	return l.charged.Load(), l.unknown.Load() + 2*l.admitted.Load()
}
