package resilience

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// DefaultMaxCalls is how many calls a [Timeout] hands over at a time unless its options say otherwise.
const DefaultMaxCalls = 256

// TimeoutOptions change the policy that [Timeout] makes. The zero value, and nil, take the defaults.
type TimeoutOptions struct {
	// MaxCalls bounds the calls to a store that is not prompt which have not ended, abandoned ones included:
	// each has a goroutine. 0 is DefaultMaxCalls. A call above it fails with quota.ErrOverloaded; a breaker
	// counts that as a failure of the store only if at least half of the calls are abandoned ones.
	MaxCalls int
	// Notice receives "panic" when a call panicked in the store after it was abandoned; "timeout" when the store
	// measured a round trip to its server, and t is less than two of them; and the notices of a store that has
	// no receiver of its own. If it is nil such a panic is logged with slog.Error.
	Notice func(quota.Notice)
}

// Timeout returns the policy that a decision comes after t at the latest, whatever the store does.
//
// A [driver.Prompt] store gets a context with the deadline and is called directly; it must return by then, as
// it declares. It may not heed cancellation: then a call whose caller cancels is answered at t at the latest. Any other store is called on a goroutine of its own, with private copies of the charges and
// the decisions, under a deadline that comes up to 5 ms sooner. At t, or when the caller's own context ends,
// the call is abandoned: it keeps its goroutine and counts against MaxCalls until the store returns.
//
// The error of a call that ran out of time is quota.ErrIndeterminate, or quota.ErrUnavailable if the call was
// certainly not sent. If the caller's own context ended, it is quota.ErrIndeterminate with the context's
// error wrapped, or the context's error alone if the call was certainly not sent.
//
// A panic or runtime.Goexit in the store happens in the caller's goroutine too, the former as a [*Panic] if
// it came from another goroutine.
//
// Close closes the store, then waits for the calls that have not ended, for t at most. Calls that have still
// not ended are an error; they end when the store returns.
//
// A t of 0 or less, and a negative MaxCalls, is refused by Wrap.
func Timeout(t time.Duration, o *TimeoutOptions) Policy {
	if o == nil {
		o = &TimeoutOptions{}
	}
	return timeoutPolicy{t, *o, true}
}

type timeoutPolicy struct {
	t       time.Duration
	o       TimeoutOptions
	listens bool // to the store's reports
}

func (timeoutPolicy) kind() kind { return kindTimeout }

func (p timeoutPolicy) wrap(inner quota.Store, _ bool) (quota.Store, error) {
	switch {
	case p.t <= 0:
		return nil, invalid(fmt.Sprintf("the timeout is %v", p.t), "more than 0")
	case p.o.MaxCalls < 0:
		return nil, invalid(fmt.Sprintf("TimeoutOptions.MaxCalls is %d", p.o.MaxCalls), "0 or more")
	case p.o.MaxCalls == 0:
		p.o.MaxCalls = DefaultMaxCalls
	}
	if p.listens {
		listen(inner, p.t, p.o.Notice)
	}
	if driver.IsPrompt(inner) {
		return &promptTimeout{layer: layer{inner: inner, of: kindTimeout}, t: p.t, base: time.Now()}, nil
	}
	s := &handOff{
		layer: layer{inner: inner, of: kindTimeout}, t: p.t, base: time.Now(), slots: make(chan struct{}, p.o.MaxCalls),
	}
	s.notes.tell = p.o.Notice
	s.full = fmt.Errorf("resilience: %w: %w: %d calls to the store have not ended", quota.ErrOverloaded, ErrRejected, p.o.MaxCalls)
	s.stalled = fmt.Errorf("resilience: %w: %d calls to the store have not ended, most of them after their timeout of %v",
		quota.ErrOverloaded, p.o.MaxCalls, p.t)
	return s, nil
}

// listen has a store tell its notices, and tells itself if a timeout is too short for the way to the store's server.
func listen(inner quota.Store, timeout time.Duration, tell func(quota.Notice)) {
	store, ok := driver.Find[driver.Reporter](inner)
	if !ok || tell == nil {
		return
	}
	tell = guarded(tell)
	var mu sync.Mutex
	told := map[string]bool{} // by node
	store.Report(driver.Reports{Notice: tell, RoundTrip: func(node string, d time.Duration) {
		if timeout >= 2*d {
			return
		}
		mu.Lock()
		first := !told[node] && len(told) < maxNodes
		if first {
			told[node] = true
		}
		mu.Unlock()
		if first {
			ofNode(tell, node)(quota.Notice{Name: "timeout", Text: fmt.Sprintf("the timeout is %v, and a round trip to the store's server takes %v; "+
				"accepted: at least two round trips, %v, because a decision may wait for the batch before it", timeout, d, 2*d)})
		}
	}})
}

