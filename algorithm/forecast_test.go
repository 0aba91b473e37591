package algorithm_test

import (
	"math"
	"slices"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

func decision(r rule, v quota.Verdict, now int64) quota.Decision {
	return quota.Decision{
		Allowed: v.Allowed, Capacity: r.limit, Remaining: v.Remaining, At: quota.Micros(now),
		RetryAfter: v.RetryAfter.Duration(), ResetAfter: v.ResetAfter.Duration(),
	}
}

// A queue that is served token by token, each as early as it can be, is never faster than the forecast.
func TestForecast(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(400) {
			r := randomRule(rng, k)
			for r.limit > 50 {
				r = randomRule(rng, k)
			}
			c, now := busy(rng, r)
			now += rng.Int64N(r.period)
			d := decision(r, c.peek(r, 0, now), now)
			if d.Remaining < -200 {
				continue
			}
			queue, at := c, now
			for n := int64(1); n <= 3*r.limit; n++ {
				v := queue.take(r, 1, at)
				if !v.Allowed {
					at += int64(v.RetryAfter)
					if v = queue.take(r, 1, at); !v.Allowed {
						t.Fatalf("take after the wait: got %+v, want it allowed", v)
					}
				}
				real := time.Duration(at-now) * time.Microsecond
				got := r.Algorithm.(quota.Forecaster).Forecast(d, n)
				if real > 140*year {
					break // beyond the numbers of a forecast
				}
				slack := time.Duration(math.MaxInt64)
				switch k {
				case bucket:
					if !overfills(r) {
						slack = time.Duration(r.tick) * time.Microsecond
					}
				case fixed, first, offset:
					slack = 0
				}
				if got > real || real-got > slack || got < 0 {
					t.Fatalf("limit %d refill %d in %dµs tick %d: %d tokens after %+v: forecast %v, took %v",
						r.limit, r.refill, r.period, r.tick, n, d, got, real)
				}
			}
		}
	})
}

// What is left now takes no time, and more never takes less.
func TestForecastGrows(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(2000) {
			r := randomRule(rng, k)
			c, now := busy(rng, r)
			d := decision(r, c.peek(r, 0, now), now)
			f := r.Algorithm.(quota.Forecaster)
			if got := f.Forecast(d, max(d.Remaining, 0)); d.Remaining >= 0 && got != 0 {
				t.Fatalf("forecast of the %d remaining: got %v, want 0", d.Remaining, got)
			}
			last := time.Duration(0)
			ns := []int64{0, 1, r.limit, r.limit + 1, 2 * r.limit, 1 << 50, 1 << 62, math.MaxInt64}
			slices.Sort(ns)
			for _, n := range ns {
				got := f.Forecast(d, n)
				if got < last {
					t.Fatalf("limit %d in %dµs: forecast of %d after %+v: got %v, want %v or more, as of fewer tokens", r.limit, r.period, n, d, got, last)
				}
				last = got
			}
		}
	})
}
