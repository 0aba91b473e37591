package resilience

import (
	"context"
	"errors"
	"fmt"
	"path"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/failsafe-go/failsafe-go"
	"github.com/failsafe-go/failsafe-go/circuitbreaker"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// FailsafeOptions change the policies that [Failsafe], [RetryFailsafe] and [HedgeFailsafe] make. The zero
// value, and nil, take the defaults.
type FailsafeOptions struct {
	// ProbeLimit is how long a probe of a circuit breaker may take; after it the breaker is opened again. 0
	// is DefaultDelay. A Timeout inside ends the probe sooner.
	ProbeLimit time.Duration
	// FirstDelay is how long a circuit breaker stays open before it first lets a probe through, less a random
	// part of up to a tenth, and each opening takes twice as long as the one before it, see
	// BreakerOptions.FirstDelay. The longest is the breaker's own delay. A probe that fails opens the breaker
	// at once. 0 is DefaultFirstDelay; with a negative one the breaker's own delay and thresholds alone count.
	FirstDelay time.Duration
	// Notice receives "breaker" at each change of state of a circuit breaker, in order; "misconfigured", at
	// most once a minute, if the store is misconfigured and the circuit breaker is the outermost policy that
	// may report it; "repeat" when a policy of an unknown kind tried to repeat a charge without a request id;
	// and "panic" when a hedge that no caller waits for panicked in the store. If it is nil such a panic is
	// logged with slog.Error.
	Notice func(quota.Notice)
}

// Failsafe returns a failsafe-go policy as a policy of this package: a circuit breaker takes the position of
// [Breaker]; a bulkhead, rate limiter, adaptive limiter or throttler, and any policy of the program's own,
// takes that of [Bulkhead]. A policy of failsafe-go keeps its state in itself, so each store must get one of
// its own.
//
// Failures are those that [Breaker] lists, whatever the policy's conditions: these see only such errors, and
// results; every other error looks to the policy like an empty result. The result of a call, a list or not,
// is a quota.Result.
//
// A circuit breaker opens as its own thresholds say. It is driven by hand, which avoids these faults: a panic or a
// probe that hangs takes its permit for good; results from before it opened count while it is half-open; and an error
// without bearing on the store's health, such as a caller's cancellation, counts as a success. Its conditions and its
// function of the delay are not evaluated at all. A panic under any other policy is caught and goes on once the
// policy has seen the call end; after runtime.Goexit in the store the policy's permit is lost, and the caller of a
// hedged attempt waits until its context ends. A listener of a circuit breaker must not panic: failsafe-go would
// unlock its lock twice, which ends the program.
//
// A call that the policy refuses before the store is called is quota.ErrOverloaded and [ErrRejected], or
// quota.ErrUnavailable and [ErrOpen] if the policy is a circuit breaker.
//
// Wrap refuses retry and hedge policies, which have constructors of their own; failsafe-go's timeout, which
// returns when the store does and not before: use [Timeout]; and its fallback and its cache, whose decisions
// no store made: use [FailOpen], [FailClosed] or [Fallback]. A policy that nevertheless repeats a charge
// without a request id gets the answer to the first attempt again.
func Failsafe(p failsafe.Policy[quota.Result], o *FailsafeOptions) Policy {
	k := kindBulkhead
	if _, ok := p.(circuitbreaker.CircuitBreaker[quota.Result]); ok {
		k = kindBreaker
	}
	return newFailsafe(p, o, k)
}

// RetryFailsafe returns a failsafe-go retry policy in the position of [Retry]. It applies to peeks and to
// charges with a request id; every other charge is sent once. See [Failsafe] for the errors and results that
// its conditions see, and [Retry] for the error where an attempt had an unknown outcome.
//
// Each attempt has its timeout, but only the policy's own maximum duration bounds its attempts and pauses
// together. Wrap refuses other kinds of policies, and a stack without a [Timeout] inside.
func RetryFailsafe(p failsafe.Policy[quota.Result], o *FailsafeOptions) Policy {
	return newFailsafe(p, o, kindRetry)
}

// HedgeFailsafe returns a failsafe-go hedge policy: a second attempt where the first is slow, and the answer
// that comes first. It applies to peeks and to charges with a request id; every other charge is sent once.
// The attempt that lost is cancelled and ends by its timeout; Close waits for it.
//
// A panic in an attempt that the caller waits for happens in the caller's goroutine too. Wrap refuses other
// kinds of policies, and a stack without a [Timeout] inside.
func HedgeFailsafe(p failsafe.Policy[quota.Result], o *FailsafeOptions) Policy {
	return newFailsafe(p, o, kindHedge)
}

func newFailsafe(p failsafe.Policy[quota.Result], o *FailsafeOptions, k kind) Policy {
	if o == nil {
		o = &FailsafeOptions{}
	}
	return failsafePolicy{p, *o, k}
}

type failsafePolicy struct {
	p failsafe.Policy[quota.Result]
	o FailsafeOptions
	k kind
}

func (p failsafePolicy) kind() kind    { return p.k }
func (p failsafePolicy) reports() bool { return p.k == kindBreaker && p.o.Notice != nil }

// unfit gives the reason why a policy of failsafe-go is refused.
var unfit = map[string]string{
	"timeout":     "it returns when the store does, not when the time is up; accepted: Timeout",
	"fallback":    "no store made its decisions; accepted: FailOpen, FailClosed or Fallback",
	"cachepolicy": "a decision holds for one charge; accepted: DenialMemory",
	"retrypolicy": "a charge without a request id must not be repeated; accepted: RetryFailsafe, which repeats no other",
	"hedgepolicy": "a charge without a request id must not be repeated; accepted: HedgeFailsafe, which repeats no other",
}

// native returns the package of failsafe-go in which a policy is made, or "" for a policy of another origin.
func native(p any) string {
	t := reflect.TypeOf(p)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if pkg := t.PkgPath(); strings.HasPrefix(pkg, "github.com/failsafe-go/failsafe-go/") {
		return path.Base(pkg)
	}
	return ""
}

func (p failsafePolicy) wrap(inner quota.Store, alarms bool) (quota.Store, error) {
	if p.p == nil {
		return nil, invalid("the failsafe-go policy is nil", "a policy")
	}
	pkg := native(p.p)
	switch own := map[kind]string{kindRetry: "retrypolicy", kindHedge: "hedgepolicy"}[p.k]; {
	case p.o.ProbeLimit < 0:
		return nil, invalid(fmt.Sprintf("FailsafeOptions.ProbeLimit is %v", p.o.ProbeLimit), "0 or more")
	case own != "" && pkg != "" && pkg != own:
		return nil, invalid(fmt.Sprintf("failsafe-go's %s is given as a %s", pkg, p.k), own)
	case own == "" && unfit[pkg] != "":
		return nil, fmt.Errorf("resilience: %w: failsafe-go's %s does not fit: %s", quota.ErrInvalid, pkg, unfit[pkg])
	case own != "":
		if _, err := timeoutInside(inner, p.k); err != nil {
			return nil, err
		}
	}
	if cb, ok := p.p.(circuitbreaker.CircuitBreaker[quota.Result]); ok {
		return newFailsafeBreaker(cb, p.o, inner, alarms), nil
	}
	s := &failsafeStore{layer: layer{inner: inner, of: p.k}, exec: failsafe.With(p.p)}
	s.notes.tell = p.o.Notice
	return s, nil
}

// failsafeStore runs calls under a failsafe-go executor.
type failsafeStore struct {
	layer
	exec  failsafe.Executor[quota.Result]
	notes notifier

	refusals, repeats atomic.Int64

	mu      sync.Mutex
	running int           // attempts
	idle    chan struct{} // closed when running is 0, if Close waits for that
}

// Readings tells how many calls the policy refused, or of a retry and a hedge the attempts after the first.
func (s *failsafeStore) Readings(tell func(driver.Reading)) {
	if s.of == kindBulkhead {
		tell(driver.Reading{Metric: driver.MetricBulkheadRefusals, Value: s.refusals.Load()})
		return
	}
	tell(driver.Reading{Metric: driver.MetricRetries, Value: s.repeats.Load()})
}

func (s *failsafeStore) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.of != kindBulkhead && c.ID == "" && c.Op != quota.OpPeek {
		return s.inner.Charge(ctx, c)
	}
	var out [1]quota.Decision
	err := s.do(ctx, &execution{cs: []quota.Charge{c}, single: true}, out[:])
	return out[0], err
}

