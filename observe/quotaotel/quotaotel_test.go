package quotaotel_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/observe/quotaotel"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

// sdk is telemetry with an SDK in memory.
type sdk struct {
	*quotaotel.Telemetry
	reader *metric.ManualReader
	tracer trace.Tracer
	spans  *tracetest.InMemoryExporter
}

func newSDK(t testing.TB, maxLimits int) *sdk {
	t.Helper()
	return newSDKWith(t, quotaotel.Options{MaxLimits: maxLimits})
}

func newSDKWith(t testing.TB, o quotaotel.Options) *sdk {
	t.Helper()
	s := &sdk{reader: metric.NewManualReader(), spans: tracetest.NewInMemoryExporter()}
	meters, tracers := metric.NewMeterProvider(metric.WithReader(s.reader)), sdktrace.NewTracerProvider(sdktrace.WithSyncer(s.spans))
	t.Cleanup(func() { meters.Shutdown(context.Background()); tracers.Shutdown(context.Background()) })
	s.tracer = tracers.Tracer("test")
	var err error
	o.MeterProvider, o.TracerProvider = meters, tracers
	s.Telemetry, err = quotaotel.New(&o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *sdk) options() *quota.Options {
	return &quota.Options{Observers: []func(context.Context, *quota.Call){s.Observe}}
}

// collect returns all that the SDK has measured, by the instruments' names.
func (s *sdk) collect(t *testing.T) map[string]metricdata.Metrics {
	t.Helper()
	var all metricdata.ResourceMetrics
	if err := s.reader.Collect(t.Context(), &all); err != nil {
		t.Fatal(err)
	}
	byName := map[string]metricdata.Metrics{}
	for _, scope := range all.ScopeMetrics {
		if scope.Scope.Name != "github.com/fleetquota/fleetquota" {
			t.Errorf("scope: got %q, want the module", scope.Scope.Name)
		}
		for _, m := range scope.Metrics {
			byName[m.Name] = m
		}
	}
	return byName
}

// text returns the values of attributes, in the order of their keys.
func text(set attribute.Set) string {
	var words []string
	for _, kv := range set.ToSlice() {
		words = append(words, kv.Value.String())
	}
	return strings.Join(words, " ")
}

// wantSums fails unless metrics have the sums of want, by their names.
func wantSums(t *testing.T, metrics map[string]metricdata.Metrics, want map[string]map[string]int64) {
	t.Helper()
	for name, points := range want {
		if got := sums(t, metrics[name]); !maps.Equal(got, points) {
			t.Errorf("%s: got %v, want %v", name, got, points)
		}
	}
}

// sums returns the points of a metric: the values of numbers, and the counts of histograms.
func sums(t *testing.T, m metricdata.Metrics) map[string]int64 {
	t.Helper()
	points := map[string]int64{}
	switch data := m.Data.(type) {
	case metricdata.Sum[int64]:
		for _, p := range data.DataPoints {
			points[text(p.Attributes)] = p.Value
		}
	case metricdata.Gauge[int64]:
		for _, p := range data.DataPoints {
			points[text(p.Attributes)] = p.Value
		}
	case metricdata.Histogram[float64]:
		for _, p := range data.DataPoints {
			points[text(p.Attributes)] = int64(p.Count)
		}
	default:
		t.Errorf("%s: got %T, want numbers", m.Name, m.Data)
	}
	return points
}

// The instruments have the numbers of a ledger, through grants, denials, lists, shadows, corrections, waits, outages and refusals.
func TestMetrics(t *testing.T) {
	s := newSDK(t, 0)
	store := quotatest.New(t, nil)
	here := local.New()
	guarded, err := resilience.Wrap(store, resilience.Fallback(here, resilience.Instances(1), nil))
	if err != nil {
		t.Fatal(err)
	}
	five, day := quota.NewLimit("five", algorithm.TokenBucket(5, 5, time.Hour)), quota.NewLimit("day", algorithm.FixedWindow(100, 24*time.Hour))
	limiter := quota.Must(quota.NewLimiter(guarded, five, s.options()))
	t.Cleanup(func() { limiter.Close() })
	s.Watch(limiter)
	s.Watch(limiter) // once
	ctx := t.Context()

	d, _ := limiter.Take(ctx, "k", 4)                                                                                  // allowed, 4 charged
	limiter.Settle(ctx, "k", d, 3)                                                                                     // refund, 1 returned
	limiter.Take(ctx, "k", 3)                                                                                          // denied 3
	limiter.Take(ctx, "k", 9)                                                                                          // denied 9, never
	limiter.Peek(ctx, "k", 9)                                                                                          // denied, never, no tokens
	limiter.ChargeAll(ctx, quota.Charge{Key: "k", Cost: 5}, quota.Charge{Limit: day, Key: "k", Cost: 7})               // denied 5, and not made
	limiter.ChargeAll(ctx, quota.Charge{Key: "k", Cost: 5, Shadow: true}, quota.Charge{Limit: day, Key: "k", Cost: 7}) // shadow_denied 5, and 7 charged
	for range 2 {                                                                                                      // 2 charged, and 2 replayed
		limiter.ChargeAll(ctx, quota.Charge{Limit: day, Key: "again", Cost: 2, ID: "id"})
	}
	limiter.Take(ctx, "", 1)   // refused
	limiter.Take(ctx, "k", -1) // refused
	store.FailNext(1, quota.ErrUnavailable)
	limiter.Take(ctx, "k", 1) // the fallback, allowed 1
	store.FailNext(1, quota.ErrMisconfigured)
	limiter.Debit(ctx, "other", 1) // error
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	limiter.Wait(short, "k", 5) // an error: it takes too long
	cancel()

	m := s.collect(t)
	for name, want := range map[string]map[string]int64{
		"fleetquota.decisions": {
			"five take allowed store": 1, "five refund allowed store": 1, "five take denied store": 3, "five peek denied store": 1, "day take not_made store": 1,
			"five take shadow_denied store": 1, "day take allowed store": 3, "five take refused none": 2, "five take allowed fallback": 1, "five debit error none": 1, "five take error none": 1,
		},
		"fleetquota.tokens":             {"five charged": 5, "five returned": 1, "five denied": 17, "five shadow_denied": 5, "day charged": 9, "day replayed": 2},
		"fleetquota.never_denials":      {"five": 2},
		"fleetquota.denial.retry_after": {"five": 2},
		"fleetquota.waiters":            {"": 0},
	} {
		got := sums(t, m[name])
		if !maps.Equal(got, want) {
			t.Errorf("%s: got %v, want %v", name, got, want)
		}
	}
	failures := sums(t, m["fleetquota.errors"])
	if failures["invalid"] != 2 || failures["misconfigured"] != 1 || failures["deadline"] != 1 {
		t.Errorf("errors: got %v, want 2 invalid, 1 misconfigured and 1 deadline", failures)
	}
	if got := sums(t, m["fleetquota.decision.duration"]); got["fallback"] != 1 || got["store"] != 9 || got["none"] != 2 {
		t.Errorf("durations: got %v, want those of the calls that asked", got)
	}
	if got := sums(t, m["fleetquota.utilization"]); got["day"] != 4 || got["five"] < 7 {
		t.Errorf("utilization: got %v, want one of each charge but peeks", got)
	}
	// The numbers of stores and policies.
	want := map[string]map[string]int64{}
	for _, r := range backend.Readings(guarded) {
		name, of := "fleetquota."+r.Metric.String(), "primary"
		if r.Fallback {
			of = "fallback"
		}
		if r.Metric.ByNode() {
			of = strings.TrimSpace(r.Node + " " + of)
		}
		if want[name] == nil {
			want[name] = map[string]int64{}
		}
		want[name][of] += r.Value
	}
	if len(want) < 5 {
		t.Errorf("readings: got %v, want those of two stores and a fallback", want)
	}
	wantSums(t, m, want)
}

// The duration of a call has an exemplar with the caller's trace.
func TestExemplars(t *testing.T) {
	s := newSDK(t, 0)
	limiter := quota.Must(quota.NewLimiter(local.New(), quota.NewLimit("n", algorithm.FixedWindow(5, time.Hour)), s.options()))
	defer limiter.Close()
	ctx, span := s.tracer.Start(t.Context(), "caller")
	limiter.Take(ctx, "k", 1)
	span.End()
	durations := s.collect(t)["fleetquota.decision.duration"].Data.(metricdata.Histogram[float64]).DataPoints
	if len(durations) != 1 || len(durations[0].Exemplars) != 1 {
		t.Fatalf("durations: got %+v, want one with one exemplar", durations)
	}
	if got, want := trace.TraceID(durations[0].Exemplars[0].TraceID), span.SpanContext().TraceID(); got != want {
		t.Errorf("exemplar: got the trace %s, want %s", got, want)
	}
}

// Whatever keys, limits and operations come, the number of series is bounded.
func TestCardinality(t *testing.T) {
	s := newSDK(t, 3)
	for i := range testenv.Sized(20_000, 100_000) {
		limit := quota.NewLimit(fmt.Sprint("limit-", i%10), algorithm.FixedWindow(5, time.Hour))
		s.Observe(t.Context(), &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: fmt.Sprint("key-", i), Cost: 1}}, Decisions: []quota.Decision{{Source: quota.Source(i % 256)}}})
		s.Observe(t.Context(), &quota.Call{Charges: []quota.Charge{{Key: fmt.Sprint("\xff", i), Op: quota.Op(i % 256)}}, Err: errors.New("any"), Refused: true})
	}
	m := s.collect(t)
	for name, most := range map[string]int{"fleetquota.decisions": 4*7 + 16, "fleetquota.tokens": 4, "fleetquota.errors": 1, "fleetquota.decision.duration": 7} {
		if got := len(sums(t, m[name])); got == 0 || got > most {
			t.Errorf("%s: got %d series, want at most %d", name, got, most)
		}
	}
}

