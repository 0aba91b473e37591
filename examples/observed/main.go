// Command observed runs a small fleet of agents and shows it from outside: metrics, traces, top keys, logs and probes.
//
//	go -C examples/observed run . -listen :8080
//
//	/metrics   decisions, and the state of the store, for Prometheus
//	/top       the keys that are denied most and use most
//	/traces    the latest spans, of an exporter in memory
//	/ledger    the sums that the agents counted themselves
//	/readyz    whether the process can decide, and /livez
//
// The quotas are in memory, or in the Redis of REDIS_URL: then the spans of calls have children around the round trips.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/observe/probe"
	"github.com/fleetquota/fleetquota/observe/quotalog"
	"github.com/fleetquota/fleetquota/observe/quotaotel"
	"github.com/fleetquota/fleetquota/observe/quotaprom"
	"github.com/fleetquota/fleetquota/observe/top"
	"github.com/fleetquota/fleetquota/quota"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdout); err != nil && !errors.Is(err, flag.ErrHelp) {
		fmt.Fprintln(os.Stderr, "observed:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	flags := flag.NewFlagSet("observed", flag.ContinueOnError)
	listen := flags.String("listen", "127.0.0.1:8080", "the `address` of the pages")
	length := flags.Duration("for", 0, "how long to run; 0 is until an interrupt")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if *length > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, *length)
		defer cancel()
	}
	f, err := newFleet(ctx, os.Getenv("REDIS_URL"))
	if err != nil {
		return err
	}
	defer f.close()
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		return err
	}
	server := &http.Server{Handler: f.pages, ReadHeaderTimeout: 5 * time.Second}
	go server.Serve(l)
	defer server.Close()
	fmt.Fprintf(stdout, "http://%s/top, and /metrics, /traces, /ledger, /readyz\n", l.Addr())
	f.work(ctx, 0, 20*time.Millisecond)
	fmt.Fprintln(stdout, f.ledger.summary())
	return nil
}

// newFleet makes a fleet of agents with all that observes it. The URL is that of a Redis; "" is the memory of this process.
func newFleet(ctx context.Context, url string) (*fleet, error) {
	if url == "" {
		url = "memory://"
	}
	store, err := backend.Open(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("REDIS_URL: %w", err)
	}
	spans := &recent{}
	tracers := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	telemetry, err := quotaotel.New(&quotaotel.Options{TracerProvider: tracers})
	if err != nil {
		return nil, err
	}
	// A logger of the program, at most one line a minute of each limit and kind.
	log := quota.Must(quotalog.New(&quotalog.Options{Logger: slog.Default(), PerMinute: 1}))

	config := fleetquota.Config{Store: telemetry.Trace(store), Limit: agentTokens, Observers: []func(context.Context, *quota.Call){telemetry.Observe, log.Observe}}
	registry, pages := prometheus.NewRegistry(), http.NewServeMux()

	// Five lines, and the limiter between them.
	metrics, offenders := quotaprom.New(nil), quota.Must(top.New(nil))
	config.Observers = append(config.Observers, metrics.Observe, offenders.Observe)
	limiter, err := fleetquota.New(ctx, config)
	if err != nil {
		return nil, err
	}
	metrics.Watch(limiter)
	registry.MustRegister(metrics)
	pages.Handle("GET /top", offenders)

	telemetry.Watch(limiter)
	probes := quota.Must(probe.New(limiter.Store(), nil))
	pages.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}))
	pages.Handle("GET /traces", spans)
	pages.Handle("GET /readyz", probes.Ready())
	pages.Handle("GET /livez", probes.Live())
	f := &fleet{limiter: limiter.Limiter, tracer: tracers.Tracer("observed"), tracers: tracers, spans: spans, pages: pages, ledger: newLedger()}
	pages.Handle("GET /ledger", f.ledger)
	return f, nil
}
