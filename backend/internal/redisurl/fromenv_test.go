package redisurl_test

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

// urls returns a URL of each scheme, to real servers, for the client that is taken for it and for the
// other one.
func urls(t *testing.T) map[string]string {
	t.Helper()
	server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"fleet on >p@ss/word ~* +@all"}})
	secure, dir := tlsServer(t)
	cluster := redisserver.StartCluster(t).Addrs()
	sentinel := redisserver.StartSentinel(t)
	all := map[string]string{}
	for scheme, text := range map[string]string{
		"redis":          "redis://fleet:p%40ss%2Fword@" + server.Addr() + "/1?timeout=2s",
		"rediss":         "rediss://" + secure.Addr() + "?" + ca(dir),
		"redis+cluster":  "redis+cluster://" + cluster[0] + "?addr=" + cluster[1],
		"redis+sentinel": "redis+sentinel://" + sentinel.Addrs()[0] + "/0?master=" + sentinel.MasterName,
	} {
		all[scheme] = text
		for _, client := range clients {
			all[scheme+" "+client] = text + "&client=" + client
		}
	}
	return all
}

func TestFromEnvOnRedis(t *testing.T) {
	for name, text := range urls(t) {
		t.Run(name, func(t *testing.T) {
			t.Setenv("REDIS_URL", text)
			t.Setenv("TOKEN_BUCKET_SIZE", "5")
			t.Setenv("TOKEN_REFILL_RATE", "0.001")
			first, err := fleetquota.FromEnv(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer first.Close()
			second, err := fleetquota.FromEnv(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer second.Close()
			key := plain(t)
			for i, limiter := range []*quota.Limiter{first, second, first, second} {
				d, err := limiter.Take(t.Context(), key, 2)
				if allowed := i < 2; err != nil || d.Allowed != allowed || d.Remaining != int64(max(3-2*i, 1)) {
					t.Errorf("call %d: %+v, %v", i, d, err)
				}
			}
			first.Close()
			if _, err := first.Take(t.Context(), key, 1); !errors.Is(err, quota.ErrClosed) {
				t.Error(err)
			}
		})
	}
}

func TestFromEnvWithRedisDown(t *testing.T) {
	server := redisserver.Start(t)
	for _, client := range clients {
		t.Run(client, func(t *testing.T) {
			server.Kill()
			t.Setenv("REDIS_URL", fmt.Sprintf("redis://u:secret@%s?client=%s", server.Addr(), client))
			t.Setenv("TOKEN_BUCKET_SIZE", "")
			t.Setenv("TOKEN_REFILL_RATE", "")
			start := time.Now()
			limiter, err := fleetquota.FromEnv(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			defer limiter.Close()
			for range 2 { // a third would open the circuit breaker, for half a minute
				if _, err = limiter.Take(t.Context(), "k", 1); !errors.Is(err, quota.ErrUnavailable) || strings.Contains(err.Error(), "secret") {
					t.Errorf("with Redis down: %v", err)
				}
			}
			if took := time.Since(start); took > 500*time.Millisecond {
				t.Errorf("with Redis down it took %v", took)
			}
			if err := server.Restart(); err != nil {
				t.Fatal(err)
			}
			if _, err := server.Do("ACL", "SETUSER", "u", "on", ">secret", "~*", "+@all"); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
			defer cancel()
			d, err := limiter.Take(ctx, "k", 1)
			if err != nil || !d.Allowed || d.Remaining != 999 {
				t.Errorf("with Redis up again: %+v, %v", d, err)
			}
		})
	}
}
