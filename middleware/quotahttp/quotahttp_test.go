package quotahttp_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// All limits of a request are one call: a denied one charges none, and its answer says which denied it, and
// until when.
func TestDenied(t *testing.T) {
	store := quotatest.New(t, nil)
	h := handler(t, store, nil, ok, byPeer(minute, day))
	for i := range 3 {
		resp := send(h)
		wantStatus(t, resp, 200)
		wantField(t, resp.Header, "RateLimit", fmt.Sprintf(`"minute";r=%d;t=60, "day";r=%d;t=86400`, 2-i, 4-i))
	}
	store.Advance(18800 * time.Millisecond)
	resp := send(h)
	wantStatus(t, resp, 429)
	wantField(t, resp.Header, "Retry-After", "42")
	wantField(t, resp.Header, "RateLimit", `"minute";r=0;t=42, "day";r=2;t=86382`)
	wantField(t, resp.Header, "Content-Type", "application/problem+json")
	const want = `{"type":"https://iana.org/assignments/http-problem-types#quota-exceeded","title":"Quota exceeded","status":429,"violated-policies":["minute"]}` + "\n"
	if got := body(t, resp); got != want {
		t.Errorf("body: got %s, want %s", got, want)
	}
	store.WantCharged(day, peerKey, 3)
	store.Advance(42 * time.Second) // as told
	wantStatus(t, send(h), 200)
	wantStatus(t, send(h), 200)
	resp = send(h)
	wantStatus(t, resp, 429)
	wantField(t, resp.Header, "Retry-After", "86340")
	if got := body(t, resp); !strings.Contains(got, `"violated-policies":["day"]`) {
		t.Errorf("body: got %s, want it to name day", got)
	}
	wantStatus(t, send(h, func(r *http.Request) { r.RemoteAddr = "192.0.2.2:1" }), 200)
}

// Every body is JSON, with the names of all limits that denied the request and of none else, once each.
func TestProblem(t *testing.T) {
	for _, test := range []struct {
		refusal quotahttp.Refusal
		kind    string
	}{
		{quotahttp.Refusal{Status: 429, Limits: []string{"minute", "day"}}, "#quota-exceeded"},
		{quotahttp.Refusal{Status: 429, Limits: []string{"minute"}}, "#quota-exceeded"},
		{quotahttp.Refusal{Status: 429}, "#quota-exceeded"},
		{quotahttp.Refusal{Status: 503, Err: quota.ErrUnavailable}, "#temporary-reduced-capacity"},
		{quotahttp.Refusal{Status: 500, Err: quotahttp.ErrNoKey}, "about:blank"},
	} {
		w := httptest.NewRecorder()
		test.refusal.ServeHTTP(w, nil)
		var got struct {
			Type, Title string
			Status      int
			Limits      []string `json:"violated-policies"`
		}
		if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil || !strings.HasSuffix(got.Type, test.kind) || got.Title == "" || got.Status != test.refusal.Status || w.Code != got.Status || !reflect.DeepEqual(got.Limits, test.refusal.Limits) {
			t.Errorf("problem of %+v: got %d %s, %v", test.refusal, w.Code, w.Body, err)
		}
	}
	store := &answers{decisions: []quota.Decision{{}, {Allowed: true}, {}, {Shadow: true}}}
	charges := func(*http.Request) ([]quota.Charge, error) {
		return []quota.Charge{{Limit: day, Key: "a"}, {Limit: minute, Key: "b"}, {Limit: day, Key: "b"}, {Limit: tokens, Key: "b", Shadow: true}}, nil
	}
	if got := body(t, send(handler(t, store, nil, ok, charges))); !strings.HasSuffix(got, `"violated-policies":["day"]}`+"\n") {
		t.Errorf("problem of a list: got %s, want it to name day once", got)
	}
}

