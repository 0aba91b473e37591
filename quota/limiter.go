package quota

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Options are the options of NewLimiter. The zero value, and nil, take the defaults.
type Options struct {
	// LimitFor chooses the limit of a key, by tenant or plan for example; nil, or a nil result, stands for the
	// limiter's own limit. It is called for each request, concurrently, with a valid key. A result that NewLimit did not
	// make, such as the zero Limit, is ErrInvalid, and the store is not asked.
	LimitFor func(key string) *Limit
	// Observers are told each call when it is over, in their order, on the caller's goroutine; they may be called
	// concurrently, and must not keep the call, see [Call]. The context is the caller's, and may have ended. Calls that are refused before the store is asked are
	// told too; Close, and a call in which a store panics, are not. Without observers there is no cost.
	Observers []func(ctx context.Context, call *Call)
	// MaxWaiters bounds the calls of Wait and WaitAll that wait, over all keys; 0 is 1024.
	MaxWaiters int
}

// A Limiter decides requests against a limit: it checks them, picks the limit, and asks the store. [NewLimiter] makes
// one. All methods may be called concurrently.
//
// Every method fails with ErrInvalid on an invalid key or a negative number of tokens, before the store is asked. Any
// other error is the store's, see [Charged].
type Limiter struct {
	store      Store
	limit      *Limit
	limitFor   func(string) *Limit
	observer   func(context.Context, *Call) // nil for none
	maxWaiters int
	clock      clocked // nil for the time of the process

	corrections corrections

	mu      sync.Mutex
	queues  map[queueID]*queue
	waiting int
	queued  atomic.Int32 // the length of queues, to be read without mu
}

// NewLimiter returns a limiter of one limit on a store. A nil store or limit is ErrInvalid.
func NewLimiter(store Store, limit *Limit, o *Options) (*Limiter, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case store == nil:
		return nil, invalid("store", "nil", "a Store, such as local.New(nil)")
	case limit == nil || limit.algorithm == nil:
		return nil, invalid("limit", "nil", "a limit that NewLimit made")
	case o.MaxWaiters < 0:
		return nil, invalid("Options.MaxWaiters", o.MaxWaiters, "0 or more")
	}
	for i, observe := range o.Observers {
		if observe == nil {
			return nil, invalid(fmt.Sprintf("Options.Observers[%d]", i), "nil", "a function")
		}
	}
	l := &Limiter{store: store, limit: limit, limitFor: o.LimitFor, observer: compose(slices.Clone(o.Observers)), maxWaiters: o.MaxWaiters, clock: clockOf(store)}
	if l.maxWaiters == 0 {
		l.maxWaiters = 1024
	}
	return l, nil
}

// Take charges n tokens to the key if they fit. A denial is a decision that is not Allowed; its RetryAfter says when
// the same request would fit. An n of 0 asks whether the key is out of debt; an n above the capacity is denied with
// RetryAfter [Never].
func (l *Limiter) Take(ctx context.Context, key string, n int64) (d Decision, err error) {
	// Most limiters take this path; a charge that is built once and not twice saves them a tenth of a decision, and so does
	// a decision that is not copied once more.
	if l.limitFor == nil && l.observer == nil && n >= 0 && validKey(key) {
		c := Charge{Limit: l.limit, Key: key, Cost: n}
		r := receiptFor(&c)
		d, err = l.store.Take(ctx, c)
		if err == nil && d.Allowed {
			d.receipt = r
		}
		return d, err
	}
	return l.do(ctx, Charge{Key: key, Cost: n})
}

// Allow is Take for callers who check an error and nothing else: it returns nil where the tokens were taken, and where they
// were denied a [*Denial], which is [ErrDenied]. Any other error is as Take returns it, and is never ErrDenied: a store that
// failed has not denied. Nor has a policy that denies in its place ([FromClosed]): that is ErrUnavailable.
//
//	if err := limiter.Allow(ctx, "team-7/agent-123", 250); err != nil {
//		return err
//	}
//
// Take is for callers who settle or refund: its decision is the receipt.
func (l *Limiter) Allow(ctx context.Context, key string, n int64) error {
	c := Charge{Key: key, Cost: n}
	d, err := l.doWithin(ctx, ctx, &c)
	if err == nil && d.Allowed {
		return nil
	}
	return denied(&c, d, err)
}

// AllowAll is [Limiter.TakeAll] for the same callers: nil where the list was granted, and where it was denied a [*Denial] of
// the charge that decided.
func (l *Limiter) AllowAll(ctx context.Context, charges ...Charge) error {
	r, cs, err := l.list(ctx, charges)
	if err == nil && r.Granted {
		return nil
	}
	if err != nil {
		return denied(nil, Decision{}, err)
	}
	return denied(&cs[r.Decider], r.Decisions[r.Decider], nil)
}

