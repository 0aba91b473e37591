package quotaprom_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/observe/quotaprom"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

var bg = context.Background()

func bucket(name string, capacity, refill int64, per time.Duration) *quota.Limit {
	return quota.NewLimit(name, algorithm.TokenBucket(capacity, refill, per))
}

// observedBy returns options whose observer is the metrics'.
func observedBy(m *quotaprom.Metrics) *quota.Options {
	return &quota.Options{Observers: []func(context.Context, *quota.Call){m.Observe}}
}

func registered(t testing.TB, m *quotaprom.Metrics) *prometheus.Registry {
	t.Helper()
	r := prometheus.NewPedanticRegistry()
	if err := r.Register(m); err != nil {
		t.Fatal(err)
	}
	return r
}

// scrape returns the samples of a page of metrics, by name and labels; of histograms the counts and sums.
func scrape(t testing.TB, g prometheus.Gatherer) map[string]float64 {
	t.Helper()
	page := httptest.NewRecorder()
	promhttp.HandlerFor(g, promhttp.HandlerOpts{ErrorHandling: promhttp.HTTPErrorOnError}).ServeHTTP(page, httptest.NewRequest("GET", "/metrics", nil))
	if page.Code != 200 {
		t.Fatalf("scrape: got status %d: %s", page.Code, page.Body)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(page.Body)
	if err != nil {
		t.Fatal(err)
	}
	samples := map[string]float64{}
	for name, family := range families {
		for _, m := range family.GetMetric() {
			var labels []string
			for _, l := range m.GetLabel() {
				labels = append(labels, l.GetName()+"="+l.GetValue())
			}
			id := strings.TrimPrefix(name, "fleetquota_") + "{" + strings.Join(labels, ",") + "}"
			switch {
			case m.Counter != nil:
				samples[id] = m.Counter.GetValue()
			case m.Gauge != nil:
				samples[id] = m.Gauge.GetValue()
			case m.Histogram != nil:
				samples[id] = float64(m.Histogram.GetSampleCount())
				samples[id+" sum"] = m.Histogram.GetSampleSum()
			}
		}
	}
	return samples
}

// TestLint: the names and helps are as Prometheus wants them, with all metrics there.
func TestLint(t *testing.T) {
	m := quotaprom.New(&quotaprom.Options{Tenant: func(string) string { return "t" }, HealthTimeout: time.Second})
	m.WatchStore(everything{local.New()})
	limiter := quota.Must(quota.NewLimiter(local.New(), bucket("n", 10, 1, time.Hour), observedBy(m)))
	m.Watch(limiter)
	limiter.Take(bg, "k", 20)
	limiter.Take(bg, "k", 1)
	problems, err := testutil.GatherAndLint(registered(t, m))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

// everything is a store that tells every metric.
type everything struct{ quota.Store }

func (everything) Readings(tell func(driver.Reading)) {
	for m := range driver.Metrics() {
		r := driver.Reading{Metric: m, Value: 2}
		if m == driver.MetricServers {
			r.Server, r.Version = "redis", "7.4.1"
		}
		tell(r)
	}
}

// TestOutcomes: what becomes of each charge is told as the package documentation says.
func TestOutcomes(t *testing.T) {
	m := quotaprom.New(nil)
	r := registered(t, m)
	store := &outage{Store: local.New()}
	a, b := bucket("a", 10, 1, time.Hour), bucket("b", 100, 1, time.Hour)
	charger := quota.Must(quota.NewCharger(store, observedBy(m)))
	limiter := quota.Must(charger.For(a))
	m.Watch(limiter)
	m.Watch(charger) // the same
	m.WatchStore(store)
	d, _ := limiter.Take(bg, "k", 4)
	limiter.Settle(bg, "k", d, 1)
	limiter.Debit(bg, "k", 1)
	limiter.Peek(bg, "k", 10)
	limiter.Take(bg, "k", 11)
	charger.ChargeAll(bg, quota.Charge{Limit: a, Key: "k", Cost: 9}, quota.Charge{Limit: b, Key: "k", Cost: 9})               // denied by a
	charger.ChargeAll(bg, quota.Charge{Limit: a, Key: "k", Cost: 9, Shadow: true}, quota.Charge{Limit: b, Key: "k", Cost: 9}) // granted
	charger.TakeFirst(bg, []quota.Charge{{Limit: a, Key: "k", Cost: 9}}, []quota.Charge{{Limit: b, Key: "k", Cost: 1}})       // the second
	charger.ChargeAll(bg, quota.Charge{Limit: a, Key: "other", Cost: 3, ID: "1"})
	charger.ChargeAll(bg, quota.Charge{Limit: a, Key: "other", Cost: 3, ID: "1"}) // again
	limiter.Take(bg, "", 1)
	limiter.Take(bg, "k", -1)
	store.err = fmt.Errorf("test: %w", quota.ErrUnavailable)
	limiter.Take(bg, "k", 1)
	charger.ChargeAll(bg, quota.Charge{Limit: a, Key: "k", Cost: 9}, quota.Charge{Limit: b, Key: "k", Cost: 9})
	got := scrape(t, r)
	for id, want := range map[string]float64{
		"decisions_total{limit=a,op=take,outcome=allowed,source=store}":       3,
		"decisions_total{limit=a,op=refund,outcome=allowed,source=store}":     1,
		"decisions_total{limit=a,op=debit,outcome=allowed,source=store}":      1,
		"decisions_total{limit=a,op=peek,outcome=denied,source=store}":        1,
		"decisions_total{limit=a,op=take,outcome=denied,source=store}":        2,
		"decisions_total{limit=b,op=take,outcome=not_made,source=store}":      1,
		"decisions_total{limit=a,op=take,outcome=shadow_denied,source=store}": 1,
		"decisions_total{limit=b,op=take,outcome=allowed,source=store}":       2,
		"decisions_total{limit=a,op=take,outcome=not_made,source=store}":      1,
		"decisions_total{limit=a,op=take,outcome=refused,source=none}":        2,
		"decisions_total{limit=a,op=take,outcome=error,source=none}":          2,
		"decisions_total{limit=b,op=take,outcome=error,source=none}":          1,
		"tokens_total{limit=a,outcome=charged}":                               8,
		"tokens_total{limit=a,outcome=returned}":                              3,
		"tokens_total{limit=a,outcome=replayed}":                              3,
		"tokens_total{limit=a,outcome=denied}":                                20,
		"tokens_total{limit=a,outcome=shadow_denied}":                         9,
		"tokens_total{limit=b,outcome=charged}":                               10,
		"tokens_total{limit=b,outcome=denied}":                                0,
		"never_denials_total{limit=a}":                                        1,
		"errors_total{class=invalid}":                                         2,
		"errors_total{class=unavailable}":                                     2,
		"errors_total{class=closed}":                                          0,
		"decision_duration_seconds{source=store}":                             10,
		"decision_duration_seconds{source=none}":                              2,
		"denial_retry_after_seconds{limit=a}":                                 2,
		"store_keys{store=primary}":                                           3,
		"waiters{}":                                                           0,
	} {
		if value, told := got[id]; value != want || !told {
			t.Errorf("%s: got %v, want %v", id, value, want)
		}
	}
	decisions := 0.0
	for id, value := range got {
		if strings.HasPrefix(id, "decisions_total") {
			decisions += value
		}
	}
	if decisions != 18 {
		t.Errorf("decisions: got %v, want 18, the number of charges", decisions)
	}
}

// outage is a store that fails while err is set.
type outage struct {
	quota.Store
	err error
}

func (s *outage) Unwrap() quota.Store { return s.Store }

func (s *outage) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.err != nil {
		return quota.Decision{}, s.err
	}
	return s.Store.Charge(ctx, c)
}

func (s *outage) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.err != nil {
		return s.err
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

// TestWaits: calls that wait are told while they do, and how long they did.
func TestWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := quotaprom.New(nil)
		r := registered(t, m)
		limiter := quota.Must(quota.NewLimiter(local.New(), bucket("n", 1, 1, time.Second), observedBy(m)))
		m.Watch(limiter)
		limiter.Take(bg, "k", 1)
		go limiter.Wait(bg, "k", 1)
		synctest.Wait()
		if got := scrape(t, r)["waiters{}"]; got != 1 {
			t.Errorf("waiters: got %v, want 1", got)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		got := scrape(t, r)
		if got["waiters{}"] != 0 || got["wait_duration_seconds{limit=n}"] != 1 || got["wait_duration_seconds{limit=n} sum"] < 0.99 || got["wait_duration_seconds{limit=n} sum"] > 1.01 {
			t.Errorf("after a wait of a second: got %v waiters, %v waits of %v s", got["waiters{}"], got["wait_duration_seconds{limit=n}"], got["wait_duration_seconds{limit=n} sum"])
		}
	})
}