func (s *failsafeStore) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.of != kindBulkhead && !repeatable(cs) {
		return s.inner.ChargeAll(ctx, cs, out)
	}
	// A hedge that lost may read the charges after the call has returned.
	return s.do(ctx, &execution{cs: append([]quota.Charge(nil), cs...)}, out)
}

// execution is one decision: the attempts that a policy made for it.
type execution struct {
	cs     []quota.Charge
	single bool

	mu       sync.Mutex
	attempts []*attempt
	returned bool // the caller no longer waits
}

// leave notes that the caller no longer waits, and returns the attempts.
func (x *execution) leave() []*attempt {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.returned = true
	return x.attempts
}

// attempt is one call to the store. Its result may be read once done is closed.
type attempt struct {
	ds     []quota.Decision
	err    error
	hidden bool // the policy sees a result in place of err
	panic  *Panic
	done   chan struct{}
}

func (a *attempt) ended() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

func (s *failsafeStore) do(ctx context.Context, x *execution, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	defer x.leave() // even if the policy panics
	r, err := s.exec.WithContext(ctx).GetWithExecution(func(e failsafe.Execution[quota.Result]) (quota.Result, error) {
		return s.attempt(ctx, e.Context(), x)
	})
	attempts := x.leave()
	unknown := false
	var last, chosen *attempt
	for _, a := range attempts {
		if !a.ended() {
			unknown = true
			continue
		}
		if a.panic != nil {
			panic(a.panic)
		}
		unknown = unknown || errors.Is(a.err, quota.ErrIndeterminate)
		last = a
		if err == nil && len(r.Decisions) > 0 && &r.Decisions[0] == &a.ds[0] {
			chosen = a
		}
	}
	switch {
	case err != nil && driver.Sentinel(err) == nil && last != nil:
		chosen = last // the policy gave up, so the last answer counts
	case err == nil && chosen == nil:
		err = fmt.Errorf("resilience: %w: a failsafe-go policy answered in the store's place", quota.ErrMisconfigured)
	case err != nil:
		if err = translate(ctx, err, len(attempts)); len(attempts) == 0 && errors.Is(err, ErrRejected) {
			s.refusals.Add(1)
		}
	}
	if chosen != nil {
		err = chosen.err
	}
	if err != nil {
		return afterAttempts(unknown && !driver.OnlyPeeks(x.cs), err)
	}
	copy(out, chosen.ds)
	return nil
}

