package quotahttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/failsafe-go/failsafe-go/failsafehttp"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// server is a RoundTripper that answers as a test says.
type server func(*http.Request) (*http.Response, error)

func (s server) RoundTrip(r *http.Request) (*http.Response, error) { return s(r) }

// answer is the answer of a server with some fields, each of the form "Name: value".
func answer(status int, fields ...string) *http.Response {
	return &http.Response{StatusCode: status, Header: request("", fields...).Header, Body: http.NoBody}
}

func newTransport(t testing.TB, store quota.Store, o *quotahttp.TransportOptions, rules ...quotahttp.Rule) http.RoundTripper {
	t.Helper()
	tr, err := quotahttp.NewTransport(newLimiter(t, store, nil), o, rules...)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

func outgoing(ctx context.Context, url string, fields ...string) *http.Request {
	r := quota.Must(http.NewRequestWithContext(ctx, "GET", url, nil))
	for name, values := range request("", fields...).Header {
		r.Header[name] = values
	}
	return r
}

const hostKey = "api.example.org/host"

// blocked returns how long the backoff of a key lasts.
func blocked(t *testing.T, store quota.Store, key string) time.Duration {
	t.Helper()
	d, err := store.Charge(t.Context(), quota.Charge{Limit: quotahttp.Backoff, Key: key, Op: quota.OpPeek, Floor: quotahttp.Backoff.Capacity()})
	if err != nil {
		t.Fatal(err)
	}
	return d.RetryAfter
}

// TestLearn: how long a client holds off after an answer.
func TestLearn(t *testing.T) {
	date := "Date: " + time.Date(2026, 1, 1, 12, 0, 0, 0, time.UTC).Format(http.TimeFormat)
	for name, test := range map[string]struct {
		resp *http.Response
		want time.Duration
	}{
		"granted":                   {answer(200), 0},
		"refused, and no more":      {answer(429), 0},
		"seconds":                   {answer(429, "Retry-After: 30"), 30 * time.Second},
		"of 503":                    {answer(503, "Retry-After: 30"), 30 * time.Second},
		"of 403":                    {answer(403, "Retry-After: 30"), 30 * time.Second},
		"of a redirect":             {answer(301, "Retry-After: 30"), 0},
		"0":                         {answer(429, "Retry-After: 0"), 0},
		"below 0":                   {answer(429, "Retry-After: -5"), 0},
		"a part of a second":        {answer(429, "Retry-After: 0.5"), 500 * time.Millisecond},
		"no number":                 {answer(429, "Retry-After: soon"), 0},
		"NaN":                       {answer(429, "Retry-After: NaN"), 0},
		"infinity":                  {answer(429, "Retry-After: Inf"), 24 * time.Hour},
		"a year":                    {answer(429, "Retry-After: 31536000"), 24 * time.Hour},
		"1e300":                     {answer(429, "Retry-After: 1e300"), 24 * time.Hour},
		"a date":                    {answer(429, date, "Retry-After: Thu, 01 Jan 2026 12:01:30 GMT"), 90 * time.Second},
		"a date that has passed":    {answer(429, date, "Retry-After: Thu, 01 Jan 2026 11:00:00 GMT"), 0},
		"Retry-After and RateLimit": {answer(429, "Retry-After: 5", `RateLimit: "a";r=0;t=60`), 5 * time.Second},
		"RateLimit":                 {answer(429, `RateLimit: "a";r=0;t=60`), 60 * time.Second},
		"RateLimit of 200":          {answer(200, `RateLimit: "a";r=0;t=60, "b";r=0;t=70, "c";r=1;t=80`), 70 * time.Second},
		"RateLimit, some left":      {answer(200, `RateLimit: "a";r=1;t=60`), 0},
		"RateLimit in two lines":    {answer(200, `RateLimit: "a";r=1;t=60`, `RateLimit: "b";r=0;t=6`), 6 * time.Second},
		"RateLimit without t":       {answer(200, `RateLimit: "a";r=0`), 0},
		"RateLimit without r":       {answer(200, `RateLimit: "a";t=5`), 0},
		"RateLimit, broken":         {answer(200, `RateLimit: "a";r=0;t=60, "b`), 0},
		"RateLimit, other types":    {answer(200, `RateLimit: "a";r=0;t="60", (a b);r=0;t=60`), 0},
		"RateLimit of a cache":      {answer(200, "Age: 3", `RateLimit: "a";r=0;t=60`), 0},
		"GitHub":                    {answer(403, date, "X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 1767268860"), 60 * time.Second},
		"GitHub, some left":         {answer(200, date, "X-RateLimit-Remaining: 1", "X-RateLimit-Reset: 1767268860"), 0},
		"in milliseconds":           {answer(429, date, "X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 1767268860000"), 60 * time.Second},
		"from now":                  {answer(429, "X-RateLimit-Remaining: 0", "X-RateLimit-Reset: 7"), 7 * time.Second},
		"draft 03":                  {answer(429, "RateLimit-Remaining: 0", "RateLimit-Reset: 7"), 7 * time.Second},
		"OpenAI":                    {answer(200, "x-ratelimit-remaining-requests: 0", "x-ratelimit-reset-requests: 6m0s", "x-ratelimit-remaining-tokens: 0", "x-ratelimit-reset-tokens: 12ms"), 6 * time.Minute},
		"OpenAI, unknown":           {answer(200, "x-ratelimit-remaining-tokens: -1", "x-ratelimit-reset-tokens: 6m0s"), 0},
		"Anthropic":                 {answer(429, date, "anthropic-ratelimit-input-tokens-remaining: 0", "anthropic-ratelimit-input-tokens-reset: 2026-01-01T12:00:05Z"), 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			store := quotatest.New(t, nil)
			tr := newTransport(t, store, &quotahttp.TransportOptions{Next: server(func(*http.Request) (*http.Response, error) { return test.resp, nil })})
			if resp, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/v1")); resp != test.resp || err != nil {
				t.Errorf("answer: got %v, %v; want the server's", resp, err)
			}
			if got := blocked(t, store, hostKey); got != test.want {
				t.Errorf("backoff: got %v, want %v", got, test.want)
			}
		})
	}
}