// TestSeries: however many keys, tenants and names of limits come, the number of series does not grow.
func TestSeries(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	m := quotaprom.New(&quotaprom.Options{MaxLimits: 3, MaxTenants: 5, Tenant: func(key string) string { tenant, _, _ := strings.Cut(key, "/"); return tenant }})
	r := registered(t, m)
	var limits []*quota.Limit
	for i := range 10 {
		limits = append(limits, bucket(fmt.Sprint("limit-", i), 10, 10, time.Second))
	}
	o := observedBy(m)
	o.LimitFor = func(key string) *quota.Limit { return limits[int(key[len(key)-1])%len(limits)] }
	store := quota.Must(local.NewWithOptions(local.Options{MaxKeys: 1000})) // which has no room for most of them
	limiter := quota.Must(quota.NewLimiter(store, limits[0], o))
	m.Watch(limiter)
	keys := func(n int) {
		for range n {
			key := make([]byte, 1+rng.IntN(12))
			for i := range key {
				key[i] = byte(rng.Uint32())
			}
			switch rng.IntN(4) {
			case 0:
				key = fmt.Appendf(nil, "tenant-%d/%x", rng.IntN(5), key)
			case 1:
				key = fmt.Appendf(nil, "tenant-%d/%s", rng.IntN(5), key)
			case 2:
				key = fmt.Appendf(nil, "%x/%d", key, rng.IntN(10))
			}
			limiter.Take(bg, string(key), rng.Int64N(12))
		}
	}
	for i := range 5 { // the others come too late
		limiter.Peek(bg, fmt.Sprintf("tenant-%d/0", i), 1)
	}
	some, many := 100_000, testenv.Sized(100_000, 1_000_000) // by the first 100 000 keys all series have come
	keys(some)
	before := len(scrape(t, r))
	keys(many)
	after := scrape(t, r)
	if len(after) != before || before > 500 {
		t.Errorf("series: got %d after %d keys, want the %d that there were after %d, and few", len(after), some+many, before, some)
	}
	total := 0.0
	for id, value := range after {
		if strings.HasPrefix(id, "decisions_total") {
			total += value
		}
	}
	if want := float64(5 + some + many); total != want {
		t.Errorf("decisions: got %v, want %v", total, want)
	}
}

