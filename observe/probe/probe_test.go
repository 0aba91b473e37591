package probe_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/observe/probe"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// store is a store with servers, whose answers a test chooses.
type store struct {
	quota.Store
	health error
	charge func(ctx context.Context, key string) error // nil for none
	calls  atomic.Int64
}

func (s *store) Health(context.Context) (driver.Health, error) {
	if s.health != nil {
		return driver.Health{}, s.health
	}
	return driver.Health{Kind: "redis", Version: "7.4.1", Eviction: "allkeys-lru", Evicted: 3}, nil
}

func (s *store) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	s.calls.Add(1)
	if c.Op != quota.OpPeek {
		return quota.Decision{}, fmt.Errorf("got the operation %s, want a peek", c.Op)
	}
	if s.charge != nil {
		if err := s.charge(ctx, c.Key); err != nil {
			return quota.Decision{}, err
		}
	}
	return s.Store.Charge(ctx, c)
}

func fail(err error) func(context.Context, string) error {
	return func(context.Context, string) error { return err }
}

// get returns the status and the body of an answer.
func get(t *testing.T, p *probe.Probe, live bool) (status int, body map[string]any) {
	t.Helper()
	h := p.Ready()
	if live {
		h = p.Live()
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
	if err := json.Unmarshal(w.Body.Bytes(), &body); err != nil {
		t.Fatalf("body: got %q, %v, want JSON", w.Body, err)
	}
	return w.Code, body
}

// The state, and the answers for readiness and liveness, for each state of the store and each policy around it.
func TestStates(t *testing.T) {
	down, wrong := fmt.Errorf("%w: refused", quota.ErrUnavailable), fmt.Errorf("%w: NOPERM", quota.ErrMisconfigured)
	policies := map[string]func() resilience.Policy{
		"fallback":   func() resilience.Policy { return resilience.Fallback(local.New(), resilience.Instances(4), nil) },
		"fail open":  func() resilience.Policy { return resilience.FailOpen(nil) },
		"closed":     func() resilience.Policy { return resilience.FailClosed(nil) },
		"with error": resilience.FailWithError,
	}
	for _, test := range []struct {
		name   string
		policy string
		set    func(s *store)
		want   probe.State
	}{
		{"healthy", "fallback", func(*store) {}, probe.OK},
		{"healthy", "with error", func(*store) {}, probe.OK},
		{"no right to ask for the health", "with error", func(s *store) { s.health = wrong }, probe.OK},
		{"outage", "fallback", func(s *store) { s.health, s.charge = down, fail(down) }, probe.Degraded},
		{"outage", "fail open", func(s *store) { s.health, s.charge = down, fail(down) }, probe.Degraded},
		{"outage", "closed", func(s *store) { s.health, s.charge = down, fail(down) }, probe.Unavailable},
		{"outage", "with error", func(s *store) { s.health, s.charge = down, fail(down) }, probe.Unavailable},
		{"lost answers", "fallback", func(s *store) { s.health, s.charge = down, fail(quota.ErrIndeterminate) }, probe.Degraded},
		{"one node of several is down", "with error", func(s *store) {
			s.health, s.charge = down, func(_ context.Context, key string) error {
				if strings.HasSuffix(key, "3") {
					return down
				}
				return nil
			}
		}, probe.Degraded},
		{"health alone fails", "with error", func(s *store) { s.health = down }, probe.Degraded},
		{"misconfigured", "fallback", func(s *store) { s.health, s.charge = wrong, fail(wrong) }, probe.Misconfigured},
		{"misconfigured", "fail open", func(s *store) { s.health, s.charge = wrong, fail(wrong) }, probe.Misconfigured},
		{"misconfigured", "with error", func(s *store) { s.health, s.charge = wrong, fail(wrong) }, probe.Misconfigured},
		{"charges alone are misconfigured", "fallback", func(s *store) { s.charge = fail(wrong) }, probe.Misconfigured},
		{"misconfigured while the fallback decides", "fallback", func(s *store) { s.health, s.charge = wrong, fail(down) }, probe.Misconfigured},
		{"panic", "with error", func(s *store) { s.charge = func(context.Context, string) error { panic("oops") } }, probe.Unavailable},
	} {
		name := test.name + ", " + test.policy
		s := &store{Store: local.New()}
		test.set(s)
		guarded, err := resilience.Standard(s, policies[test.policy](), nil)
		if err != nil {
			t.Fatal(err)
		}
		p, err := probe.New(guarded, nil)
		if err != nil {
			t.Fatal(err)
		}
		check(t, name, p, test.want)
		guarded.Close()
		// The result above still serves: another probe sees the store closed.
		p = quota.Must(probe.New(guarded, nil))
		check(t, name+", and closed", p, probe.Closed)
	}
}

// check checks the answers of a probe.
func check(t *testing.T, name string, p *probe.Probe, want probe.State) {
	t.Helper()
	status := map[probe.State][2]int{probe.OK: {200, 200}, probe.Degraded: {200, 200}, probe.Unavailable: {503, 200}, probe.Misconfigured: {503, 200}, probe.Closed: {503, 503}}
	for i, live := range []bool{false, true} {
		code, body := get(t, p, live)
		if code != status[want][i] || body["state"] != string(want) {
			t.Errorf("%s: live %v: got %d, %v, want %d, %s", name, live, code, body, status[want][i], want)
		}
		if want != probe.OK && body["error"] == "" {
			t.Errorf("%s: error: got none, want the cause", name)
		}
	}
}

// A store in memory has no servers; its limits may deny all.
func TestInMemory(t *testing.T) {
	limiter := quota.Must(quota.NewLimiter(local.New(), testkit.Bucket("n", 1, time.Hour), nil))
	for range 10 {
		limiter.Take(t.Context(), "k", 1)
	}
	check(t, "in memory", quota.Must(probe.New(limiter.Store(), nil)), probe.OK)
	limiter.Close()
	check(t, "in memory, closed", quota.Must(probe.New(limiter.Store(), nil)), probe.Closed)
}

// A check ends by its timeout, one serves all requests meanwhile, and each serves for its age.
func TestCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hang := make(chan struct{})
		s := &store{Store: local.New(), charge: func(context.Context, string) error { <-hang; return nil }} // it does not see its deadline
		p := quota.Must(probe.New(s, nil))
		var wg sync.WaitGroup
		for range 100 {
			wg.Go(func() {
				start := time.Now()
				if r := p.Check(t.Context()); r.State != probe.Unavailable || r.Err == nil || time.Since(start) > time.Second {
					t.Errorf("a store that hangs: got %+v after %v, want unavailable within a second", r, time.Since(start))
				}
			})
		}
		wg.Wait()
		peeks := s.calls.Load()
		if peeks == 0 || peeks > 16 {
			t.Errorf("peeks for 100 requests: got %d, want those of one check", peeks)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if r := p.Check(ctx); r.State != probe.Unavailable || !errors.Is(r.Err, context.Canceled) {
			t.Errorf("a request that ended: got %+v, want unavailable and its error", r)
		}
		close(hang)
		synctest.Wait()
		if r := p.Check(t.Context()); !errors.Is(r.Err, context.DeadlineExceeded) || s.calls.Load() != peeks {
			t.Errorf("after the check that hung: got %+v and %d peeks, want its outcome", r, s.calls.Load()-peeks)
		}
		time.Sleep(probe.DefaultMaxAge)
		if r := p.Check(t.Context()); r.State != probe.OK {
			t.Errorf("a second later: got %+v, want ok", r)
		}
		peeks = s.calls.Load()
		s.charge = fail(quota.ErrUnavailable)
		if r := p.Check(t.Context()); r.State != probe.OK || s.calls.Load() != peeks {
			t.Errorf("at once: got %+v and %d peeks, want the result before and no peek", r, s.calls.Load()-peeks)
		}
		time.Sleep(probe.DefaultMaxAge)
		if r := p.Check(t.Context()); r.State != probe.Unavailable {
			t.Errorf("a second later: got %+v, want unavailable", r)
		}
	})
}

