package fleetquota_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/quota"
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
	if d, err := limiter.Take(t.Context(), "a", 3); err != nil || !d.Allowed || d.Limit != 3 || d.ResetAfter != 6*time.Second {
		t.Errorf("%+v, %v", d, err)
	}
	d, err := limiter.Take(t.Context(), "a", 2)
	if err != nil || d.Allowed || d.RetryAfter > 4*time.Second || d.RetryAfter < 3*time.Second {
		t.Errorf("%+v, %v", d, err)
	}
	limiter.Close()
	if _, err := limiter.Take(t.Context(), "a", 1); !errors.Is(err, quota.ErrClosed) {
		t.Error(err)
	}
}

// TestFromEnvLinksRedis: the schemes of Redis are there without an import, and nothing is asked of a server.
// What they do is tested where servers can be started, in backend.
func TestFromEnvLinksRedis(t *testing.T) {
	for _, url := range []string{
		"redis://127.0.0.1:1", "redis://127.0.0.1:1?client=rueidis", "rediss://127.0.0.1:1", "redis+sentinel://127.0.0.1:1?master=m",
		"redis+cluster://127.0.0.1:1", "redis+cluster://127.0.0.1:1?client=goredis",
	} {
		t.Setenv("REDIS_URL", url)
		limiter, err := fleetquota.FromEnv(t.Context())
		if err != nil {
			t.Errorf("%s: %v", url, err)
			continue
		}
		if _, err := limiter.Take(t.Context(), "k", 1); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("%s: %v", url, err)
		}
		limiter.Close()
	}
}

func TestFromEnvRefuses(t *testing.T) {
	for name, value := range map[string]string{"REDIS_URL": "redis://:secret@host/x", "TOKEN_BUCKET_SIZE": "-1", "TOKEN_REFILL_RATE": "fast"} {
		t.Run(name, func(t *testing.T) {
			t.Setenv(name, value)
			limiter, err := fleetquota.FromEnv(t.Context())
			if limiter != nil || !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v, %v", limiter, err)
			}
		})
	}
}
