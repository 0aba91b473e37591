package resilience

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"math/rand/v2"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// DefaultFallbackKeys is FallbackOptions.MaxKeys unless options say otherwise.
const DefaultFallbackKeys = 1 << 17

// FallbackOptions change what [Fallback] makes. The zero value, and nil, take the defaults.
type FallbackOptions struct {
	// MaxKeys bounds the limits and keys that account is kept of, rounded up to a multiple of 64; 0 is
	// DefaultFallbackKeys. An account takes some 250 bytes beside the key's own text.
	MaxKeys int
	// Notice is told, as "fallback", that decisions are made on this instance's share, and that they are
	// the store's again: the former at once, the latter when the store has answered everything for some
	// seconds. And as "misconfigured", at most once a minute, of a store that is. nil is nobody.
	Notice func(quota.Notice)
}

// Instances is the number of instances of a fleet that does not change, for [Fallback].
func Instances(n int64) func() int64 { return func() int64 { return n } }

// Fallback returns the policy that decisions the primary, which is everything inside, cannot make are made
// by another store, on this instance's share of the limit: one n-th, where instances reports n, the number
// of instances now. The store is usually a local.New(nil), and is the policy's own, for one primary: Close closes both.
//
// That is where the primary fails with quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrOverloaded
// (of a bulkhead, a pool or the store: who cannot be asked in time cannot be asked) or an error that the
// contract does not know, and the caller's own context has not ended. All other errors pass. The
// decisions are [quota.FromFallback]; their Limit, Remaining and times are those of the share. A cost
// above the share is denied, with a RetryAfter that is a guess where the whole limit could admit it.
//
// # What is kept
//
// For each limit and key the policy keeps what the primary last said, and what was admitted here and not
// yet charged there. So
//
//   - the share is warm: when a key is first decided here it has one n-th of what the primary had left for it,
//     refill since then counted in: an exhausted key stays exhausted. From then on it refills at the
//     share's rate, until the primary serves the key again;
//   - what is admitted here is charged to the primary in front of the key's next call that reaches it,
//     exactly once, into debt if need be (Spec.Debt says how far). Such a call makes two requests, within one
//     timeout of the [Timeout] inside; if the outcome of the first is unknown, the key's next call
//     repeats it under the same id. A repeat that comes more than quota.IDWindow after the first may charge
//     twice, and so deny too much. Other calls of the key do not wait for it. A list pays for all its keys,
//     those of one group in one request;
//   - until that is done the key gets no fresh share: if the primary fails again it goes on with what it had
//     left, in whole tokens, without refill for the time in between.
//
// An account is dropped when nothing is owed and the quota is whole by what the primary said. When MaxKeys
// are kept that cannot be dropped, keys without an account are denied here; as are, for as long as they might be
// exhausted, keys that were left out then and others that share their fate by hash.
//
// # The bound
//
// Of one limit and key, a token bucket of capacity B and rate r, the fleet admits in a time T at most
//
//	B + r·T + Σ(b_i + r_i·T_i) + (B + Σ b_i) per loss of the primary's state + b_i per restart of instance i
//
// however often the primary comes and goes, where b_i and r_i are the share of instance i, the largest if it
// changes, and T_i the time in which i serves the key in the primary's place: from a decision made here until
// the primary next answers i for that key, and one tick of the rule each time. It holds where instances never
// report fewer than there are, where B is at least their number, and while debt stays above Spec.Debt.
//
// The argument. Every token admitted is charged to the primary, or owed. Let t be the last time at which the
// primary's deficit was B or less: it charged up to t at most B + r·t. Later it admits nothing, so what
// it is charged after t, and what is owed at the end, was admitted by the instances. Of instance i that
// is whole episodes, an episode being the time between two reconciliations, in which the share is
// never raised but by refill, r_i times its part of T_i. In the first that is charged after t the share
// began with at most b_i. Each later one begins with what the primary said after the reconciliation before, so
// after t, when nothing was left: with one n-th of the refill that the primary had from then on. These times
// do not overlap for one instance, so all n of them together get at most r·(T-t) of it, which is the rest of r·T.
//
// A loss of state begins this anew: with the consumption, up to B, the primary forgets the debt by which
// shares of before were paid for, up to Σ b_i of it unrepaid; hot keys, of whose quota nothing is left when the
// primary fails, have none. A restarted instance is another one.
//
// # Operations
//
// Takes and debits are admitted as the share's rule says; debits count as admitted. A refund of a
// receipt that is FromFallback lowers what is owed; once that was charged, the refund goes to the primary, as
// of the time of that charge. During an outage a refund that belongs to the primary, of a receipt FromStore or of
// one that was charged since, fails with the primary's error, and so does a reset: nothing has changed
// then, and where that error is not ErrIndeterminate it may be repeated later. A reset that the primary
// did forgives what is owed, too.
//
// A request id is passed to the store that decides. So it is exactly-once on either side; an id that both
// see, one after the other, is charged by both.
//
// Wrap refuses a nil store, nil instances or fewer than one, and negative MaxKeys. A limit whose
// algorithm is no [driver.Sharer], or has no share of that size, is quota.ErrInvalid on every call.
func Fallback(store quota.Store, instances func() int64, o *FallbackOptions) Policy {
	if o == nil {
		o = &FallbackOptions{}
	}
	return fallbackPolicy{store, instances, *o}
}

