package resilience

import (
	"context"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// reconciliation is a request that charges debts to the primary: debits of keys of one group, sent under one
// request id until their outcome is known. debt.reserve and debt.settle or debt.cancel are its begin and end
// for each key.
type reconciliation struct {
	// busy is set by the call that sends the reconciliation. Only that call uses the fields below.
	busy atomic.Bool

	charges     []quota.Charge // of each key the debit
	keys        []*keyState
	settlements []settlement
	unknown     bool // an attempt may have been charged
}

// add reserves the debt of a key for the reconciliation. The caller holds the lock of the key's table.
func (r *reconciliation) add(k *keyState, l *quota.Limit) {
	amount, s := k.debt.reserve(r, k.share.at)
	r.charges = append(r.charges, quota.Charge{Limit: l, Key: k.id.key, Op: quota.OpDebit, Cost: amount})
	r.keys = append(r.keys, k)
	r.settlements = append(r.settlements, s)
}

// reconcileAndTake charges the primary the debts of a call's keys, and then asks it for the decisions.
func (f *fallback) reconcileAndTake(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if finishes(cs) {
		return f.finish(ctx, cs, out)
	}
	within, translated, release := f.within(ctx)
	defer release()
	if err := f.reconcile(within, cs); err != nil {
		err = translated(err)
		if f.takesOver(ctx, err) {
			return f.decide(ctx, cs, out, err)
		}
		if ctx.Err() != nil {
			return ctx.Err() // the call itself was not sent
		}
		// The primary's objection to the debit applies to the call too, or does not concern the call.
	}
	before := make([]snapshot, len(cs))
	sent := append([]quota.Charge(nil), cs...)
	for i := range sent {
		before[i] = f.snapshot(&sent[i])
		c := &sent[i]
		switch {
		case ofShare(c):
			return errTwoStores
		case c.From == quota.FromFallback && c.Op == quota.OpRefund:
			c.MadeAt, c.From = before[i].chargedAt(c.MadeAt), quota.FromStore
			if c.MadeAt == 0 {
				c.Cost = 0 // the primary has not charged it, or its time is no longer known
			}
		}
	}
	var err error
	if len(sent) == 1 {
		out[0], err = f.inner.Charge(within, sent[0])
	} else {
		err = f.inner.ChargeAll(within, sent, out)
	}
	if err != nil {
		err = translated(err)
		if f.takesOver(ctx, err) {
			return f.decide(ctx, cs, out, err)
		}
		return err
	}
	granted := quota.Granted(out)
	for i := range sent {
		f.record(&sent[i], &out[i], before[i], granted && sent[i].Op == quota.OpReset)
	}
	return nil
}

// within returns the context of a call and the reconciliation in front of it, and a function that translates the error of one of them.
func (f *fallback) within(ctx context.Context) (within context.Context, translated func(error) error, release func()) {
	if f.budget > 0 {
		d := &deadline{Context: ctx, at: time.Now().Add(f.budget)}
		if own, ok := ctx.Deadline(); !ok || d.at.Before(own) {
			return d, func(err error) error { err, _ = timedOut(ctx, d, f.budget, err); return err }, d.release
		}
	}
	return ctx, func(err error) error { return err }, func() {}
}

// chargedAt returns the primary's time at which it charged an admission of the fallback's store, and 0 if it
// did not or if that is no longer known.
func (s snapshot) chargedAt(admitted quota.Micros) quota.Micros {
	if s.key == nil {
		return 0
	}
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	return s.key.debt.chargedAt(admitted, s.key.known.at)
}

// reconcile charges the primary the debts of a list's keys, and has it hold the tokens that are held here. Debts and holds that
// another call is charging it leaves alone.
func (f *fallback) reconcile(ctx context.Context, cs []quota.Charge) error {
	for {
		more, err := f.reconcileOnce(ctx, cs)
		if err != nil {
			return err
		}
		if !more {
			break
		}
	}
	for i := range cs {
		if err := f.place(ctx, &cs[i]); err != nil {
			return err
		}
	}
	return nil
}

// reconcileOnce sends the reconciliations that the debts of a list's keys need now. more says that one of them
// was an earlier one, whose keys may owe quota that was admitted after it.
func (f *fallback) reconcileOnce(ctx context.Context, cs []quota.Charge) (more bool, err error) {
	left := f.reserve(cs)
	defer func() {
		for _, r := range left {
			r.giveUp()
		}
	}()
	for len(left) > 0 {
		more = more || left[0].unknown
		if err := f.send(ctx, left[0]); err != nil {
			return false, err
		}
		left = left[1:]
	}
	return more, nil
}

// reserve returns the reconciliations of a list's keys, which the caller must send or give up: earlier ones
// whose outcome is unknown, and new ones for debts that no reconciliation carries, one for each group or,
// where the primary decides single keys only, for each key.
func (f *fallback) reserve(cs []quota.Charge) (rs []*reconciliation) {
	single := f.layer.Atomicity() == driver.OneKey
	for i := range cs {
		if cs[i].Op == quota.OpReset || stateless(cs[i].Limit) {
			continue // a reset forgives the debt
		}
		t := f.table(&cs[i])
		t.mu.Lock()
		k := t.keys[keyOf(&cs[i])]
		switch {
		case k == nil || k.debt.owed == 0:
		case k.debt.by != nil:
			if k.debt.by.busy.CompareAndSwap(false, true) {
				rs = append(rs, k.debt.by)
			}
		default:
			var r *reconciliation
			for _, other := range rs {
				if !single && !other.unknown && quota.Group(other.charges[0].Key) == quota.Group(k.id.key) {
					r = other
				}
			}
			if r == nil {
				r = &reconciliation{}
				r.busy.Store(true)
				rs = append(rs, r)
			}
			r.add(k, cs[i].Limit)
		}
		t.mu.Unlock()
	}
	return rs
}

// send sends a reconciliation. If it fails the caller must give the reconciliation up.
func (f *fallback) send(ctx context.Context, r *reconciliation) (err error) {
	if r.charges[0].ID == "" {
		id := f.ids + strconv.FormatUint(f.lastID.Add(1), 36)
		for i := range r.charges {
			r.charges[i].ID = id
		}
	}
	wasUnknown := r.unknown
	r.unknown = true // until the outcome is known, also if the store panics
	out := make([]quota.Decision, len(r.charges))
	if len(out) == 1 {
		out[0], err = f.inner.Charge(ctx, r.charges[0])
	} else {
		err = f.inner.ChargeAll(ctx, r.charges, out)
	}
	if err == nil && !byStore(&out[0]) {
		err = quota.ErrUnavailable
	}
	if err != nil {
		r.unknown = wasUnknown || mayBeCharged(ctx, err)
		return err
	}
	now := f.now()
	f.recovered(now)
	for i, k := range r.keys {
		s := r.settlements[i]
		s.at = out[i].At
		k.table.mu.Lock()
		owed := k.debt.owed
		k.debt.settle(s)
		k.owes(owed)
		k.table.reconciled += owed - k.debt.owed
		k.record(f.kept(r.charges[i].Limit, &out[i]), now, false)
		k.table.mu.Unlock()
	}
	return nil
}

// giveUp ends a call's hold on a reconciliation that was not settled. One that may have been charged is left
// to the next call of any of its keys, which must send it again; any other is cancelled.
func (r *reconciliation) giveUp() {
	if !r.unknown {
		for i, k := range r.keys {
			k.table.mu.Lock()
			k.debt.cancel(r.settlements[i])
			k.table.mu.Unlock()
		}
	}
	r.busy.Store(false)
}

// byStore reports whether the primary, and no policy inside, made a decision.
func byStore(d *quota.Decision) bool {
	return d.Source == quota.FromStore || d.Source == quota.FromLease
}

// corrects reports whether a charge may change a debt, or holds.
func corrects(c *quota.Charge) bool {
	return (c.Op == quota.OpReset || c.From == quota.FromFallback && c.Op == quota.OpRefund) && !stateless(c.Limit) || ofShare(c)
}
