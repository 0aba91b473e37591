package fleetquota_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

func ExampleFromEnv() {
	ctx := context.Background()
	limiter, err := fleetquota.FromEnv(ctx) // 1000 tokens, 10 more each second, in memory
	if err != nil {
		fmt.Println(err)
		return
	}
	defer limiter.Close()

	for _, tokens := range []int64{250, 700, 100} {
		d, err := limiter.Take(ctx, "team-7/agent-123", tokens)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println(tokens, "allowed:", d.Allowed, "left:", d.Remaining, "retry after:", d.RetryAfter.Round(time.Second))
	}
	// Output:
	// 250 allowed: true left: 750 retry after: 0s
	// 700 allowed: true left: 50 retry after: 0s
	// 100 allowed: false left: 50 retry after: 5s
}

func TestFromEnv(t *testing.T) {
	t.Setenv("REDIS_URL", "")
	t.Setenv("TOKEN_BUCKET_SIZE", "3")
	t.Setenv("TOKEN_REFILL_RATE", "0.5")
	limiter, err := fleetquota.FromEnv(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer limiter.Close()
	if d, err := limiter.Take(t.Context(), "a", 3); err != nil || !d.Allowed || d.Capacity != 3 || d.ResetAfter != 6*time.Second {
		t.Errorf("first take: got %+v, %v; want it allowed, limit 3, reset after 6s", d, err)
	}
	d, err := limiter.Take(t.Context(), "a", 2)
	if err != nil || d.Allowed || d.RetryAfter > 4*time.Second || d.RetryAfter < 3*time.Second {
		t.Errorf("second take: got %+v, %v; want it denied, retry after 3s to 4s", d, err)
	}
	limiter.Close()
	if _, err := limiter.Take(t.Context(), "a", 1); !errors.Is(err, quota.ErrClosed) {
		t.Errorf("take after Close: got %v, want ErrClosed", err)
	}
}

// TestFromEnvLinksRedis: the schemes of Redis are there without an import, and nothing is asked of a server.
// Tests with servers are in backend.
func TestFromEnvLinksRedis(t *testing.T) {
	for _, url := range []string{
		"redis://127.0.0.1:1", "redis://127.0.0.1:1?client=rueidis", "rediss://127.0.0.1:1", "redis+sentinel://127.0.0.1:1?master=m",
		"redis+cluster://127.0.0.1:1", "redis+cluster://127.0.0.1:1?client=goredis",
	} {
		t.Setenv("REDIS_URL", url)
		limiter, err := fleetquota.FromEnv(t.Context())
		if err != nil {
			t.Errorf("%s: got %v, want nil", url, err)
			continue
		}
		if _, err := limiter.Take(t.Context(), "k", 1); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("%s: take: got %v, want ErrUnavailable", url, err)
		}
		limiter.Close()
	}
}

// TestFromEnvHealth asks for the health of servers through the policies of FromEnv. No server listens on port
// 1.
func TestFromEnvHealth(t *testing.T) {
	for url, want := range map[string]error{
		"redis://127.0.0.1:1": quota.ErrUnavailable, "redis://127.0.0.1:1?client=rueidis": quota.ErrUnavailable, "": errors.ErrUnsupported,
	} {
		t.Setenv("REDIS_URL", url)
		limiter, err := fleetquota.FromEnv(t.Context())
		if err != nil {
			t.Fatalf("%q: %v", url, err)
		}
		if h, err := backend.Health(t.Context(), limiter.Store()); !errors.Is(err, want) || h != (driver.Health{}) {
			t.Errorf("%q: health: got %+v, %v; want zero, %v", url, h, err, want)
		}
		limiter.Close()
	}
}

// TestFromEnvOutage: with Redis down the breaker opens, and FLEET_SIZE decides about a fallback. No server
// listens on port 1.
func TestFromEnvOutage(t *testing.T) {
	logged := make(lines, 100)
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(logged, nil)))
	defer slog.SetDefault(old)
	t.Setenv("REDIS_URL", "redis://:secret@127.0.0.1:1")
	t.Setenv("TOKEN_BUCKET_SIZE", "1000")
	open := func(fleet string) *quota.Limiter {
		t.Setenv("FLEET_SIZE", fleet)
		limiter, err := fleetquota.FromEnv(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { limiter.Close() })
		return limiter
	}

	// A breaker opens once all calls have failed for half a second, three at the least.
	pause := time.NewTicker(100 * time.Millisecond)
	defer pause.Stop()
	limiter := open("")
	begin := time.Now()
	for n := 1; ; n++ {
		_, err := limiter.Take(t.Context(), "k", 1)
		if !errors.Is(err, quota.ErrUnavailable) {
			t.Fatalf("call %d: got %v, want ErrUnavailable", n, err)
		}
		if errors.Is(err, resilience.ErrOpen) {
			if took := time.Since(begin); n < 4 || took < 500*time.Millisecond {
				t.Errorf("the breaker opened before call %d, after %v; want at least three calls and 500ms", n, took)
			}
			break
		}
		if n == 100 {
			t.Fatalf("call %d: got %v, want ErrOpen", n, err)
		}
		<-pause.C
	}

	limiter = open("4")
	for n, allowed := range []bool{true, true, false, false} {
		d, err := limiter.Take(t.Context(), "k", 120)
		if err != nil || d.Allowed != allowed || d.Source != quota.FromFallback || d.Capacity != 250 {
			t.Errorf("call %d on a share of 250: got %+v, %v; want allowed %v by the fallback", n+1, d, err, allowed)
		}
	}

	// So many keys have room in the fallback, and more are denied.
	t.Setenv("FALLBACK_MAX_KEYS", "64")
	limiter = open("4")
	here, denied := 0, 0
	for n := range 200 {
		if d, err := limiter.Take(t.Context(), "key/"+strconv.Itoa(n), 1); err != nil || d.Source != quota.FromFallback {
			t.Errorf("key %d: got %+v, %v; want a decision of the fallback", n, d, err)
		} else if d.Allowed {
			here++
		} else {
			denied++
		}
	}
	if here > 64 || denied == 0 {
		t.Errorf("200 keys, of which 64 have room: got %d admitted and %d denied", here, denied)
	}

	// Notices are delivered by a goroutine of their own.
	timeout := time.After(10 * time.Second)
	for text := ""; strings.Count(text, "the circuit breaker opened") < 2 || !strings.Contains(text, "decides on its share") || !strings.Contains(text, "MaxKeys is 64"); {
		select {
		case line := <-logged:
			if text += line; strings.Contains(line, "secret") {
				t.Errorf("log: got %s, want no password", line)
			}
		case <-pause.C:
			limiter.Take(t.Context(), "k", 1) // which fails until the breaker opens
		case <-timeout:
			t.Fatalf("log: got\n%s\nwant two open breakers, one of them with a share", text)
		}
	}

	// A store in memory cannot fail, and FLEET_SIZE changes nothing.
	t.Setenv("REDIS_URL", "")
	if d, err := open("4").Take(t.Context(), "k", 1); err != nil || d.Capacity != 1000 || d.Source != quota.FromStore {
		t.Errorf("in memory: got %+v, %v; want limit 1000, from the store", d, err)
	}
}

