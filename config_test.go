package fleetquota_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

// A program sets in the configuration that the environment gave whatever the environment does not say.
func ExampleNew() {
	config, err := fleetquota.ConfigFromEnv()
	if err != nil {
		fmt.Println(err)
		return
	}
	config.Limit = quota.Must(algorithm.ParseLimit("calls: 2/24h fixed-from-first"))
	config.Observers = append(config.Observers, func(_ context.Context, c *quota.Call) {
		fmt.Println("observed:", c.Charges[0].Limit.Name(), c.Granted)
	})
	limiter, err := fleetquota.New(context.Background(), config)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limiter.Close()
	for range 3 {
		limiter.Allow(context.Background(), "agent-123", 1)
	}
	fmt.Println("breakers:", len(limiter.Breakers()))
	// Output:
	// observed: calls true
	// observed: calls true
	// observed: calls false
	// breakers: 0
}

// variables are those that a configuration is read from.
var variables = []string{"QUOTA_URL", "REDIS_URL", "QUOTA_LIMIT", "TOKEN_BUCKET_SIZE", "TOKEN_REFILL_RATE", "FLEET_SIZE", "QUOTA_OUTAGE",
	"FALLBACK_MAX_KEYS", "QUOTA_TIMEOUT", "QUOTA_IN_FLIGHT", "QUOTA_MAX_WAITERS"}

func setenv(t *testing.T, values map[string]string) {
	t.Helper()
	for _, name := range variables {
		t.Setenv(name, values[name])
	}
}

func TestConfigFromEnv(t *testing.T) {
	setenv(t, nil)
	c, err := fleetquota.ConfigFromEnv()
	if err != nil || c.Limit.String() != "tokens: 1000 burst 10/s bucket" {
		t.Errorf("no variable: got the limit %v, %v, want the default", c.Limit, err)
	}
	c.Limit = nil
	if !reflect.DeepEqual(c, fleetquota.Config{}) {
		t.Errorf("no variable: got %+v, want the zero Config", c)
	}
	const url = "redis://:secret@127.0.0.1:1"
	setenv(t, map[string]string{"QUOTA_URL": url, "REDIS_URL": url, "QUOTA_LIMIT": "calls: 100/1m sliding", "FLEET_SIZE": "4", "QUOTA_OUTAGE": "closed",
		"FALLBACK_MAX_KEYS": "1000", "QUOTA_TIMEOUT": "250ms", "QUOTA_IN_FLIGHT": "7", "QUOTA_MAX_WAITERS": "9"})
	c, err = fleetquota.ConfigFromEnv()
	if err != nil {
		t.Fatal(err)
	}
	if c.URL != url || c.Limit.String() != "calls: 100/1m sliding" || c.Fleet != 4 || c.Outage != fleetquota.OutageClosed ||
		c.FallbackKeys != 1000 || c.Timeout != 250*time.Millisecond || c.InFlight != 7 || c.MaxWaiters != 9 {
		t.Errorf("all variables: got %+v, want the values of all", c)
	}
	setenv(t, map[string]string{"TOKEN_BUCKET_SIZE": "7", "TOKEN_REFILL_RATE": "10.5"})
	if c, err := fleetquota.ConfigFromEnv(); err != nil || c.Limit.String() != "tokens: 7 burst 21/2s bucket" {
		t.Errorf("a bucket: got %v, %v", c.Limit, err)
	}
	for _, name := range []string{"QUOTA_URL", "REDIS_URL"} {
		setenv(t, map[string]string{name: url})
		if c, err := fleetquota.ConfigFromEnv(); err != nil || c.URL != url {
			t.Errorf("%s: got %q, %v, want the URL", name, c.URL, err)
		}
		setenv(t, map[string]string{name: "redis://:secret@host/x"})
		if _, err := fleetquota.FromEnv(t.Context()); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s that is wrong: got %v, want ErrInvalid with its name, and no secret", name, err)
		}
	}
}

func TestConfigFromEnvRefuses(t *testing.T) {
	for _, test := range []struct {
		values map[string]string
		parts  []string
	}{
		{map[string]string{"QUOTA_URL": "redis://:secret@a", "REDIS_URL": "redis://:secret@b"}, []string{"QUOTA_URL and REDIS_URL", "differ"}},
		{map[string]string{"QUOTA_LIMIT": "calls: 100/1x sliding"}, []string{"QUOTA_LIMIT", `"1x"`}},
		{map[string]string{"QUOTA_LIMIT": "calls: 100/1m sliding", "TOKEN_REFILL_RATE": "1"}, []string{"QUOTA_LIMIT and TOKEN_REFILL_RATE"}},
		{map[string]string{"QUOTA_OUTAGE": "shut"}, []string{"QUOTA_OUTAGE", `"shut"`, "share, error, open or closed"}},
		{map[string]string{"QUOTA_TIMEOUT": "0s"}, []string{"QUOTA_TIMEOUT", `"0s"`, "250ms"}},
		{map[string]string{"QUOTA_TIMEOUT": "61m"}, []string{"QUOTA_TIMEOUT", "1h"}},
		{map[string]string{"QUOTA_TIMEOUT": "250"}, []string{"QUOTA_TIMEOUT"}},
		{map[string]string{"QUOTA_IN_FLIGHT": "0"}, []string{"QUOTA_IN_FLIGHT", `"0"`, "1 to 1000000"}},
		{map[string]string{"QUOTA_MAX_WAITERS": "-1"}, []string{"QUOTA_MAX_WAITERS"}},
	} {
		setenv(t, test.values)
		c, err := fleetquota.ConfigFromEnv()
		if !errors.Is(err, quota.ErrInvalid) || !reflect.DeepEqual(c, fleetquota.Config{}) {
			t.Errorf("%v: got %+v, %v, want the zero Config and ErrInvalid", test.values, c, err)
			continue
		}
		for _, part := range append(test.parts, "accepted: ") {
			if !strings.Contains(err.Error(), part) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v: got %q, want %q in it, and no secret", test.values, err, part)
			}
		}
	}
	setenv(t, map[string]string{"QUOTA_OUTAGE": "share", "REDIS_URL": "redis://127.0.0.1:1"})
	if _, err := fleetquota.FromEnv(t.Context()); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "FLEET_SIZE") {
		t.Errorf("a share without a fleet: got %v, want ErrInvalid that names FLEET_SIZE", err)
	}
}