// Every dialect that the middleware writes, the transport reads: the next request fits when it waits as long
// as it was told.
func TestLearnOwnDialects(t *testing.T) {
	for _, dialect := range []quotahttp.Headers{quotahttp.IETF, quotahttp.GitHub, quotahttp.OpenAI, quotahttp.Anthropic, quotahttp.Draft03} {
		far := quotatest.New(t, nil)
		h := handler(t, far, &quotahttp.Options{Headers: dialect}, ok, byPeer(minute))
		store := quotatest.New(t, nil)
		next := server(func(*http.Request) (*http.Response, error) {
			resp := send(h)
			resp.Header.Del("Retry-After")
			resp.Header.Set("Date", far.Now().UTC().Format(http.TimeFormat))
			return resp, nil
		})
		tr := newTransport(t, store, &quotahttp.TransportOptions{Next: next})
		for range 3 {
			if _, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/v1")); err != nil {
				t.Fatal(err)
			}
		}
		wait := blocked(t, store, hostKey)
		if wait != time.Minute {
			t.Errorf("backoff by dialect %d: got %v, want 1m", dialect, wait)
		}
		store.Advance(wait)
		far.Advance(wait)
		if resp, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/v1")); err != nil || resp.StatusCode != 200 {
			t.Errorf("request after the backoff: got %v, %v; want 200", resp, err)
		}
	}
}

