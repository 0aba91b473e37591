package clienttest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

func TestMain(m *testing.M) { Main(m) }

// TestFromEnv: REDIS_URL works out of the box, with each scheme, with the client that is taken for it and
// with each that is asked for, and two processes share the quota.
func TestFromEnv(t *testing.T) {
	server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"fleet on >p@ss/word ~* +@all"}})
	secure, cluster, sentinel := tlsServer(t), redisserver.StartCluster(t), redisserver.StartSentinel(t)
	for scheme, url := range map[string]string{
		"redis":          "redis://fleet:p%40ss%2Fword@" + server.Addr() + "/1?timeout=2s",
		"rediss":         "rediss://" + secure.Addr() + "?" + ca(secure),
		"redis+cluster":  clusterURL(cluster, ""),
		"redis+sentinel": sentinelURL(sentinel),
	} {
		t.Run(scheme, func(t *testing.T) { sharedFromEnv(t, url) })
		for _, l := range libraries {
			t.Run(scheme+" "+l.name, func(t *testing.T) { sharedFromEnv(t, by(url, l.name)) })
		}
	}
}

func sharedFromEnv(t *testing.T, url string) {
	first, second := fromEnv(t, url), fromEnv(t, url)
	key := group(t)
	for i, limiter := range []*quota.Limiter{first, second, first, second} {
		d, err := limiter.Take(t.Context(), key, 2)
		if allowed, left := i < 2, int64(max(3-2*i, 1)); err != nil || d.Allowed != allowed || d.Remaining != left {
			t.Errorf("call %d: got %+v, %v; want allowed=%v, %d left", i, d, err, allowed, left)
		}
	}
	first.Close()
	_, err := first.Take(t.Context(), key, 1)
	is(t, "after Close", err, quota.ErrClosed)
}

func fromEnv(t *testing.T, url string) *quota.Limiter {
	t.Helper()
	t.Setenv("REDIS_URL", url)
	t.Setenv("TOKEN_BUCKET_SIZE", "5")
	t.Setenv("TOKEN_REFILL_RATE", "0.001")
	limiter, err := fleetquota.FromEnv(t.Context())
	ok(t, err)
	t.Cleanup(func() { limiter.Close() })
	return limiter
}

func TestFromEnvWithRedisDown(t *testing.T) {
	server := redisserver.Start(t)
	for _, l := range libraries {
		t.Run(l.name, func(t *testing.T) {
			server.Kill()
			start := time.Now()
			limiter := fromEnv(t, fmt.Sprintf("redis://u:secret@%s?client=%s", server.Addr(), l.name))
			for range 2 { // a third would open the circuit breaker, for half a minute
				if _, err := limiter.Take(t.Context(), "k", 1); !errors.Is(err, quota.ErrUnavailable) || strings.Contains(err.Error(), "secret") {
					t.Errorf("with Redis down: got error %v, want ErrUnavailable without the password", err)
				}
			}
			if took := time.Since(start); took > 500*time.Millisecond {
				t.Errorf("with Redis down: got answers after %v, want at most 500ms", took)
			}
			ok(t, server.Restart())
			do(t, server, "ACL", "SETUSER", "u", "on", ">secret", "~*", "+@all")
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			var d quota.Decision
			var err error
			for start := time.Now(); time.Since(start) < time.Second; time.Sleep(10 * time.Millisecond) { // between attempts to connect
				if d, err = limiter.Take(ctx, "k", 1); err == nil {
					break
				}
			}
			if err != nil || !d.Allowed || d.Remaining != 4 {
				t.Errorf("within a second of Redis' return: got %+v, %v; want a grant and 4 left", d, err)
			}
		})
	}
}
