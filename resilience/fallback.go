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

const maxFallbackKeys = 1 << 30

// DefaultCloseWithin is FallbackOptions.CloseWithin unless options say otherwise.
const DefaultCloseWithin = 2 * time.Second

// FallbackOptions change the policy that [Fallback] makes. The zero value, and nil, take the defaults.
type FallbackOptions struct {
	// MaxKeys bounds the keys whose state is kept, each limit of a key counted by itself, and is rounded up
	// to a multiple of 64; up to 2^30, 0 is DefaultFallbackKeys. A state takes some 250 bytes beside the key's own
	// text. Where there is no room, keys that have used up to half of their limit are forgotten, those with the
	// least use first: in an outage they get the share of a new key. If all keys owe quota or have used more, the
	// instance denies the other keys in an outage.
	MaxKeys int
	// CloseWithin bounds the time in which Close charges the primary the quota that was admitted here. 0 is
	// DefaultCloseWithin; with a negative one Close drops that quota. A store inside that neither is prompt
	// nor has a Timeout may use the rest of a call longer.
	CloseWithin time.Duration
	// AtLeastOne makes a share at least one token. Without it the share of a limit below the number of instances is
	// 0, so that shares never add up to more than the limit, and the instance denies all that costs a token. With it
	// the shares of such a limit add up to one token an instance, though not to more than the limit's rate.
	AtLeastOne bool
	// Notice receives "fallback" when decisions are made on this instance's share, at once, when they are the
	// store's again, after it has answered every call for some seconds, and when Close dropped quota that the
	// primary could not be charged; "share", once for each name of a limit, if this instance's share of it is
	// 0; "keys", once in each outage, when a key is denied because MaxKeys leaves no room for it, and once in all
	// when a key that had used quota was forgotten; and "misconfigured", at most once a minute, if the store is
	// misconfigured. It may be nil.
	Notice func(quota.Notice)
}

// Instances returns a function for [Fallback] that reports n, the size of a fleet that does not change.
func Instances(n int64) func() int64 { return func() int64 { return n } }

// Fallback returns the policy that, where the store and the policies inside (the primary) cannot decide,
// another store decides on this instance's share of the limit: one n-th, rounded down, where instances
// reports n, the number of instances now. A share of 0 denies. The other store is usually a local.New()
// and must serve this policy alone.
//
// A key begins with one n-th of the quota that the primary had left for it. Quota admitted here is charged to
// the primary exactly once, in front of the key's next call that reaches it, into debt if need be; before
// that the key gets no fresh share. Close charges the rest, unless the primary is down. So of a token bucket of B
// tokens, r more each second, the fleet admits in T seconds at most
//
//	B + r·T + Σ(b_i + r_i·T_i) + (B + Σ b_i) per loss of the primary's state + b_i per restart of instance i
//
// tokens, where b_i and r_i are the share of instance i, and T_i the seconds in which it decides in the
// primary's place. Σ b_i is at most B, or, where FallbackOptions.AtLeastOne makes shares one token each, the number
// of instances. instances must not report fewer than there are.
// docs/design/fallback.md has the proof, the other conditions, and the rules for refunds, resets and request
// ids.
//
// It decides where the primary fails with quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrOverloaded
// or an error that the contract does not know, while the caller's own context has not ended. All other errors
// pass. Its decisions are [quota.FromFallback]; their Capacity, Remaining and times are those of the share. A
// cost above the share is denied, with a RetryAfter that is a guess if the whole limit could admit it.
//
// Tokens are held on the share, see [quota.OpHold]. A hold that was made here is renewed and spent here, also when the primary decides
// again, and by this instance alone; [quota.FromFallback] decides it. The primary holds as many tokens from the key's next call on,
// until they are spent here or lapse, or for a TTL if this instance ends before: where its rule is algorithm.Concurrency always,
// else where they fit, and what is really used is charged in any case. So callers of a fleet hold at most B + Σ b_i at a time, and B
// once all instances have called. A list with such a hold beside charges that the primary may deny is quota.ErrCrossSlot. A hold of
// the primary cannot be spent or renewed here: the primary's error passes.
//
// Close waits for the debits of all keys that owe quota, for FallbackOptions.CloseWithin at most, and then
// closes both stores.
//
// Wrap refuses a nil store, nil instances or fewer than one, and negative MaxKeys. A limit whose algorithm is
// no [driver.Sharer], or has no share of that size, is quota.ErrInvalid on every call.
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

