package quotaotel

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"github.com/fleetquota/fleetquota/observe/internal/calls"
	"github.com/fleetquota/fleetquota/observe/internal/watched"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// scope is the name of the meter and the tracer.
const scope = "github.com/fleetquota/fleetquota"

// Defaults of [Options].
const (
	DefaultMaxLimits  = 200
	DefaultMaxTenants = 100
)

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// MeterProvider and TracerProvider are those of the program's SDK; nil is OpenTelemetry's global one.
	MeterProvider  metric.MeterProvider
	TracerProvider trace.TracerProvider
	// MaxLimits is how many names of limits are told apart; 0 is DefaultMaxLimits.
	MaxLimits int
	// Tenant returns the tenant of a key, for the attribute fleetquota.tenant of fleetquota.decisions and fleetquota.tokens; nil leaves
	// it out. It is called for each charge, concurrently, also with keys of refused calls, which have any bytes and length. A
	// tenant that is not in UTF-8 is "other".
	Tenant func(key string) string
	// MaxTenants is how many tenants are told apart, those that came first; further ones are "other". 0 is DefaultMaxTenants.
	MaxTenants int
}

// Telemetry tells OpenTelemetry of the decisions of limiters. [New] makes one.
type Telemetry struct {
	maxLimits, maxTenants int
	tenant                func(key string) string // nil for none
	tenants               calls.Tenants
	tracer                trace.Tracer

	decisions, tokens, never, failures       metric.Int64Counter
	durations, utilization, retryAfter, wait metric.Float64Histogram

	limits     calls.Limits[limitOptions]
	other      *limitOptions
	failed     sync.Map // of string, a class: the []metric.AddOption of an error
	durationOf [calls.Sources][]metric.RecordOption

	watched watched.Set
}

// New returns telemetry of no call. An option that is not accepted is [quota.ErrInvalid]; other errors are the provider's.
func New(o *Options) (*Telemetry, error) {
	if o == nil {
		o = &Options{}
	}
	if o.MaxLimits < 0 {
		return nil, fmt.Errorf("quotaotel: %w: Options.MaxLimits is %d; accepted: 0 or more", quota.ErrInvalid, o.MaxLimits)
	}
	if o.MaxTenants < 0 {
		return nil, fmt.Errorf("quotaotel: %w: Options.MaxTenants is %d; accepted: 0 or more", quota.ErrInvalid, o.MaxTenants)
	}
	t := &Telemetry{maxLimits: cmp.Or(o.MaxLimits, DefaultMaxLimits), maxTenants: cmp.Or(o.MaxTenants, DefaultMaxTenants), tenant: o.Tenant}
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
	t.other = newLimitOptions(calls.Other)
	for i := range t.durationOf {
		t.durationOf[i] = []metric.RecordOption{metric.WithAttributes(attribute.String("fleetquota.source", calls.Source(i).String()))}
	}
	return t, nil
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
	observable := func(name, help string, counter bool) (o metric.Int64Observable, err error) {
		if counter {
			o, err = m.Int64ObservableCounter("fleetquota."+name, metric.WithDescription(help))
		} else {
			o, err = m.Int64ObservableGauge("fleetquota."+name, metric.WithDescription(help))
		}
		all = append(all, o)
		return o, err
	}
	var reserved []metric.Int64Observable // of watched.OfReservations
	for _, r := range watched.OfReservations {
		o, err := observable(r.Name, r.Help, r.Counter)
		if err != nil {
			return err
		}
		reserved = append(reserved, o)
	}
	for k := range driver.Metrics() {
		if of[k], err = observable(k.String(), k.Help(), k.Counter()); err != nil {
			return err
		}
	}
	_, err = m.RegisterCallback(func(_ context.Context, observer metric.Observer) error {
		observer.ObserveInt64(waiters, int64(t.watched.Waiting()))
		reservations := t.watched.Reservations()
		for i, r := range watched.OfReservations {
			observer.ObserveInt64(reserved[i], r.Of(reservations))
		}
		t.read(observer, of)
		return nil
	}, all...)
	return err
}

// Watch has the SDK read the numbers of a limiter's store and policies, its waiting callers and its reservations from now on. Of several limiters
// and chargers the numbers are added up; a store that they share is read once.
func (t *Telemetry) Watch(limiter interface {
	Store() quota.Store
	Waiting() int
}) {
	t.watched.Add(limiter)
}

// read tells an observer the stores' numbers of this moment.
func (t *Telemetry) read(observer metric.Observer, of map[driver.Metric]metric.Int64Observable) {
	for _, r := range t.watched.Readings() {
		attributes := []attribute.KeyValue{attribute.String("fleetquota.store", watched.StoreName(r))}
		if r.Metric.ByNode() {
			attributes = append(attributes, attribute.String("fleetquota.node", r.Node))
		}
		if r.Metric == driver.MetricServers {
			attributes = append(attributes, attribute.String("fleetquota.server.kind", r.Server), attribute.String("fleetquota.server.version", r.Version))
		}
		observer.ObserveInt64(of[r.Metric], r.Value, metric.WithAttributes(attributes...))
	}
}

