package quotaotel

import (
	"context"
	"fmt"
	"reflect"
	"sync"
	"sync/atomic"
	"unique"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// scope is the name of the meter and the tracer.
const scope = "github.com/fleetquota/fleetquota"

// DefaultMaxLimits is Options.MaxLimits where that is 0.
const DefaultMaxLimits = 200

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// MeterProvider and TracerProvider are those of the program's SDK; nil is OpenTelemetry's global one.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
	// MaxLimits is how many names of limits are told apart; 0 is DefaultMaxLimits.
	MaxLimits int
}

// Telemetry tells OpenTelemetry of the decisions of limiters. [New] makes one.
type Telemetry struct {
	maxLimits int
	tracer    trace.Tracer

	decisions, tokens, never, failures       metric.Int64Counter
	durations, utilization, retryAfter, wait metric.Float64Histogram

	limits     atomic.Pointer[map[unique.Handle[string]]*limitOptions] // by name; a map does not change once it is here
	other      *limitOptions
	failed     sync.Map // of string, a class: the []metric.AddOption of an error
	durationOf [unknown + 2][]metric.RecordOption

	mu       sync.Mutex // held while limits is replaced, and guards the fields below
	chargers []watched
}

// watched is a limiter or charger whose store is asked for its numbers.
type watched interface {
	Store() quota.Store
	Waiting() int
}

// unknown is the number of a source that this release does not know, and noSource that of a call that failed.
const (
	unknown  = int(quota.FromLease) + 1
	noSource = unknown + 1
)

// New returns telemetry of no call. An option that is not accepted is [quota.ErrInvalid]; other errors are the provider's.
func New(o *Options) (*Telemetry, error) {
	if o == nil {
		o = &Options{}
	}
	t := &Telemetry{maxLimits: o.MaxLimits}
	switch {
	case t.maxLimits < 0:
		return nil, fmt.Errorf("quotaotel: %w: Options.MaxLimits is %d; accepted: 0 or more", quota.ErrInvalid, t.maxLimits)
	case t.maxLimits == 0:
		t.maxLimits = DefaultMaxLimits
	}
	meters, tracers := o.MeterProvider, o.TracerProvider
	if meters == nil {
		meters = otel.GetMeterProvider()
	}
	if tracers == nil {
		tracers = otel.GetTracerProvider()
	}
	t.tracer = tracers.Tracer(scope)
	if err := t.instruments(meters.Meter(scope)); err != nil {
		return nil, fmt.Errorf("quotaotel: %w", err)
	}
	t.other = newLimitOptions("other")
	t.limits.Store(&map[unique.Handle[string]]*limitOptions{})
	for i := range t.durationOf {
		t.durationOf[i] = []metric.RecordOption{metric.WithAttributes(attribute.String("fleetquota.source", sourceName(i)))}
	}
	return t, nil
}

func sourceName(i int) string {
	if i == noSource {
		return "none"
	}
	return quota.Source(i).String()
}

