package quotatest_test

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

// This file is the tests of a user's program, as the user writes them.

var calls = quota.Must(algorithm.ParseLimit("calls: 10 burst 1/s bucket"))

// handle is the user's program: it checks an error and nothing else.
func handle(ctx context.Context, l *quota.Limiter, n int64) error { return l.Allow(ctx, "k", n) }

func TestUsersWait(t *testing.T) {
	store := quotatest.New(t, nil)
	l := quota.Must(quota.NewLimiter(store, calls, nil))
	quota.Must(l.Take(t.Context(), "k", 10))
	done := make(chan error)
	go func() { _, err := l.Wait(t.Context(), "k", 5); done <- err }()
	store.AwaitSleepers(1)
	store.Advance(5 * time.Second)
	if err := <-done; err != nil {
		t.Error(err)
	}
	store.WantCharged(calls, "k", 15)
}

func TestUsersWaitInABubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := quota.Must(quota.NewLimiter(quotatest.New(t, &quotatest.Options{Clock: time.Now}), calls, nil))
		quota.Must(l.Take(t.Context(), "k", 10))
		quota.Must(l.Wait(t.Context(), "k", 5)) // five seconds of the bubble
	})
}

func TestUsersOutage(t *testing.T) {
	store := quotatest.New(t, nil)
	policies := quota.Must(resilience.Standard(store, resilience.Fallback(local.New(), resilience.Instances(2), nil), nil))
	l := quota.Must(quota.NewLimiter(policies, calls, nil))
	defer l.Close()
	store.Fail(quota.ErrUnavailable)
	if d, err := l.Take(t.Context(), "k", 1); err != nil || d.Source != quota.FromFallback {
		t.Errorf("take in an outage: got %v, %v, want a decision of the fallback", d, err)
	}
	bare := quota.Must(quota.NewLimiter(store, calls, nil))
	if err := handle(t.Context(), bare, 1); !errors.Is(err, quota.ErrUnavailable) || errors.Is(err, quota.ErrDenied) {
		t.Errorf("handle in an outage: got %v, want ErrUnavailable", err)
	}
}

func TestUsersDenial(t *testing.T) {
	l := quota.Must(quota.NewLimiter(quotatest.New(t, nil), calls, nil))
	if err := handle(t.Context(), l, 100); !errors.Is(err, quota.ErrDenied) {
		t.Errorf("100 of 10: got %v, want ErrDenied", err)
	}
}
