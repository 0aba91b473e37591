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

// Options are the options of NewCharger and NewLimiter. The zero value, and nil, take the defaults.
type Options struct {
	// LimitFor chooses the limit of a key, by tenant or plan for example, for charges that name none: nil, or a nil result,
	// stands for the limiter's own limit. It is called for each request, concurrently, with a valid key. All limiters of a
	// Charger share it, and it is told the key alone, so limiters that need different ones have chargers of their own. A result that is not valid, see
	// [Limit.Err], is ErrInvalid, and the store is not asked.
	LimitFor func(key string) *Limit
	// Observers are told each call when it is over, in their order, on the caller's goroutine; they may be called
	// concurrently, and must not keep the call, see [Call]. The context is the caller's, and may have ended. Calls that are refused before the store is asked are
	// told too; Close, and a call in which a store panics, are not. Without observers there is no cost.
	Observers []func(ctx context.Context, call *Call)
	// MaxWaiters bounds the calls of Wait, WaitAll and Acquire that wait, over all keys; 0 is 1024.
	MaxWaiters int
	// Notice is told of reservations that could not be finished before their holds lapsed ("unfinished"); nil logs with
	// slog.Error.
	Notice func(Notice)
}

// A Charger has lists of charges decided by a store: it checks them, asks the store, and tells the observers. Each charge must
// name its limit. [NewCharger] makes one, and [Charger.For] makes limiters of single limits that share all that it has. All
// methods may be called concurrently.
//
//	charger, err := quota.NewCharger(store, nil)
//	r, err := charger.ChargeAll(ctx,
//		quota.Charge{Limit: perAgent, Key: "team-7/agent-123", Cost: 250},
//		quota.Charge{Limit: perTeam, Key: "team-7", Cost: 250})
//
// Every method fails with ErrInvalid on an invalid key, an invalid limit or a negative number of tokens, before the store is
// asked. Any other error is the store's, see [Charged].
type Charger struct {
	store      Store
	limitFor   func(string) *Limit
	observer   func(context.Context, *Call) // nil for none
	maxWaiters int
	clock      clocked // nil for the time of the process

	notice      func(Notice)
	corrections corrections
	keeper      keeper

	mu      sync.Mutex
	queues  map[queueID]*queue
	waiting int
	queued  atomic.Int32 // the length of queues, to be read without mu
}

// A Limiter is a [Charger] with a limit of its own, for requests against that. [NewLimiter] makes one. All methods may be
// called concurrently. The errors are those of a Charger.
type Limiter struct {
	*Charger
	limit *Limit
	store Store // the Charger's
	plain bool  // there is no LimitFor
}

// NewCharger returns a charger on a store. A nil store is ErrInvalid.
func NewCharger(store Store, o *Options) (*Charger, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case store == nil:
		return nil, invalid("store", "nil", "a Store, such as local.New()")
	case o.MaxWaiters < 0:
		return nil, invalid("Options.MaxWaiters", o.MaxWaiters, "0 or more")
	}
	for i, observe := range o.Observers {
		if observe == nil {
			return nil, invalid(fmt.Sprintf("Options.Observers[%d]", i), "nil", "a function")
		}
	}
	ch := &Charger{store: store, limitFor: o.LimitFor, observer: compose(slices.Clone(o.Observers)), maxWaiters: o.MaxWaiters, clock: clockOf(store), notice: o.Notice}
	ch.keeper.ch = ch
	if ch.maxWaiters == 0 {
		ch.maxWaiters = 1024
	}
	return ch, nil
}

// NewLimiter returns a limiter of one limit on a store, with a charger of its own. A nil store is ErrInvalid, and so is a limit
// that is not valid, see [Limit.Err].
func NewLimiter(store Store, limit *Limit, o *Options) (*Limiter, error) {
	ch, err := NewCharger(store, o)
	if err != nil {
		return nil, err
	}
	return ch.For(limit)
}

// For returns a limiter of one limit. It shares the store, the options, the waiting callers and the memory of corrections with
// the charger and all of its limiters; closing one of them closes the store of all. A limit that is not valid is ErrInvalid.
func (ch *Charger) For(limit *Limit) (*Limiter, error) {
	if err := limit.Err(); err != nil {
		return nil, err
	}
	return &Limiter{Charger: ch, limit: limit, store: ch.store, plain: ch.limitFor == nil}, nil
}