// Processes that were told times wait until the latest of them, and the times do not add up. Another host is
// not held off.
func TestBackoffOfFleet(t *testing.T) {
	store := quotatest.New(t, nil)
	refuse := []string{"30", "30", "20", "41", "41", "1"}
	var fleet []http.RoundTripper
	for range refuse {
		fleet = append(fleet, newTransport(t, store, &quotahttp.TransportOptions{Next: server(func(*http.Request) (*http.Response, error) { return answer(200), nil })}))
	}
	want := []time.Duration{30 * time.Second, 30 * time.Second, 30 * time.Second, 41 * time.Second, 41 * time.Second, 41 * time.Second}
	for i, after := range refuse {
		learn(t, store, after)
		if got := blocked(t, store, hostKey); got != want[i] {
			t.Errorf("backoff after %d refusals: got %v, want %v", i+1, got, want[i])
		}
	}
	sent := make(chan error)
	for _, tr := range fleet {
		go func() {
			_, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/v1"))
			sent <- err
		}()
	}
	store.AwaitSleepers(len(fleet))
	if _, err := fleet[0].RoundTrip(outgoing(t.Context(), "https://other.example.org/")); err != nil {
		t.Errorf("request to another host: got %v, want none", err)
	}
	store.Advance(41*time.Second - time.Microsecond)
	select {
	case err := <-sent:
		t.Fatalf("a request was sent before the time: %v", err)
	default:
	}
	store.Advance(time.Microsecond)
	for range fleet {
		if err := <-sent; err != nil {
			t.Errorf("request after the time: got %v, want none", err)
		}
	}
}

// learn has a transport of its own, whose requests wait for nothing, be refused.
func learn(t *testing.T, store quota.Store, after string) {
	t.Helper()
	tr := newTransport(t, passing{store}, &quotahttp.TransportOptions{Next: server(func(*http.Request) (*http.Response, error) { return answer(429, "Retry-After: "+after), nil })})
	if _, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/v1")); err != nil {
		t.Fatal(err)
	}
}

// passing is a store that allows every peek: the request was sent before the others were refused.
type passing struct{ quota.Store }

func (p passing) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if c.Op == quota.OpPeek {
		return quota.Decision{Allowed: true}, nil
	}
	return p.Store.Charge(ctx, c)
}

// Each user has a backoff of their own where the key says so.
func TestBackoffKey(t *testing.T) {
	store := quotatest.New(t, nil)
	tr := newTransport(t, store, &quotahttp.TransportOptions{
		Backoff: quotahttp.Join(quotahttp.Host, quotahttp.Header("Authorization")),
		Next: server(func(r *http.Request) (*http.Response, error) {
			if r.Header.Get("Authorization") == "Bearer a" {
				return answer(429, "Retry-After: 30"), nil
			}
			return answer(200), nil
		}),
	})
	soon, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	for _, test := range []struct {
		user string
		want error
	}{{"a", nil}, {"b", nil}, {"a", context.DeadlineExceeded}, {"b", nil}} {
		if _, err := tr.RoundTrip(outgoing(soon, "https://api.example.org/", "Authorization: Bearer "+test.user)); !errors.Is(err, test.want) {
			t.Errorf("request of %s: got %v, want %v", test.user, err, test.want)
		}
	}
	if soon.Err() != nil {
		t.Error("a request whose deadline comes before the quota waited for it, want it to fail at once")
	}
}