type fallbackPolicy struct {
	store     quota.Store
	instances func() int64
	o         FallbackOptions
}

func (fallbackPolicy) kind() kind    { return kindFallback }
func (p fallbackPolicy) tells() bool { return p.o.Notice != nil }

func (p fallbackPolicy) wrap(inner quota.Store, at place) (quota.Store, error) {
	switch {
	case p.store == nil:
		return nil, invalid("the fallback's store is nil", "a store, such as local.New(nil)")
	case p.instances == nil:
		return nil, invalid("the number of instances is nil", "a function that reports it, such as Instances(n)")
	case p.o.MaxKeys < 0:
		return nil, invalid(fmt.Sprintf("FallbackOptions.MaxKeys is %d", p.o.MaxKeys), "0 or more")
	case p.o.MaxKeys == 0:
		p.o.MaxKeys = DefaultFallbackKeys
	}
	n := p.instances()
	if n < 1 {
		return nil, invalid(fmt.Sprintf("the number of instances is %d", n), "1 or more")
	}
	f := &fallback{
		layer: layer{inner: inner, of: kindFallback}, store: p.store, count: p.instances, base: time.Now(), seed: maphash.MakeSeed(),
		ids: "fallback-" + strconv.FormatUint(rand.Uint64(), 36) + strconv.FormatUint(rand.Uint64(), 36) + "-",
	}
	f.lastCount.Store(n)
	f.budget = attemptBound(inner)
	f.notes.tell = p.o.Notice
	f.alarm = alarm{notifier: &f.notes, loud: at.loud, base: f.base}
	for i := range f.books {
		f.books[i].accounts = make(map[memoryKey]*account)
		f.books[i].most = (p.o.MaxKeys + books - 1) / books
	}
	return f, nil
}

// attemptBound returns the time in which a store decides, or 0 if it sets itself none.
func attemptBound(s quota.Store) time.Duration {
	for ; s != nil; s = unwrap(s) {
		if l, ok := s.(interface{ layerKind() kind }); ok && l.layerKind() == kindRetry {
			return 0
		}
		if b, ok := s.(interface{ bound() time.Duration }); ok {
			return b.bound()
		}
	}
	return 0
}

type fallback struct {
	layer
	store     quota.Store
	count     func() int64
	lastCount atomic.Int64 // the latest count that was at least 1
	base      time.Time
	seed      maphash.Seed
	budget    time.Duration // for a call and the reconciliation in front of it; 0: each has its own
	notes     notifier
	alarm     alarm
	shares    shares

	ids    string // what the ids of reconciliations begin with
	lastID atomic.Uint64

	degraded atomic.Bool
	lastFell atomic.Int64 // since base
	decided  atomic.Int64 // decisions made here since degraded

	books [books]book
}

// Atomicity is the weaker of the two stores'.
func (f *fallback) Atomicity() driver.Atomicity {
	if g, ok := find[driver.Graded](f.store); ok {
		return max(g.Atomicity(), f.layer.Atomicity())
	}
	return f.layer.Atomicity()
}

// Prompt says whether both stores return by their context's deadline.
func (f *fallback) Prompt() bool { return prompt(f.inner) && prompt(f.store) }

