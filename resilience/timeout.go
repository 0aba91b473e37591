package resilience

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// DefaultMaxCalls is how many calls a [Timeout] hands over at a time unless its options say otherwise.
const DefaultMaxCalls = 256

// TimeoutOptions change what [Timeout] makes. The zero value, and nil, take the defaults.
type TimeoutOptions struct {
	// MaxCalls bounds the calls to a store that is not prompt which have not ended, abandoned ones
	// included: each has a goroutine. 0 is DefaultMaxCalls. A call above it fails with
	// quota.ErrOverloaded; a breaker counts that as a failure of the store only where at least half of
	// the calls are abandoned ones.
	MaxCalls int
	// Notice is told, as "panic", that a call panicked in the store after it was abandoned; nil lets
	// such a panic end the program.
	Notice func(quota.Notice)
}

// Timeout returns the policy that a decision comes after t at the latest, whatever the store does.
//
// A [driver.Prompt] store gets a context with the deadline and is called directly; it is held to what
// it declared. Any other store is called on a goroutine, with copies of the charges and the decisions
// that nobody else sees, under a deadline that comes up to 5 ms sooner. At t, or when the caller's own context ends, the call is abandoned: it keeps
// its goroutine and counts against MaxCalls until the store returns.
//
// A call that ran out of t is quota.ErrIndeterminate, or quota.ErrUnavailable if it was certainly not
// sent. One whose own context ended is quota.ErrIndeterminate with the context's error wrapped, or
// the context's error alone if it was certainly not sent.
//
// A panic or runtime.Goexit in the store happens in the caller's goroutine too, the former as a
// [*Panic] if it came from another goroutine.
//
// Close closes the store, then waits for the calls that have not ended, for t at most; calls that have
// still not ended are an error, and end when the store lets them.
//
// A t of 0 or less, and a negative MaxCalls, is refused by Wrap.
func Timeout(t time.Duration, o *TimeoutOptions) Policy {
	if o == nil {
		o = &TimeoutOptions{}
	}
	return timeoutPolicy{t, *o}
}

type timeoutPolicy struct {
	t time.Duration
	o TimeoutOptions
}

func (timeoutPolicy) kind() kind { return kindTimeout }

func (p timeoutPolicy) wrap(inner quota.Store, _ place) (quota.Store, error) {
	switch {
	case p.t <= 0:
		return nil, invalid(fmt.Sprintf("the timeout is %v", p.t), "more than 0")
	case p.o.MaxCalls < 0:
		return nil, invalid(fmt.Sprintf("TimeoutOptions.MaxCalls is %d", p.o.MaxCalls), "0 or more")
	case p.o.MaxCalls == 0:
		p.o.MaxCalls = DefaultMaxCalls
	}
	if prompt(inner) {
		return &promptTimeout{layer: layer{inner: inner, of: kindTimeout}, t: p.t, base: time.Now()}, nil
	}
	s := &handOff{layer: layer{inner: inner, of: kindTimeout}, t: p.t, base: time.Now(), slots: make(chan struct{}, p.o.MaxCalls)}
	s.notes.tell = p.o.Notice
	s.full = fmt.Errorf("resilience: %w: %w: %d calls to the store have not ended", quota.ErrOverloaded, ErrRejected, p.o.MaxCalls)
	s.stalled = fmt.Errorf("resilience: %w: %d calls to the store have not ended, most of them after their timeout of %v", quota.ErrOverloaded, p.o.MaxCalls, p.t)
	return s, nil
}

// promptTimeout bounds a store that honours deadlines.
type promptTimeout struct {
	layer
	t    time.Duration
	base time.Time
}

func (s *promptTimeout) bound() time.Duration { return s.t }

func (s *promptTimeout) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	at := after(s.base, s.t)
	if own, ok := ctx.Deadline(); ok && !own.After(at) {
		return s.inner.Take(ctx, c)
	}
	d := &deadline{Context: ctx, at: at}
	defer d.release()
	decision, err := s.inner.Take(d, c)
	if err != nil {
		err = ranOut(ctx, d, s.t, err)
	}
	return decision, err
}

func (s *promptTimeout) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	at := after(s.base, s.t)
	if own, ok := ctx.Deadline(); ok && !own.After(at) {
		return s.inner.TakeAll(ctx, cs, out)
	}
	d := &deadline{Context: ctx, at: at}
	defer d.release()
	err := s.inner.TakeAll(d, cs, out)
	if err != nil {
		err = ranOut(ctx, d, s.t, err)
	}
	return err
}