// TestFromEnvShares: while Redis is down a fleet admits no more than its bucket, also where that has less than one token
// for each process. A process then says so as it starts, and no second time.
func TestFromEnvShares(t *testing.T) {
	logged := make(lines, 1000)
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewTextHandler(logged, nil)))
	defer slog.SetDefault(old)
	t.Setenv("REDIS_URL", "redis://127.0.0.1:1")
	t.Setenv("TOKEN_REFILL_RATE", "0.01")
	for _, test := range []struct {
		size, fleet string
		processes   int
		want        int
	}{{"100", "4", 4, 100}, {"7", "4", 4, 4}, {"2", "4", 4, 0}, {"1000", "1000000", 2, 0}} {
		t.Setenv("TOKEN_BUCKET_SIZE", test.size)
		t.Setenv("FLEET_SIZE", test.fleet)
		admitted := 0
		for range test.processes {
			limiter, err := fleetquota.FromEnv(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if test.want == 0 {
				want, text := "FLEET_SIZE is "+test.fleet+" and limit \\\"tokens: "+test.size+" burst ", ""
				for len(logged) > 0 { // also what processes before it say late
					text += <-logged
				}
				if !strings.Contains(text, want) {
					t.Errorf("log at the start: got %q, want it to say %q", text, want)
				}
			}
			for range 200 {
				d, err := limiter.Take(t.Context(), "k", 1)
				if err != nil || !d.Allowed && (d.RetryAfter <= 0 || d.RetryAfter == quota.Never) {
					t.Fatalf("take: got %+v, %v; want a decision, with a guess where it is denied", d, err)
				}
				if d.Allowed {
					admitted++
				}
			}
			limiter.Close()
			for len(logged) > 0 {
				if text := <-logged; strings.Contains(text, "less than one token") {
					t.Errorf("log after the start: got %q, want the share of 0 told once", text)
				}
			}
		}
		if admitted != test.want {
			t.Errorf("admitted by %d processes of %s, of %s tokens: got %d, want %d", test.processes, test.fleet, test.size, admitted, test.want)
		}
	}
}

// lines is a writer that sends each text on a channel.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

func TestFromEnvRefuses(t *testing.T) {
	for _, test := range []struct{ name, value string }{
		{"REDIS_URL", "redis://:secret@host/x"}, {"TOKEN_BUCKET_SIZE", "-1"}, {"TOKEN_REFILL_RATE", "fast"},
		{"FLEET_SIZE", "0"}, {"FLEET_SIZE", "-1"}, {"FLEET_SIZE", "1000001"}, {"FLEET_SIZE", "four"}, {"FLEET_SIZE", "4.0"},
		{"FLEET_SIZE", strings.Repeat("9", 1000)},
		{"FALLBACK_MAX_KEYS", "0"}, {"FALLBACK_MAX_KEYS", "-1"}, {"FALLBACK_MAX_KEYS", "1073741825"}, {"FALLBACK_MAX_KEYS", "many"},
	} {
		t.Run(test.name+" "+test.value[:min(len(test.value), 9)], func(t *testing.T) {
			t.Setenv(test.name, test.value)
			limiter, err := fleetquota.FromEnv(t.Context())
			if limiter != nil || !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), test.name) || strings.Contains(err.Error(), "secret") || len(err.Error()) > 300 {
				t.Errorf("got %v, %v; want nil, an ErrInvalid of 300 bytes at most that says %s and no password", limiter, err, test.name)
			}
		})
	}
	// A share of 2 tokens, 101 of which come in 10^6 times three years.
	t.Setenv("REDIS_URL", "redis://127.0.0.1:1")
	t.Setenv("TOKEN_BUCKET_SIZE", "2000000")
	t.Setenv("TOKEN_REFILL_RATE", "0.01000001")
	t.Setenv("FLEET_SIZE", "1000000")
	if _, err := fleetquota.FromEnv(t.Context()); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "FLEET_SIZE is 1000000") {
		t.Errorf("a share that is too slow: got %v, want ErrInvalid that says FLEET_SIZE is 1000000", err)
	}
}