// The store failed: 503 or the handler, never 429, and the error is told. An invalid charge is the program's:
// 500.
func TestFailed(t *testing.T) {
	for _, test := range []struct {
		err          error
		status, open int
		retry        string
	}{
		{quota.ErrUnavailable, 503, 200, "1"},
		{quota.ErrIndeterminate, 503, 200, "1"},
		{quota.ErrOverloaded, 503, 200, "1"},
		{quota.ErrConflict, 503, 200, "1"},
		{quota.ErrMisconfigured, 503, 200, "1"},
		{quota.ErrClosed, 503, 200, "1"},
		{errors.New("not of this library"), 503, 200, "1"},
		{context.DeadlineExceeded, 503, 200, "1"}, // the store's own
		{quota.ErrInvalid, 500, 500, ""},
		{quota.ErrCrossSlot, 500, 500, ""},
	} {
		for _, open := range []bool{false, true} {
			var errs errorList
			err := fmt.Errorf("secret of the store: %w", test.err)
			h := handler(t, &answers{err: err}, &quotahttp.Options{FailOpen: open, Error: errs.tell}, ok, byPeer(minute, day))
			resp, want, retry := send(h), test.status, test.retry
			if open {
				want = test.open
			}
			if want == 200 {
				retry = ""
			}
			wantStatus(t, resp, want)
			wantField(t, resp.Header, "Retry-After", retry)
			wantField(t, resp.Header, "RateLimit", "")
			if got := body(t, resp); strings.Contains(got, "secret") {
				t.Errorf("body: got %s, want nothing of the error", got)
			}
			if got := errs.take(); len(got) != 1 || !errors.Is(got[0], test.err) {
				t.Errorf("errors told for %v, open %v: got %v, want it once", test.err, open, got)
			}
		}
	}
}

// A policy that denies while the store is down is an outage, not a denial, unless the request could never
// fit.
func TestFailedClosed(t *testing.T) {
	for _, open := range []bool{false, true} {
		for retry, want := range map[time.Duration]int{1500 * time.Millisecond: 503, quota.Never: 429} {
			var errs errorList
			store := &answers{decisions: []quota.Decision{{Source: quota.FromClosed, RetryAfter: retry}}}
			wantStatus(t, send(handler(t, store, &quotahttp.Options{FailOpen: open, Error: errs.tell}, ok, byPeer(minute))), want)
			if got := errs.take(); (len(got) == 1 && errors.Is(got[0], quota.ErrUnavailable)) != (want == 503) {
				t.Errorf("errors told: got %v, want an ErrUnavailable for 503 alone", got)
			}
		}
	}
}

// A client that left gets neither 429 nor 503, its handler does not run, and it is no error. A deadline of
// the server's own is an outage.
func TestClientGone(t *testing.T) {
	for _, open := range []bool{false, true} {
		store := quotatest.New(t, nil)
		defer store.Hang()()
		var errs errorList
		h := handler(t, store, &quotahttp.Options{FailOpen: open, Error: errs.tell}, func(http.ResponseWriter, *http.Request) { t.Error("the handler ran") }, byPeer(minute))
		gone, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Millisecond, cancel)
		resp := send(h, func(r *http.Request) { *r = *r.WithContext(gone) })
		wantStatus(t, resp, 499)
		wantField(t, resp.Header, "Retry-After", "")
		if got := errs.take(); len(got) != 0 {
			t.Errorf("errors told: got %v, want none", got)
		}
		late, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		wantStatus(t, send(h, func(r *http.Request) { *r = *r.WithContext(late) }), 503)
		if got := errs.take(); len(got) != 1 || !errors.Is(got[0], context.DeadlineExceeded) {
			t.Errorf("errors told: got %v, want the deadline", got)
		}
	}
}