// Tenants are told apart, the first ones, and whatever tenants come after them, the number of series does not grow.
func TestTenants(t *testing.T) {
	tenant := func(key string) string { name, _, _ := strings.Cut(key, "/"); return name }
	s := newSDKWith(t, quotaotel.Options{Tenant: tenant, MaxTenants: 3})
	limit := quota.NewLimit("n", algorithm.FixedWindow(5, time.Hour))
	decided := func(key string) {
		s.Observe(t.Context(), &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: key, Cost: 2}}, Decisions: []quota.Decision{{Allowed: true, Charged: 2}}, Granted: true})
	}
	decided("\xff\xfe") // not in UTF-8
	for range 2 {
		decided("a/1")
		decided("b/1")
		decided("/") // the tenant ""
	}
	const strangers = 100_000
	for i := range strangers {
		decided(fmt.Sprintf("stranger-%d/%d", i, i))
		s.Observe(t.Context(), &quota.Call{Charges: []quota.Charge{{Key: fmt.Sprintf("\xff%d", i)}}, Err: quota.ErrInvalid, Refused: true})
	}
	decided("a/2")
	m := s.collect(t)
	wantSums(t, m, map[string]map[string]int64{
		"fleetquota.decisions": {
			"n take allowed store a": 3, "n take allowed store b": 2, "n take allowed store ": 2, "n take allowed store other": strangers + 1,
			"other take refused none other": strangers,
		},
		"fleetquota.tokens": {"n charged a": 6, "n charged b": 4, "n charged ": 4, "n charged other": 2*strangers + 2},
	})
}

