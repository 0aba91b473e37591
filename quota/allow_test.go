package quota_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// eachAllow runs a test with both ways to be allowed n tokens of "k".
func eachAllow(t *testing.T, test func(t *testing.T, allow func(lim *quota.Limiter, n int64) error)) {
	t.Run("Allow", func(t *testing.T) {
		test(t, func(lim *quota.Limiter, n int64) error { return lim.Allow(bg, "k", n) })
	})
	t.Run("AllowAll", func(t *testing.T) {
		test(t, func(lim *quota.Limiter, n int64) error {
			return lim.AllowAll(bg, quota.Charge{Key: "other"}, quota.Charge{Key: "k", Cost: n})
		})
	})
}

func TestAllow(t *testing.T) {
	eachAllow(t, func(t *testing.T, allow func(*quota.Limiter, int64) error) {
		testkit.EachRule(t, 10, time.Second, func(t *testing.T, own *quota.Limit) {
			synctest.Test(t, func(t *testing.T) {
				plan := testkit.LimitOf("plan", own.Name(), 4, time.Hour)
				for _, o := range []*quota.Options{{}, {LimitFor: func(string) *quota.Limit { return plan }}} {
					limit := own
					if o.LimitFor != nil {
						limit = plan
					}
					var calls []quota.Call
					for _, observers := range [][]func(context.Context, *quota.Call){nil, watch(&calls).Observers} {
						o.Observers = observers
						lim := newLimiter(t, local.New(), own, o)
						if err := allow(lim, 3); err != nil {
							t.Errorf("3 of %v: got %v, want nil", limit, err)
						}
						n := limit.Capacity() - 2 // one more than is left
						err := allow(lim, n)
						var denial *quota.Denial
						if !errors.Is(err, quota.ErrDenied) || !errors.As(err, &denial) {
							t.Fatalf("%d more: got %v, want ErrDenied and a Denial", n, err)
						}
						d := must[quota.Decision](t)(lim.Peek(bg, "k", n))
						if wait, ever := denial.RetryAfter(); wait != d.RetryAfter || !ever {
							t.Errorf("RetryAfter: got %v, %v, want %v", wait, ever, d.RetryAfter)
						}
						if denial.Limit != limit || denial.Key != "k" || denial.Decision.Bare() != d.Bare() {
							t.Errorf("denial: got %+v, want the limit %v, the key k and the decision %v", denial, limit, d)
						}
						for _, part := range []string{limit.String(), "retry after"} {
							if !strings.Contains(err.Error(), part) {
								t.Errorf("error: got %q, want %q in it", err, part)
							}
						}
						testkit.WantInvalid(t, allow(lim, -1), "cost", "-1")
					}
				}
			})
		})
	})
}

// The wait that a denial tells is never a century.
func TestDenialForEver(t *testing.T) {
	eachAllow(t, func(t *testing.T, allow func(*quota.Limiter, int64) error) {
		for _, l := range []*quota.Limit{testkit.Bucket("n", 10, time.Second), quota.NewLimit("n", algorithm.DenyAll)} {
			err := allow(newLimiter(t, local.New(), l, nil), 11)
			var denial *quota.Denial
			if !errors.As(err, &denial) {
				t.Fatalf("11 of %v: got %v, want a Denial", l, err)
			}
			if wait, ever := denial.RetryAfter(); wait != 0 || ever || !strings.Contains(err.Error(), "can never fit") {
				t.Errorf("11 of %v: got %v, %v and %q, want 0, false, and that it can never fit", l, wait, ever, err)
			}
		}
	})
}

// A store that failed has not denied, whatever its error, and neither has a policy that denies in its place.
func TestAFailedStoreIsNotADenial(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Second)
	eachAllow(t, func(t *testing.T, allow func(*quota.Limiter, int64) error) {
		for _, cause := range []error{quota.ErrUnavailable, quota.ErrIndeterminate, context.Canceled, quota.ErrOverloaded} {
			if err := allow(newLimiter(t, &slow{err: cause}, l, nil), 1); !errors.Is(err, cause) || errors.Is(err, quota.ErrDenied) {
				t.Errorf("store with %v: got %v, want that error", cause, err)
			}
		}
		for _, wrong := range []error{quota.ErrDenied, fmt.Errorf("remote: %w", &quota.Denial{Limit: l})} {
			var denial *quota.Denial
			err := allow(newLimiter(t, &slow{err: wrong}, l, nil), 1)
			if err == nil || errors.Is(err, quota.ErrDenied) || errors.As(err, &denial) || quota.Charged(err) != quota.ChargeUnknown {
				t.Errorf("store that fails with %v: got %v, want an error that is no denial", wrong, err)
			}
		}
		closed := quota.Must(resilience.Wrap(&slow{Store: local.New(), err: quota.ErrUnavailable}, resilience.FailClosed(nil)))
		if err := allow(newLimiter(t, closed, l, nil), 1); !errors.Is(err, quota.ErrUnavailable) || errors.Is(err, quota.ErrDenied) {
			t.Errorf("FailClosed, the store down: got %v, want ErrUnavailable", err)
		}
	})
}

func TestAllowDoesNotAllocate(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector allocates")
	}
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 1<<40, time.Hour), nil)
	if n := testing.AllocsPerRun(1000, func() { lim.Allow(bg, "k", 1) }); n != 0 {
		t.Errorf("allocations of an Allow that is granted: got %v, want 0", n)
	}
}

func TestRetryAt(t *testing.T) {
	at := testkit.Epoch
	for _, c := range []struct {
		d    quota.Decision
		want time.Time
		ever bool
	}{
		{quota.Decision{At: at, RetryAfter: 3 * time.Second}, at.Time().Add(3 * time.Second), true},
		{quota.Decision{At: at, Allowed: true}, at.Time(), true},
		{quota.Decision{At: at, RetryAfter: quota.Never}, time.Time{}, false},
		{quota.Decision{Source: quota.FromClosed, RetryAfter: time.Second}, time.Time{}, false},
		{quota.Decision{At: quota.MaxNumber, RetryAfter: quota.Never - 1}, quota.Micros(quota.MaxNumber).Time().Add(quota.Never - 1), true},
	} {
		if got, ever := c.d.RetryAt(); !got.Equal(c.want) || ever != c.ever {
			t.Errorf("RetryAt of %v: got %v, %v, want %v, %v", c.d, got, ever, c.want, c.ever)
		}
	}
}
