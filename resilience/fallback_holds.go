package resilience

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// holds is the tokens of a key that callers hold on this instance's share. The table's lock guards it.
//
// They are renewed and spent on the share, also while the primary decides: the share's store knows their times of lapse and the
// request ids of their callers, so that a finish has effect once, and on that hold alone. The primary holds the sum, for the
// whole instance: placed follows open, in front of the key's next call that reaches the primary.
//
// Invariant: while tokens are open the share is not reset, so that they are never above its capacity.
type holds struct {
	open   []lot         // of callers, by the time of the share's store
	placed []lot         // of the primary, by its time
	call   quota.Charge  // to the primary, in flight or of unknown outcome; without an ID there is none
	busy   bool          // a call sends it
	sent   time.Duration // when it was sent last, since the fallback's base
	retry  time.Duration // when tokens that the primary denied are asked for again
}

// lot is tokens that lapse together.
type lot struct {
	until  quota.Micros
	tokens int64
}

func tokensOf(lots []lot) (n int64) {
	for _, l := range lots {
		n = plus(n, l.tokens)
	}
	return n
}

// more returns lots with tokens added.
func more(lots []lot, until quota.Micros, n int64) []lot {
	if n <= 0 {
		return lots
	}
	for i := range lots {
		if lots[i].until == until {
			lots[i].tokens = plus(lots[i].tokens, n)
			return lots
		}
	}
	return append(lots, lot{until, n})
}

// less returns lots without up to n tokens that lapse at a time, and how many those were.
func less(lots []lot, until quota.Micros, n int64) ([]lot, int64) {
	for i := range lots {
		if lots[i].until == until {
			n = min(n, lots[i].tokens)
			if lots[i].tokens -= n; lots[i].tokens == 0 {
				lots = slices.Delete(lots, i, i+1)
			}
			return lots, n
		}
	}
	return lots, 0
}

// holding returns the holds of a key, or nil if there are none. The caller holds the lock.
func (k *keyState) holding(l *quota.Limit, now time.Duration) *holds {
	h := k.holds
	if h == nil {
		return nil
	}
	lapsed := func(at quota.Micros, seen time.Duration) func(lot) bool {
		at += quota.Micros((now - seen) / time.Microsecond)
		return func(l lot) bool { return l.until <= at }
	}
	h.open = slices.DeleteFunc(h.open, lapsed(k.share.at, k.share.seen))
	if !h.busy {
		h.placed = slices.DeleteFunc(h.placed, lapsed(k.known.at, k.known.seen))
		if len(h.open)+len(h.placed) == 0 && (h.call.ID == "" || now-h.sent > 2*l.TTL()) { // a call of unknown outcome has lapsed too
			k.holds, h = nil, nil
		}
	}
	return h
}

// heldHere takes over a granted decision on a hold of the share, and returns how many tokens came back. The caller holds the lock.
func (k *keyState) heldHere(c *quota.Charge, d *quota.Decision) (back int64) {
	h := k.holds
	if h == nil {
		if c.Op == quota.OpSpend || d.Held == 0 {
			return 0
		}
		h = &holds{}
		k.holds = h
	}
	k.limit = c.Limit
	switch c.Op {
	case quota.OpSpend:
		h.open, back = less(h.open, c.Until, c.Held)
	case quota.OpRenew:
		h.open, _ = less(h.open, c.Until, d.Held)
		h.open = more(h.open, d.Until, d.Held)
	case quota.OpHold:
		h.open = more(h.open, d.Until, d.Held)
	}
	return back
}

// forget drops the holds of a key that the primary has reset.
func (h *holds) forget() {
	if h == nil {
		return
	}
	if h.open = nil; !h.busy {
		h.placed, h.call = nil, quota.Charge{}
	}
}

// nextOfHolds returns the holds of a key, and the charge that the primary needs for them now. ok says that there is one. The caller holds
// the lock.
func (k *keyState) nextOfHolds(c *quota.Charge, now time.Duration) (h *holds, call quota.Charge, ok bool) {
	if h = k.holding(c.Limit, now); h != nil {
		call, ok = h.next(k, c, now)
	}
	return h, call, ok
}

// next returns the charge that the primary needs now, so that it holds as many tokens as are open. It has no request id yet, but
// for one of unknown outcome. ok says that there is one. The caller holds the lock.
func (h *holds) next(k *keyState, c *quota.Charge, now time.Duration) (call quota.Charge, ok bool) {
	switch {
	case h.busy:
		return call, false
	case h.call.ID != "":
		return h.call, true
	}
	call = quota.Charge{Limit: c.Limit, Key: k.id.key}
	extra := tokensOf(h.placed) - tokensOf(h.open)
	if extra > 0 {
		call.Op, call.Held, call.Until = quota.OpSpend, min(extra, h.placed[0].tokens), h.placed[0].until
		return call, true
	}
	soon := k.known.at + quota.Micros((now-k.known.seen+c.Limit.TTL()*2/3)/time.Microsecond)
	for _, l := range h.placed {
		if l.until < soon {
			call.Op, call.Held, call.Until = quota.OpRenew, l.tokens, l.until
			return call, true
		}
	}
	if call.Op, call.Cost = quota.OpHold, -extra; debitHolds(c.Limit) {
		call.Op = quota.OpDebit // which does not ask
	}
	return call, extra < 0 && now >= h.retry
}

// untold reports whether the primary needs a charge of the key's holds. The caller holds the lock.
func (k *keyState) untold(c *quota.Charge, now time.Duration) bool {
	if c.Limit.TTL() == 0 {
		return false
	}
	_, _, ok := k.nextOfHolds(c, now)
	return ok
}

