// Command panels runs a small fleet through a load and an outage, scrapes its metrics four times a second, and draws the main
// panels of the dashboard from the samples. Call it in the folder of the module:
//
//	go run ./panels -out ../../docs/metrics.svg
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"html"
	"log"
	"maps"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/quotaprom"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

func main() {
	out := flag.String("out", "metrics.svg", "the picture's file")
	took := flag.Duration("for", 60*time.Second, "how long the fleet runs; the outage is in the middle third")
	flag.Parse()
	if err := run(*out, *took); err != nil {
		log.Fatal(err)
	}
}

// store fails while it is off.
type store struct {
	*local.Store
	off atomic.Bool
}

var errOff = fmt.Errorf("panels: %w: the store is off", quota.ErrUnavailable)

func (s *store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.off.Load() {
		return quota.Decision{}, errOff
	}
	return s.Store.Charge(ctx, c)
}

func (s *store) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if s.off.Load() {
		return errOff
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func run(out string, took time.Duration) error {
	shared := &store{Store: local.New()}
	policies, err := resilience.Standard(shared, resilience.Fallback(local.New(), resilience.Instances(3), nil), nil)
	if err != nil {
		return err
	}
	metrics := quotaprom.New(nil)
	charger, err := quota.NewCharger(policies, &quota.Options{Observers: []func(context.Context, *quota.Call){metrics.Observe}})
	if err != nil {
		return err
	}
	defer charger.Close()
	metrics.Watch(charger)
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	server := &http.Server{Handler: promhttp.HandlerFor(registry, promhttp.HandlerOpts{})}
	go server.Serve(listener)
	defer server.Close()

	ctx, cancel := context.WithTimeout(context.Background(), took)
	defer cancel()
	var agents sync.WaitGroup
	for i := range 24 {
		agents.Go(func() { agent(ctx, charger, i) })
	}
	defer time.AfterFunc(took/3, func() { shared.off.Store(true) }).Stop()
	defer time.AfterFunc(2*took/3, func() { shared.off.Store(false) }).Stop()
	var scrapes []scraped
	ticker := time.NewTicker(250 * time.Millisecond)
	defer ticker.Stop()
	for began := time.Now(); ctx.Err() == nil; <-ticker.C {
		s, err := scrape("http://" + listener.Addr().String())
		if err != nil {
			return err
		}
		s.at = time.Since(began)
		scrapes = append(scrapes, s)
	}
	agents.Wait()
	return os.WriteFile(out, []byte(draw(scrapes, took)), 0o644)
}

var (
	tokens = quota.NewLimit("tokens", algorithm.TokenBucket(40_000, 40_000, time.Second))
	calls  = quota.NewLimit("calls", algorithm.TokenBucket(100, 50, time.Second))
)

// agent takes from the quotas of its team until the context ends. Teams differ in their hunger.
func agent(ctx context.Context, charger *quota.Charger, i int) {
	team := i % 4
	for ctx.Err() == nil {
		n := rand.Int64N(100) * int64(team+1)
		charger.ChargeAll(context.Background(), quota.Charge{Limit: tokens, Key: fmt.Sprintf("team-%d", team), Cost: n},
			quota.Charge{Limit: calls, Key: fmt.Sprintf("team-%d/agent-%d", team, i), Cost: 1})
		time.Sleep(time.Duration(5+rand.IntN(30)) * time.Millisecond)
	}
}

// scraped are the samples of a scrape, by name and labels.
type scraped struct {
	at      time.Duration
	samples map[string]float64
	buckets map[string]map[float64]float64 // of histograms: cumulative counts by upper bound
}

func scrape(url string) (s scraped, err error) {
	response, err := http.Get(url)
	if err != nil {
		return s, err
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return s, errors.New("panels: scrape: " + response.Status)
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(response.Body)
	s = scraped{samples: map[string]float64{}, buckets: map[string]map[float64]float64{}}
	for name, family := range families {
		for _, m := range family.GetMetric() {
			id := name
			for _, l := range m.GetLabel() {
				id += " " + l.GetName() + "=" + l.GetValue()
			}
			switch {
			case m.Counter != nil:
				s.samples[id] = m.Counter.GetValue()
			case m.Gauge != nil:
				s.samples[id] = m.Gauge.GetValue()
			case m.Histogram != nil:
				s.buckets[id] = map[float64]float64{}
				for _, b := range m.Histogram.GetBucket() {
					s.buckets[id][b.GetUpperBound()] = float64(b.GetCumulativeCount())
				}
			}
		}
	}
	return s, err
}

// line is a line of a panel.
type line struct {
	name   string
	points []point
}

type point struct{ x, y float64 }

// window is over how many scrapes rates are.
const window = 8

// rates returns, for each value of a label, the rate of a metric's samples that have all of some labels.
func rates(scrapes []scraped, metric, by string, having ...string) []line {
	lines := map[string][]point{}
	for i := window; i < len(scrapes); i++ {
		sums := map[string]float64{}
		for id, value := range scrapes[i].samples {
			labels := strings.Split(id, " ")
			if labels[0] != metric || slices.ContainsFunc(having, func(h string) bool { return !slices.Contains(labels, h) }) {
				continue
			}
			name := metric
			for _, l := range labels[1:] {
				if value, ok := strings.CutPrefix(l, by+"="); ok {
					name = value
				}
			}
			sums[name] += (value - scrapes[i-window].samples[id]) / (scrapes[i].at - scrapes[i-window].at).Seconds()
		}
		for name, sum := range sums {
			lines[name] = append(lines[name], point{scrapes[i].at.Seconds(), sum})
		}
	}
	return sorted(lines)
}

// gauge returns a gauge.
func gauge(scrapes []scraped, name, id string) line {
	l := line{name: name}
	for _, s := range scrapes {
		l.points = append(l.points, point{s.at.Seconds(), s.samples[id]})
	}
	return l
}

// quantile returns a quantile of a histogram, as histogram_quantile does, times a scale.
func quantile(scrapes []scraped, name, id string, q, scale float64) line {
	l := line{name: name}
	for i := window; i < len(scrapes); i++ {
		bounds := slices.Sorted(maps.Keys(scrapes[i].buckets[id]))
		if len(bounds) == 0 {
			continue
		}
		count := func(bound float64) float64 {
			return scrapes[i].buckets[id][bound] - scrapes[i-window].buckets[id][bound]
		}
		rank := q * count(bounds[len(bounds)-1])
		if rank == 0 {
			continue
		}
		below, from := 0.0, 0.0
		for _, bound := range bounds {
			if n := count(bound); n >= rank {
				if math.IsInf(bound, 1) {
					bound = from
				}
				if n > below {
					from += (bound - from) * (rank - below) / (n - below)
				}
				break
			}
			below, from = count(bound), bound
		}
		l.points = append(l.points, point{scrapes[i].at.Seconds(), scale * from})
	}
	return l
}

// sorted returns the lines that are not 0 throughout.
func sorted(lines map[string][]point) (all []line) {
	for _, name := range slices.Sorted(maps.Keys(lines)) {
		if slices.ContainsFunc(lines[name], func(p point) bool { return p.y != 0 }) {
			all = append(all, line{name, lines[name]})
		}
	}
	return all
}

const (
	width, height = 400, 220
	left, top     = 52, 34
	right, bottom = 14, 58
)

var colors = []string{"#3274d9", "#e02f44", "#56a64b", "#ff9830", "#8f3bb8", "#37872d"}

// draw returns the panels as a picture.
func draw(scrapes []scraped, took time.Duration) string {
	duration, use := "fleetquota_decision_duration_seconds source=", "fleetquota_utilization_ratio limit="
	panels := []struct {
		title string
		lines []line
	}{
		{"Decisions a second, by outcome", rates(scrapes, "fleetquota_decisions_total", "outcome")},
		{"Denials a second, by limit", rates(scrapes, "fleetquota_decisions_total", "limit", "outcome=denied")},
		{"Decisions a second, by source", rates(scrapes, "fleetquota_decisions_total", "source")},
		{"Tokens a second", rates(scrapes, "fleetquota_tokens_total", "outcome", "limit=tokens")},
		{"Utilization after a decision", []line{
			quantile(scrapes, "tokens, median", use+"tokens", 0.5, 1), quantile(scrapes, "tokens, 99 %", use+"tokens", 0.99, 1), quantile(scrapes, "calls, median", use+"calls", 0.5, 1),
		}},
		{"Time of decisions, 99 %, in microseconds", []line{
			quantile(scrapes, "store", duration+"store", 0.99, 1e6), quantile(scrapes, "fallback", duration+"fallback", 0.99, 1e6),
		}},
		{"Breaker and fallback", []line{
			gauge(scrapes, "breaker open", "fleetquota_breakers_open node= store=primary"), gauge(scrapes, "degraded", "fleetquota_degraded store=primary"),
		}},
		{"Tokens owed to the store", []line{gauge(scrapes, "owed", "fleetquota_fallback_owed_tokens store=primary")}},
		{"Calls that the breaker refused, a second", rates(scrapes, "fleetquota_breaker_refused_calls_total", "store")},
	}
	const columns = 3
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="11">`+"\n", columns*width, (len(panels)+columns-1)/columns*height)
	fmt.Fprintf(&b, `<rect width="100%%" height="100%%" fill="#fff"/>`+"\n")
	for i, p := range panels {
		panel(&b, i%columns*width, i/columns*height, p.title, p.lines, took.Seconds())
	}
	return b.String() + "</svg>\n"
}

// panel draws a panel at a place.
func panel(b *strings.Builder, x, y int, title string, lines []line, seconds float64) {
	most := 0.0
	for _, l := range lines {
		for _, p := range l.points {
			most = max(most, p.y)
		}
	}
	most = nice(most)
	fmt.Fprintf(b, `<g transform="translate(%d,%d)"><text x="%d" y="18" font-size="13" font-weight="bold">%s</text>`+"\n", x, y, 10, html.EscapeString(title))
	at := func(p point) (float64, float64) {
		return left + p.x/seconds*(width-left-right), height - bottom - p.y/most*(height-top-bottom)
	}
	for i := range 5 {
		value := most * float64(i) / 4
		_, py := at(point{0, value})
		fmt.Fprintf(b, `<line x1="%d" x2="%d" y1="%.1f" y2="%.1f" stroke="#ddd"/><text x="%d" y="%.1f" text-anchor="end" fill="#555">%s</text>`+"\n", left, width-right, py, py, left-5, py+4, short(value))
	}
	for i := range 4 {
		px, _ := at(point{seconds * float64(i) / 3, 0})
		fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="middle" fill="#555">%.0f s</text>`+"\n", px, height-bottom+15, seconds*float64(i)/3)
	}
	from, _ := at(point{seconds / 3, 0})
	to, _ := at(point{2 * seconds / 3, 0})
	fmt.Fprintf(b, `<rect x="%.1f" y="%d" width="%.1f" height="%d" fill="#e02f44" opacity="0.06"/>`+"\n", from, top, to-from, height-top-bottom)
	legend := 10
	for i, l := range lines {
		color := colors[i%len(colors)]
		fmt.Fprintf(b, `<polyline fill="none" stroke="%s" stroke-width="1.3" points="`, color)
		for _, p := range l.points {
			px, py := at(p)
			fmt.Fprintf(b, "%.1f,%.1f ", px, py)
		}
		fmt.Fprintf(b, `"/><rect x="%d" y="%d" width="10" height="3" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n", legend, height-20, color, legend+14, height-15, html.EscapeString(l.name))
		legend += 30 + 6*len(l.name)
	}
	b.WriteString("</g>\n")
}

// nice returns a round number of at least n.
func nice(n float64) float64 {
	if n <= 0 {
		return 1
	}
	unit := math.Pow(10, math.Floor(math.Log10(n)))
	for _, m := range []float64{1, 2, 4, 5, 10} {
		if m*unit >= n {
			return m * unit
		}
	}
	return 10 * unit
}

func short(n float64) string {
	if n >= 10_000 {
		return fmt.Sprintf("%.4gk", n/1000)
	}
	return fmt.Sprintf("%.4g", n)
}