// The numbers of reservations are those of the limiter.
func TestReservations(t *testing.T) {
	s := newSDK(t, 0)
	limiter := quota.Must(quota.NewLimiter(local.New(), quota.NewLimit("n", algorithm.Concurrency(5, time.Hour)), s.options()))
	defer limiter.Close()
	s.Watch(limiter)
	for i := range 4 {
		r := quota.Must(limiter.Reserve(t.Context(), quota.Charge{Key: "k", Cost: 1}))
		if i == 0 {
			r.Release(t.Context())
		} else if i < 3 {
			r.Settle(t.Context())
		}
	}
	m := s.collect(t)
	for name, want := range map[string]int64{"open": 1, "owed": 0, "settled": 2, "released": 1, "lost": 0, "lapsed": 0} {
		if got := sums(t, m["fleetquota.reservations_"+name]); len(got) != 1 || got[""] != want {
			t.Errorf("reservations_%s: got %v, want %d", name, got, want)
		}
	}
}

// event is an event of a span as text.
func event(e sdktrace.Event) string {
	words := []string{e.Name}
	for _, kv := range e.Attributes {
		words = append(words, string(kv.Key)+"="+kv.Value.String())
	}
	return strings.Join(words, " ")
}

// Denials, failures and waits are events of the caller's span, and a local decision has no span.
func TestEvents(t *testing.T) {
	s := newSDK(t, 0)
	store := quotatest.New(t, nil)
	limiter := quota.Must(quota.NewLimiter(s.Trace(store), quota.NewLimit("n", algorithm.FixedWindow(5, time.Hour)), s.options()))
	ctx, span := s.tracer.Start(t.Context(), "caller")
	limiter.Take(ctx, "k", 5)
	limiter.Take(ctx, "k", 9)
	limiter.Peek(ctx, "k", 9)
	limiter.Take(ctx, "k", -1)
	store.FailNext(1, quota.ErrUnavailable)
	limiter.Take(ctx, "k", 1)
	limiter.Take(context.Background(), "k", 9) // no span
	span.End()
	limiter.Take(ctx, "k", 9) // its span is over
	spans := s.spans.GetSpans()
	if len(spans) != 1 {
		t.Fatalf("spans: got %d, want that of the caller alone", len(spans))
	}
	var got []string
	for _, e := range spans[0].Events {
		got = append(got, event(e))
	}
	want := []string{
		"fleetquota.denied fleetquota.limit=n fleetquota.op=take fleetquota.cost=9 fleetquota.remaining=0 fleetquota.capacity=5 fleetquota.source=store",
		"fleetquota.failed error.type=invalid fleetquota.refused=true fleetquota.limit=n",
		"fleetquota.failed error.type=unavailable fleetquota.refused=false fleetquota.limit=n",
	}
	if !slices.Equal(got, want) {
		t.Errorf("events: got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A wait is an event with its time.
func TestWaitedEvent(t *testing.T) {
	s := newSDK(t, 0)
	ctx, span := s.tracer.Start(t.Context(), "caller")
	limit := quota.NewLimit("n", algorithm.FixedWindow(5, time.Hour))
	s.Observe(ctx, &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: "k"}}, Decisions: []quota.Decision{{Allowed: true}}, Granted: true, Waited: 1500 * time.Millisecond})
	span.End()
	if events := s.spans.GetSpans()[0].Events; len(events) != 1 || event(events[0]) != "fleetquota.waited fleetquota.limit=n fleetquota.waited=1.5" {
		t.Errorf("events: got %v, want one of the wait", events)
	}
	if got := sums(t, s.collect(t)["fleetquota.wait.duration"]); got["n"] != 1 {
		t.Errorf("waits: got %v, want one", got)
	}
}