// debitHolds reports whether a debit of the limit holds its cost, and charges none.
func debitHolds(l *quota.Limit) bool {
	const at = quota.Micros(1 << 50)
	s, debit := l.Algorithm().Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: 1}, at)
	_, spend := l.Algorithm().Decide(s, quota.Request{Op: quota.OpSpend, Arg: l.Spec().Lapse(at), Floor: 1}, at)
	return spend.Remaining > debit.Remaining
}

// decided takes over the primary's decision on a call. The caller holds the lock.
func (h *holds) decided(c *quota.Charge, d *quota.Decision, now time.Duration) {
	switch c.Op {
	case quota.OpSpend, quota.OpRenew:
		h.placed, _ = less(h.placed, c.Until, c.Held)
		h.placed = more(h.placed, d.Until, d.Held)
	case quota.OpDebit:
		h.placed = more(h.placed, c.Limit.Spec().Lapse(d.At), c.Cost)
	case quota.OpHold:
		if h.placed = more(h.placed, d.Until, d.Held); !d.Allowed {
			h.retry = plus(now, DefaultRetryAfter)
		}
	}
}

// place has the primary hold the tokens of a key that are held here. What another call is sending it leaves alone.
func (f *fallback) place(ctx context.Context, c *quota.Charge) error {
	if c.Op == quota.OpReset || c.Limit.TTL() == 0 {
		return nil
	}
	t := f.table(c)
	for {
		t.mu.Lock()
		k := t.keys[keyOf(c)]
		if k == nil {
			t.mu.Unlock()
			return nil
		}
		now := f.now()
		h, call, ok := k.nextOfHolds(c, now)
		if !ok {
			t.mu.Unlock()
			return nil
		}
		unknown := call.ID != ""
		if !unknown {
			call.ID = f.ids + strconv.FormatUint(f.lastID.Add(1), 36)
		}
		h.call, h.busy, h.sent = call, true, now
		t.mu.Unlock()
		if err := f.sendHold(ctx, k, h, call, unknown); err != nil {
			return err
		}
	}
}

// sendHold sends the call of a key's holds. unknown says that an earlier attempt may have been charged.
func (f *fallback) sendHold(ctx context.Context, k *keyState, h *holds, call quota.Charge, unknown bool) (err error) {
	var d quota.Decision
	kept := true // until the outcome is known, also if the store panics
	defer func() {
		k.table.mu.Lock()
		defer k.table.mu.Unlock()
		if h.busy = false; !kept {
			h.call = quota.Charge{}
		}
	}()
	if d, err = f.inner.Charge(ctx, call); err == nil && !byStore(&d) {
		err = quota.ErrUnavailable
	}
	if err != nil {
		kept = unknown || mayBeCharged(ctx, err)
		return err
	}
	kept = false
	now := f.now()
	f.recovered(now)
	k.table.mu.Lock()
	defer k.table.mu.Unlock()
	h.decided(&call, &d, now)
	k.record(f.kept(call.Limit, &d), now, false)
	return nil
}

// finishes reports whether a list finishes or renews holds of this instance's shares, and has no other charge that may be denied.
func finishes(cs []quota.Charge) bool {
	n := 0
	for i := range cs {
		if ofShare(&cs[i]) {
			n++
		} else if cs[i].Op.Deniable() {
			return false
		}
	}
	return n > 0
}

// ofShare reports whether a charge finishes or renews a hold of this instance's share.
func ofShare(c *quota.Charge) bool {
	return c.From == quota.FromFallback && (c.Op == quota.OpSpend || c.Op == quota.OpRenew) && !stateless(c.Limit)
}

// finish finishes and renews holds on the shares where they are, whether the primary decides or not, and tells the primary if that
// decides. The other charges of the list follow.
func (f *fallback) finish(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var here, rest []quota.Charge
	var at []int // of here, and then of rest, in the list
	for i := range cs {
		if ofShare(&cs[i]) {
			here, at = append(here, cs[i]), append(at, i)
		}
	}
	for i := range cs {
		if !ofShare(&cs[i]) {
			rest, at = append(rest, cs[i]), append(at, i)
		}
	}
	ds := make([]quota.Decision, len(cs))
	if err := f.decide(ctx, here, ds[:len(here)], nil); err != nil {
		return err
	}
	within, _, release := f.within(ctx)
	defer release()
	f.alarm.check(f.reconcile(within, here)) // or in front of a later call
	if len(rest) > 0 {
		if !quota.Granted(ds[:len(here)]) {
			for i := range rest {
				rest[i] = quota.Charge{Limit: rest[i].Limit, Key: rest[i].Key, Op: quota.OpPeek}
			}
		}
		if err := f.reconcileAndTake(ctx, rest, ds[len(here):]); err != nil {
			return fmt.Errorf("resilience: %w: the holds of the list are finished, and its other charges are not: %w", quota.ErrIndeterminate, err)
		}
	}
	for n, i := range at {
		out[i] = ds[n]
	}
	return nil
}

// errTwoStores is the error of a list that no store decides in one step.
var errTwoStores = fmt.Errorf("resilience: %w: list has holds of this instance's share beside charges that the store may deny; accepted: two lists", quota.ErrCrossSlot)

// mayBeCharged reports whether a call that failed may have been charged. A context's error is a sign that nothing was sent only if
// this context ended.
func mayBeCharged(ctx context.Context, err error) bool {
	return quota.Charged(err) == quota.ChargeUnknown || ofContext(err) && ctx.Err() == nil
}
