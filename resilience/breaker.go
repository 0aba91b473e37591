package resilience

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sony/gobreaker/v2"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The defaults of [BreakerOptions].
const (
	DefaultFailures   = 3
	DefaultFailingFor = 500 * time.Millisecond
	DefaultFirstDelay = 250 * time.Millisecond
	DefaultDelay      = 30 * time.Second
	DefaultJitter     = 0.1
)

// BreakerOptions change the policy that [Breaker] makes. The zero value, and nil, take the defaults.
type BreakerOptions struct {
	// Failures is how many calls in a row must fail, at the least, to open the breaker; 0 is DefaultFailures.
	Failures int
	// FailingFor is how long no call must have succeeded, from the first of these failures on, so that one
	// stall, in which all calls in flight fail together, does not open the breaker. 0 is the time of the
	// [Timeout] inside, or DefaultFailingFor if there is none; a negative one counts failures alone.
	FailingFor time.Duration
	// Trip replaces Failures and FailingFor: after each failure it reports whether the breaker must open. It
	// is called with a lock held and must not call the store; its panic reaches the caller whose call failed. With
	// nil failures in a row are counted, at next to no cost for the calls of a healthy store; with Trip gobreaker
	// counts every call, which takes locks and an allocation.
	Trip func(gobreaker.Counts) bool
	// Window is how far back Trip counts; 0 is back to when the breaker closed. It moves in Slices.
	Window time.Duration
	// Slice is the step in which Window moves, at most Window; 0 clears all counts once each Window.
	Slice time.Duration
	// FirstDelay is how long the breaker stays open before it first lets a probe through. Each opening takes
	// twice as long as the one before it, up to Delay, and the next is the first again once the breaker has
	// stayed closed for twice the last one. 0 is DefaultFirstDelay, or Delay if that is less. For openings
	// that are all the same, set it to Delay.
	FirstDelay time.Duration
	// Delay is the longest time that the breaker stays open before it lets a probe through; 0 is
	// DefaultDelay, or FirstDelay if that is more.
	Delay time.Duration
	// Jitter is the random part of each opening, so that the processes of a fleet do not probe together: one
	// of at most d takes between d·(1-Jitter) and d. Up to 1; 0 is DefaultJitter, a negative one is none.
	Jitter float64
	// Probes is how many calls in a row must succeed to close the breaker, and how many may be made at a time
	// while it is half-open; 0 is 1.
	Probes int
	// ProbeLimit is how long a probe may take. After it the probe is given up and counts as failed, so that
	// the breaker works on while a probe hangs. 0 is Delay. A Timeout inside ends the probe sooner.
	ProbeLimit time.Duration
	// Notice receives "breaker" at each change of state, in order; and "misconfigured", at most once a
	// minute, if the store is misconfigured and no policy outside reports it. It may be nil.
	Notice func(quota.Notice)
}

// Breaker returns the policy that a store which keeps failing is not called: once some calls have failed, and
// none has succeeded for one whole timeout since the first of them, the breaker opens and calls fail at once,
// with an error that is quota.ErrUnavailable and [ErrOpen]; after a delay it is half-open and lets a probe
// through, a call like any other; a probe that succeeds closes it, one that fails opens it again, for twice
// as long. It is a sony/gobreaker.
//
// ErrUnavailable and ErrIndeterminate count as failures, ErrOverloaded too unless it is [ErrRejected], and so
// does every error that is none of package quota's; but no error counts where the caller's own context has
// ended, nor one of a call that left while its store connected, see [driver.GettingReady]. A denial is a success.
// Every other error has no bearing on the store's health, and a probe that ends in one leaves the breaker half-open.
// A panic is a failure. Several errors of one round trip count once, see [driver.RoundTripError]. Results of calls that began
// before the last change of state are ignored.
//
// Other negative numbers, a Jitter above 1, a FirstDelay above Delay and a Slice above Window are refused by
// Wrap.
func Breaker(o *BreakerOptions) Policy {
	if o == nil {
		o = &BreakerOptions{}
	}
	return breakerPolicy(*o)
}

type breakerPolicy BreakerOptions

func (breakerPolicy) kind() kind      { return kindBreaker }
func (p breakerPolicy) reports() bool { return p.Notice != nil }