// served is a store in memory that says it has servers, and counts its calls.
type served struct {
	quota.Store
	mu    sync.Mutex
	calls int
	err   error
}

func (s *served) Health(context.Context) (driver.Health, error) { return driver.Health{}, nil }

func (s *served) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	s.mu.Lock()
	s.calls++
	err := s.err
	s.mu.Unlock()
	if err != nil {
		return quota.Decision{}, err
	}
	return s.Store.Charge(ctx, c)
}

// Round trips have spans, and decisions of policies and leases around the store have none.
func TestNoSpanOfLocalDecisions(t *testing.T) {
	s := newSDK(t, 0)
	inner := &served{Store: local.New()}
	leases, err := lease.New(s.Trace(inner), &lease.Options{Instances: func() int64 { return 1 }})
	if err != nil {
		t.Fatal(err)
	}
	limiter := quota.Must(quota.NewLimiter(leases, quota.NewLimit("n", algorithm.TokenBucket(1_000_000, 1_000_000, time.Hour)), s.options()))
	for range 2000 {
		limiter.Take(t.Context(), "k", 1)
	}
	limiter.Close()
	inner.mu.Lock()
	calls := inner.calls
	inner.mu.Unlock()
	if got := len(s.spans.GetSpans()); got != calls || calls >= 1000 {
		t.Errorf("leases: got %d spans of %d calls of the store, want one each, and far fewer than 2000", got, calls)
	}

	s = newSDK(t, 0)
	inner = &served{Store: local.New(), err: quota.ErrUnavailable}
	guarded, err := resilience.Standard(s.Trace(inner), resilience.Fallback(local.New(), resilience.Instances(2), nil), nil)
	if err != nil {
		t.Fatal(err)
	}
	limiter = quota.Must(quota.NewLimiter(guarded, quota.NewLimit("n", algorithm.FixedWindow(5000, time.Hour)), s.options()))
	defer limiter.Close()
	for deadline := time.Now().Add(10 * time.Second); resilience.BreakerStates(guarded)[""] != "open" && time.Now().Before(deadline); {
		limiter.Take(t.Context(), "k", 1)
	}
	inner.mu.Lock()
	before := inner.calls
	inner.mu.Unlock()
	const more = 50
	for range more {
		limiter.Take(t.Context(), "k", 1)
	}
	inner.mu.Lock()
	calls = inner.calls
	inner.mu.Unlock()
	spans := s.spans.GetSpans()
	if len(spans) != calls || calls == 0 || calls-before > more/2 { // some may be probes
		t.Errorf("a breaker: got %d spans of %d calls of the store, %d of them by %d calls once it was open, want one of each, and few", len(spans), calls, calls-before, more)
	}
	for _, span := range spans {
		if got := fmt.Sprint(span.Status, span.SpanKind); got != "{Error unavailable} client" {
			t.Errorf("span: got %s, want a client's with an error", got)
			break
		}
	}
}