// instruments makes the instruments, and the callback of those that are read.
func (t *Telemetry) instruments(m metric.Meter) (err error) {
	counter := func(to *metric.Int64Counter, name, unit, help string) {
		c, e := m.Int64Counter("fleetquota."+name, metric.WithUnit(unit), metric.WithDescription(help))
		if *to = c; err == nil {
			err = e
		}
	}
	histogram := func(to *metric.Float64Histogram, name, unit, help string, bounds ...float64) {
		h, e := m.Float64Histogram("fleetquota."+name, metric.WithUnit(unit), metric.WithDescription(help), metric.WithExplicitBucketBoundaries(bounds...))
		if *to = h; err == nil {
			err = e
		}
	}
	counter(&t.decisions, "decisions", "{decision}", "Charges by their outcome.")
	counter(&t.tokens, "tokens", "{token}", "Tokens that were charged, given back, and denied.")
	counter(&t.never, "never_denials", "{decision}", "Denials of charges that can never fit.")
	counter(&t.failures, "errors", "{call}", "Calls that failed, by the class of their error.")
	histogram(&t.durations, "decision.duration", "s", "The time of calls that asked the store, without waits for quota.",
		1e-6, 1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, .01, .025, .05, .1, .25, .5, 1, 2.5, 10)
	histogram(&t.utilization, "utilization", "1", "How much of the limit was used after a decision; above 1 is debt.",
		0, .1, .2, .3, .4, .5, .6, .7, .8, .9, .95, .99, 1, 2)
	histogram(&t.retryAfter, "denial.retry_after", "s", "How long denied callers have to wait until the same charge fits.",
		.001, .01, .1, .5, 1, 5, 15, 60, 300, 900, 3600, 6*3600, 24*3600, 7*24*3600)
	histogram(&t.wait, "wait.duration", "s", "How long calls of Wait and WaitAll waited for their turn and for quota.",
		.001, .01, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
	if err != nil {
		return err
	}
	waiters, err := m.Int64ObservableGauge("fleetquota.waiters", metric.WithUnit("{call}"), metric.WithDescription("Calls of Wait and WaitAll that wait now."))
	if err != nil {
		return err
	}
	all, of := []metric.Observable{waiters}, map[driver.Metric]metric.Int64Observable{}
	for k := range driver.Metrics() {
		name, help := "fleetquota."+k.String(), metric.WithDescription(k.Help())
		var o metric.Int64Observable
		if k.Counter() {
			o, err = m.Int64ObservableCounter(name, help)
		} else {
			o, err = m.Int64ObservableGauge(name, help)
		}
		if err != nil {
			return err
		}
		all, of[k] = append(all, o), o
	}
	_, err = m.RegisterCallback(func(_ context.Context, observer metric.Observer) error {
		t.read(observer, waiters, of)
		return nil
	}, all...)
	return err
}

// Watch has the SDK read the numbers of a limiter's store and policies, and its waiting callers, from now on. Of several limiters
// and chargers the numbers are added up; a store that they share is read once.
func (t *Telemetry) Watch(limiter interface {
	Store() quota.Store
	Waiting() int
}) {
	w := watched(limiter)
	if l, ok := limiter.(*quota.Limiter); ok {
		w = l.Charger // limiters of one charger share its waiting callers
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, known := range t.chargers {
		if known == w {
			return
		}
	}
	t.chargers = append(t.chargers, w)
}

// read tells an observer the numbers of this moment.
func (t *Telemetry) read(observer metric.Observer, waiters metric.Int64Observable, of map[driver.Metric]metric.Int64Observable) {
	t.mu.Lock()
	chargers := t.chargers[:len(t.chargers):len(t.chargers)]
	t.mu.Unlock()
	waiting, sums, stores := 0, map[driver.Reading]int64{}, map[quota.Store]bool{}
	for _, c := range chargers {
		waiting += c.Waiting()
		store := c.Store()
		if reflect.TypeOf(store).Comparable() {
			if stores[store] {
				continue
			}
			stores[store] = true
		}
		for _, r := range backend.Readings(store) {
			value := r.Value
			r.Value = 0
			sums[r] += value
		}
	}
	observer.ObserveInt64(waiters, int64(waiting))
	for r, value := range sums {
		store := "primary"
		if r.Fallback {
			store = "fallback"
		}
		attributes := []attribute.KeyValue{attribute.String("fleetquota.store", store)}
		if r.Metric.ByNode() {
			attributes = append(attributes, attribute.String("fleetquota.node", r.Node))
		}
		if r.Metric == driver.MetricServers {
			attributes = append(attributes, attribute.String("fleetquota.server.kind", r.Server), attribute.String("fleetquota.server.version", r.Version))
		}
		observer.ObserveInt64(of[r.Metric], value, metric.WithAttributes(attributes...))
	}
}

// limitOptions are the options of measurements of a limit. They are made once, for each costs an allocation.
type limitOptions struct {
	name                        string
	plain                       []metric.RecordOption
	never                       []metric.AddOption
	charged, returned, replayed []metric.AddOption
	denied, shadowDenied        []metric.AddOption
	decisions                   [ops][len(outcomes)][unknown + 2]atomic.Pointer[[]metric.AddOption]
}

// ops is how many operations have options of their own. An operation of a refused call is any number: those above have the last.
const ops = 16

// outcomes of a charge.
const (
	allowed = iota
	denied
	notMade
	shadowDenied
	failed
	refused
)

var outcomes = [...]string{"allowed", "denied", "not_made", "shadow_denied", "error", "refused"}

func newLimitOptions(name string) *limitOptions {
	limit := attribute.String("fleetquota.limit", name)
	of := func(outcome string) []metric.AddOption {
		return []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(limit, attribute.String("fleetquota.outcome", outcome)))}
	}
	plain := metric.WithAttributeSet(attribute.NewSet(limit))
	return &limitOptions{
		name: name, plain: []metric.RecordOption{plain}, never: []metric.AddOption{plain},
		charged: of("charged"), returned: of("returned"), replayed: of("replayed"), denied: of("denied"), shadowDenied: of("shadow_denied"),
	}
}