// A request without a key is never charged to a quota of all such requests, also where the store may fail
// open.
func TestNoKey(t *testing.T) {
	store := quotatest.New(t, nil)
	var errs errorList
	byHeader := quotahttp.By(quotahttp.Header("X-API-Key"), minute)
	h := handler(t, store, &quotahttp.Options{FailOpen: true, Error: errs.tell}, ok, byPeer(day), byHeader)
	resp := send(h)
	wantStatus(t, resp, 500)
	wantField(t, resp.Header, "Retry-After", "")
	if got := errs.take(); len(got) != 1 || !errors.Is(got[0], quotahttp.ErrNoKey) {
		t.Errorf("errors told: got %v, want ErrNoKey", got)
	}
	if got := len(store.Calls()); got != 0 {
		t.Errorf("calls of the store: got %d, want 0", got)
	}
	wantStatus(t, send(h, with("X-API-Key", "sk-1")), 200)

	refuse := func(w http.ResponseWriter, r *http.Request, refusal *quotahttp.Refusal) {
		if errors.Is(refusal.Err, quotahttp.ErrNoKey) {
			http.Error(w, "an API key is needed", http.StatusUnauthorized)
			return
		}
		refusal.ServeHTTP(w, r)
	}
	h = handler(t, store, &quotahttp.Options{Refuse: refuse, Error: errs.tell}, ok, byHeader)
	wantStatus(t, send(h), 401)
	for range 2 {
		wantStatus(t, send(h, with("X-API-Key", "sk-1")), 200)
	}
	resp = send(h, with("X-API-Key", "sk-1"))
	wantStatus(t, resp, 429)
	wantField(t, resp.Header, "Retry-After", "60")
}

// The ready parts of rules, and rules of the program's own.
func TestRules(t *testing.T) {
	store := quotatest.New(t, nil)
	var errs errorList
	header := func(name string) func(*http.Request) int64 {
		return func(r *http.Request) int64 {
			var n int64
			_, _ = fmt.Sscan(r.Header.Get(name), &n)
			return n
		}
	}
	h := handler(t, store, &quotahttp.Options{Error: errs.tell}, ok,
		byPeer(tokens).Cost(header("Cost")).Floor(header("Floor")),
		byPeer(day).Shadow(),
		byPeer(minute).Skip(func(r *http.Request) bool { return r.Method == http.MethodOptions }),
		func(r *http.Request) ([]quota.Charge, error) { return nil, nil },
	)
	wantStatus(t, send(h, with("Cost", "900")), 200)
	store.WantCharged(tokens, peerKey, 900)
	wantStatus(t, send(h, with("Cost", "90"), with("Floor", "2")), 429)
	wantStatus(t, send(h, with("Cost", "90"), with("Floor", "1")), 200)
	wantStatus(t, send(h, with("Cost", "-1")), 500)
	wantStatus(t, send(h, with("Cost", "1"), with("Floor", "101")), 500)
	wantStatus(t, send(h, with("Cost", "1001")), 429)
	wantField(t, send(h, with("Cost", "1001")).Header, "Retry-After", "")
	for range 5 { // the day has 5 tokens, and 2 are charged
		wantStatus(t, send(h, func(r *http.Request) { r.Method = http.MethodOptions }), 200)
	}
	store.WantCharged(minute, peerKey, 2)
	store.WantCharged(day, peerKey, 5)

	all := handler(t, store, nil, ok, byPeer(minute).Skip(func(*http.Request) bool { return true }))
	store.Forget()
	wantStatus(t, send(all), 200)
	if got := len(store.Calls()); got != 0 {
		t.Errorf("calls of the store for a request without charges: got %d, want 0", got)
	}
	failing := handler(t, store, &quotahttp.Options{FailOpen: true, Error: errs.tell}, ok, func(*http.Request) ([]quota.Charge, error) { return nil, errors.New("no database") })
	wantStatus(t, send(failing), 500)
	twice := handler(t, store, &quotahttp.Options{FailOpen: true, Error: errs.tell}, ok, byPeer(day), byPeer(day))
	wantStatus(t, send(twice), 500)
}

