package main

import (
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/go-chi/httprate"
	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	ulule "github.com/ulule/limiter/v3"
	ululememory "github.com/ulule/limiter/v3/drivers/store/memory"
	"golang.org/x/time/rate"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestStacked holds the comparison of the README: 1000 requests come at once under two limits, 5000 a day and 100 a
// minute. Limiters that are stacked, the day outside, charge the day for all 1000, because the day is charged
// before the minute denies. A list of charges uses of the day only the requests that both limits admit.
//
// Ours is a multiple of 100: the requests may lie in two minutes.
func TestStacked(t *testing.T) {
	const perDay, perMinute, requests = 5000, 100, 1000
	ctx := t.Context()

	t.Run("fleetquota", func(t *testing.T) {
		day := quota.NewLimit("day", algorithm.FixedWindowFromFirst(perDay, day))
		minute := quota.NewLimit("minute", algorithm.FixedWindowFromFirst(perMinute, time.Minute))
		limiter := quota.Must(quota.NewLimiter(local.New(), day, nil))
		defer limiter.Close()
		for range requests {
			if _, err := limiter.ChargeAll(ctx, quota.Charge{Limit: day, Key: "user", Cost: 1}, quota.Charge{Limit: minute, Key: "user", Cost: 1}); err != nil {
				t.Fatal(err)
			}
		}
		d, err := limiter.Peek(ctx, "user", 1)
		if used := perDay - d.Remaining; err != nil || used == 0 || used%perMinute != 0 || used > 3*perMinute {
			t.Errorf("used of the day: got %d, %v; want %d", used, err, perMinute)
		}
	})

	t.Run("redis_rate", func(t *testing.T) {
		client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
		defer client.Close()
		l := redis_rate.NewLimiter(client)
		byDay := redis_rate.Limit{Rate: perDay, Burst: perDay, Period: day}
		allow := func(key string, limit redis_rate.Limit) *redis_rate.Result {
			r, err := l.Allow(ctx, key, limit)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		for range requests {
			if allow("day", byDay).Allowed > 0 {
				allow("minute", redis_rate.PerMinute(perMinute))
			}
		}
		r, err := l.AllowN(ctx, "day", byDay, 0)
		if err != nil {
			t.Fatal(err)
		}
		check(t, perDay-r.Remaining, requests)
	})

	t.Run("httprate", func(t *testing.T) {
		byDay := httprate.NewRateLimiter(perDay, day)
		handler := byDay.Handler(httprate.LimitBy(perMinute, time.Minute, httprate.Key("*"))(
			http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})))
		for range requests {
			handler.ServeHTTP(httptest.NewRecorder(), httptest.NewRequestWithContext(ctx, http.MethodGet, "/", nil))
		}
		_, used, err := byDay.Status("*")
		if err != nil {
			t.Fatal(err)
		}
		check(t, int(used), requests)
	})

	t.Run("ulule/limiter", func(t *testing.T) {
		byDay := ulule.New(ululememory.NewStore(), ulule.Rate{Period: day, Limit: perDay})
		byMinute := ulule.New(ululememory.NewStore(), ulule.Rate{Period: time.Minute, Limit: perMinute})
		for range requests {
			if c, err := byDay.Get(ctx, "user"); err != nil {
				t.Fatal(err)
			} else if !c.Reached {
				if _, err := byMinute.Get(ctx, "user"); err != nil {
					t.Fatal(err)
				}
			}
		}
		c, err := byDay.Peek(ctx, "user")
		if err != nil {
			t.Fatal(err)
		}
		check(t, perDay-int(c.Remaining), requests)
	})

	t.Run("x-time-rate", func(t *testing.T) {
		now := time.Now()
		byDay, byMinute := rate.NewLimiter(rate.Every(day/perDay), perDay), rate.NewLimiter(rate.Every(time.Minute/perMinute), perMinute)
		for range requests {
			if byDay.AllowN(now, 1) {
				byMinute.AllowN(now, 1)
			}
		}
		check(t, perDay-int(byDay.TokensAt(now)), requests)
	})
}

func check(t *testing.T, used, want int) {
	t.Helper()
	if used != want {
		t.Errorf("used of the day: got %d, want %d", used, want)
	}
}