func (p breakerPolicy) wrap(inner quota.Store, alarms bool) (quota.Store, error) {
	o := BreakerOptions(p)
	switch {
	case o.Failures < 0 || o.Probes < 0 || o.Delay < 0 || o.FirstDelay < 0 || o.ProbeLimit < 0:
		return nil, invalid(fmt.Sprintf("BreakerOptions are %d failures, %d probes, a first delay of %v, a delay of %v and a limit of %v for probes",
			o.Failures, o.Probes, o.FirstDelay, o.Delay, o.ProbeLimit), "0 or more")
	case o.Delay > 0 && o.FirstDelay > o.Delay:
		return nil, invalid(fmt.Sprintf("BreakerOptions.FirstDelay is %v", o.FirstDelay), fmt.Sprintf("up to the delay of %v", o.Delay))
	case o.Jitter > 1:
		return nil, invalid(fmt.Sprintf("BreakerOptions.Jitter is %v", o.Jitter), "up to 1")
	case o.Window < 0 || o.Slice < 0 || o.Slice > o.Window:
		return nil, invalid(fmt.Sprintf("BreakerOptions.Window is %v in slices of %v", o.Window, o.Slice), "0 or more, and slices up to the window")
	}
	if o.Failures == 0 {
		o.Failures = DefaultFailures
	}
	if o.FailingFor == 0 {
		o.FailingFor = DefaultFailingFor
		if t, ok := driver.Find[bounded](inner); ok {
			o.FailingFor = t.bound()
		}
	}
	if o.Delay == 0 {
		o.Delay = max(DefaultDelay, o.FirstDelay)
	}
	if o.FirstDelay == 0 {
		o.FirstDelay = min(DefaultFirstDelay, o.Delay)
	}
	if o.Jitter == 0 {
		o.Jitter = DefaultJitter
	}
	o.Jitter = max(o.Jitter, 0)
	if o.Probes == 0 {
		o.Probes = 1
	}
	if o.ProbeLimit == 0 {
		o.ProbeLimit = o.Delay
	}
	b := &breaker{layer: layer{inner: inner, of: kindBreaker}, o: o, base: time.Now().Add(-1)}
	b.notes.tell = o.Notice
	b.alarm = alarm{notifier: &b.notes, on: alarms, base: b.base}
	b.openings.first, b.openings.jitter = o.FirstDelay, o.Jitter
	b.circuit.Store(b.newCircuit())
	return b, nil
}

type breaker struct {
	layer
	monitor
	o    BreakerOptions
	base time.Time // a moment before the breaker was made, so that no time since is 0

	circuit   atomic.Pointer[circuit]
	until     atomic.Int64 // time since base up to which the open breaker refuses; 0 if it is not open
	cause     atomic.Value // cause{} of the latest failure
	replacing sync.Mutex   // held while a circuit is replaced
	openings  openings
}

// monitor judges the store's health by the outcome of calls, and reports a misconfigured store.
type monitor struct {
	notes  notifier
	alarm  alarm
	failed roundTrips

	opened, refusals atomic.Int64
}

// readings tells the state of a breaker, how often it opened, and how many calls it refused.
func (m *monitor) readings(state string, tell func(driver.Reading)) {
	for _, s := range [...]struct {
		metric driver.Metric
		state  string
	}{{driver.MetricBreakersClosed, "closed"}, {driver.MetricBreakersHalfOpen, "half-open"}, {driver.MetricBreakersOpen, "open"}} {
		r := driver.Reading{Metric: s.metric}
		if s.state == state {
			r.Value = 1
		}
		tell(r)
	}
	tell(driver.Reading{Metric: driver.MetricBreakerOpenings, Value: m.opened.Load()})
	tell(driver.Reading{Metric: driver.MetricBreakerRefusals, Value: m.refusals.Load()})
}

// judge is the function judge, but counts the failures of one round trip once.
func (m *monitor) judge(ctx context.Context, err error) outcome {
	if err == nil {
		return healthy
	}
	m.alarm.check(err)
	o := judge(ctx, err)
	if o == failed && m.failed.repeated(err) {
		return unrelated
	}
	return o
}

// circuit is a gobreaker. It is replaced where a probe hangs, because gobreaker waits for its probes without
// end.
type circuit struct {
	*gobreaker.TwoStepCircuitBreaker[none]
	phase    atomic.Uint64 // four times the changes of state, plus the state
	probed   atomic.Int64  // time since base of the latest probe, 0 unless half-open
	replaced atomic.Bool   // its changes of state no longer matter
	tripped  bool          // opens at the next failure

	// failing is the time since base of the first of the present failures in a row. gobreaker's lock guards
	// it.
	failing int64

	// failures counts those reported to gobreaker, and cleared those of them that a success followed. While
	// the two are equal, and failures in a row are counted, another success changes no count.
	failures, cleared atomic.Uint64
}

const phases = 4 // more than gobreaker has states