// attempt calls the store, for the policy.
func (s *failsafeStore) attempt(caller, ctx context.Context, x *execution) (quota.Result, error) {
	a := &attempt{ds: make([]quota.Decision, len(x.cs)), done: make(chan struct{})}
	x.mu.Lock()
	if x.returned {
		x.mu.Unlock()
		return quota.Result{}, context.Canceled
	}
	if len(x.attempts) > 0 && !repeatable(x.cs) {
		first := x.attempts[0]
		x.mu.Unlock()
		s.notes.send("repeat", "a policy tried to repeat a charge without a request id; it was not repeated", nil)
		<-first.done
		return first.result()
	}
	if len(x.attempts) > 0 {
		s.repeats.Add(1)
	}
	x.attempts = append(x.attempts, a)
	x.mu.Unlock()
	s.count(1)
	returned := false
	defer func() {
		if !returned {
			if v := recover(); v != nil {
				a.panic, a.hidden = newPanic(v), true
			}
		}
		x.mu.Lock()
		abandoned := x.returned
		close(a.done)
		x.mu.Unlock()
		s.count(-1)
		if a.panic != nil && abandoned {
			s.notes.abandonedPanic(a.panic)
		}
	}()
	s.call(caller, ctx, x, a)
	returned = true
	return a.result()
}