// closes notes that it was closed.
type closes struct {
	quota.Store
	closed bool
}

func (c *closes) Close() error { c.closed = true; return c.Store.Close() }

func TestNewRefuses(t *testing.T) {
	for field, c := range map[string]fleetquota.Config{
		"Fleet": {Fleet: -1}, "FallbackKeys": {FallbackKeys: 1<<30 + 1}, "Timeout": {Timeout: -1}, "InFlight": {InFlight: -1}, "Outage": {Outage: "shut"},
		"URL and a Store": {URL: "memory://"}, "Outage is": {Outage: fleetquota.OutageShare}, "MaxWaiters": {MaxWaiters: -1},
		"Observers[0]": {Observers: []func(context.Context, *quota.Call){nil}}, "-1 probes": {Breaker: &resilience.BreakerOptions{Probes: -1}},
	} {
		store := &closes{Store: quotatest.New(t, nil)}
		c.Store = store
		l, err := fleetquota.New(t.Context(), c)
		if l != nil || !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: got %v, %v, want ErrInvalid that names it", field, l, err)
		}
		if !store.closed {
			t.Errorf("%s: the store: got it open, want it closed", field)
		}
	}
	if _, err := fleetquota.New(t.Context(), fleetquota.Config{URL: "nosuch://host"}); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "Config.URL") {
		t.Errorf("a wrong URL: got %v, want ErrInvalid that names Config.URL", err)
	}
}

// Each way to decide in an outage, and the other parts of a configuration, on a store that the test makes fail.
func TestNew(t *testing.T) {
	for outage, want := range map[fleetquota.Outage]quota.Source{
		"": quota.FromFallback, fleetquota.OutageShare: quota.FromFallback, fleetquota.OutageOpen: quota.FromOpen, fleetquota.OutageClosed: quota.FromClosed,
		fleetquota.OutageError: quota.FromStore,
	} {
		logged := make(lines, 100)
		store := quotatest.New(t, nil)
		calls := 0
		limiter, err := fleetquota.New(t.Context(), fleetquota.Config{
			Store: store, Fleet: 4, Outage: outage, Timeout: time.Second, Limit: quota.Must(algorithm.ParseLimit("calls: 100/1m fixed")),
			LimitFor: func(key string) *quota.Limit {
				if key == "large" {
					return quota.Must(algorithm.ParseLimit("calls: 400/1m fixed"))
				}
				return nil
			},
			Observers: []func(context.Context, *quota.Call){func(context.Context, *quota.Call) { calls++ }},
			Logger:    slog.New(slog.NewTextHandler(logged, nil)),
		})
		if err != nil {
			t.Fatal(err)
		}
		if d, err := limiter.Take(t.Context(), "large", 1); err != nil || d.Capacity != 400 || d.Source != quota.FromStore {
			t.Errorf("outage %q: take before it: got %v, %v, want it of 400 by the store", outage, d, err)
		}
		store.Fail(quota.ErrUnavailable)
		d, err := limiter.Take(t.Context(), "k", 1)
		if outage == fleetquota.OutageError {
			if !errors.Is(err, quota.ErrUnavailable) {
				t.Errorf("outage %q: got %v, %v, want ErrUnavailable", outage, d, err)
			}
		} else if err != nil || d.Source != want || d.Allowed != (want != quota.FromClosed) {
			t.Errorf("outage %q: got %v, %v, want a decision %v", outage, d, err, want)
		}
		if states := limiter.Breakers(); len(states) != 1 || states[""] != "closed" {
			t.Errorf("outage %q: breakers: got %v, want one, closed", outage, states)
		}
		if _, err := limiter.Health(t.Context()); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("outage %q: health of a store without servers: got %v, want ErrUnsupported", outage, err)
		}
		if calls != 2 {
			t.Errorf("outage %q: observed calls: got %d, want 2", outage, calls)
		}
		if err := limiter.Close(); err != nil {
			t.Errorf("Close: got %v", err)
		}
		for range 100 { // notices come from a goroutine
			if outage == fleetquota.OutageError || len(logged) > 0 {
				break
			}
			time.Sleep(10 * time.Millisecond)
		}
		if text := ""; outage != fleetquota.OutageError {
			for len(logged) > 0 {
				text += <-logged
			}
			if !strings.Contains(text, "notice=") {
				t.Errorf("outage %q: log: got %q, want a notice with its name", outage, text)
			}
		}
	}
}

// The page about the environment has every variable.
func TestVariablesAreDocumented(t *testing.T) {
	b, err := os.ReadFile("docs/usage.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range variables {
		if !strings.Contains(string(b), "| `"+name) {
			t.Errorf("docs/usage.md: got no row of %s, want one", name)
		}
	}
}