// quiet reports whether a success would change no count.
func (c *circuit) quiet() bool {
	return c.phase.Load()%phases == uint64(gobreaker.StateClosed) && c.failures.Load() == c.cleared.Load()
}

// BreakerState returns the state of the breaker around a store, also inside other policies: "closed", "open",
// or "half-open" from when a probe may be made. It is "" if the store has no breaker. Of the breakers of several nodes
// it is the worst state, see [BreakerStates].
func BreakerState(s quota.Store) string {
	if b, ok := driver.Find[interface{ state() string }](s); ok {
		return b.state()
	}
	return ""
}

func (b *breaker) state() string {
	// gobreaker's State would make it half-open before our delay is over.
	state := gobreaker.State(b.circuit.Load().phase.Load() % phases)
	switch until := b.until.Load(); {
	case until > b.now():
		state = gobreaker.StateOpen
	case state == gobreaker.StateOpen:
		state = gobreaker.StateHalfOpen
	}
	return state.String()
}

// Readings tells the breaker's state and counts.
func (b *breaker) Readings(tell func(driver.Reading)) { b.readings(b.state(), tell) }

type none struct{}

type cause struct{ error }

// The results of a call that are reported to gobreaker, beside nil.
var (
	errFailed    = errors.New("failed")
	errUnrelated = errors.New("unrelated")
)

func (b *breaker) newCircuit() *circuit {
	c := &circuit{}
	c.TwoStepCircuitBreaker = gobreaker.NewTwoStepCircuitBreaker[none](gobreaker.Settings{
		MaxRequests:  uint32(b.o.Probes),
		Interval:     b.o.Window,
		BucketPeriod: b.o.Slice,
		// The shortest opening: gobreaker's are all the same, so until refuses calls in front of it. Its
		// opening ends only after its Timeout, and ours at the time itself, hence the -1.
		Timeout: max(time.Duration(float64(b.o.FirstDelay)*(1-b.o.Jitter))-1, 1),
		ReadyToTrip: func(n gobreaker.Counts) bool {
			switch {
			case c.tripped:
				return true
			case b.o.Trip != nil:
				return b.o.Trip(n)
			}
			now := b.now()
			if n.ConsecutiveFailures == 1 {
				c.failing = now
			}
			return n.ConsecutiveFailures >= uint32(b.o.Failures) && now-c.failing >= int64(b.o.FailingFor)
		},
		IsExcluded:    func(err error) bool { return err == errUnrelated },
		OnStateChange: func(_ string, from, to gobreaker.State) { b.changed(c, from, to) },
	})
	return c
}

func (b *breaker) now() int64 { return int64(time.Since(b.base)) }

// changed is called with gobreaker's lock held.
func (b *breaker) changed(c *circuit, from, to gobreaker.State) {
	defer c.phase.Store((c.phase.Load()/phases+1)*phases + uint64(to))
	if c.replaced.Load() {
		return
	}
	until, probed := int64(0), int64(0)
	switch to {
	case gobreaker.StateOpen:
		again := from == gobreaker.StateHalfOpen || c.tripped
		delay := b.openings.open(b.o.Delay, again)
		until = b.now() + int64(delay)
		b.opened.Add(1)
		text := fmt.Sprintf("the circuit breaker opened, the store keeps failing; it is probed in %v", delay)
		if again {
			text = fmt.Sprintf("the circuit breaker opened again, a probe of the store failed; the next is in %v", delay)
		}
		last, _ := b.cause.Load().(cause)
		b.notes.send("breaker", text, last.error)
	case gobreaker.StateHalfOpen:
		// A result that comes late can bring gobreaker's half-open state forward. Calls are refused until our
		// delay is over all the same.
		until = b.until.Load()
		probed = max(b.now(), until)
		b.notes.send("breaker", "the circuit breaker is half-open: the store is being probed", nil)
	case gobreaker.StateClosed:
		b.openings.close()
		b.notes.send("breaker", "the circuit breaker closed: the store answers", nil)
	}
	b.until.Store(until)
	c.probed.Store(probed)
}

func (b *breaker) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	p, err := b.allow()
	if err != nil {
		return d, err
	}
	defer b.done(&p)
	d, err = b.inner.Charge(ctx, c)
	b.returned(&p, ctx, err)
	return d, err
}

func (b *breaker) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	p, err := b.allow()
	if err != nil {
		return err
	}
	defer b.done(&p)
	err = b.inner.ChargeAll(ctx, cs, out)
	b.returned(&p, ctx, err)
	return err
}

// permit is the permit of a call in flight.
type permit struct {
	circuit  *circuit
	phase    uint64      // the circuit's when the call began
	done     func(error) // reports the result to gobreaker; nil where gobreaker was not asked
	returned bool
	outcome  outcome
}

