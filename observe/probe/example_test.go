package probe_test

import (
	"fmt"
	"net/http/httptest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/observe/probe"
	"github.com/fleetquota/fleetquota/quota"
)

// A process is ready until its limiter is closed.
func ExampleProbe_Ready() {
	limiter := quota.Must(quota.NewLimiter(local.New(), quota.NewLimit("day", algorithm.FixedWindow(50, 24*time.Hour)), nil))
	probes := quota.Must(probe.New(limiter.Store(), &probe.Options{MaxAge: time.Nanosecond}))
	for range 2 {
		w := httptest.NewRecorder()
		probes.Ready().ServeHTTP(w, httptest.NewRequest("GET", "/readyz", nil))
		fmt.Print(w.Code, " ", w.Body)
		limiter.Close()
	}
	// Output:
	// 200 {"state":"ok"}
	// 503 {"state":"closed","error":"quota: the store is closed"}
}