func (s *failsafeStore) call(caller, ctx context.Context, x *execution, a *attempt) {
	if x.single {
		a.ds[0], a.err = s.inner.Charge(ctx, x.cs[0])
	} else {
		a.err = s.inner.ChargeAll(ctx, x.cs, a.ds)
	}
	// A conflict is no sign of the store's health, but a repeat may win.
	a.hidden = judge(caller, a.err) == unrelated && !(s.of == kindRetry && errors.Is(a.err, quota.ErrConflict))
}

// result returns the result of an attempt as the policy sees it.
func (a *attempt) result() (quota.Result, error) {
	if a.err != nil && !a.hidden {
		return quota.Result{}, a.err
	}
	r := quota.Result{Decisions: a.ds}
	if a.err == nil && a.panic == nil {
		r.Granted, r.Decider = quota.Granted(a.ds), quota.Decider(a.ds)
	}
	return r, nil
}

// translate returns an executor's error as one of package quota's.
func translate(ctx context.Context, err error, attempts int) error {
	switch {
	case driver.Sentinel(err) != nil:
		return err
	case attempts > 0: // and none has ended
		return fmt.Errorf("resilience: %w: %w", quota.ErrIndeterminate, err)
	case ctx.Err() != nil && ended(ctx):
		return ctx.Err()
	case errors.Is(err, circuitbreaker.ErrOpen):
		return fmt.Errorf("resilience: %w: %w: %w", quota.ErrUnavailable, ErrOpen, err)
	}
	return fmt.Errorf("resilience: %w: %w: %w", quota.ErrOverloaded, ErrRejected, err)
}

// count adds n to the attempts that are running.
func (s *failsafeStore) count(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.running += n
	if s.running == 0 && s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// Close closes the store inside and waits for the attempts that were abandoned, which end by their timeout.
func (s *failsafeStore) Close() error {
	if !s.gate.Close() {
		return nil
	}
	err := s.inner.Close()
	t, ok := driver.Find[bounded](s.inner)
	if !ok {
		return err // only a hedge leaves attempts, and has a timeout inside
	}
	s.mu.Lock()
	idle := make(chan struct{})
	s.idle = idle
	if s.running == 0 {
		close(idle)
		s.idle = nil
	}
	s.mu.Unlock()
	timer := time.NewTimer(t.bound())
	defer timer.Stop()
	select {
	case <-idle:
		return err
	case <-timer.C:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return errors.Join(err, fmt.Errorf("resilience: %d attempts have not ended %v after the store was closed", s.running, t.bound()))
}

// failsafeBreaker drives a failsafe-go circuit breaker by hand.
type failsafeBreaker struct {
	layer
	cb    circuitbreaker.CircuitBreaker[quota.Result]
	limit time.Duration
	monitor

	mu    sync.Mutex
	last  circuitbreaker.State // the latest state seen
	epoch uint64               // counts the changes of state
	// spare counts the permits of probes without a verdict, in the present half-open state: failsafe-go
	// cannot take them back, so the next probes use them. probes are those in flight.
	spare  int
	probes map[*probe]struct{}
	// until is when the present opening is over, unless the breaker's own delay is over sooner; it is zero
	// unless the breaker is open. ending says that a call is making the breaker half-open.
	until    time.Time
	ending   bool
	openings openings // first is 0 where only the breaker's own delay counts
}

func (b *failsafeBreaker) state() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	state := b.cb.State()
	b.observe(state)
	if state == circuitbreaker.OpenState && b.remaining() == 0 {
		state = circuitbreaker.HalfOpenState
	}
	return state.String()
}

// Readings tells the breaker's state and counts.
func (b *failsafeBreaker) Readings(tell func(driver.Reading)) { b.readings(b.state(), tell) }

// remaining returns the time until the next probe. The caller holds the lock.
func (b *failsafeBreaker) remaining() time.Duration {
	left := b.cb.RemainingDelay()
	if !b.until.IsZero() {
		left = min(left, max(time.Until(b.until), 0))
	}
	return left
}

// probe is the permit of a call.
type probe struct {
	epoch uint64
	began time.Time
}

func newFailsafeBreaker(cb circuitbreaker.CircuitBreaker[quota.Result], o FailsafeOptions, inner quota.Store, alarms bool) *failsafeBreaker {
	b := &failsafeBreaker{
		layer: layer{inner: inner, of: kindBreaker}, cb: cb, limit: o.ProbeLimit, last: cb.State(), probes: map[*probe]struct{}{},
	}
	if b.limit == 0 {
		b.limit = DefaultDelay
	}
	if o.FirstDelay == 0 {
		o.FirstDelay = DefaultFirstDelay
	}
	b.openings.first, b.openings.jitter = max(o.FirstDelay, 0), DefaultJitter
	b.notes.tell = o.Notice
	b.alarm = alarm{notifier: &b.notes, on: alarms, base: time.Now()}
	return b
}

func (b *failsafeBreaker) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	p, err := b.allow()
	if err != nil {
		return d, err
	}
	o := failed // where the store does not return
	defer func() { b.done(p, o) }()
	d, err = b.inner.Charge(ctx, c)
	o = b.judge(ctx, err)
	return d, err
}