// TestLatency: the histogram is that of client_golang, classic and native.
func TestLatency(t *testing.T) {
	m := quotaprom.New(nil)
	var bounds []float64
	get := func() *dto.Histogram {
		families, err := registered(t, m).Gather()
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range families {
			if f.GetName() != "fleetquota_decision_duration_seconds" {
				continue
			}
			for _, metric := range f.GetMetric() {
				if metric.GetLabel()[0].GetValue() == "store" {
					return metric.GetHistogram()
				}
			}
		}
		t.Fatal("there is no histogram of durations")
		return nil
	}
	for _, b := range get().GetBucket() {
		bounds = append(bounds, b.GetUpperBound())
	}
	twin := prometheus.NewHistogram(prometheus.HistogramOpts{Name: "x", Buckets: bounds[:len(bounds)-1], NativeHistogramBucketFactor: 1.1,
		NativeHistogramMaxBucketNumber: 1000, NativeHistogramZeroThreshold: 1.0 / (1 << 30)})
	rng := rand.New(rand.NewPCG(3, 4))
	limit := bucket("n", 10, 1, time.Second)
	durations := []time.Duration{0, 1, 2, time.Microsecond, time.Second, time.Hour, 10 * time.Second, 10*time.Second + 1}
	for range 20_000 {
		durations = append(durations, time.Duration(1)<<rng.IntN(42)+time.Duration(rng.Int64N(1<<rng.IntN(42))))
	}
	for _, d := range durations {
		m.Observe(bg, &quota.Call{Charges: []quota.Charge{{Limit: limit, Key: "k"}}, Decisions: []quota.Decision{{Allowed: true, Capacity: 10}}, Granted: true, Took: d})
		twin.Observe(d.Seconds())
	}
	var written dto.Metric
	if err := twin.Write(&written); err != nil {
		t.Fatal(err)
	}
	got, want := get(), written.GetHistogram()
	if got.GetSampleCount() != want.GetSampleCount() || got.GetZeroCount() != want.GetZeroCount() || got.GetSchema() != want.GetSchema() ||
		got.GetZeroThreshold() != want.GetZeroThreshold() {
		t.Errorf("native histogram: got %d samples, %d in the zero bucket, schema %d, threshold %v; want %d, %d, %d, %v", got.GetSampleCount(), got.GetZeroCount(),
			got.GetSchema(), got.GetZeroThreshold(), want.GetSampleCount(), want.GetZeroCount(), want.GetSchema(), want.GetZeroThreshold())
	}
	if diff := got.GetSampleSum() - want.GetSampleSum(); diff > 1e-3 || diff < -1e-3 {
		t.Errorf("sum: got %v, want %v", got.GetSampleSum(), want.GetSampleSum())
	}
	if g, w := native(got), native(want); g != w {
		t.Errorf("native buckets: got\n%s\nwant\n%s", g, w)
	}
	for i, b := range want.GetBucket() {
		if n := got.GetBucket()[i].GetCumulativeCount(); n != b.GetCumulativeCount() {
			t.Errorf("bucket up to %v: got %d, want %d", b.GetUpperBound(), n, b.GetCumulativeCount())
		}
	}
}

