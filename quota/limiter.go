package quota

import (
	"context"
	"fmt"
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
	// Observer is called after each decision and error, on the caller's goroutine; it may be called concurrently. It
	// is not called for a request that was refused before the store was asked. Without an observer there is no cost.
	Observer func(Event)
	// MaxWaiters bounds the calls of Wait that wait, over all keys; 0 is 1024.
	MaxWaiters int
}

// Event is one charge and its answer, as an Observer gets it.
type Event struct {
	Limit, Key string
	Op         Op
	Cost       int64
	Decision   Decision      // without meaning if Err is not nil
	Err        error         // the error that the call returned
	Took       time.Duration // the time of the whole call, without waiting for quota
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
	observer   func(Event)
	maxWaiters int

	corrections corrections

	mu      sync.Mutex
	queues  map[string]*queue // by key
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
	l := &Limiter{store: store, limit: limit, limitFor: o.LimitFor, observer: o.Observer, maxWaiters: o.MaxWaiters}
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
		d, err = l.store.Take(ctx, c)
		if err == nil && d.Allowed {
			d.receipt = receiptFor(&c)
		}
		return d, err
	}
	return l.do(ctx, Charge{Key: key, Cost: n})
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
	ctx, cancel := outlive(ctx)
	defer cancel()
	return l.do(ctx, c)
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
	cs := make([]Charge, len(charges))
	copy(cs, charges)
	for i := range cs {
		if cs[i].Limit != nil {
			continue
		}
		if err := CheckKey(cs[i].Key); err != nil {
			return Result{}, err
		}
		var err error
		if cs[i].Limit, err = l.limitOf(cs[i].Key); err != nil {
			return Result{}, err
		}
	}
	if err := Check(cs); err != nil {
		return Result{}, err
	}
	if correctsOnly(cs) {
		var cancel context.CancelFunc
		ctx, cancel = outlive(ctx)
		defer cancel()
	}
	ds := make([]Decision, len(cs))
	start := l.clock()
	err := l.takeAll(ctx, cs, ds)
	if l.observer != nil {
		took := time.Since(start)
		for i := range cs {
			l.observe(&cs[i], ds[i], err, took)
		}
	}
	if err != nil {
		return Result{}, err
	}
	return Result{Granted: Granted(ds), Decider: Decider(ds), Decisions: ds}, nil
}

// Store returns the limiter's store, with the policies around it. backend.Health asks the servers behind it for their
// health.
func (l *Limiter) Store() Store { return l.store }

// Close closes the store.
func (l *Limiter) Close() error { return l.store.Close() }

// do fills in the limit, checks, asks the store and tells the observer.
func (l *Limiter) do(ctx context.Context, c Charge) (d Decision, err error) {
	c.Limit = l.limit
	if err := c.check(); err != nil {
		return Decision{}, err
	}
	if l.limitFor != nil {
		if c.Limit, err = l.limitOf(c.Key); err != nil {
			return Decision{}, err
		}
	}
	if err := c.checkLimit(); err != nil {
		return Decision{}, err
	}
	return l.tell(ctx, c)
}

// tell has a charge decided that is whole and valid, and tells the observer.
func (l *Limiter) tell(ctx context.Context, c Charge) (Decision, error) {
	if l.observer == nil {
		return l.decide(ctx, c)
	}
	start := time.Now()
	d, err := l.decide(ctx, c)
	l.observe(&c, d, err, time.Since(start))
	return d, err
}

// decide has the store decide a charge, unless it corrects a receipt that was corrected before.
func (l *Limiter) decide(ctx context.Context, c Charge) (Decision, error) {
	if c.remembered() {
		var ds [1]Decision
		err := l.takeAll(ctx, []Charge{c}, ds[:])
		return ds[0], err
	}
	d, err := l.store.Take(ctx, c)
	if err == nil && d.Allowed {
		d.receipt = receiptFor(&c)
		if d.Charged < 0 {
			l.gaveBack(c.Key)
		}
	}
	return d, err
}

// takeAll has the store decide a list, unless it corrects receipts that were corrected before.
func (l *Limiter) takeAll(ctx context.Context, cs []Charge, ds []Decision) (err error) {
	corrects := false
	for i := range cs {
		corrects = corrects || cs[i].remembered()
	}
	if corrects {
		begun, earlier := l.corrections.begin(cs)
		if earlier != nil {
			return repeated(ctx, cs, earlier, ds)
		}
		err = errPanicked
		defer func() { l.corrections.end(cs, begun, ds, err) }()
	}
	if len(cs) == 1 {
		ds[0], err = l.store.Take(ctx, cs[0])
	} else {
		err = l.store.TakeAll(ctx, cs, ds)
	}
	if err == nil && Granted(ds) {
		for i := range ds {
			ds[i].receipt = receiptFor(&cs[i])
			if ds[i].Charged < 0 {
				l.gaveBack(cs[i].Key)
			}
		}
	}
	return err
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

// clock returns the time if there is an observer, and else the zero time.
func (l *Limiter) clock() (t time.Time) {
	if l.observer != nil {
		t = time.Now()
	}
	return t
}

func (l *Limiter) observe(c *Charge, d Decision, err error, took time.Duration) {
	l.observer(Event{Limit: c.Limit.name, Key: c.Key, Op: c.Op, Cost: c.Cost, Decision: d, Err: err, Took: took})
}
