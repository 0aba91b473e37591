package resilience

import (
	"context"
	"errors"
	"hash/maphash"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const books = 64

// book is a part of the accounts that a fallback keeps. Its lock is never held during a call.
type book struct {
	mu       sync.Mutex
	accounts map[memoryKey]*account
	all      []*account // the same, for the hand
	hand     int        // what is looked at next for something to drop
	most     int
	// blind is the time since base up to which a key without an account may be one that was left out.
	blind time.Duration
	// upTo is the latest upTo of an account that was dropped.
	upTo quota.Micros
}

// account is what a fallback knows of one limit and key. Times are since base unless they are in Micros.
type account struct {
	id      memoryKey
	gone    bool   // dropped
	version uint32 // counts what was learnt

	// What the primary said last.
	known bool
	used  int64         // the capacity less what remained
	at    quota.Micros  // the primary's time
	seen  time.Duration // when that was known here
	whole time.Duration // when nothing is used any more, if nobody charges

	// What is owed to the primary.
	pending int64
	claim   *claim // the reconciliation under way, or of unknown outcome
	claimed int64  // its part of pending
	// By the store's clock: what was admitted in between is reconciled, or claimed; before, it was on an account that was dropped.
	from, upTo quota.Micros
	marks      []mark // reconciliations, the latest last

	// The share. Only while it is live may the store be asked: it holds what the account says.
	live   bool
	making bool          // it is being made live
	flying int           // calls that the store is deciding
	wake   chan struct{} // closed when making or flying ends; nil if nobody waits

	// What the store said last, and how long the share refilled after that until the primary served the key.
	hereUsed int64
	hereAt   quota.Micros
	hereSeen time.Duration
	span     time.Duration
}

// mark is a reconciliation: of what was admitted here after one time and up to another, by the store's
// clock, charged to the primary at a time of its own.
type mark struct{ after, upTo, at quota.Micros }

// maxMarks is how many reconciliations are remembered for refunds.
const maxMarks = 4

// claim is a reconciliation: debits that are sent under one id until their outcome is known.
type claim struct {
	charges  []quota.Charge
	accounts []*account
	marks    []mark

	busy  atomic.Bool // whoever sets it owns the claim until he clears it
	maybe bool        // an attempt may have been charged
}

func (f *fallback) book(c *quota.Charge) *book {
	return &f.books[maphash.String(f.seed, c.Key)%books]
}

// look returns what the book has on a charge's key, and whether something is owed on it.
func (f *fallback) look(c *quota.Charge) (k seen, owes bool) {
	k.book = f.book(c)
	k.book.mu.Lock()
	if a := k.book.accounts[keyOf(c)]; a != nil {
		k.account, k.version, owes = a, a.version, a.owes()
	}
	k.book.mu.Unlock()
	return k, owes
}

func (a *account) owes() bool { return a.pending > 0 || a.claim != nil }

// served keeps what the primary decided, which was asked when the book had known.
func (f *fallback) served(c *quota.Charge, d *quota.Decision, known seen) {
	if !byStore(d) {
		return
	}
	now := f.now()
	f.rose(now)
	b, a := known.book, known.account
	b.mu.Lock()
	defer b.mu.Unlock()
	inOrder := a != nil && !a.gone && a.version == known.version
	if a == nil || a.gone {
		if a = b.accounts[keyOf(c)]; a == nil {
			if d.ResetAfter <= 0 {
				return
			}
			if a = b.open(c, now); a == nil {
				b.blind = max(b.blind, plus(now, d.ResetAfter))
				return
			}
		}
	}
	a.learn(d, now, inOrder)
}

// learn takes over what the primary said, and ends the time in which the share stood in for it. inOrder
// says that the primary was asked after all that is known was; else its clock tells, and in doubt the worse
// counts.
func (a *account) learn(d *quota.Decision, now time.Duration, inOrder bool) {
	used, whole := d.Limit-d.Remaining, plus(now, d.ResetAfter)
	switch {
	case d.Replayed && a.known && d.At <= a.at:
	case inOrder && !d.Replayed, !a.known, d.At > a.at:
		a.used, a.at, a.seen, a.whole, a.known = used, d.At, now, whole, true
	default:
		a.used, a.whole = max(a.used, used), max(a.whole, whole)
	}
	a.version++
	if a.live {
		a.live, a.span = false, now-a.hereSeen
	}
}

// open returns a new account, or nil if there is no room. The caller holds the lock.
func (b *book) open(c *quota.Charge, now time.Duration) *account {
	// Two are looked at for each that is added, so that those that can go do. If none can, some more are.
	look := 2
	if len(b.all) >= b.most {
		look = 32
	}
	for i := 0; i < look && len(b.all) > 0; i++ {
		b.hand %= len(b.all)
		if old := b.all[b.hand]; old.idle(now) {
			old.gone = true
			b.upTo = max(b.upTo, old.upTo)
			delete(b.accounts, old.id)
			last := len(b.all) - 1
			b.all[b.hand], b.all[last] = b.all[last], nil
			b.all = b.all[:last]
			if i >= 2 {
				break
			}
		} else {
			b.hand++
		}
	}
	if len(b.all) >= b.most {
		return nil
	}
	a := &account{id: keyOf(c), upTo: b.upTo, from: b.upTo}
	a.id.key = strings.Clone(a.id.key) // not the request that it may be cut from
	b.accounts[a.id] = a
	b.all = append(b.all, a)
	return a
}

// idle reports whether an account may be dropped: nothing is owed, nobody uses it, and a new one would say
// the same.
func (a *account) idle(now time.Duration) bool {
	return !a.owes() && a.flying == 0 && !a.making && (!a.known || now >= a.whole)
}

var errNoAccount = errors.New("no account")

// board makes the share of every charge live, with what the account says, and counts the call as flying
// on it until land. While it waits for others it flies on nothing, so no two calls wait for each other.
func (f *fallback) board(ctx context.Context, cs, here []quota.Charge, accounts []*account, n int64, cause error) error {
	for i := 0; i < len(cs); {
		a, fill, wait, err := f.enter(&cs[i], cause)
		if fill {
			err = f.fill(ctx, a, &cs[i], &here[i], n)
			if err != nil {
				err = failedBoth(cause, err)
			}
		}
		if err != nil {
			f.land(accounts[:i], here, nil)
			return err
		}
		if wait == nil {
			accounts[i] = a
			i++
			continue
		}
		f.land(accounts[:i], here, nil)
		i = 0
		select {
		case <-wait:
		case <-ctx.Done():
			return failedBoth(cause, ctx.Err())
		}
	}
	return nil
}

// enter counts a call as flying on the account of a charge. If its share is not live the caller must fill it;
// if somebody else does that, or is in the way of it, nothing is counted and there is something to wait for.
func (f *fallback) enter(c *quota.Charge, cause error) (a *account, fill bool, wait <-chan struct{}, err error) {
	now := f.now()
	b := f.book(c)
	b.mu.Lock()
	defer b.mu.Unlock()
	if a = b.accounts[keyOf(c)]; a == nil {
		if now >= b.blind {
			a = b.open(c, now)
		}
		if a == nil {
			return nil, false, nil, errNoAccount
		}
	}
	if c.Op == quota.OpRefund && c.At <= a.upTo {
		return nil, false, nil, cause // the primary was charged for it
	}
	switch {
	case a.making, !a.live && a.flying > 0:
		if a.wake == nil {
			a.wake = make(chan struct{})
		}
		return nil, false, a.wake, nil
	case !a.live:
		a.making, fill = true, true
	}
	a.flying++
	return a, fill, nil, nil
}

// fill sets the store's bucket to what the account says. The caller is the only one who flies on it.
func (f *fallback) fill(ctx context.Context, a *account, c, here *quota.Charge, n int64) (err error) {
	b := f.book(c)
	capacity := here.Limit.Spec().Capacity
	b.mu.Lock()
	now, used := f.now(), int64(0)
	switch {
	case a.owes():
		used = usedAfter(here.Limit, a.hereUsed, a.hereAt, a.span)
	case a.known:
		whole := c.Limit.Spec().Capacity
		if u := usedAfter(c.Limit, a.used, a.at, now-a.seen); u > 0 {
			used = capacity - min(capacity, floorDiv(whole-u, n))
		}
	}
	b.mu.Unlock()

	var d quota.Decision
	filled := false
	defer func() {
		b.mu.Lock()
		a.making = false
		if filled {
			a.live = true
			a.hereUsed, a.hereAt, a.hereSeen = used, d.At, f.now()
		} else {
			a.flying--
		}
		a.awake()
		b.mu.Unlock()
	}()
	d, err = f.store.Take(ctx, quota.Charge{Limit: here.Limit, Key: here.Key, Op: quota.OpReset})
	if err == nil && used > 0 {
		d, err = f.store.Take(ctx, quota.Charge{Limit: here.Limit, Key: here.Key, Op: quota.OpDebit, Cost: used})
	}
	filled = err == nil
	return err
}

// awake wakes those who wait. The caller holds the lock.
func (a *account) awake() {
	if a.wake != nil {
		close(a.wake)
		a.wake = nil
	}
}

// land ends the flights of a call, and keeps what the store decided; nil where it did not.
func (f *fallback) land(accounts []*account, here []quota.Charge, out []quota.Decision) {
	granted := out != nil && quota.Granted(out)
	for i, a := range accounts {
		b := f.book(&here[i])
		b.mu.Lock()
		a.flying--
		if out != nil {
			a.keep(&here[i], &out[i], granted, f.now())
		}
		if a.flying == 0 {
			a.awake()
		}
		b.mu.Unlock()
	}
}

// keep takes over what the store decided.
func (a *account) keep(c *quota.Charge, d *quota.Decision, granted bool, now time.Duration) {
	// Decisions that overlap may come out of order; the store's clock tells, unless it was set back.
	const back = quota.Micros(time.Second / time.Microsecond)
	if used := d.Limit - d.Remaining; d.At > a.hereAt || d.At < a.hereAt-back || d.At == a.hereAt && used > a.hereUsed || c.Op == quota.OpRefund {
		a.hereUsed, a.hereAt, a.hereSeen = used, d.At, now
		if !a.live {
			a.span = 0
		}
	}
	if !granted || d.Replayed {
		return
	}
	switch c.Op {
	case quota.OpTake, quota.OpDebit:
		a.pending = plus(a.pending, d.Charged)
	case quota.OpRefund:
		a.pending -= min(c.Cost, a.pending-a.claimed)
	}
}

// forgive drops what a key owed when it was reset.
func (f *fallback) forgive(c *quota.Charge, owed int64) {
	b := f.book(c)
	b.mu.Lock()
	defer b.mu.Unlock()
	if a := b.accounts[keyOf(c)]; a != nil {
		a.pending = max(a.pending-owed, a.claimed)
	}
}

// chargedAt returns when, by the primary's clock, it was charged for what was admitted here at a time; 0
// if it never was, or nobody knows.
func (a *account) chargedAt(here quota.Micros) quota.Micros {
	if a == nil {
		return 0
	}
	settled := a.from
	for _, m := range a.marks {
		if here > m.after && here <= m.upTo {
			return m.at
		}
		settled = m.upTo
	}
	if here > settled && a.owes() {
		return a.at // it is being charged just now
	}
	return 0
}

// reconcile charges the primary what the keys of a list owe. Where somebody else is doing that it goes on.
func (f *fallback) reconcile(ctx context.Context, cs []quota.Charge) error {
	var claims []*claim
	defer func() {
		for _, cl := range claims {
			f.release(cl, !cl.maybe)
		}
	}()
	single := f.layer.Atomicity() == driver.OneKey
	for i := range cs {
		if cs[i].Op == quota.OpReset {
			continue
		}
		b := f.book(&cs[i])
		b.mu.Lock()
		a := b.accounts[keyOf(&cs[i])]
		switch {
		case a == nil:
		case a.claim != nil:
			if a.claim.busy.CompareAndSwap(false, true) {
				claims = append(claims, a.claim)
			}
		case a.pending > 0:
			var cl *claim
			for _, other := range claims {
				if !single && !other.maybe && quota.Group(other.charges[0].Key) == quota.Group(a.id.key) {
					cl = other
				}
			}
			if cl == nil {
				cl = &claim{}
				cl.busy.Store(true)
				claims = append(claims, cl)
			}
			cl.charges = append(cl.charges, quota.Charge{Limit: cs[i].Limit, Key: a.id.key, Op: quota.OpDebit, Cost: a.pending})
			cl.accounts = append(cl.accounts, a)
			cl.marks = append(cl.marks, mark{after: a.upTo, upTo: a.hereAt})
			a.claim, a.claimed, a.upTo = cl, a.pending, max(a.upTo, a.hereAt)
		}
		b.mu.Unlock()
	}
	for len(claims) > 0 {
		cl := claims[0]
		if cl.charges[0].ID == "" {
			id := f.ids + strconv.FormatUint(f.lastID.Add(1), 36)
			for i := range cl.charges {
				cl.charges[i].ID = id
			}
		}
		if err := f.settle(ctx, cl); err != nil {
			return err
		}
		claims = claims[1:]
	}
	return nil
}

// settle sends a claim, which stays the caller's if it fails.
func (f *fallback) settle(ctx context.Context, cl *claim) (err error) {
	before := cl.maybe
	cl.maybe = true // until the contrary is known, were it by a panic
	out := make([]quota.Decision, len(cl.charges))
	if len(out) == 1 {
		out[0], err = f.inner.Take(ctx, cl.charges[0])
	} else {
		err = f.inner.TakeAll(ctx, cl.charges, out)
	}
	if err == nil && !byStore(&out[0]) {
		err = quota.ErrUnavailable
	}
	if err != nil {
		// Only an error that says so means "not charged".
		cl.maybe = before || errors.Is(err, quota.ErrIndeterminate) || !classified(err) && !(ofContext(err) && ctx.Err() != nil)
		return err
	}
	now := f.now()
	f.rose(now)
	for i, a := range cl.accounts {
		c := &cl.charges[i]
		b := f.book(c)
		b.mu.Lock()
		a.pending -= c.Cost
		a.claim, a.claimed = nil, 0
		m := cl.marks[i]
		m.at = out[i].At
		if len(a.marks) >= maxMarks {
			a.marks = append(a.marks[:0], a.marks[1:]...)
		}
		a.marks = append(a.marks, m)
		a.learn(&out[i], now, false)
		b.mu.Unlock()
	}
	return nil
}

// release gives a claim up that was not settled: to whoever comes next if it may have been charged, else for
// good.
func (f *fallback) release(cl *claim, drop bool) {
	if drop {
		for i, a := range cl.accounts {
			b := f.book(&cl.charges[i])
			b.mu.Lock()
			a.claim, a.claimed, a.upTo = nil, 0, cl.marks[i].after
			b.mu.Unlock()
		}
	}
	cl.busy.Store(false)
}

// floorDiv returns a/b rounded down, for b > 0.
func floorDiv(a, b int64) int64 {
	q := a / b
	if q*b > a {
		q--
	}
	return q
}
