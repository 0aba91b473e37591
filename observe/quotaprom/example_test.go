package quotaprom_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/quotaprom"
	"github.com/fleetquota/fleetquota/quota"
)

func Example() {
	metrics := quotaprom.New(nil)
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(100, 1, time.Hour))
	limiter := quota.Must(quota.NewLimiter(local.New(), limit, &quota.Options{Observers: []func(context.Context, *quota.Call){metrics.Observe}}))
	defer limiter.Close()
	metrics.Watch(limiter)
	registry := prometheus.NewRegistry()
	registry.MustRegister(metrics)

	for range 3 {
		limiter.Take(context.Background(), "team-7/agent-123", 40)
	}

	page := httptest.NewRecorder()
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(page, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	for line := range strings.Lines(page.Body.String()) {
		for _, name := range []string{"fleetquota_decisions_total", `fleetquota_tokens_total{limit="tokens"`, "fleetquota_store_keys"} {
			if strings.HasPrefix(line, name) {
				fmt.Print(line)
			}
		}
	}
	// Output:
	// fleetquota_decisions_total{limit="tokens",op="take",outcome="allowed",source="store"} 2
	// fleetquota_decisions_total{limit="tokens",op="take",outcome="denied",source="store"} 1
	// fleetquota_store_keys{store="primary"} 1
	// fleetquota_tokens_total{limit="tokens",outcome="charged"} 80
	// fleetquota_tokens_total{limit="tokens",outcome="denied"} 40
	// fleetquota_tokens_total{limit="tokens",outcome="replayed"} 0
	// fleetquota_tokens_total{limit="tokens",outcome="returned"} 0
	// fleetquota_tokens_total{limit="tokens",outcome="shadow_denied"} 0
}