// promptTimeout bounds a store that honours deadlines.
type promptTimeout struct {
	layer
	t        time.Duration
	base     time.Time
	timeouts atomic.Int64
}

// Readings tells how many calls ran out of time.
func (s *promptTimeout) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricTimeouts, Value: s.timeouts.Load()})
}

// timedOut is the function timedOut, and counts.
func (s *promptTimeout) timedOut(ctx context.Context, d *deadline, err error) error {
	err, late := timedOut(ctx, d, s.t, err)
	if late {
		s.timeouts.Add(1)
	}
	return err
}

func (s *promptTimeout) bound() time.Duration { return s.t }

func (s *promptTimeout) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	at := after(s.base, s.t)
	if own, ok := ctx.Deadline(); ok && !own.After(at) {
		return s.inner.Charge(ctx, c)
	}
	d := &deadline{Context: ctx, at: at}
	defer d.release()
	decision, err := s.inner.Charge(d, c)
	if err != nil {
		err = s.timedOut(ctx, d, err)
	}
	return decision, err
}

func (s *promptTimeout) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	at := after(s.base, s.t)
	if own, ok := ctx.Deadline(); ok && !own.After(at) {
		return s.inner.ChargeAll(ctx, cs, out)
	}
	d := &deadline{Context: ctx, at: at}
	defer d.release()
	err := s.inner.ChargeAll(d, cs, out)
	if err != nil {
		err = s.timedOut(ctx, d, err)
	}
	return err
}

// timedOut translates the error of a call under d, which ends t after it began, for the caller, to whom d is
// unknown, and reports whether d ended the call. If ctx, around it, is over too, the error is left to the policy that made
// ctx, or to the caller.
func timedOut(ctx context.Context, d *deadline, t time.Duration, err error) (translated error, late bool) {
	switch {
	case over(ctx) || d.Err() == nil:
	case errors.Is(err, quota.ErrIndeterminate):
		return fmt.Errorf("resilience: no answer within the timeout of %v: %w", t, err), true
	case ofContext(err):
		return fmt.Errorf("resilience: %w: nothing was sent within the timeout of %v: %w", quota.ErrUnavailable, t, err), true
	}
	return err, false
}

// handOff bounds a store whose calls may return late: it hands them over to goroutines.
type handOff struct {
	layer
	t             time.Duration
	base          time.Time
	slots         chan struct{} // holds an element for each call that has not ended
	abandoned     atomic.Int64
	timeouts      atomic.Int64
	notes         notifier
	full, stalled error
}

// Readings tells how many calls ran out of time, and how many that were left have not ended.
func (s *handOff) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricTimeouts, Value: s.timeouts.Load()})
	tell(driver.Reading{Metric: driver.MetricAbandonedCalls, Value: s.abandoned.Load()})
}

func (s *handOff) bound() time.Duration { return s.t }

// Prompt returns true: every call returns by its context's deadline, whatever the store inside does.
func (s *handOff) Prompt() bool { return true }

// maxHeadStart is the longest time by which a call's deadline comes before the call is abandoned.
const maxHeadStart = 5 * time.Millisecond

// call is a call that was handed over. Its goroutine owns all fields but state and done, until state is
// finished.
type call struct {
	ctx    deadline
	single bool
	c      quota.Charge
	cs     []quota.Charge
	d      quota.Decision
	out    []quota.Decision
	err    error
	late   bool // err says that the call ran out of time
	panic  *Panic
	exited bool // by runtime.Goexit

	state atomic.Int32
	done  chan struct{}
}

// The states of a call: queued, then withdrawn; or running, then finished or abandoned.
const (
	queued int32 = iota
	withdrawn
	running
	finished
	abandoned
)

func (s *handOff) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	k := &call{single: true, c: c}
	if err := s.do(ctx, k); err != nil {
		return quota.Decision{}, err
	}
	return k.d, nil
}

func (s *handOff) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	k := &call{cs: append([]quota.Charge(nil), cs...), out: make([]quota.Decision, len(out))}
	if err := s.do(ctx, k); err != nil {
		return err
	}
	copy(out, k.out)
	return nil
}