func (b *failsafeBreaker) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	p, err := b.allow()
	if err != nil {
		return err
	}
	o := failed
	defer func() { b.done(p, o) }()
	err = b.inner.ChargeAll(ctx, cs, out)
	o = b.judge(ctx, err)
	return err
}

// observe notes the breaker's state and returns the epoch. The caller holds the lock.
func (b *failsafeBreaker) observe(state circuitbreaker.State) uint64 {
	if state != b.last {
		again := b.last == circuitbreaker.HalfOpenState
		b.last = state
		b.epoch++
		b.until, b.ending = time.Time{}, false
		switch {
		case state == circuitbreaker.ClosedState:
			b.openings.close()
		case state == circuitbreaker.OpenState && b.openings.first > 0:
			b.until = time.Now().Add(b.openings.open(b.cb.RemainingDelay(), again))
		}
		if state == circuitbreaker.OpenState {
			b.opened.Add(1)
		}
		b.spare = 0
		clear(b.probes)
		b.notes.send("breaker", "the circuit breaker is "+state.String(), nil)
	}
	return b.epoch
}

// allow asks for a permit.
func (b *failsafeBreaker) allow() (*probe, error) {
	b.mu.Lock()
	b.observe(b.cb.State())
	if !b.until.IsZero() && time.Until(b.until) <= 0 && !b.ending {
		b.ending = true
		b.mu.Unlock()
		b.cb.HalfOpen()
		b.mu.Lock()
		b.observe(b.cb.State())
	}
	if b.spare > 0 {
		b.spare--
		p := b.begin()
		b.mu.Unlock()
		return p, nil
	}
	b.mu.Unlock()
	// Not under the lock, because it calls the program's listeners.
	permitted := b.cb.TryAcquirePermit()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.observe(b.cb.State())
	if permitted {
		return b.begin(), nil
	}
	if b.last == circuitbreaker.HalfOpenState {
		for p := range b.probes {
			if time.Since(p.began) >= b.limit {
				b.mu.Unlock()
				b.cb.Open()
				b.mu.Lock()
				b.observe(b.cb.State())
				break
			}
		}
	}
	b.refusals.Add(1)
	return nil, b.orClosed(&openError{b.remaining()})
}

// begin returns the permit of a call that may be made. The caller holds the lock.
func (b *failsafeBreaker) begin() *probe {
	p := &probe{epoch: b.epoch}
	if b.last == circuitbreaker.HalfOpenState {
		p.began = time.Now()
		b.probes[p] = struct{}{}
	}
	return p
}

// done reports the outcome of a call to the breaker, unless its state has changed since the call began.
func (b *failsafeBreaker) done(p *probe, o outcome) {
	b.mu.Lock()
	stale := b.observe(b.cb.State()) != p.epoch
	probed := b.last == circuitbreaker.HalfOpenState
	delete(b.probes, p)
	if !stale && o == unrelated && b.last == circuitbreaker.HalfOpenState {
		b.spare++
	}
	b.mu.Unlock()
	if stale || o == unrelated {
		return
	}
	if o == failed {
		b.cb.RecordFailure()
		if probed && b.openings.first > 0 && b.cb.IsHalfOpen() {
			b.cb.Open()
		}
	} else {
		b.cb.RecordSuccess()
	}
	b.mu.Lock()
	b.observe(b.cb.State())
	b.mu.Unlock()
}