// A request waits for quota and charges it once; one that leaves, or whose host holds it off for longer than
// it may wait, has its charges given back, and its body closed.
func TestTransportWaits(t *testing.T) {
	store := quotatest.New(t, nil)
	byHost := quotahttp.By(quotahttp.Host, minute)
	sends := 0
	tr := newTransport(t, store, &quotahttp.TransportOptions{Next: server(func(r *http.Request) (*http.Response, error) {
		sends++
		return answer(200, "Set: 1"), nil
	})}, byHost)
	for range 3 {
		if _, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/")); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error)
	go func() {
		_, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/"))
		done <- err
	}()
	store.AwaitSleepers(1)
	store.WantCharged(minute, hostKey, 3)
	store.Advance(time.Minute)
	if err := <-done; err != nil {
		t.Errorf("request that waited: got %v, want none", err)
	}
	store.WantCharged(minute, hostKey, 4)
	if sends != 4 {
		t.Errorf("requests sent: got %d, want 4", sends)
	}

	learn(t, store, "3600")
	closed := false
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	r := outgoing(ctx, "https://api.example.org/")
	r.Body = closer{&closed}
	if _, err := tr.RoundTrip(r); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("request that is held off for longer than its deadline: got %v, want DeadlineExceeded", err)
	}
	if !closed {
		t.Error("body of a request that was not sent: got it open, want it closed")
	}
	store.WantCharged(minute, hostKey, 4)

	gone, leave := context.WithCancel(t.Context())
	go func() {
		_, err := tr.RoundTrip(outgoing(gone, "https://api.example.org/"))
		done <- err
	}()
	store.AwaitSleepers(1)
	store.WantCharged(minute, hostKey, 5) // while it waits
	leave()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("request that left: got %v, want Canceled", err)
	}
	store.WantCharged(minute, hostKey, 4)
}

type closer struct{ closed *bool }

func (closer) Read([]byte) (int, error) { return 0, io.EOF }
func (c closer) Close() error           { *c.closed = true; return nil }

// One request without quota holds up no request of the same host with quota.
func TestTransportHoldsUpNone(t *testing.T) {
	store := quotatest.New(t, nil)
	tr := newTransport(t, store, &quotahttp.TransportOptions{Next: server(func(*http.Request) (*http.Response, error) { return answer(200), nil })},
		quotahttp.By(quotahttp.Header("Authorization"), minute))
	send := func(user string) error {
		_, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/", "Authorization: "+user))
		return err
	}
	for range 3 {
		if err := send("a"); err != nil {
			t.Fatal(err)
		}
	}
	done := make(chan error)
	go func() { done <- send("a") }()
	store.AwaitSleepers(1)
	if err := send("b"); err != nil {
		t.Errorf("request with quota: got %v, want none", err)
	}
	store.Advance(time.Minute)
	if err := <-done; err != nil {
		t.Errorf("request that waited: got %v, want none", err)
	}
}

// The store failed: the error, or the request with FailOpen; a wait that cannot end in time is no failure of
// the store.
func TestTransportFailed(t *testing.T) {
	for _, open := range []bool{false, true} {
		store := quotatest.New(t, nil)
		var errs errorList
		tr := newTransport(t, store, &quotahttp.TransportOptions{FailOpen: open, Error: errs.tell,
			Next: server(func(*http.Request) (*http.Response, error) { return answer(429, "Retry-After: 60"), nil })}, quotahttp.By(quotahttp.Host, minute))
		store.Fail(quota.ErrUnavailable)
		resp, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/"))
		if open != (err == nil && resp.StatusCode == 429) || !open && !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("request while the store is down, open %v: got %v, %v", open, resp, err)
		}
		if got := errs.take(); open != (len(got) == 2) {
			t.Errorf("errors told, open %v: got %v, want two of the charge and the backoff, or none", open, got)
		}
		store.Fail(nil)
		if _, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/")); err != nil {
			t.Error(err)
		}
		soon, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := tr.RoundTrip(outgoing(soon, "https://api.example.org/")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("request that is held off for longer than its deadline, open %v: got %v, want DeadlineExceeded", open, err)
		}
		failed := errors.New("no route")
		tr = newTransport(t, store, &quotahttp.TransportOptions{Next: server(func(*http.Request) (*http.Response, error) { return nil, failed })}, quotahttp.By(quotahttp.Host, minute))
		if _, err := tr.RoundTrip(outgoing(t.Context(), "https://other.example.org/")); err != failed {
			t.Errorf("request that fails: got %v, want the error of the transport inside", err)
		}
		store.WantCharged(minute, "other.example.org/host", 1)
	}
	limiter := newLimiter(t, quotatest.New(t, nil), nil)
	for name, make := range map[string]func() (http.RoundTripper, error){
		"no limiter": func() (http.RoundTripper, error) { return quotahttp.NewTransport(nil, nil) },
		"a nil rule": func() (http.RoundTripper, error) { return quotahttp.NewTransport(limiter, nil, nil) },
	} {
		if _, err := make(); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "; accepted: ") {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
	tr, err := quotahttp.NewTransport(limiter, nil, quotahttp.By(quotahttp.Header("X-API-Key"), minute))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/")); !errors.Is(err, quotahttp.ErrNoKey) {
		t.Errorf("request without a key: got %v, want ErrNoKey", err)
	}
}