// Close closes both stores.
func (f *fallback) Close() error { return errors.Join(f.layer.Close(), f.store.Close()) }

func (f *fallback) now() time.Duration { return time.Since(f.base) }

func (f *fallback) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if err := f.sharable(c.Limit); err != nil {
		return quota.Decision{}, err
	}
	known, owes := f.look(&c)
	if owes || corrects(&c) {
		return f.one(c, func(cs []quota.Charge, out []quota.Decision) error { return f.pay(ctx, cs, out) })
	}
	d, err := f.inner.Take(ctx, c)
	if err == nil {
		f.served(&c, &d, known)
		return d, nil
	}
	if !f.falls(ctx, err) {
		return d, err
	}
	return f.one(c, func(cs []quota.Charge, out []quota.Decision) error { return f.decide(ctx, cs, out, err) })
}

// one makes a list of a charge. What it allocates is kept off the path of a healthy primary.
func (f *fallback) one(c quota.Charge, do func([]quota.Charge, []quota.Decision) error) (quota.Decision, error) {
	out := make([]quota.Decision, 1)
	err := do([]quota.Charge{c}, out)
	return out[0], err
}

func (f *fallback) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var few [8]seen
	known := few[:0]
	for i := range cs {
		if err := f.sharable(cs[i].Limit); err != nil {
			return err
		}
		one, owes := f.look(&cs[i])
		if owes || corrects(&cs[i]) {
			return f.pay(ctx, cs, out)
		}
		known = append(known, one)
	}
	if err := f.inner.TakeAll(ctx, cs, out); err != nil {
		if f.falls(ctx, err) {
			return f.decide(ctx, cs, out, err)
		}
		return err
	}
	for i := range cs {
		f.served(&cs[i], &out[i], known[i])
	}
	return nil
}

// corrects reports whether a charge may change what is owed.
func corrects(c *quota.Charge) bool {
	return c.Op == quota.OpReset || c.Op == quota.OpRefund && c.From == quota.FromFallback
}

// seen is what the book had on a key when the primary was asked.
type seen struct {
	book    *book
	account *account // or nil
	version uint32
}

// falls reports whether a call that the primary failed is decided here.
func (f *fallback) falls(ctx context.Context, err error) bool {
	if !ended(ctx) && (errors.Is(err, ErrRejected) || judge(ctx, err) == failed) {
		return true
	}
	f.alarm.see(err)
	return false
}

// pay asks the primary after charging it what the keys owe.
func (f *fallback) pay(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	within := ctx
	if f.budget > 0 {
		d := &deadline{Context: ctx, at: time.Now().Add(f.budget)}
		if own, ok := ctx.Deadline(); !ok || d.at.Before(own) {
			defer d.release()
			within = d
		}
	}
	if err := f.reconcile(within, cs); err != nil {
		if f.falls(ctx, err) {
			return f.decide(ctx, cs, out, err)
		}
		if ctx.Err() != nil {
			return ctx.Err() // the call itself was not sent
		}
		// What the primary has against the debit it has against the call, or the call is none of its concern.
	}
	known := make([]seen, len(cs))
	owed := make([]int64, len(cs))
	sent := append([]quota.Charge(nil), cs...)
	for i := range sent {
		c := &sent[i]
		b := f.book(c)
		b.mu.Lock()
		a := b.accounts[keyOf(c)]
		known[i] = seen{book: b}
		if a != nil {
			known[i] = seen{b, a, a.version}
			owed[i] = a.pending
		}
		if c.Op == quota.OpRefund && c.From == quota.FromFallback {
			c.At, c.From = a.chargedAt(c.At), quota.FromStore
			if c.At == 0 {
				c.Cost = 0 // the primary was never charged, or so long ago that nobody knows
			}
		}
		b.mu.Unlock()
	}
	var err error
	if len(sent) == 1 {
		out[0], err = f.inner.Take(within, sent[0])
	} else {
		err = f.inner.TakeAll(within, sent, out)
	}
	if err != nil {
		if f.falls(ctx, err) {
			return f.decide(ctx, cs, out, err)
		}
		return err
	}
	granted := quota.Granted(out)
	for i := range sent {
		if granted && sent[i].Op == quota.OpReset && byStore(&out[i]) {
			f.forgive(&sent[i], owed[i])
		}
		f.served(&sent[i], &out[i], known[i])
	}
	return nil
}