// Take charges n tokens to the key if they fit. A denial is a decision that is not Allowed; its RetryAfter says when
// the same request would fit. An n of 0 asks whether the key is out of debt; an n above the capacity is denied with
// RetryAfter [Never].
func (l *Limiter) Take(ctx context.Context, key string, n int64) (d Decision, err error) {
	// Most limiters take this path; a charge that is built once and not twice saves them a tenth of a decision, and so does
	// a decision that is not copied once more.
	if l.plain && n >= 0 && validKey(key) {
		c := Charge{Limit: l.limit, Key: key, Cost: n}
		o := l.observe(nil, nil)
		r := receiptFor(&c)
		o.ask()
		d, err = l.store.Charge(ctx, c)
		if err == nil && d.Allowed {
			d.receipt = r
		}
		if o != nil {
			l.overOne(ctx, o, &c, &d, err)
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
	d, err := l.doWithin(ctx, ctx, l.limit, &c)
	if err == nil && d.Allowed {
		return nil
	}
	return denied(&c, d, err)
}

// AllowAll is [Charger.ChargeAll] for callers who check an error and nothing else, see [Limiter.Allow]: nil where the list was
// granted, and where it was denied a [*Denial] of the charge that decided.
func (ch *Charger) AllowAll(ctx context.Context, charges ...Charge) error {
	return ch.allowAll(ctx, nil, charges)
}

// AllowAll is [Charger.AllowAll]; a charge without a limit goes to the limiter's own.
func (l *Limiter) AllowAll(ctx context.Context, charges ...Charge) error {
	return l.allowAll(ctx, l.limit, charges)
}

func (ch *Charger) allowAll(ctx context.Context, own *Limit, charges []Charge) error {
	r, cs, err := ch.list(ctx, own, charges)
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
	return l.doWithin(ctx, longer, l.limit, &c)
}

// Reset makes the key's quota whole, under the limit that it has.
func (l *Limiter) Reset(ctx context.Context, key string) error {
	_, err := l.do(ctx, Charge{Key: key, Op: OpReset})
	return err
}

// ChargeAll decides a list of charges all-or-nothing: several limits on one key, several keys, different costs and
// operations. The same limit and key twice is ErrInvalid, and so are the other lists that [Check] refuses. Of refunds and
// settles in a list the same holds as of [Limiter.Refund]; a list outlives the context if it has nothing else.
func (ch *Charger) ChargeAll(ctx context.Context, charges ...Charge) (Result, error) {
	r, _, err := ch.list(ctx, nil, charges)
	return r, err
}

// ChargeAll is [Charger.ChargeAll]; a charge without a limit goes to the limiter's own.
func (l *Limiter) ChargeAll(ctx context.Context, charges ...Charge) (Result, error) {
	r, _, err := l.list(ctx, l.limit, charges)
	return r, err
}

// list has a list decided, tells the observers, and returns the charges with their limits too. Those without one go to own.
func (ch *Charger) list(ctx context.Context, own *Limit, charges []Charge) (Result, []Charge, error) {
	cs := slices.Clone(charges)
	ds := make([]Decision, len(cs))
	o := ch.observe(cs, ds)
	r, err := ch.doAll(ctx, own, cs, ds, o)
	ch.over(ctx, own, o, err)
	return r, cs, err
}

// doAll fills in the limits, checks, and asks the store.
func (ch *Charger) doAll(ctx context.Context, own *Limit, cs []Charge, ds []Decision, o *observed) (Result, error) {
	if _, err := ch.fillAll(own, cs); err != nil {
		return Result{}, err
	}
	if correctsOnly(cs) {
		var cancel context.CancelFunc
		ctx, cancel = outlive(ctx)
		defer cancel()
	}
	if err := ch.chargeAll(ctx, cs, ds, o); err != nil {
		return Result{}, err
	}
	return Result{Granted: Granted(ds), Decider: Decider(ds), Decisions: ds}, nil
}

// fillAll fills in the limits of a list and checks it. It returns the charges, by their bits, that had no limit.
func (ch *Charger) fillAll(own *Limit, cs []Charge) (unnamed uint64, err error) {
	for i := range cs {
		if cs[i].Limit != nil {
			continue
		}
		if err := CheckKey(cs[i].Key); err != nil {
			return 0, err
		}
		if cs[i].Limit, err = ch.limitOf(own, cs[i].Key); err != nil {
			return 0, err
		}
		unnamed |= 1 << i
	}
	return unnamed, Check(cs)
}

// LimitOf returns the limit of a key: that of Options.LimitFor, or the limiter's own. It fails as Take does, with ErrInvalid.
func (l *Limiter) LimitOf(key string) (*Limit, error) {
	if err := CheckKey(key); err != nil {
		return nil, err
	}
	return l.limitOf(l.limit, key)
}

// Store returns the store, with the policies around it. backend.Health asks the servers behind it for their
// health.
func (ch *Charger) Store() Store { return ch.store }

// Close closes the store. Open reservations are lost before that: nothing renews them, and their holds lapse by themselves. Those
// whose Settle or Release waits to be repeated are tried once more, for a second at most.
func (ch *Charger) Close() error {
	ch.keeper.close()
	return ch.store.Close()
}

// do fills in the limit, checks, asks the store and tells the observers.
func (l *Limiter) do(ctx context.Context, c Charge) (Decision, error) {
	return l.doWithin(ctx, ctx, l.limit, &c)
}

// doWithin decides a charge to own, or to the limit that LimitFor chooses. The store gets the context within; the limit is left
// in c.
func (ch *Charger) doWithin(ctx, within context.Context, own *Limit, c *Charge) (d Decision, err error) {
	o := ch.observe(nil, nil)
	c.Limit = own
	if err = ch.fill(own, c); err == nil {
		d, err = ch.decide(within, c, o)
	}
	if o != nil {
		ch.overOne(ctx, o, c, &d, err)
	}
	return d, err
}

// fill checks a charge and fills in the limit that LimitFor chooses.
func (ch *Charger) fill(own *Limit, c *Charge) error {
	if err := c.check(); err != nil {
		return err
	}
	if ch.limitFor != nil {
		limit, err := ch.limitOf(own, c.Key)
		if err != nil {
			return err
		}
		c.Limit = limit
	}
	return c.checkLimit()
}

// decide has the store decide a charge, unless it corrects a receipt that was corrected before.
func (ch *Charger) decide(ctx context.Context, c *Charge, o *observed) (d Decision, err error) {
	if c.remembered() {
		var ds [1]Decision
		err := ch.chargeAll(ctx, []Charge{*c}, ds[:], o)
		return ds[0], err
	}
	r := receiptFor(c)
	o.ask()
	d, err = ch.store.Charge(ctx, *c)
	if err == nil && d.Allowed {
		d.receipt = r
		if d.Charged < 0 || c.Op == OpSpend {
			ch.gaveBack(c)
		}
	}
	return d, err
}

// chargeAll has the store decide a list, unless it corrects receipts that were corrected before.
func (ch *Charger) chargeAll(ctx context.Context, cs []Charge, ds []Decision, o *observed) (err error) {
	corrects := false
	for i := range cs {
		corrects = corrects || cs[i].remembered()
	}
	if corrects {
		begun, earlier := ch.corrections.begin(cs)
		for earlier != nil {
			again, err := repeated(ctx, cs, earlier, ds)
			if !again {
				return err
			}
			begun, earlier = ch.corrections.begin(cs)
		}
		err = errPanicked
		defer func() { ch.corrections.end(cs, begun, ds, err) }()
	}
	o.ask()
	if err = ch.askStore(ctx, cs, ds); err == nil && Granted(ds) {
		list := uint8(0) // the alternative that was taken
		if len(cs) > 0 && cs[0].Alternative > 0 {
			list = ds[Decider(ds)].Alternative
		}
		for i := range ds {
			if ds[i].Alternative != list {
				continue
			}
			ds[i].receipt = receiptFor(&cs[i])
			if ds[i].Charged < 0 || cs[i].Op == OpSpend {
				ch.gaveBack(&cs[i])
			}
		}
	}
	return err
}

// askStore has the store decide charges.
func (ch *Charger) askStore(ctx context.Context, cs []Charge, ds []Decision) (err error) {
	if len(cs) == 1 {
		ds[0], err = ch.store.Charge(ctx, cs[0])
		return err
	}
	return ch.store.ChargeAll(ctx, cs, ds)
}

// errPanicked is the error of a correction in which the store panicked.
var errPanicked = fmt.Errorf("quota: %w: the store panicked", ErrIndeterminate)

// limitOf returns the limit of a valid key: that of LimitFor, or else own.
func (ch *Charger) limitOf(own *Limit, key string) (*Limit, error) {
	if ch.limitFor != nil {
		if limit := ch.limitFor(key); limit != nil {
			if err := limit.Err(); err != nil {
				return nil, fmt.Errorf("quota: Options.LimitFor chose a limit that is not valid: %w", err)
			}
			return limit, nil
		}
	}
	return own, nil
}
