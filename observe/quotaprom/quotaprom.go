// Package quotaprom tells Prometheus of the decisions of limiters, and of the state of the stores and policies behind them.
//
//	metrics := quotaprom.New(nil)
//	limiter, err := quota.NewLimiter(store, limit, &quota.Options{Observers: []func(context.Context, *quota.Call){metrics.Observe}})
//	metrics.Watch(limiter)
//	prometheus.MustRegister(metrics)
//	http.Handle("/metrics", promhttp.Handler())
//
// [Metrics.Observe] is an observer of calls, and [Metrics.Watch] has a scrape tell the numbers of the limiter's store and policies,
// and of its reservations.
//
// # Calls
//
//	fleetquota_decisions_total{limit,op,outcome,source}   charges, by their outcome
//	fleetquota_tokens_total{limit,outcome}                tokens: charged, returned, denied, shadow_denied, and replayed under a request id
//	fleetquota_never_denials_total{limit}                 denials of charges that can never fit: larger than the limit
//	fleetquota_utilization_ratio{limit}                   how much of the limit was used after a decision: over 0.8 is near the limit
//	fleetquota_denial_retry_after_seconds{limit}          how long denied callers have to wait
//	fleetquota_wait_duration_seconds{limit}               how long calls of Wait waited for quota
//	fleetquota_waiters                                    calls of Wait that wait now
//	fleetquota_reservations_open                          reservations that are not finished
//	fleetquota_reservations_owed                          finishes that the store could not take yet
//	fleetquota_reservations_settled_total                 reservations that were settled, and so _released_total
//	fleetquota_reservations_lost_total                    reservations whose hold ended while they were open
//	fleetquota_reservations_lapsed_total                  reservations that lapsed before the store could be told how they ended
//	fleetquota_errors_total{class}                        calls that failed, by the error of package quota
//	fleetquota_decision_duration_seconds{source}          the time of calls, without waits; a native histogram too
//
// The outcome of a charge is allowed where it was made; denied where it did not fit and its list was denied; not_made where it
// fits, or was not the alternative taken, and nothing was charged; shadow_denied of a shadow that did not fit; error where the
// call failed, and refused where it failed before the store was asked. The sum over outcomes is the number of charges that
// callers passed. The source is where the decision was made, see [quota.Source]; none where the call failed. So the part of
// decisions that a limit denied is
//
//	rate(fleetquota_decisions_total{outcome="denied",op="take"}[5m]) / rate(fleetquota_decisions_total{op="take"}[5m])
//
// # Stores and policies
//
// The metrics of [driver.Metric] are called fleetquota_ and its name, and end with _total where it is a counter; so
// fleetquota_store_keys, fleetquota_breakers_open and fleetquota_degraded_calls_total. The label store is primary, or fallback for
// the store of a fallback; breakers, bulkheads and timeouts have the label node. fleetquota_server_info has kind and version.
//
// # Series
//
// No label holds a key. The names of limits are the program's, and at most [Options.MaxLimits] are told apart; tenants, if
// Options.Tenant tells them, are bounded too. Further ones are "other". So keys that strangers make up add no series.
//
// # Cost
//
// The observer adds no allocation to a decision. BenchmarkObserve measures its time; docs/metrics.md has the figures.
package quotaprom

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/observe/internal/calls"
	"github.com/fleetquota/fleetquota/observe/internal/watched"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Defaults of [Options].
const (
	DefaultMaxLimits  = 200
	DefaultMaxTenants = 100
)

// Options are the options of New. The zero value, and nil, take the defaults.
type Options struct {
	// MaxLimits is how many names of limits are told apart; the label limit of further ones is "other". 0 is DefaultMaxLimits.
	MaxLimits int
	// Tenant returns the tenant of a key, for a label tenant on fleetquota_decisions_total and fleetquota_tokens_total; nil leaves
	// the label out. It is called for each charge, concurrently, also with keys of refused calls, which have any bytes and length.
	// A tenant that is not in UTF-8 is "other".
	Tenant func(key string) string
	// MaxTenants is how many tenants are told apart, those that came first; further ones are "other". 0 is DefaultMaxTenants.
	MaxTenants int
	// Exemplar returns the labels of an exemplar for a call's duration, such as the trace_id of the span in its context; nil, or a nil
	// result, is none. They must be valid: up to 128 characters together. Prometheus gets exemplars in the format OpenMetrics.
	//
	//	func(ctx context.Context) prometheus.Labels {
	//		if span := trace.SpanContextFromContext(ctx); span.IsSampled() {
	//			return prometheus.Labels{"trace_id": span.TraceID().String()}
	//		}
	//		return nil
	//	}
	Exemplar func(ctx context.Context) prometheus.Labels
	// HealthTimeout has each scrape ask the servers of the watched stores for their health first, for this time at most, so that
	// fleetquota_server_info and fleetquota_server_evicted_keys_total are of that moment, and fleetquota_server_up tells whether
	// they answered. 0 asks nothing: then they are of the last backend.Health of the program.
	HealthTimeout time.Duration
}