// ranOut turns the error of a call under d, which ends t after it began, into one that the caller
// understands, who does not know of d.
func ranOut(ctx context.Context, d *deadline, t time.Duration, err error) error {
	switch {
	case ended(ctx) || d.Err() == nil:
		return err
	case errors.Is(err, quota.ErrIndeterminate):
		return fmt.Errorf("resilience: no answer within the timeout of %v: %w", t, err)
	case ofContext(err):
		return fmt.Errorf("resilience: %w: nothing was sent within the timeout of %v: %w", quota.ErrUnavailable, t, err)
	}
	return err
}

// handOff bounds a store that may come late.
type handOff struct {
	layer
	t             time.Duration
	base          time.Time
	slots         chan struct{} // holds an element for each call that has not ended
	abandoned     atomic.Int64
	notes         notifier
	full, stalled error
}

func (s *handOff) bound() time.Duration { return s.t }

// Prompt says that every call returns by its context's deadline: this is what makes a store prompt.
func (s *handOff) Prompt() bool { return true }

// maxHead is how much earlier than a call is abandoned its deadline comes, at most.
const maxHead = 5 * time.Millisecond

// call is a call that was handed over. The goroutine owns ctx, the charges, the decisions and the rest
// until state says that it has finished.
type call struct {
	ctx    deadline
	single bool
	c      quota.Charge
	cs     []quota.Charge
	d      quota.Decision
	out    []quota.Decision
	err    error
	panic  *Panic
	exited bool // by runtime.Goexit

	state atomic.Int32
	done  chan struct{}
}

// The states of a call: queued, then withdrawn; or running, then finished or left.
const (
	queued int32 = iota
	withdrawn
	running
	finished
	left
)

func (s *handOff) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	k := &call{single: true, c: c}
	if err := s.do(ctx, k); err != nil {
		return quota.Decision{}, err
	}
	return k.d, nil
}

func (s *handOff) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	k := &call{cs: append([]quota.Charge(nil), cs...), out: make([]quota.Decision, len(out))}
	if err := s.do(ctx, k); err != nil {
		return err
	}
	copy(out, k.out)
	return nil
}

// do runs the call, and returns nil only if k may be read.
func (s *handOff) do(ctx context.Context, k *call) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if s.closed.Load() {
		return errClosed
	}
	select {
	case s.slots <- struct{}{}:
	default:
		if 2*s.abandoned.Load() >= int64(cap(s.slots)) {
			return s.unless(s.stalled)
		}
		return s.unless(s.full)
	}
	timer := time.NewTimer(s.t)
	defer timer.Stop()
	k.done = make(chan struct{})
	// A store that heeds its deadline knows more of the call than that it has not ended.
	k.ctx.Context, k.ctx.at = ctx, after(s.base, s.t-min(s.t/20, maxHead))
	if own, ok := ctx.Deadline(); ok && own.Before(k.ctx.at) {
		k.ctx.at = own
	}
	go s.run(k)
	select {
	case <-k.done:
		return k.result()
	case <-timer.C:
	case <-ctx.Done():
	}
	if k.state.CompareAndSwap(queued, withdrawn) {
		if err := ctx.Err(); err != nil {
			return err
		}
		return fmt.Errorf("resilience: %w: nothing was sent within the timeout of %v", quota.ErrUnavailable, s.t)
	}
	s.abandoned.Add(1)
	if !k.state.CompareAndSwap(running, left) {
		s.abandoned.Add(-1)
		<-k.done
		return k.result()
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("resilience: %w: the caller's context ended before the store answered: %w", quota.ErrIndeterminate, err)
	}
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
			s.notes.lost(panicked)
		}
	}()
	if k.single {
		k.d, k.err = s.inner.Take(&k.ctx, k.c)
	} else {
		k.err = s.inner.TakeAll(&k.ctx, k.cs, k.out)
	}
	if k.err != nil {
		k.err = ranOut(k.ctx.Context, &k.ctx, s.t, k.err)
	}
	returned = true
}

// result passes on how the call ended.
func (k *call) result() error {
	switch {
	case k.panic != nil:
		panic(k.panic)
	case k.exited:
		runtime.Goexit()
	}
	return k.err
}

// Close closes the store inside and waits for the calls that have not ended, as long as one may take.
func (s *handOff) Close() error {
	if s.closed.Swap(true) {
		return nil
	}
	err := s.inner.Close()
	timer := time.NewTimer(s.t)
	defer timer.Stop()
	for n := range cap(s.slots) { // whoever holds all slots is alone
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

// Panic is what a policy panics with where a store panicked on another goroutine.
type Panic struct {
	Value any    // what the store panicked with
	Stack []byte // where
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

// lost tells of a panic that nobody waits for, or passes it on if there is nobody to tell.
func (n *notifier) lost(p *Panic) {
	if n.tell == nil {
		panic(p)
	}
	n.send("panic", "the store panicked in a call that was abandoned", p)
}