// OPTIONS and HEAD are charged as GET is: a preflight's fields must not open a way past the limits.
func TestMethods(t *testing.T) {
	store := quotatest.New(t, nil)
	h := handler(t, store, nil, ok, byPeer(minute))
	preflight := []func(*http.Request){with("Origin", "https://example.org"), with("Access-Control-Request-Method", "GET")}
	for _, method := range []string{"OPTIONS", "HEAD", "GET"} {
		wantStatus(t, send(h, append(preflight, func(r *http.Request) { r.Method = method })...), 200)
	}
	for _, method := range []string{"OPTIONS", "HEAD", "GET"} {
		resp := send(h, append(preflight, func(r *http.Request) { r.Method = method })...)
		wantStatus(t, resp, 429)
		wantField(t, resp.Header, "Retry-After", "60")
	}
}

// Limits by plan: a rule without limits takes those of LimitFor, and the answer tells of them.
func TestLimitFor(t *testing.T) {
	store := quotatest.New(t, nil)
	paid := limit("minute: 10/1m fixed")
	limiter := newLimiter(t, store, &quota.Options{LimitFor: func(key string) *quota.Limit {
		if quota.Group(key) == "192.0.2.7" {
			return paid
		}
		return nil
	}})
	limits, err := quotahttp.New(limiter, nil, byPeer())
	if err != nil {
		t.Fatal(err)
	}
	h := limits(http.HandlerFunc(ok))
	wantField(t, send(h).Header, "RateLimit", `"minute";r=2;t=60`)
	resp := send(h, func(r *http.Request) { r.RemoteAddr = "192.0.2.7:1" })
	wantField(t, resp.Header, "RateLimit", `"minute";r=9;t=60`)
	wantField(t, resp.Header, "RateLimit-Policy", `"minute";q=10;w=60`)

	var errs errorList
	limits, err = quotahttp.New(limiter, &quotahttp.Options{FailOpen: true, Error: errs.tell}, func(*http.Request) ([]quota.Charge, error) { return []quota.Charge{{Cost: 1}}, nil })
	if err != nil {
		t.Fatal(err)
	}
	wantStatus(t, send(limits(http.HandlerFunc(ok))), 500) // a charge without a key
}

func TestNew(t *testing.T) {
	limiter := newLimiter(t, quotatest.New(t, nil), nil)
	for name, make := range map[string]func() (func(http.Handler) http.Handler, error){
		"no limiter": func() (func(http.Handler) http.Handler, error) { return quotahttp.New(nil, nil, byPeer(minute)) },
		"no rules":   func() (func(http.Handler) http.Handler, error) { return quotahttp.New(limiter, nil) },
		"a nil rule": func() (func(http.Handler) http.Handler, error) {
			return quotahttp.New(limiter, nil, byPeer(minute), nil)
		},
		"nil, Settle": func() (func(http.Handler) http.Handler, error) {
			return quotahttp.New(limiter, &quotahttp.Options{Settle: map[string]func(quotahttp.Usage) int64{"tokens": nil}}, byPeer(minute))
		},
	} {
		if limits, err := make(); limits != nil || !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "; accepted: ") {
			t.Errorf("%s: got %v, want an ErrInvalid", name, err)
		}
	}
}

// Without Options.Error one error a second is logged, with the number of those left out, and no text of the
// request.
func TestLog(t *testing.T) {
	var log bytes.Buffer
	before := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(&log, nil)))
	defer slog.SetDefault(before)
	h := handler(t, &answers{err: quota.ErrUnavailable}, nil, ok, byPeer(minute))
	began := time.Now()
	for range 1000 {
		send(h, with("Authorization", "secret"))
	}
	if got := strings.Count(log.String(), "\n"); got < 1 || got > 1+int(time.Since(began)/time.Second)+1 {
		t.Errorf("lines logged: got %d, want one a second:\n%s", got, &log)
	}
	if !strings.Contains(log.String(), "store unavailable") || strings.Contains(log.String(), "secret") {
		t.Errorf("log: got %s, want the error and nothing of the request", &log)
	}
}
