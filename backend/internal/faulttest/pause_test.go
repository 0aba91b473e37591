package faulttest

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestPaused freezes the server under calls with a deadline. They return, say that they do not know, and
// what they sent is executed when the server wakes: it counts against the caller and never for it.
func TestPaused(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		const callers, deadline = 64, 100 * time.Millisecond
		server := redisserver.Start(t)
		to := single(server)
		to.timeout = 10 * time.Second // so that it is not what bounds the calls
		s, direct := l.open(t, to), l.open(t, single(server))
		limit, list := yearly(plenty), keys(8)
		y := calls(s, limit, list, 500)
		before := runtime.NumGoroutine()
		ok(t, server.Pause())
		var wg sync.WaitGroup
		for i := range callers {
			wg.Go(func() {
				for range 2 {
					ctx, cancel := context.WithTimeout(bg, deadline)
					y.do(ctx, s, quota.Charge{Limit: limit, Key: list[i%len(list)], Cost: 1})
					cancel()
				}
			})
		}
		wg.Wait()
		ok(t, server.Resume())
		// Wakened, the server reads what the callers left behind; then the count stands still.
		now := charged(t, direct, limit, list...)
		until(t, "the late charges", func() bool {
			last := now
			time.Sleep(50 * time.Millisecond)
			now = charged(t, direct, limit, list...)
			return now == last
		})
		t.Logf("%d charged late: %v", now-y.ok, y)
		y.only(t, quota.ErrIndeterminate, quota.ErrOverloaded, quota.ErrUnavailable, errOdd)
		for _, err := range y.examples {
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%v is neither of a class nor the context's own error", err)
			}
		}
		y.bounds(t, now)
		if y.failed[quota.ErrIndeterminate] == 0 {
			t.Error("no outcome was unknown")
		}
		if now == y.ok {
			t.Log("no charge was late")
		}
		if y.slowest > 5*time.Second {
			t.Errorf("a call took %v with a deadline of %v", y.slowest, deadline)
		}
		until(t, "the goroutines of abandoned calls to end", func() bool { return runtime.NumGoroutine() <= before+callers/4 })
		z := calls(s, limit, list, 100)
		if z.ok < 50 {
			t.Errorf("after the pause: %v", z)
		}
	})
}