// A retry policy goes around the transport, which holds its repeats off until the server admits them.
func ExampleNewTransport() {
	requests := quota.Must(algorithm.ParseLimit("requests: 100/1m sliding"))
	limiter := quota.Must(quota.NewLimiter(local.New(), requests, nil))
	defer limiter.Close()
	refusals := 0
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if refusals++; refusals == 1 {
			w.Header().Set("Retry-After", "1")
			w.WriteHeader(http.StatusTooManyRequests)
		}
	}))
	defer api.Close()

	transport := quota.Must(quotahttp.NewTransport(limiter, nil, quotahttp.By(quotahttp.Host, requests)))
	client := &http.Client{Transport: failsafehttp.NewRoundTripper(transport, failsafehttp.NewRetryPolicyBuilder().Build())}
	began := time.Now()
	resp := quota.Must(client.Get(api.URL))
	resp.Body.Close()
	fmt.Println(resp.StatusCode, "after", time.Since(began).Truncate(time.Second))
	// Output: 200 after 1s
}

// FuzzLearn: whatever an answer says, the backoff is 0 to 24 hours, and no panic.
func FuzzLearn(f *testing.F) {
	for _, s := range []string{"30", "Thu, 01 Jan 2026 12:01:30 GMT", `"a";r=0;t=60`, "6m0s", "2026-01-01T12:00:05Z", "1767268860", "-1", "9e999", "", "0x10", "-9223372036854775808ns", `"a";r=0;t=999999999999999`} {
		f.Add(uint16(429), s, s)
	}
	f.Fuzz(func(t *testing.T, status uint16, retry, reset string) {
		h := http.Header{"Retry-After": {retry}, "Date": {reset}, "Ratelimit": {reset}}
		for _, name := range []string{"X-Ratelimit", "Ratelimit"} {
			h[name+"-Remaining"], h[name+"-Reset"] = []string{"0"}, []string{reset}
		}
		h["X-Ratelimit-Remaining-A"], h["X-Ratelimit-Reset-A"] = []string{"0"}, []string{reset}
		h["Anthropic-Ratelimit-Remaining"], h["Anthropic-Ratelimit-A-Remaining"], h["Anthropic-Ratelimit-A-Reset"] = []string{"0"}, []string{"0"}, []string{retry}
		store := local.New()
		defer store.Close()
		var errs errorList
		tr := newTransport(t, store, &quotahttp.TransportOptions{Error: errs.tell, Next: server(func(*http.Request) (*http.Response, error) {
			return &http.Response{StatusCode: int(status), Header: h, Body: http.NoBody}, nil
		})})
		if _, err := tr.RoundTrip(outgoing(t.Context(), "https://api.example.org/")); err != nil {
			t.Fatal(err)
		}
		if got := errs.take(); len(got) != 0 {
			t.Errorf("errors told: got %v, want none", got)
		}
		if got := blocked(t, store, hostKey); got < 0 || got > 24*time.Hour {
			t.Errorf("backoff: got %v, want 0 to 24h", got)
		}
	})
}