func (fallbackPolicy) kind() kind      { return kindFallback }
func (p fallbackPolicy) reports() bool { return p.o.Notice != nil }

func (p fallbackPolicy) wrap(inner quota.Store, alarms bool) (quota.Store, error) {
	switch {
	case p.store == nil:
		return nil, invalid("the fallback's store is nil", "a store, such as local.New()")
	case p.instances == nil:
		return nil, invalid("the number of instances is nil", "a function that reports it, such as Instances(n)")
	case p.o.MaxKeys < 0 || p.o.MaxKeys > maxFallbackKeys:
		return nil, invalid(fmt.Sprintf("FallbackOptions.MaxKeys is %d", p.o.MaxKeys), "0 to 2^30")
	case p.o.MaxKeys == 0:
		p.o.MaxKeys = DefaultFallbackKeys
	}
	if p.o.CloseWithin == 0 {
		p.o.CloseWithin = DefaultCloseWithin
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
	f.closeWithin = p.o.CloseWithin
	f.limits.least = p.o.AtLeastOne
	f.limits.zero = f.shareIsZero
	f.budget = timeoutOf(inner)
	f.notes.tell = p.o.Notice
	f.alarm = alarm{notifier: &f.notes, on: alarms, base: f.base}
	for i := range f.tables {
		f.tables[i].keys = make(map[limitKey]*keyState)
		f.tables[i].most = (p.o.MaxKeys + keyTables - 1) / keyTables
	}
	return f, nil
}

// timeoutOf returns the time that the timeout in a store gives each decision, or 0 if there is no timeout or
// if a retry makes several attempts under it.
func timeoutOf(s quota.Store) time.Duration {
	for l, ok := layerIn(s); ok; l, ok = layerIn(l.Unwrap()) {
		if l.layerKind() == kindRetry {
			return 0
		}
		if b, ok := l.(bounded); ok {
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
	budget    time.Duration // of a call and the reconciliation in front of it; 0: each has its own
	notes     notifier
	alarm     alarm
	limits    shareLimits

	closeWithin time.Duration // below 0: Close drops the debts

	ids    string // the prefix of the reconciliations' request ids
	lastID atomic.Uint64

	degraded atomic.Bool
	lastHere atomic.Int64 // time since base of the latest decision made here
	decided  atomic.Int64 // decisions made here since degraded
	answered atomic.Int64 // calls that were decided here

	toldFull, toldForgotten atomic.Bool // the former since degraded

	tables [keyTables]keyTable
}

// Atomicity returns the weaker of the two stores' atomicities.
func (f *fallback) Atomicity() driver.Atomicity {
	return max(f.layer.Atomicity(), driver.AtomicityOf(f.store))
}

// Prompt reports whether both stores return by their context's deadline.
func (f *fallback) Prompt() bool { return f.layer.Prompt() && driver.IsPrompt(f.store) }

func (f *fallback) now() time.Duration { return time.Since(f.base) }

func (f *fallback) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if err := f.sharable(c.Limit); err != nil {
		return quota.Decision{}, err
	}
	before := f.snapshot(&c)
	if before.unpaid || corrects(&c) {
		return f.one(c, func(cs []quota.Charge, out []quota.Decision) error { return f.reconcileAndTake(ctx, cs, out) })
	}
	d, err := f.inner.Charge(ctx, c)
	if err == nil {
		f.record(&c, &d, before, false)
		return d, nil
	}
	if !f.takesOver(ctx, err) {
		return d, err
	}
	return f.one(c, func(cs []quota.Charge, out []quota.Decision) error { return f.decide(ctx, cs, out, err) })
}

// one makes a list of a charge. Its allocations are kept off the path of a healthy primary.
func (f *fallback) one(c quota.Charge, do func([]quota.Charge, []quota.Decision) error) (quota.Decision, error) {
	out := make([]quota.Decision, 1)
	err := do([]quota.Charge{c}, out)
	return out[0], err
}

func (f *fallback) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	var few [8]snapshot
	before := few[:0]
	for i := range cs {
		if err := f.sharable(cs[i].Limit); err != nil {
			return err
		}
		s := f.snapshot(&cs[i])
		if s.unpaid || corrects(&cs[i]) {
			return f.reconcileAndTake(ctx, cs, out)
		}
		before = append(before, s)
	}
	if err := f.inner.ChargeAll(ctx, cs, out); err != nil {
		if f.takesOver(ctx, err) {
			return f.decide(ctx, cs, out, err)
		}
		return err
	}
	for i := range cs {
		f.record(&cs[i], &out[i], before[i], false)
	}
	return nil
}

// takesOver reports whether a call for which the primary failed is decided here.
func (f *fallback) takesOver(ctx context.Context, err error) bool {
	if !ended(ctx) && (errors.Is(err, ErrRejected) || isGettingReady(err) || judge(ctx, err) == failed) {
		return true
	}
	f.alarm.check(err)
	return false
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

// recoveryTime is how long the primary must have answered every call before it counts as well again.
const recoveryTime = 5 * time.Second

// degrade notes that a decision is made here.
func (f *fallback) degrade(cause error) {
	f.lastHere.Store(int64(f.now()))
	f.decided.Add(1)
	if !f.degraded.Load() && !f.degraded.Swap(true) {
		f.notes.send("fallback", "began: the store cannot decide; this instance decides on its share of the limits", cause)
	}
}

// tellFull notes that a key is denied because its state has no room.
func (f *fallback) tellFull() {
	if !f.toldFull.Load() && !f.toldFull.Swap(true) {
		f.notes.send("keys", fmt.Sprintf("FallbackOptions.MaxKeys is %d: while the store cannot decide, this instance denies further keys, because the keys "+
			"that it keeps owe quota or have used much of it; accepted: more than the keys in use", f.maxKeys()), nil)
	}
}

// tellForgotten notes that keys that had used quota are forgotten, if the table forgot one. The caller holds its lock.
func (f *fallback) tellForgotten(t *keyTable) {
	if !t.forgot {
		return
	}
	if t.forgot = false; !f.toldForgotten.Load() && !f.toldForgotten.Swap(true) {
		f.notes.send("keys", fmt.Sprintf("FallbackOptions.MaxKeys is %d and more keys are in use: those with the least use are forgotten, and get the share "+
			"of a new key while the store cannot decide; accepted: more than the keys in use", f.maxKeys()), nil)
	}
}

// maxKeys returns how many keys have room.
func (f *fallback) maxKeys() int { return keyTables * f.tables[0].most }

// shareIsZero notes that this instance's share of a limit is 0.
func (f *fallback) shareIsZero(l *quota.Limit, n int64) {
	f.notes.send("share", fmt.Sprintf("limit %s has a capacity of %d, which is less than one token for each of %d instances: "+
		"while the store cannot decide, this instance denies", l.Name(), l.Spec().Capacity, n), nil)
}

// recovered notes that the primary made a decision.
func (f *fallback) recovered(now time.Duration) {
	if f.degraded.Load() && now-time.Duration(f.lastHere.Load()) >= recoveryTime && f.degraded.Swap(false) {
		f.toldFull.Store(false)
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