// native returns the native buckets of a histogram that are not empty, by their index.
func native(h *dto.Histogram) string {
	var all []string
	index, n, next := int32(0), int64(0), 0
	for _, span := range h.GetPositiveSpan() {
		index += span.GetOffset()
		for range span.GetLength() {
			n += h.GetPositiveDelta()[next]
			if n != 0 {
				all = append(all, fmt.Sprintf("%d: %d", index, n))
			}
			index++
			next++
		}
	}
	return strings.Join(all, ", ")
}

type traceKey struct{}

// TestExemplar: a call's duration has the trace of its context, in the format that has exemplars.
func TestExemplar(t *testing.T) {
	m := quotaprom.New(&quotaprom.Options{Exemplar: func(ctx context.Context) prometheus.Labels {
		if trace, ok := ctx.Value(traceKey{}).(string); ok {
			return prometheus.Labels{"trace_id": trace}
		}
		return nil
	}})
	limiter := quota.Must(quota.NewLimiter(local.New(), bucket("n", 10, 1, time.Second), observedBy(m)))
	limiter.Take(bg, "k", 1)
	limiter.Take(context.WithValue(bg, traceKey{}, "0af7651916cd43dd8448eb211c80319c"), "k", 1)
	page := httptest.NewRecorder()
	request := httptest.NewRequest("GET", "/metrics", nil)
	request.Header.Set("Accept", "application/openmetrics-text; version=1.0.0")
	promhttp.HandlerFor(registered(t, m), promhttp.HandlerOpts{EnableOpenMetrics: true}).ServeHTTP(page, request)
	n := 0
	for line := range strings.Lines(page.Body.String()) {
		if strings.Contains(line, `# {trace_id="0af7651916cd43dd8448eb211c80319c"}`) {
			if n++; !strings.HasPrefix(line, `fleetquota_decision_duration_seconds_bucket{source="store"`) {
				t.Errorf("line of an exemplar: got %s", line)
			}
		}
	}
	if n != 1 {
		t.Errorf("exemplars: got %d, want 1 in\n%s", n, page.Body)
	}
}

// server is a store that plays one on a server.
type server struct {
	*local.Store
	err error
}

func (s *server) Health(context.Context) (driver.Health, error) {
	return driver.Health{Kind: "valkey", Version: "8.1.0", Evicted: 7}, s.err
}

func (s *server) Readings(tell func(driver.Reading)) {
	s.Store.Readings(tell)
	h, _ := s.Health(bg)
	h.Readings(tell)
}

// TestHealth: a scrape asks the servers if it may, and tells what they are.
func TestHealth(t *testing.T) {
	s := &server{Store: local.New()}
	m := quotaprom.New(&quotaprom.Options{HealthTimeout: time.Second})
	m.WatchStore(quota.Must(resilience.Standard(s, resilience.FailWithError(), nil)))
	m.WatchStore(local.New()) // without a server
	r := registered(t, m)
	for _, err := range []error{nil, errors.New("down")} {
		s.err = err
		got := scrape(t, r)
		up := 1.0
		if err != nil {
			up = 0
		}
		if got["server_up{}"] != up || got["server_info{kind=valkey,store=primary,version=8.1.0}"] != 1 || got["server_evicted_keys_total{store=primary}"] != 7 {
			t.Errorf("server: got %v up, %v, %v evicted; want %v, 1, 7", got["server_up{}"], got["server_info{kind=valkey,store=primary,version=8.1.0}"],
				got["server_evicted_keys_total{store=primary}"], up)
		}
	}
}

// TestAllocs: an observed decision takes no memory.
func TestAllocs(t *testing.T) {
	m := quotaprom.New(nil)
	limiter := quota.Must(quota.NewLimiter(local.New(), bucket("n", 1<<40, 1<<30, time.Second), observedBy(m)))
	limiter.Take(bg, "k", 1)
	if n := testing.AllocsPerRun(1000, func() { limiter.Take(bg, "k", 1) }); n >= 1 {
		t.Errorf("allocations of a take: got %v, want 0", n)
	}
}

// BenchmarkObserve measures a decision in memory by itself, with an observer that does nothing, and with metrics.
func BenchmarkObserve(b *testing.B) {
	limit := bucket("n", 1<<40, 1<<30, time.Second)
	for _, test := range []struct {
		name string
		o    *quota.Options
	}{
		{"none", nil},
		{"nothing", &quota.Options{Observers: []func(context.Context, *quota.Call){func(context.Context, *quota.Call) {}}}},
		{"quotaprom", observedBy(quotaprom.New(nil))},
	} {
		b.Run(test.name, func(b *testing.B) {
			limiter := quota.Must(quota.NewLimiter(local.New(), limit, test.o))
			b.ReportAllocs()
			for b.Loop() {
				limiter.Take(bg, "team-7/agent-123", 1)
			}
		})
	}
}