// limitOptions are the options of measurements of a limit. They are made once, for each costs an allocation.
type limitOptions struct {
	name    string
	plain   []metric.RecordOption
	never   []metric.AddOption
	charges *chargeOptions // without a tenant
	tenants calls.ByTenant[chargeOptions]
}

// chargeOptions are the options of measurements of a limit and tenant.
type chargeOptions struct {
	of        []attribute.KeyValue // the limit and the tenant
	tokens    [calls.KindsOfToken][]metric.AddOption
	decisions [ops]atomic.Pointer[decisionOptions]
}

type decisionOptions [calls.Outcomes][calls.Sources]atomic.Pointer[[]metric.AddOption]

// ops is how many operations have options of their own. An operation of a refused call is any number: those above have the last.
const ops = 16

func newLimitOptions(name string) *limitOptions {
	limit := attribute.String("fleetquota.limit", name)
	plain := metric.WithAttributeSet(attribute.NewSet(limit))
	return &limitOptions{name: name, plain: []metric.RecordOption{plain}, never: []metric.AddOption{plain}, charges: newChargeOptions(limit)}
}

func newChargeOptions(of ...attribute.KeyValue) *chargeOptions {
	c := &chargeOptions{of: of}
	for k := calls.NoTokens + 1; k < calls.KindsOfToken; k++ {
		c.tokens[k] = c.with(attribute.String("fleetquota.outcome", k.String()))
	}
	return c
}

// with returns options with the limit, the tenant, and more attributes.
func (c *chargeOptions) with(more ...attribute.KeyValue) []metric.AddOption {
	return []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(append(more, c.of...)...))}
}

// charges returns the options of a limit and of a key's tenant.
func (t *Telemetry) charges(limit *limitOptions, key string) *chargeOptions {
	if t.tenant == nil {
		return limit.charges
	}
	tenant := t.tenants.Label(t.tenant(key), t.maxTenants)
	return limit.tenants.Of(tenant, func() *chargeOptions {
		return newChargeOptions(attribute.String("fleetquota.limit", limit.name), attribute.String("fleetquota.tenant", tenant))
	})
}

// limit returns the options of a limit, which is nil or not valid in a refused call.
func (t *Telemetry) limit(l *quota.Limit) *limitOptions {
	if l == nil || l.Err() != nil {
		return t.other
	}
	if known := t.limits.Find(l); known != nil {
		return known
	}
	return cmp.Or(t.limits.Add(l, t.maxLimits, func() *limitOptions { return newLimitOptions(l.Name()) }), t.other)
}

// decision counts a charge.
func (t *Telemetry) decision(ctx context.Context, c *chargeOptions, op quota.Op, outcome calls.Outcome, source calls.Source) {
	op = min(op, ops-1)
	of := c.decisions[op].Load()
	if of == nil {
		c.decisions[op].CompareAndSwap(nil, new(decisionOptions))
		of = c.decisions[op].Load()
	}
	cached := &of[outcome][source]
	options := cached.Load()
	if options == nil {
		made := c.with(attribute.String("fleetquota.op", op.String()), attribute.String("fleetquota.outcome", outcome.String()), attribute.String("fleetquota.source", source.String()))
		options = &made
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
		t.charge(ctx, &c.Charges[i], &c.Decisions[i], calls.Of(c, i))
	}
	t.durations.Record(ctx, c.Took.Seconds(), t.durationOf[calls.SourceOf(decider)]...)
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

// charge counts a charge and its decision.
func (t *Telemetry) charge(ctx context.Context, c *quota.Charge, d *quota.Decision, is calls.Charge) {
	limit := t.limit(c.Limit)
	charges := t.charges(limit, c.Key)
	if is.Tokens != calls.NoTokens {
		t.tokens.Add(ctx, is.Count, charges.tokens[is.Tokens]...)
	}
	switch {
	case is.Outcome != calls.Denied:
	case d.RetryAfter == quota.Never:
		t.never.Add(ctx, 1, limit.never...)
	default:
		t.retryAfter.Record(ctx, d.RetryAfter.Seconds(), limit.plain...)
	}
	t.decision(ctx, charges, c.Op, is.Outcome, calls.SourceOf(d))
	if used, ok := calls.Utilization(c, d); ok {
		t.utilization.Record(ctx, used, limit.plain...)
	}
}

// fail counts a call that failed.
func (t *Telemetry) fail(ctx context.Context, span trace.Span, c *quota.Call) {
	if !c.Refused {
		t.durations.Record(ctx, c.Took.Seconds(), t.durationOf[calls.NoSource]...)
	}
	class := driver.Class(c.Err)
	options, ok := t.failed.Load(class)
	if !ok {
		options, _ = t.failed.LoadOrStore(class, []metric.AddOption{metric.WithAttributeSet(attribute.NewSet(attribute.String("error.type", class)))})
	}
	t.failures.Add(ctx, 1, options.([]metric.AddOption)...)
	for i := range c.Charges {
		charge := &c.Charges[i]
		t.decision(ctx, t.charges(t.limit(charge.Limit), charge.Key), charge.Op, calls.OfError(c), calls.NoSource)
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
