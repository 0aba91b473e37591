package quotahttp_test

import (
	"net/http"
	"testing"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

// TestAllocs bounds the allocations of a request through the middleware, one limit by address, on the store in memory.
func TestAllocs(t *testing.T) {
	if testenv.Race {
		t.Skip("the race detector allocates, and empties pools")
	}
	for _, test := range []struct {
		headers quotahttp.Headers
		limit   string
		most    float64
	}{
		{quotahttp.NoHeaders, "requests: 1000000000/24h fixed", 5},
		{quotahttp.GitHub, "requests: 1000000000/24h fixed", 7},
		{quotahttp.IETF, "requests: 1000000000/24h fixed", 7},
		{quotahttp.GitHub, "requests: 0/24h fixed", 8},
		{quotahttp.IETF, "requests: 0/24h fixed", 8},
	} {
		store := local.New()
		defer store.Close()
		limits := quota.Must(quotahttp.New(quota.Must(quota.NewLimiter(store, minute, nil)), &quotahttp.Options{Headers: test.headers}, byPeer(limit(test.limit))))
		h := limits(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
		r, w := requestOf(t), discard{http.Header{}}
		got := testing.AllocsPerRun(1000, func() {
			clear(w.header)
			h.ServeHTTP(w, r)
		})
		if got > test.most {
			t.Errorf("allocations of a request, %s, dialect %d: got %v, want at most %v", test.limit, test.headers, got, test.most)
		}
	}
}
