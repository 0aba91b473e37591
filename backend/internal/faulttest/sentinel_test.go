package faulttest

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestSentinel kills the master that sentinels watch, under load, and then has an operator fail over: the
// client must follow both.
func TestSentinel(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		n := redisserver.StartSentinel(t)
		s := l.open(t, target{addrs: n.Addrs(), master: n.MasterName})
		limit, list := yearly(plenty), keys(8)
		y, stop := load(t, s, limit, list)
		y.more(t, 100)
		old, err := n.Master()
		ok(t, err)
		old.Kill()
		killed := time.Now()
		peek := quota.Charge{Limit: limit, Key: list[0], Op: quota.OpPeek}
		until(t, "the failure", func() bool { return s.fails(peek) })
		until(t, "the client to find the new master", func() bool { return !s.fails(peek) })
		out := time.Since(killed)
		y.more(t, 100)
		ok(t, old.Restart())
		ok(t, n.WaitOK())
		ok(t, n.Failover())
		ok(t, n.WaitOK())
		y.more(t, 100)
		stop()
		t.Logf("outage %v: %v", out.Round(time.Millisecond), y)
		// The old master takes writes for some seconds that are lost: see redisserver.
		y.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
		if out > outage {
			t.Errorf("the outage lasted %v", out)
		}
		if held := charged(t, s, limit, list...); held == 0 || held > y.ok+y.failed[quota.ErrIndeterminate] {
			t.Errorf("%d charged: %v", held, y)
		}
	})
}