// Metrics is a prometheus.Collector of the decisions of limiters. Use New to make one. Methods may be called concurrently.
type Metrics struct {
	o Options

	decisions, tokens, never      *prometheus.CounterVec
	utilization, retryAfter, wait *prometheus.HistogramVec
	failures                      *prometheus.CounterVec
	errors                        map[string]prometheus.Counter // by driver.Class
	durations                     [calls.Sources]*latency

	limits    calls.Limits[limitSeries]
	other     *limitSeries
	tenants   calls.Tenants
	mu        sync.Mutex // held while maps of decisions are replaced
	watched   watched.Set
	waiting   *prometheus.Desc
	up        *prometheus.Desc
	ofMetrics map[driver.Metric]*prometheus.Desc
	reserved  []*prometheus.Desc // of watched.OfReservations
}

// A Limiter can be watched by [Metrics.Watch]: it is a [quota.Limiter] or [quota.Charger], or one of package fleetquota.
type Limiter interface {
	Store() quota.Store // with its policies
	Waiting() int
}

// New returns metrics of no call. It panics where an option is negative, as prometheus.MustRegister does.
func New(o *Options) *Metrics {
	if o == nil {
		o = &Options{}
	}
	if o.MaxLimits < 0 || o.MaxTenants < 0 || o.HealthTimeout < 0 {
		panic(fmt.Sprintf("quotaprom: Options are %d limits, %d tenants and a timeout of %v; accepted: 0 or more", o.MaxLimits, o.MaxTenants, o.HealthTimeout))
	}
	m := &Metrics{o: *o, errors: map[string]prometheus.Counter{}, ofMetrics: map[driver.Metric]*prometheus.Desc{}}
	if m.o.MaxLimits == 0 {
		m.o.MaxLimits = DefaultMaxLimits
	}
	if m.o.MaxTenants == 0 {
		m.o.MaxTenants = DefaultMaxTenants
	}
	if m.o.Exemplar == nil {
		m.o.Exemplar = none
	}
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "fleetquota_" + name, Help: help}, labels)
	}
	histogram := func(name, help string, buckets []float64) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "fleetquota_" + name, Help: help, Buckets: buckets}, []string{"limit"})
	}
	var tenant []string
	if o.Tenant != nil {
		tenant = []string{"tenant"}
	}
	m.decisions = counter("decisions_total", "Charges by their outcome.", append(tenant, "limit", "op", "outcome", "source")...)
	m.tokens = counter("tokens_total", "Tokens that were charged, given back, and denied.", append(tenant, "limit", "outcome")...)
	m.never = counter("never_denials_total", "Denials of charges that can never fit.", "limit")
	m.failures = counter("errors_total", "Calls that failed, by the class of their error.", "class")
	m.utilization = histogram("utilization_ratio", "How much of the limit was used after a decision; above 1 is debt.",
		[]float64{0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1, 2})
	m.retryAfter = histogram("denial_retry_after_seconds", "How long denied callers have to wait until the same charge fits.",
		[]float64{0.001, 0.01, 0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 24 * 3600, 7 * 24 * 3600})
	m.wait = histogram("wait_duration_seconds", "How long calls of Wait and WaitAll waited for their turn and for quota.",
		[]float64{0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600})
	duration := prometheus.NewDesc("fleetquota_decision_duration_seconds", "The time of calls that asked the store, without waits for quota.", []string{"source"}, nil)
	for i := range m.durations {
		m.durations[i] = newLatency(duration, pair("source", calls.Source(i).String()))
	}
	for class := range driver.Classes() {
		m.errors[class] = m.failures.WithLabelValues(class)
	}
	m.waiting = prometheus.NewDesc("fleetquota_waiters", "Calls of Wait and WaitAll that wait now.", nil, nil)
	for _, r := range watched.OfReservations {
		name := "fleetquota_" + r.Name
		if r.Counter {
			name += "_total"
		}
		m.reserved = append(m.reserved, prometheus.NewDesc(name, r.Help, nil, nil))
	}
	m.up = prometheus.NewDesc("fleetquota_server_up", "1 if the servers of the stores answered the scrape's question for their health, else 0.", nil, nil)
	for metric := range driver.Metrics() {
		name, labels := "fleetquota_"+metric.String(), []string{"store"}
		if metric.Counter() {
			name += "_total"
		}
		if metric.ByNode() {
			labels = append(labels, "node")
		}
		if metric == driver.MetricServers {
			labels = append(labels, "kind", "version")
		}
		m.ofMetrics[metric] = prometheus.NewDesc(name, metric.Help(), labels, nil)
	}
	m.other = m.newLimit(calls.Other)
	return m
}

