package resilience

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// localCall is a call that is decided on this instance's shares.
type localCall struct {
	charges []quota.Charge // as the caller made them
	limits  []*quota.Limit // of the charges' shares
	keys    []*keyState    // nil where the call is not admitted to the key's share
	n       int64          // the number of instances
}

var errNoRoom = errors.New("no room for the key's state")

// decide makes the decisions that the primary failed to make, because of cause. Without a cause they finish or renew holds: the
// shares need not serve for that.
func (f *fallback) decide(ctx context.Context, cs []quota.Charge, out []quota.Decision, cause error) error {
	if err := f.gate.Open(); err != nil {
		return definite(cause, err) // Close is charging the debts: no more may be made
	}
	l := &localCall{charges: cs, limits: make([]*quota.Limit, len(cs)), keys: make([]*keyState, len(cs)), n: f.instances()}
	here := append([]quota.Charge(nil), cs...)
	corrects := false // the call says how much was used, so a denial is no answer to it
	for i := range cs {
		switch {
		case stateless(cs[i].Limit):
		case cs[i].Op == quota.OpReset, cs[i].Op == quota.OpRefund && cs[i].From != quota.FromFallback,
			(cs[i].Op == quota.OpSpend || cs[i].Op == quota.OpRenew) && cs[i].From != quota.FromFallback:
			return cause
		case cs[i].Op == quota.OpRefund, cs[i].Op == quota.OpDebit, cs[i].Op == quota.OpSpend, cs[i].Op == quota.OpRenew:
			corrects = true
		}
		share, err := f.limits.of(cs[i].Limit, l.n)
		if err != nil {
			return definite(cause, err)
		}
		l.limits[i], here[i] = share, here[i].OnShare(share)
	}
	if cause != nil {
		f.degrade(cause)
	}
	decided := false
	defer func() {
		// Even if the store panics, no other call may wait for this one for ever.
		if !decided {
			f.release(l, nil)
		}
	}()
	switch err := f.admit(ctx, l, cause); {
	case err == errNoRoom && corrects:
		err = fmt.Errorf("resilience: %w: the fallback has no room for the state of a key", quota.ErrOverloaded)
		if cause != nil {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		return err
	case err == errNoRoom:
		for i := range here {
			out[i] = quota.Decision{
				Source: quota.FromFallback, Shadow: here[i].Shadow, Alternative: here[i].Alternative, Capacity: here[i].Limit.Spec().Capacity, RetryAfter: DefaultRetryAfter, ResetAfter: DefaultRetryAfter,
			}
		}
		f.answered.Add(1)
		return nil
	case err != nil:
		return err
	}
	var err error
	if len(here) == 1 {
		out[0], err = f.store.Charge(ctx, here[0])
	} else {
		err = f.store.ChargeAll(ctx, here, out)
	}
	if err != nil {
		return failedBoth(cause, err)
	}
	decided = true
	f.answered.Add(1)
	f.release(l, out)
	for i := range out {
		d := &out[i]
		d.Source = quota.FromFallback
		if d.RetryAfter == quota.Never && need(&cs[i]) <= cs[i].Limit.Spec().Capacity {
			d.RetryAfter = max(d.ResetAfter, DefaultRetryAfter)
		}
	}
	return nil
}

// admit admits a call to the shares of all its keys, of which those that do not serve are filled. While it
// waits for a share it holds no other, so no two calls wait for each other. If it fails it holds none.
func (f *fallback) admit(ctx context.Context, l *localCall, cause error) error {
	for i := 0; i < len(l.charges); {
		if stateless(l.charges[i].Limit) {
			i++
			continue
		}
		k, used, wait, err := f.admitKey(l, i, cause)
		if err == nil && used != noFill {
			if err = f.fill(ctx, k, l.limits[i], used); err != nil {
				err = failedBoth(cause, err)
			}
		}
		if err == nil && wait == nil {
			l.keys[i] = k
			i++
			continue
		}
		f.release(l, nil)
		i = 0
		if err != nil {
			return err
		}
		select {
		case <-wait:
		case <-ctx.Done():
			return failedBoth(cause, ctx.Err())
		}
	}
	return nil
}

// noFill says that a share serves already.
const noFill = -1

// admitKey admits a call to the share of its charge i, where wait is nil. Otherwise it must be tried again
// once wait is closed. If used is not noFill the call must fill the share so that as much of it is used.
func (f *fallback) admitKey(l *localCall, i int, cause error) (k *keyState, used int64, wait <-chan struct{}, err error) {
	c, now := &l.charges[i], f.now()
	t := f.table(c)
	t.mu.Lock()
	defer t.mu.Unlock()
	if k = t.keys[keyOf(c)]; k == nil {
		if now >= t.leftOut {
			k = t.add(c, now, mustKeep)
			f.tellForgotten(t)
		}
		if k == nil {
			f.tellFull()
			return nil, noFill, nil, errNoRoom
		}
	}
	if c.Op == quota.OpRefund && k.debt.isSettled(c.MadeAt) {
		return nil, noFill, nil, cause // the refund belongs to the primary
	}
	used = noFill
	if cause != nil && k.share.mustFill() { // asked first: the limit's rule may panic
		used = k.usedOfShare(c.Limit, l.limits[i], l.n, now)
	}
	return k, used, k.share.admit(), nil
}

// usedOfShare returns how much must be used of a share when it begins to serve. While the key owes quota the
// share goes on as it was; otherwise it is one n-th of the quota that the primary had left. The caller holds
// the lock.
func (k *keyState) usedOfShare(whole, share *quota.Limit, n int64, now time.Duration) int64 {
	if k.debt.owed > 0 {
		return k.share.usedOf(share)
	}
	used := k.known.usedOf(whole, now)
	b, capacity := whole.Spec().Capacity, share.Spec().Capacity
	empty := int64(0)
	if capacity > 0 && n > b && k.known.used > b {
		// A share that is kept at one token would be full as soon as the whole limit is. After a debt it begins with
		// no more than it gained by itself since the primary's last word: the proof needs that.
		empty = usedAfter(share, capacity, k.known.at, now-k.known.seen)
	}
	if used == 0 {
		return empty
	}
	return max(empty, capacity-min(capacity, floorDiv(b-used, n)))
}

// fill fills the bucket of a share, to which only this call is admitted, and ends its admission if that
// fails. A bucket with holds stays as it is, but for refill.
func (f *fallback) fill(ctx context.Context, k *keyState, share *quota.Limit, used int64) (err error) {
	var d quota.Decision
	filled := false // remains so if the store panics
	defer func() {
		k.table.mu.Lock()
		defer k.table.mu.Unlock()
		if filled {
			k.share.filled(used, d.At, f.now())
		} else {
			k.share.release()
		}
	}()
	first, debit := quota.OpReset, used
	k.table.mu.Lock()
	holds := k.holds != nil && len(k.holds.open) > 0
	k.table.mu.Unlock()
	if holds {
		first = quota.OpPeek
	}
	if d, err = f.store.Charge(ctx, quota.Charge{Limit: share, Key: k.id.key, Op: first}); err == nil && holds {
		debit = used - (d.Capacity - d.Remaining)
		used = max(used, d.Capacity-d.Remaining)
	}
	if err == nil && debit > 0 {
		d, err = f.store.Charge(ctx, quota.Charge{Limit: share, Key: k.id.key, Op: quota.OpDebit, Cost: debit})
	}
	filled = err == nil
	return err
}

// release ends the admission of a call, and keeps the decisions of the fallback's store; out is nil if it
// made none.
func (f *fallback) release(l *localCall, out []quota.Decision) {
	granted := out != nil && quota.Granted(out)
	for i, k := range l.keys {
		if k == nil {
			continue
		}
		l.keys[i] = nil
		k.table.mu.Lock()
		if out != nil {
			k.decidedHere(&l.charges[i], &out[i], granted, f.now())
		}
		k.share.release()
		k.table.mu.Unlock()
	}
}

// decidedHere takes over a decision of the fallback's store. granted says that the call it belongs to was
// granted. The caller holds the lock.
func (k *keyState) decidedHere(c *quota.Charge, d *quota.Decision, granted bool, now time.Duration) {
	if k.share.serving || !ofShare(c) {
		k.share.record(c.Op, d, now)
	}
	if !granted || d.Replayed {
		return
	}
	charged := d.Charged
	if c.Op.Holds() {
		if c.Op == quota.OpSpend && debitHolds(c.Limit) { // nothing is charged there but slots
			charged = 0
		}
		if back := k.heldHere(c, d); !k.share.serving {
			k.share.finished(d.At, charged-back, now)
		}
	}
	owed := k.debt.owed
	switch c.Op {
	case quota.OpTake, quota.OpAhead, quota.OpUpTo, quota.OpDebit, quota.OpSpend:
		k.debt.admit(charged)
		k.limit = c.Limit
	case quota.OpRefund:
		k.debt.refund(c.Cost)
	}
	k.owes(owed)
}

// definite returns the error of a call that is not decided here either, with the cause only where that says that the primary
// may have charged the call.
func definite(cause, err error) error {
	if cause != nil && quota.Charged(cause) == quota.ChargeUnknown {
		return failedBoth(cause, err)
	}
	return err
}

// failedBoth returns the error of a call that neither store decided. It must not be taken for one that says
// "not charged" if either error says that this is unknown.
func failedBoth(cause, err error) error {
	if cause == nil {
		return fmt.Errorf("resilience: a hold of this instance's share is not finished: %w", err)
	}
	if errors.Is(err, quota.ErrIndeterminate) && !errors.Is(cause, quota.ErrIndeterminate) {
		return fmt.Errorf("resilience: %w; before that the store failed: %v", err, cause)
	}
	if errors.Is(cause, quota.ErrIndeterminate) {
		return fmt.Errorf("resilience: %w; the fallback failed too: %v", cause, err)
	}
	return fmt.Errorf("resilience: %w; the fallback failed too: %w", cause, err)
}

// floorDiv returns a/b rounded down, for b > 0.
func floorDiv(a, b int64) int64 {
	q := a / b
	if q*b > a {
		q--
	}
	return q
}