// limit returns the options of a limit, which is nil or not valid in a refused call.
func (t *Telemetry) limit(l *quota.Limit) *limitOptions {
	if l == nil || l.Err() != nil {
		return t.other
	}
	if known := (*t.limits.Load())[l.Handle()]; known != nil {
		return known
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	all := *t.limits.Load()
	if known := all[l.Handle()]; known != nil {
		return known
	}
	if len(all) >= t.maxLimits {
		return t.other
	}
	grown := make(map[unique.Handle[string]]*limitOptions, len(all)+1)
	for k, v := range all {
		grown[k] = v
	}
	grown[l.Handle()] = newLimitOptions(l.Name())
	t.limits.Store(&grown)
	return grown[l.Handle()]
}

// decision counts a charge.
func (t *Telemetry) decision(ctx context.Context, limit *limitOptions, op quota.Op, outcome, source int) {
	op = min(op, ops-1)
	cached := &limit.decisions[op][outcome][source]
	options := cached.Load()
	if options == nil {
		options = &[]metric.AddOption{metric.WithAttributeSet(attribute.NewSet(
			attribute.String("fleetquota.limit", limit.name), attribute.String("fleetquota.op", op.String()),
			attribute.String("fleetquota.outcome", outcomes[outcome]), attribute.String("fleetquota.source", sourceName(source))))}
		cached.Store(options)
	}
	t.decisions.Add(ctx, 1, *options...)
}

// Observe counts a call, and adds events to the span of its context. It is one of quota.Options.Observers.
func (t *Telemetry) Observe(ctx context.Context, c *quota.Call) {
	span := trace.SpanFromContext(ctx)
	if c.Err != nil {
		t.fail(ctx, span, c)
		return
	}
	decided, decider := &c.Charges[c.Decider], &c.Decisions[c.Decider]
	for i := range c.Charges {
		t.charge(ctx, &c.Charges[i], &c.Decisions[i], c.Granted && c.Decisions[i].Alternative == decider.Alternative, c.Granted)
	}
	t.durations.Record(ctx, c.Took.Seconds(), t.durationOf[min(int(decider.Source), unknown)]...)
	t.waited(ctx, span, c, decided)
	if !c.Granted && decided.Op != quota.OpPeek && span.IsRecording() {
		attributes := []attribute.KeyValue{
			attribute.String("fleetquota.limit", t.limit(decided.Limit).name), attribute.String("fleetquota.op", decided.Op.String()),
			attribute.Int64("fleetquota.cost", decided.Cost), attribute.Int64("fleetquota.remaining", decider.Remaining),
			attribute.Int64("fleetquota.capacity", decider.Capacity), attribute.String("fleetquota.source", decider.Source.String()),
		}
		if decider.RetryAfter != quota.Never {
			attributes = append(attributes, attribute.Float64("fleetquota.retry_after", decider.RetryAfter.Seconds()))
		}
		span.AddEvent("fleetquota.denied", trace.WithAttributes(attributes...))
	}
}

// waited notes the time that a call waited.
func (t *Telemetry) waited(ctx context.Context, span trace.Span, c *quota.Call, of *quota.Charge) {
	if c.Waited == 0 {
		return
	}
	limit := t.limit(of.Limit)
	t.wait.Record(ctx, c.Waited.Seconds(), limit.plain...)
	if span.IsRecording() {
		span.AddEvent("fleetquota.waited", trace.WithAttributes(attribute.String("fleetquota.limit", limit.name), attribute.Float64("fleetquota.waited", c.Waited.Seconds())))
	}
}

// charge counts a charge and its decision. made says that its list was granted and taken, and granted that any was.
func (t *Telemetry) charge(ctx context.Context, c *quota.Charge, d *quota.Decision, made, granted bool) {
	limit, outcome := t.limit(c.Limit), notMade
	switch {
	case made && d.Allowed:
		outcome = allowed
		switch {
		case d.Replayed:
			t.tokens.Add(ctx, max(d.Charged, 0), limit.replayed...)
		case d.Charged > 0:
			t.tokens.Add(ctx, d.Charged, limit.charged...)
		case d.Charged < 0:
			t.tokens.Add(ctx, -d.Charged, limit.returned...)
		}
	case d.Shadow && !d.Allowed:
		outcome = shadowDenied
		if c.Op != quota.OpPeek {
			t.tokens.Add(ctx, c.Cost, limit.shadowDenied...)
		}
	case !granted && !d.Allowed:
		outcome = denied
		if c.Op != quota.OpPeek {
			t.tokens.Add(ctx, c.Cost, limit.denied...)
		}
		if d.RetryAfter == quota.Never {
			t.never.Add(ctx, 1, limit.never...)
		} else {
			t.retryAfter.Record(ctx, d.RetryAfter.Seconds(), limit.plain...)
		}
	}
	t.decision(ctx, limit, c.Op, outcome, min(int(d.Source), unknown))
	switch d.Source {
	case quota.FromOpen, quota.FromClosed: // which know nothing of the key
	default:
		if c.Op != quota.OpPeek && d.Capacity > 0 {
			t.utilization.Record(ctx, 1-float64(d.Remaining)/float64(d.Capacity), limit.plain...)
		}
	}
}

// fail counts a call that failed.
func (t *Telemetry) fail(ctx context.Context, span trace.Span, c *quota.Call) {
	outcome := failed
	if c.Refused {
		outcome = refused
	} else {
		t.durations.Record(ctx, c.Took.Seconds(), t.durationOf[noSource]...)
	}
	class := driver.Class(c.Err)
	options, ok := t.failed.Load(class)
	if !ok {
		options, _ = t.failed.LoadOrStore(class, []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(attribute.String("error.type", class)))})
	}
	t.failures.Add(ctx, 1, options.([]metric.AddOption)...)
	for i := range c.Charges {
		t.decision(ctx, t.limit(c.Charges[i].Limit), c.Charges[i].Op, outcome, noSource)
	}
	if len(c.Charges) > 0 {
		t.waited(ctx, span, c, &c.Charges[0])
	}
	if span.IsRecording() {
		attributes := []attribute.KeyValue{attribute.String("error.type", class), attribute.Bool("fleetquota.refused", c.Refused)}
		if len(c.Charges) > 0 {
			attributes = append(attributes, attribute.String("fleetquota.limit", t.limit(c.Charges[0].Limit).name))
		}
		span.AddEvent("fleetquota.failed", trace.WithAttributes(attributes...))
	}
}