// Watch has scrapes tell the numbers of a limiter's store and policies, its waiting callers and its reservations from now on. Of several limiters
// and chargers the numbers are added up; a store that they share is told once.
func (m *Metrics) Watch(l Limiter) { m.watched.Add(l) }

// WatchStore has scrapes tell the numbers of a store and the policies around it from now on. It is for stores without a limiter.
func (m *Metrics) WatchStore(s quota.Store) { m.watched.AddStore(s) }

// limitSeries are the series of a limit.
type limitSeries struct {
	name                          string
	utilization, retryAfter, wait prometheus.Observer
	never                         prometheus.Counter
	plain                         *chargeSeries // without a tenant
	tenants                       calls.ByTenant[chargeSeries]
}

// chargeSeries are the series of a limit and tenant.
type chargeSeries struct {
	tokens    [calls.KindsOfToken]prometheus.Counter
	decisions atomic.Pointer[map[decisionKey]prometheus.Counter] // a map does not change once it is here
}

type decisionKey struct {
	op      quota.Op
	outcome calls.Outcome
	source  calls.Source
}

func (m *Metrics) newLimit(name string) *limitSeries {
	s := &limitSeries{
		name: name, utilization: m.utilization.WithLabelValues(name), retryAfter: m.retryAfter.WithLabelValues(name), wait: m.wait.WithLabelValues(name),
		never: m.never.WithLabelValues(name),
	}
	if m.o.Tenant == nil {
		s.plain = m.newCharges(name, nil)
	}
	return s
}

func (m *Metrics) newCharges(limit string, tenant []string) *chargeSeries {
	s := &chargeSeries{}
	for k := calls.NoTokens + 1; k < calls.KindsOfToken; k++ {
		s.tokens[k] = m.tokens.WithLabelValues(append(tenant[:len(tenant):len(tenant)], limit, k.String())...)
	}
	s.decisions.Store(&map[decisionKey]prometheus.Counter{})
	return s
}

// limit returns the series of a limit, which is nil or not valid in a refused call.
func (m *Metrics) limit(l *quota.Limit) *limitSeries {
	if l == nil || l.Err() != nil {
		return m.other
	}
	if s := m.limits.Find(l); s != nil {
		return s
	}
	s := m.limits.Add(l, m.o.MaxLimits, func() *limitSeries {
		if l.Name() == m.other.name {
			return m.other
		}
		return m.newLimit(l.Name())
	})
	return cmp.Or(s, m.other)
}

// with returns a copy of a map with one entry more.
func with[K comparable, V any](old map[K]V, k K, v V) *map[K]V {
	grown := make(map[K]V, len(old)+1)
	for k, v := range old {
		grown[k] = v
	}
	grown[k] = v
	return &grown
}

// charges returns the series of a limit and of a key's tenant.
func (m *Metrics) charges(s *limitSeries, key string) *chargeSeries {
	if s.plain != nil {
		return s.plain
	}
	tenant := m.tenant(key)
	return s.tenants.Of(tenant, func() *chargeSeries { return m.newCharges(s.name, []string{tenant}) })
}

// tenant returns the label of a key's tenant.
func (m *Metrics) tenant(key string) string { return m.tenants.Label(m.o.Tenant(key), m.o.MaxTenants) }

// count counts a charge.
func (m *Metrics) count(limit *limitSeries, s *chargeSeries, c *quota.Charge, outcome calls.Outcome, source calls.Source) {
	k := decisionKey{c.Op, outcome, source}
	counter := (*s.decisions.Load())[k]
	if counter == nil {
		counter = m.newDecisions(limit, s, c, k)
	}
	counter.Inc()
}

func (m *Metrics) newDecisions(limit *limitSeries, s *chargeSeries, c *quota.Charge, k decisionKey) prometheus.Counter {
	var labels []string
	if m.o.Tenant != nil {
		labels = []string{m.tenant(c.Key)}
	}
	counter := m.decisions.WithLabelValues(append(labels, limit.name, c.Op.String(), k.outcome.String(), k.source.String())...)
	m.mu.Lock()
	defer m.mu.Unlock()
	s.decisions.Store(with(*s.decisions.Load(), k, counter))
	return counter
}