// do runs the call, and returns nil only if k may be read.
func (s *handOff) do(ctx context.Context, k *call) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	select {
	case s.slots <- struct{}{}:
	default:
		if 2*s.abandoned.Load() >= int64(cap(s.slots)) {
			return s.orClosed(s.stalled)
		}
		return s.orClosed(s.full)
	}
	timer := time.NewTimer(s.t)
	defer timer.Stop()
	k.done = make(chan struct{})
	// A store that heeds its deadline returns an error that says more than "no answer", so it gets a head
	// start.
	k.ctx.Context, k.ctx.at = ctx, after(s.base, s.t-min(s.t/20, maxHeadStart))
	if own, ok := ctx.Deadline(); ok && own.Before(k.ctx.at) {
		k.ctx.at = own
	}
	go s.run(k)
	select {
	case <-k.done:
		return s.result(k)
	case <-timer.C:
	case <-ctx.Done():
	}
	if k.state.CompareAndSwap(queued, withdrawn) {
		if err := ctx.Err(); err != nil {
			return err
		}
		s.timeouts.Add(1)
		return fmt.Errorf("resilience: %w: nothing was sent within the timeout of %v", quota.ErrUnavailable, s.t)
	}
	s.abandoned.Add(1)
	if !k.state.CompareAndSwap(running, abandoned) {
		s.abandoned.Add(-1)
		<-k.done
		return s.result(k)
	}
	if err := ctx.Err(); err != nil {
		whose := "the caller's context ended"
		if !ended(ctx) {
			whose = "the time that a policy outside the timeout gives was over"
		}
		return fmt.Errorf("resilience: %w: %s before the store answered: %w", quota.ErrIndeterminate, whose, err)
	}
	s.timeouts.Add(1)
	return fmt.Errorf("resilience: %w: no answer within the timeout of %v", quota.ErrIndeterminate, s.t)
}

// run makes the call on a goroutine of its own.
func (s *handOff) run(k *call) {
	if !k.state.CompareAndSwap(queued, running) {
		<-s.slots
		return
	}
	returned := false
	defer func() {
		if !returned {
			if v := recover(); v != nil {
				k.panic = newPanic(v)
			}
			k.exited = k.panic == nil
		}
		k.ctx.release()
		// A panic is read first: once the state has changed, k is the caller's.
		panicked := k.panic
		<-s.slots
		if k.state.CompareAndSwap(running, finished) {
			close(k.done)
			return
		}
		s.abandoned.Add(-1)
		if panicked != nil {
			s.notes.abandonedPanic(panicked)
		}
	}()
	if k.single {
		k.d, k.err = s.inner.Charge(&k.ctx, k.c)
	} else {
		k.err = s.inner.ChargeAll(&k.ctx, k.cs, k.out)
	}
	if k.err != nil {
		k.err, k.late = timedOut(k.ctx.Context, &k.ctx, s.t, k.err)
	}
	returned = true
}

// result ends as the call did: it returns the error, panics or exits.
func (s *handOff) result(k *call) error {
	if k.late {
		s.timeouts.Add(1)
	}
	switch {
	case k.panic != nil:
		panic(k.panic)
	case k.exited:
		runtime.Goexit()
	}
	return k.err
}

// Close closes the store inside and waits for the calls that have not ended, for at most the time of one
// call.
func (s *handOff) Close() error {
	if !s.gate.Close() {
		return nil
	}
	err := s.inner.Close()
	timer := time.NewTimer(s.t)
	defer timer.Stop()
	for n := range cap(s.slots) { // when Close holds all slots, no call is left
		select {
		case s.slots <- struct{}{}:
			continue
		default:
		}
		select {
		case s.slots <- struct{}{}:
		case <-timer.C:
			return errors.Join(err, fmt.Errorf("resilience: %d calls to the store have not ended %v after it was closed", cap(s.slots)-n, s.t))
		}
	}
	return err
}

// Panic is the value of a policy's panic where a store panicked on another goroutine.
type Panic struct {
	Value any    // the value of the store's panic
	Stack []byte // the stack of its goroutine
}

func newPanic(v any) *Panic {
	if p, ok := v.(*Panic); ok {
		return p
	}
	return &Panic{v, debug.Stack()}
}

// Error returns the value and the stack.
func (p *Panic) Error() string {
	return fmt.Sprintf("panic in a store: %v\n\n%s", p.Value, p.Stack)
}

// Unwrap returns the value if it is an error.
func (p *Panic) Unwrap() error {
	err, _ := p.Value.(error)
	return err
}