// denied returns the error of a call of Allow that was not granted.
func denied(c *Charge, d Decision, err error) error {
	switch {
	case err == nil && d.Source == FromClosed && d.RetryAfter != Never:
		return fmt.Errorf("quota: %w: a policy denies while the store cannot decide, retry after %v", ErrUnavailable, d.RetryAfter)
	case err == nil:
		return &Denial{Limit: c.Limit, Key: c.Key, Decision: d}
	case errors.Is(err, ErrDenied):
		return fmt.Errorf("quota: %w: the store failed with the error of a denial, which stores must not: %v", ErrIndeterminate, err)
	}
	return err
}

// TakeAhead charges n tokens to the key now, ahead of refill if need be, if they may be used within a time from now, and
// is denied otherwise. The caller must wait for Decision.Delay before it uses them, as x/time/rate's Reserve has it;
// a caller that does not want them any more gives them back by Refund. An n above the capacity is denied with RetryAfter
// [Never]. It fails with ErrInvalid where the limit's rule forgets debt, as windows do, see [Spec].
func (l *Limiter) TakeAhead(ctx context.Context, key string, n int64, within time.Duration) (Decision, error) {
	return l.do(ctx, Charge{Key: key, Cost: n, Op: OpAhead, Within: within})
}

// TakeUpTo charges n tokens to the key, or as many as are left if those are fewer, and is denied where that is less than
// least. Decision.Charged says how much. least is 0 to n: with 0 it may be granted and charge nothing.
func (l *Limiter) TakeUpTo(ctx context.Context, key string, n, least int64) (Decision, error) {
	return l.do(ctx, Charge{Key: key, Cost: n, Op: OpUpTo, Least: least})
}

// Peek answers as Take would, and changes nothing: RetryAfter says when n tokens would fit.
func (l *Limiter) Peek(ctx context.Context, key string, n int64) (Decision, error) {
	return l.do(ctx, Charge{Key: key, Cost: n, Op: OpPeek})
}

// Debit charges n tokens whether they fit or not: for tokens that are already used. The key may go into debt, down to
// Spec.Debt, and is denied until refill has repaid it.
func (l *Limiter) Debit(ctx context.Context, key string, n int64) (Decision, error) {
	return l.do(ctx, Charge{Key: key, Cost: n, Op: OpDebit})
}

// Refund gives n tokens of the receipt d back to the key, n at most d.Charged. The decision's Charged says how much came
// back: a refund to a quota that was whole since, or to a window that has passed, has no effect.
//
// A receipt is good for one Refund or Settle, on its own limit and key; a denial is no receipt. The limiter remembers the
// last [MaxCorrections]: a second one is not made, and gets the answer of the first if it is equal, with Replayed set,
// else ErrInvalid. After ErrIndeterminate it may have been made, and a second one gets the same error; after other errors
// it may be repeated. Two processes can correct one receipt twice, unless the charge had a request id, see [Charge.Refund].
//
// A correction outlives the caller's context, by up to ten seconds, for the tokens were used, or not, all the same.
func (l *Limiter) Refund(ctx context.Context, key string, d Decision, n int64) (Decision, error) {
	return l.correct(ctx, Charge{Key: key}.Refund(d, n))
}

// Settle corrects the receipt d, an estimate that was charged to the key, to the actual cost: it refunds the surplus or
// debits the shortfall. What is said of [Limiter.Refund] holds for it.
func (l *Limiter) Settle(ctx context.Context, key string, d Decision, actual int64) (Decision, error) {
	return l.correct(ctx, Charge{Key: key}.Settle(d, actual))
}

// correct makes a correction, though the context ends.
func (l *Limiter) correct(ctx context.Context, c Charge) (Decision, error) {
	longer, cancel := outlive(ctx)
	defer cancel()
	return l.doWithin(ctx, longer, &c)
}

// Reset makes the key's quota whole, under the limit that it has.
func (l *Limiter) Reset(ctx context.Context, key string) error {
	_, err := l.do(ctx, Charge{Key: key, Op: OpReset})
	return err
}

// TakeAll decides a list of charges all-or-nothing: several limits on one key, several keys, different costs and
// operations. A charge without a limit goes to the limiter's own. The same limit and key twice is ErrInvalid, and so
// are the other lists that [Check] refuses. Of refunds and settles in a list the same holds as of [Limiter.Refund]; a
// list outlives the context if it has nothing else.
func (l *Limiter) TakeAll(ctx context.Context, charges ...Charge) (Result, error) {
	r, _, err := l.list(ctx, charges)
	return r, err
}

// list has a list decided, tells the observers, and returns the charges with their limits too.
func (l *Limiter) list(ctx context.Context, charges []Charge) (Result, []Charge, error) {
	cs := slices.Clone(charges)
	ds := make([]Decision, len(cs))
	if l.observer == nil {
		r, err := l.doAll(ctx, cs, ds, nil)
		return r, cs, err
	}
	o := begin(cs, ds)
	r, err := l.doAll(ctx, cs, ds, o)
	l.over(ctx, o, err)
	return r, cs, err
}

// doAll fills in the limits, checks, and asks the store.
func (l *Limiter) doAll(ctx context.Context, cs []Charge, ds []Decision, o *observed) (Result, error) {
	if _, err := l.fillAll(cs); err != nil {
		return Result{}, err
	}
	if correctsOnly(cs) {
		var cancel context.CancelFunc
		ctx, cancel = outlive(ctx)
		defer cancel()
	}
	if err := l.takeAll(ctx, cs, ds, o); err != nil {
		return Result{}, err
	}
	return Result{Granted: Granted(ds), Decider: Decider(ds), Decisions: ds}, nil
}