// The spans of calls that share a batch are children of their own callers' spans, and each caller's span has the events of its own
// calls alone. Callers are told apart by their costs.
func TestParentsAcrossBatches(t *testing.T) {
	server := redisserver.Start(t)
	s := newSDK(t, 0)
	redis := quota.Must(backend.Open(t.Context(), "redis://"+server.Addr()))
	limiter := quota.Must(quota.NewLimiter(s.Trace(redis), quota.NewLimit("n", algorithm.FixedWindow(1, time.Hour)), s.options()))
	defer limiter.Close()
	limiter.Take(t.Context(), "k", 1)
	s.spans.Reset()
	const callers, calls = 64, 20
	var wg sync.WaitGroup
	for g := range callers {
		wg.Go(func() {
			for range calls {
				ctx, span := s.tracer.Start(t.Context(), "caller", trace.WithAttributes(attribute.Int("cost", 100+g)))
				if g%2 == 0 {
					limiter.Take(ctx, "k", int64(100+g))
				} else {
					limiter.ChargeAll(ctx, quota.Charge{Key: "k", Cost: int64(100 + g)}, quota.Charge{Key: "k/2", Cost: int64(100 + g)})
				}
				span.End()
			}
		})
	}
	wg.Wait()
	children, mine := map[trace.SpanID][]tracetest.SpanStub{}, 0
	for _, span := range s.spans.GetSpans() {
		children[span.Parent.SpanID()] = append(children[span.Parent.SpanID()], span)
	}
	for _, caller := range children[trace.SpanID{}] {
		if caller.Name != "caller" {
			t.Fatalf("a span without a parent: got %+v, want callers only", caller)
		}
		mine++
		cost := caller.Attributes[0].Value.AsInt64()
		events, trips := caller.Events, children[caller.SpanContext.SpanID()]
		if len(events) != 1 || !strings.Contains(event(events[0]), fmt.Sprintf("fleetquota.denied fleetquota.limit=n fleetquota.op=take fleetquota.cost=%d ", cost)) {
			t.Fatalf("events of the caller with the cost %d: got %v, want its own denial", cost, events)
		}
		if len(trips) != 1 || trips[0].Name != "fleetquota.charge" || trips[0].SpanContext.TraceID() != caller.SpanContext.TraceID() ||
			trips[0].StartTime.Before(caller.StartTime) || trips[0].EndTime.After(caller.EndTime) || len(trips[0].Events) != 0 {
			t.Fatalf("round trips of the caller with the cost %d: got %+v, want one within its own span", cost, trips)
		}
		charges := int64(1 + cost%2)
		if want := []attribute.KeyValue{attribute.String("fleetquota.limit", "n"), attribute.String("fleetquota.op", "take"), attribute.Int64("fleetquota.charges", charges), attribute.Bool("fleetquota.granted", false)}; !slices.Equal(trips[0].Attributes, want) {
			t.Fatalf("attributes of a round trip: got %v, want %v", trips[0].Attributes, want)
		}
	}
	batches := int64(0)
	for _, r := range backend.Readings(redis) {
		if r.Metric == driver.MetricBatches {
			batches += r.Value
		}
	}
	if mine != callers*calls || len(children) != mine+1 {
		t.Errorf("spans: got %d callers, and children of %d, want %d each", mine, len(children)-1, callers*calls)
	}
	if batches == 0 || batches >= callers*calls {
		t.Errorf("batches: got %d for %d calls, want fewer, or nothing was shared", batches, callers*calls)
	}
}