// The body has the server's words.
func TestBody(t *testing.T) {
	p := quota.Must(probe.New(&store{Store: local.New()}, nil))
	_, body := get(t, p, false)
	if want := map[string]any{"state": "ok", "kind": "redis", "version": "7.4.1", "eviction": "allkeys-lru", "evicted": 3.}; fmt.Sprint(body) != fmt.Sprint(want) {
		t.Errorf("body: got %v, want %v", body, want)
	}
	w := httptest.NewRecorder()
	p.Ready().ServeHTTP(w, httptest.NewRequest("POST", "/", nil))
	if w.Code != 405 || w.Header().Get("Allow") != "GET, HEAD" {
		t.Errorf("POST: got %d, %v, want 405 and the methods", w.Code, w.Header())
	}
}

func TestOptions(t *testing.T) {
	_, err := probe.New(nil, nil)
	testkit.WantInvalid(t, err, "the store is nil", "accepted: ")
	for _, o := range []probe.Options{{Timeout: -1}, {MaxAge: -1}} {
		_, err := probe.New(local.New(), &o)
		testkit.WantInvalid(t, err, "Options.", "accepted: ")
	}
}

// A server of Redis, through its states, behind a fallback.
func TestRedis(t *testing.T) {
	server := redisserver.Start(t)
	do := func(args ...string) {
		t.Helper()
		if _, err := server.Do(args...); err != nil {
			t.Fatal(err)
		}
	}
	do("ACL", "SETUSER", "app", "on", ">secret", "~quota:*", "+evalsha", "+eval", "+time", "+get", "+set", "+del", "+info")
	redis := quota.Must(backend.Open(t.Context(), "redis://app:secret@"+server.Addr()))
	guarded, err := resilience.Standard(redis, resilience.Fallback(local.New(), resilience.Instances(4), nil), &resilience.StandardOptions{Timeout: 500 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer guarded.Close()
	p := quota.Must(probe.New(guarded, &probe.Options{MaxAge: 1}))
	check(t, "up", p, probe.OK)
	do("ACL", "SETUSER", "app", "-info")
	check(t, "without the right +info", p, probe.OK)
	do("ACL", "SETUSER", "app", "-evalsha", "-eval")
	check(t, "without the rights to decide", p, probe.Misconfigured)
	do("ACL", "SETUSER", "app", "+evalsha", "+eval", "+info")
	check(t, "with all rights again", p, probe.OK)
	server.Kill()
	check(t, "killed", p, probe.Degraded)
}