// allow lets a call through, or returns its error. gobreaker takes its lock and reads the clock twice for
// each call, so while the circuit is quiet it is not asked: only failures, and the success after one, are
// reported to it.
func (b *breaker) allow() (p permit, err error) {
	if until := b.until.Load(); until != 0 {
		if left := until - b.now(); left > 0 {
			b.refusals.Add(1)
			return p, b.orClosed(&openError{time.Duration(left)})
		}
	}
	p.circuit = b.circuit.Load()
	p.phase = p.circuit.phase.Load()
	if b.o.Trip == nil && p.circuit.quiet() {
		return p, nil
	}
	if p.done, err = p.circuit.Allow(); err != nil {
		b.refusals.Add(1)
		return p, b.refused(p.circuit)
	}
	if now := p.circuit.phase.Load(); now%phases == uint64(gobreaker.StateHalfOpen) {
		p.phase = now // which Allow made it
	}
	if p.circuit.probed.Load() != 0 {
		p.circuit.probed.Store(b.now())
	}
	return p, nil
}

// returned notes the result of a call.
func (b *breaker) returned(p *permit, ctx context.Context, err error) {
	if p.outcome = b.judge(ctx, err); p.outcome == failed {
		b.cause.Store(cause{err})
	}
	p.returned = true
}

// done reports the result of a call to gobreaker, a panic or runtime.Goexit included.
func (b *breaker) done(p *permit) {
	if !p.returned {
		p.outcome = failed
		b.cause.Store(cause{errNoReturn})
	}
	switch {
	case p.outcome == failed:
		p.report(errFailed)
	case p.outcome == unrelated && p.done != nil:
		p.report(errUnrelated)
	case p.outcome == healthy && (p.done != nil || !p.circuit.quiet()):
		p.report(nil)
	}
}

var errNoReturn = errors.New("resilience: the store did not return: a panic or runtime.Goexit")

// report reports the result of a call to gobreaker, unless the state has changed since the call began.
// gobreaker would then ignore the result, but read its clock, and might become half-open before our delay is
// over.
func (p *permit) report(result error) {
	c, done := p.circuit, p.done
	if c.phase.Load() != p.phase {
		return
	}
	if done == nil {
		var err error
		if done, err = c.Allow(); err != nil {
			return
		}
		if c.phase.Load() != p.phase {
			result = errUnrelated
		}
	}
	failures := c.failures.Load()
	done(result)
	switch {
	case result == errFailed:
		// Only now: a success before gobreaker knew of the failure must not pass for one after it.
		c.failures.Add(1)
	case result == nil && c.phase.Load() == p.phase: // otherwise gobreaker may have ignored it
		c.cleared.Store(failures)
	}
}

// refused returns the error of a call that gobreaker did not let through, and gives a probe up that hangs.
func (b *breaker) refused(c *circuit) error {
	if b.hangs(c) {
		b.replace(c)
	}
	return b.orClosed(&openError{time.Duration(max(b.until.Load()-b.now(), 0))})
}

// hangs reports whether a circuit waits for a probe that has passed its limit.
func (b *breaker) hangs(c *circuit) bool {
	at := c.probed.Load()
	return at != 0 && b.now()-at >= int64(b.o.ProbeLimit)
}

// replace replaces a circuit whose probe hangs by one that is open.
func (b *breaker) replace(c *circuit) {
	b.replacing.Lock()
	defer b.replacing.Unlock()
	if b.circuit.Load() != c || !b.hangs(c) {
		return
	}
	c.replaced.Store(true)
	b.cause.Store(cause{fmt.Errorf("resilience: a probe of the store has not returned within %v", b.o.ProbeLimit)})
	open := b.newCircuit()
	open.tripped = true
	if done, err := open.Allow(); err == nil {
		done(errFailed)
	}
	open.tripped = false
	b.circuit.Store(open)
}

// openError is the error of a call that an open breaker refused.
type openError struct{ after time.Duration }

func (e *openError) Error() string {
	if e.after <= 0 {
		return fmt.Sprintf("resilience: %v: %v, and the store is being probed", quota.ErrUnavailable, ErrOpen)
	}
	return fmt.Sprintf("resilience: %v: %v, the next probe is in %v", quota.ErrUnavailable, ErrOpen, e.after)
}

func (e *openError) Is(target error) bool { return target == ErrOpen || target == quota.ErrUnavailable }

// RetryAfter returns the time until the next probe, 0 if that is unknown.
func (e *openError) RetryAfter() time.Duration { return e.after }