// A traced store is the store that it was, by the suite of all stores.
func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Name: "traced",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			return newSDK(t, 0).Trace(&served{Store: quota.Must(local.NewWithOptions(local.Options{Clock: o.Clock}))})
		},
		Lacks: []conformance.Lack{{Feature: conformance.Shared, Reason: "its state is the memory of one store"}},
	})
}

// A program that imports the package gets OpenTelemetry's API, and no SDK.
func TestAPIOnly(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "go.opentelemetry.io/otel/metric\n") {
		t.Errorf("dependencies: got\n%s\nwant the API among them", out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "go.opentelemetry.io/otel/sdk") || strings.Contains(line, "prometheus") {
			t.Errorf("dependencies: got %s, want the API alone", line)
		}
	}
}

func TestOptions(t *testing.T) {
	if _, err := quotaotel.New(&quotaotel.Options{MaxLimits: -1}); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "MaxLimits is -1; accepted: ") {
		t.Errorf("MaxLimits of -1: got %v, want ErrInvalid", err)
	}
	if _, err := quotaotel.New(&quotaotel.Options{MaxTenants: -1}); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "MaxTenants is -1; accepted: ") {
		t.Errorf("MaxTenants of -1: got %v, want ErrInvalid", err)
	}
	if _, err := quotaotel.New(nil); err != nil {
		t.Errorf("the global providers: got %v, want none", err)
	}
}

// A call allocates nothing here, and nothing in the SDK once a series is there.
func TestAllocs(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector allocates")
	}
	meters := metric.NewMeterProvider(metric.WithReader(metric.NewManualReader()))
	telemetry := quota.Must(quotaotel.New(&quotaotel.Options{MeterProvider: meters, Tenant: func(key string) string { return key }}))
	limit := quota.NewLimit("n", algorithm.FixedWindow(5, time.Hour))
	for _, d := range []quota.Decision{{Allowed: true, Charged: 1, Capacity: 5}, {Capacity: 5, RetryAfter: time.Second}, {Capacity: 5, RetryAfter: quota.Never}} {
		call := &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: "k", Cost: 1}}, Decisions: []quota.Decision{d}, Granted: d.Allowed}
		if got := testing.AllocsPerRun(100, func() { telemetry.Observe(context.Background(), call) }); got != 0 {
			t.Errorf("%v: got %v allocations, want none", d, got)
		}
	}
}

func BenchmarkObserve(b *testing.B) {
	meters := metric.NewMeterProvider(metric.WithReader(metric.NewManualReader()))
	t := quota.Must(quotaotel.New(&quotaotel.Options{MeterProvider: meters}))
	call := &quota.Call{Charges: []quota.Charge{{Limit: quota.NewLimit("n", algorithm.FixedWindow(math.MaxInt32, time.Hour)), Key: "k", Cost: 1}},
		Decisions: []quota.Decision{{Allowed: true, Charged: 1, Capacity: 10, Remaining: 5}}, Granted: true}
	b.ReportAllocs()
	for b.Loop() {
		t.Observe(context.Background(), call)
	}
}
