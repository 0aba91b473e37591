package quotahttp_test

import (
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

var (
	minute = quota.Must(algorithm.ParseLimit("minute: 3/1m fixed"))
	day    = quota.Must(algorithm.ParseLimit("day: 5/24h fixed"))
	tokens = quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/s bucket"))
)

// byPeer is the rule of most tests, and peerKey the key of a request that httptest made.
func byPeer(limits ...*quota.Limit) quotahttp.Rule {
	return quotahttp.By(quotahttp.IP(quotahttp.Peer), limits...)
}

const peerKey = "192.0.2.1/ip"

func newLimiter(t testing.TB, store quota.Store, o *quota.Options) *quota.Limiter {
	t.Helper()
	limiter, err := quota.NewLimiter(store, minute, o)
	if err != nil {
		t.Fatal(err)
	}
	return limiter
}

// handler returns a handler behind the middleware.
func handler(t testing.TB, store quota.Store, o *quotahttp.Options, next http.HandlerFunc, rules ...quotahttp.Rule) http.Handler {
	t.Helper()
	limits, err := quotahttp.New(newLimiter(t, store, nil), o, rules...)
	if err != nil {
		t.Fatal(err)
	}
	return limits(next)
}

func ok(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok") }

// send sends a request to a handler, changed by some functions.
func send(h http.Handler, changes ...func(*http.Request)) *http.Response {
	r := httptest.NewRequest("GET", "/v1/things", nil)
	for _, change := range changes {
		change(r)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w.Result()
}

func with(name string, values ...string) func(*http.Request) {
	return func(r *http.Request) { r.Header[http.CanonicalHeaderKey(name)] = values }
}

func body(t testing.TB, resp *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func wantStatus(t testing.TB, resp *http.Response, want int) {
	t.Helper()
	if resp.StatusCode != want {
		t.Errorf("status: got %d, want %d", resp.StatusCode, want)
	}
}

func wantField(t testing.TB, h http.Header, name, want string) {
	t.Helper()
	got := ""
	for i, v := range h.Values(name) {
		if i > 0 {
			got += ", "
		}
		got += v
	}
	if got != want {
		t.Errorf("field %s: got %q, want %q", name, got, want)
	}
}

// errorList collects the errors that Options.Error is told.
type errorList struct {
	mu   sync.Mutex
	errs []error
}

func (l *errorList) tell(_ *http.Request, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.errs = append(l.errs, err)
}

func (l *errorList) take() []error {
	l.mu.Lock()
	defer l.mu.Unlock()
	errs := l.errs
	l.errs = nil
	return errs
}

// answers is a store that gives decisions which a test chose.
type answers struct {
	decisions []quota.Decision
	err       error
}

func (a *answers) Charge(_ context.Context, _ quota.Charge) (quota.Decision, error) {
	if a.err != nil {
		return quota.Decision{}, a.err
	}
	return a.decisions[0], nil
}

func (a *answers) ChargeAll(_ context.Context, _ []quota.Charge, out []quota.Decision) error {
	copy(out, a.decisions)
	return a.err
}

func (a *answers) Close() error { return nil }

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

const microsecond = time.Microsecond