// Observe counts a call. It is an observer, for quota.Options.Observers.
func (m *Metrics) Observe(ctx context.Context, c *quota.Call) {
	if c.Err != nil {
		m.fail(ctx, c)
		return
	}
	for i := range c.Charges {
		m.charge(&c.Charges[i], &c.Decisions[i], calls.Of(c, i))
	}
	decider := &c.Decisions[c.Decider]
	m.durations[calls.SourceOf(decider)].observe(c.Took, m.o.Exemplar(ctx))
	if c.Waited > 0 {
		m.limit(c.Charges[c.Decider].Limit).wait.Observe(c.Waited.Seconds())
	}
}

// charge counts a charge and its decision.
func (m *Metrics) charge(c *quota.Charge, d *quota.Decision, is calls.Charge) {
	limit := m.limit(c.Limit)
	s := m.charges(limit, c.Key)
	if is.Tokens != calls.NoTokens {
		s.tokens[is.Tokens].Add(float64(is.Count))
	}
	switch {
	case is.Outcome != calls.Denied:
	case d.RetryAfter == quota.Never:
		limit.never.Inc()
	default:
		limit.retryAfter.Observe(d.RetryAfter.Seconds())
	}
	m.count(limit, s, c, is.Outcome, calls.SourceOf(d))
	if used, ok := calls.Utilization(c, d); ok {
		limit.utilization.Observe(used)
	}
}

// fail counts a call that failed.
func (m *Metrics) fail(ctx context.Context, c *quota.Call) {
	if !c.Refused {
		m.durations[calls.NoSource].observe(c.Took, m.o.Exemplar(ctx))
	}
	m.errors[driver.Class(c.Err)].Inc()
	for i := range c.Charges {
		limit := m.limit(c.Charges[i].Limit)
		m.count(limit, m.charges(limit, c.Charges[i].Key), &c.Charges[i], calls.OfError(c), calls.NoSource)
	}
	if c.Waited > 0 && len(c.Charges) > 0 {
		m.limit(c.Charges[0].Limit).wait.Observe(c.Waited.Seconds())
	}
}

// vecs returns the parts that are collectors.
func (m *Metrics) vecs() []prometheus.Collector {
	return []prometheus.Collector{m.decisions, m.tokens, m.never, m.failures, m.utilization, m.retryAfter, m.wait}
}

// Describe describes all metrics, for prometheus.Collector.
func (m *Metrics) Describe(descs chan<- *prometheus.Desc) {
	for _, vec := range m.vecs() {
		vec.Describe(descs)
	}
	descs <- m.durations[0].desc
	descs <- m.waiting
	for _, d := range m.reserved {
		descs <- d
	}
	descs <- m.up
	for metric := range driver.Metrics() {
		descs <- m.ofMetrics[metric]
	}
}

// Collect tells all metrics, for prometheus.Collector.
func (m *Metrics) Collect(metrics chan<- prometheus.Metric) {
	for _, vec := range m.vecs() {
		vec.Collect(metrics)
	}
	for _, l := range m.durations {
		metrics <- l
	}
	metrics <- prometheus.MustNewConstMetric(m.waiting, prometheus.GaugeValue, float64(m.watched.Waiting()))
	reservations := m.watched.Reservations()
	for i, r := range watched.OfReservations {
		kind := prometheus.GaugeValue
		if r.Counter {
			kind = prometheus.CounterValue
		}
		metrics <- prometheus.MustNewConstMetric(m.reserved[i], kind, float64(r.Of(reservations)))
	}
	if stores := m.watched.Stores(); m.o.HealthTimeout > 0 && len(stores) > 0 {
		metrics <- prometheus.MustNewConstMetric(m.up, prometheus.GaugeValue, m.ask(stores))
	}
	for _, r := range m.watched.Readings() {
		labels := []string{watched.StoreName(r)}
		if r.Metric.ByNode() {
			labels = append(labels, r.Node)
		}
		if r.Metric == driver.MetricServers {
			labels = append(labels, r.Server, r.Version)
		}
		kind := prometheus.GaugeValue
		if r.Metric.Counter() {
			kind = prometheus.CounterValue
		}
		metrics <- prometheus.MustNewConstMetric(m.ofMetrics[r.Metric], kind, float64(r.Value), labels...)
	}
}

// ask asks the servers of stores for their health, and returns 1 if all answered. A store without servers counts as well.
func (m *Metrics) ask(stores []quota.Store) float64 {
	ctx, cancel := context.WithTimeout(context.Background(), m.o.HealthTimeout)
	defer cancel()
	down := atomic.Bool{}
	var all sync.WaitGroup
	for _, s := range stores {
		all.Go(func() {
			if _, err := backend.Health(ctx, s); err != nil && !errors.Is(err, errors.ErrUnsupported) {
				down.Store(true)
			}
		})
	}
	all.Wait()
	if down.Load() {
		return 0
	}
	return 1
}