// fillAll fills in the limits of a list and checks it. It returns the charges, by their bits, that had no limit.
func (l *Limiter) fillAll(cs []Charge) (own uint64, err error) {
	for i := range cs {
		if cs[i].Limit != nil {
			continue
		}
		if err := CheckKey(cs[i].Key); err != nil {
			return 0, err
		}
		if cs[i].Limit, err = l.limitOf(cs[i].Key); err != nil {
			return 0, err
		}
		own |= 1 << i
	}
	return own, Check(cs)
}

// LimitOf returns the limit of a key: that of Options.LimitFor, or the limiter's own. It fails as Take does, with ErrInvalid.
func (l *Limiter) LimitOf(key string) (*Limit, error) {
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	return l.limitOf(key)
}

// Store returns the limiter's store, with the policies around it. backend.Health asks the servers behind it for their
// health.
func (l *Limiter) Store() Store { return l.store }

// Close closes the store.
func (l *Limiter) Close() error { return l.store.Close() }

// do fills in the limit, checks, asks the store and tells the observers.
func (l *Limiter) do(ctx context.Context, c Charge) (Decision, error) {
	return l.doWithin(ctx, ctx, &c)
}

// doWithin does the same with a context for the store that may differ from the caller's, and leaves the limit in c.
func (l *Limiter) doWithin(ctx, within context.Context, c *Charge) (d Decision, err error) {
	c.Limit = l.limit
	if l.observer == nil {
		if err = l.fill(c); err == nil {
			d, err = l.decide(within, *c, nil)
		}
		return d, err
	}
	o := beginOne(c)
	if err = l.fill(&o.charge[0]); err == nil {
		o.decision[0], err = l.decide(within, o.charge[0], o)
	}
	c.Limit, d = o.charge[0].Limit, o.decision[0]
	l.over(ctx, o, err)
	return d, err
}

// fill checks a charge and fills in the limit that LimitFor chooses.
func (l *Limiter) fill(c *Charge) error {
	if err := c.check(); err != nil {
		return err
	}
	if l.limitFor != nil {
		limit, err := l.limitOf(c.Key)
		if err != nil {
			return err
		}
		c.Limit = limit
	}
	return c.checkLimit()
}

// decide has the store decide a charge, unless it corrects a receipt that was corrected before.
func (l *Limiter) decide(ctx context.Context, c Charge, o *observed) (Decision, error) {
	if c.remembered() {
		var ds [1]Decision
		err := l.takeAll(ctx, []Charge{c}, ds[:], o)
		return ds[0], err
	}
	r := receiptFor(&c)
	o.ask()
	d, err := l.store.Take(ctx, c)
	if err == nil && d.Allowed {
		d.receipt = r
		if d.Charged < 0 {
			l.gaveBack(&c)
		}
	}
	return d, err
}

// takeAll has the store decide a list, unless it corrects receipts that were corrected before.
func (l *Limiter) takeAll(ctx context.Context, cs []Charge, ds []Decision, o *observed) (err error) {
	corrects := false
	for i := range cs {
		corrects = corrects || cs[i].remembered()
	}
	if corrects {
		begun, earlier := l.corrections.begin(cs)
		for earlier != nil {
			again, err := repeated(ctx, cs, earlier, ds)
			if !again {
				return err
			}
			begun, earlier = l.corrections.begin(cs)
		}
		err = errPanicked
		defer func() { l.corrections.end(cs, begun, ds, err) }()
	}
	o.ask()
	if err = l.askStore(ctx, cs, ds); err == nil && Granted(ds) {
		list := uint8(0) // the alternative that was taken
		if len(cs) > 0 && cs[0].Alternative > 0 {
			list = ds[Decider(ds)].Alternative
		}
		for i := range ds {
			if ds[i].Alternative != list {
				continue
			}
			ds[i].receipt = receiptFor(&cs[i])
			if ds[i].Charged < 0 {
				l.gaveBack(&cs[i])
			}
		}
	}
	return err
}

// askStore has the store decide charges.
func (l *Limiter) askStore(ctx context.Context, cs []Charge, ds []Decision) (err error) {
	if len(cs) == 1 {
		ds[0], err = l.store.Take(ctx, cs[0])
		return err
	}
	return l.store.TakeAll(ctx, cs, ds)
}

// errPanicked is the error of a correction in which the store panicked.
var errPanicked = fmt.Errorf("quota: %w: the store panicked", ErrIndeterminate)

// limitOf returns the limit of a valid key.
func (l *Limiter) limitOf(key string) (*Limit, error) {
	if l.limitFor != nil {
		if limit := l.limitFor(key); limit != nil {
			if limit.algorithm == nil {
				return nil, invalid("the limit that Options.LimitFor chose", "the zero Limit", "nil, or a limit that NewLimit made")
			}
			return limit, nil
		}
	}
	return l.limit, nil
}