// decide makes the decisions that the primary failed to, because of cause.
func (f *fallback) decide(ctx context.Context, cs []quota.Charge, out []quota.Decision, cause error) error {
	n := f.instances()
	here := append([]quota.Charge(nil), cs...)
	gives := false
	for i := range cs {
		switch {
		case cs[i].Op == quota.OpReset, cs[i].Op == quota.OpRefund && cs[i].From != quota.FromFallback:
			return cause
		case cs[i].Op == quota.OpRefund, cs[i].Op == quota.OpDebit:
			gives = true
		}
		share, err := f.shares.of(cs[i].Limit, n)
		if err != nil {
			return err
		}
		here[i].Limit = share
	}
	f.fell(cause)
	accounts := make([]*account, len(cs))
	if err := f.board(ctx, cs, here, accounts, n, cause); err != nil {
		if err != errNoAccount {
			return err
		}
		if gives {
			return fmt.Errorf("resilience: %w: the fallback has no room for the account of a key: %w", quota.ErrOverloaded, cause)
		}
		for i := range here {
			out[i] = quota.Decision{
				Source: quota.FromFallback, Limit: here[i].Limit.Spec().Capacity, RetryAfter: DefaultRetryAfter, ResetAfter: DefaultRetryAfter,
			}
		}
		return nil
	}
	// Whatever the store does, a panic included, nobody must wait for this call for ever.
	landed := false
	defer func() {
		if !landed {
			f.land(accounts, here, nil)
		}
	}()
	var err error
	if len(here) == 1 {
		out[0], err = f.store.Take(ctx, here[0])
	} else {
		err = f.store.TakeAll(ctx, here, out)
	}
	if err != nil {
		return failedBoth(cause, err)
	}
	landed = true
	f.land(accounts, here, out)
	for i := range out {
		d := &out[i]
		d.Source = quota.FromFallback
		if d.RetryAfter == quota.Never && here[i].Cost <= cs[i].Limit.Spec().Capacity {
			d.RetryAfter = max(d.ResetAfter, DefaultRetryAfter)
		}
	}
	return nil
}

// failedBoth returns the error of a call that neither store decided. It must not be taken for one that
// says "not charged" if one of them says that this is unknown.
func failedBoth(cause, err error) error {
	if errors.Is(err, quota.ErrIndeterminate) && !errors.Is(cause, quota.ErrIndeterminate) {
		return fmt.Errorf("resilience: %w; before that the store failed: %v", err, cause)
	}
	if errors.Is(cause, quota.ErrIndeterminate) {
		return fmt.Errorf("resilience: %w; the fallback failed too: %v", cause, err)
	}
	return fmt.Errorf("resilience: %w; the fallback failed too: %w", cause, err)
}

// byStore reports whether the primary, and no policy inside, made a decision.
func byStore(d *quota.Decision) bool {
	return d.Source == quota.FromStore || d.Source == quota.FromLease
}

// instances returns the number of instances now.
func (f *fallback) instances() int64 {
	n := f.count()
	if n < 1 {
		return f.lastCount.Load()
	}
	f.lastCount.Store(n)
	return n
}

// settled is how long the primary must have answered everything before it counts as well again.
const settled = 5 * time.Second

// fell notes that a decision is made here.
func (f *fallback) fell(cause error) {
	f.lastFell.Store(int64(f.now()))
	f.decided.Add(1)
	if !f.degraded.Load() && !f.degraded.Swap(true) {
		f.notes.send("fallback", "began: the store cannot decide; this instance decides on its share of the limits", cause)
	}
}

// rose notes that the primary made a decision.
func (f *fallback) rose(now time.Duration) {
	if f.degraded.Load() && now-time.Duration(f.lastFell.Load()) >= settled && f.degraded.Swap(false) {
		f.notes.send("fallback", fmt.Sprintf("ended: the store decides again; %d calls were decided on this instance's share", f.decided.Swap(0)), nil)
	}
}

// plus returns the sum of two counts or spans of at least 0, or the largest there is.
func plus[T ~int64](a, b T) T {
	if b > math.MaxInt64-a {
		return math.MaxInt64
	}
	return a + b
}
