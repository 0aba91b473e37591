package goredis

import (
	"net/url"
	"testing"
	"time"

	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
)

// TestOptions pins options whose loss only a rare fault would show.
func TestOptions(t *testing.T) {
	u, err := url.Parse("redis+sentinel://h?master=m&timeout=50ms")
	if err != nil {
		t.Fatal(err)
	}
	c, err := redisurl.Parse(u)
	if err != nil {
		t.Fatal(err)
	}
	const timeout, dial = 50 * time.Millisecond, time.Second
	type pinned struct {
		ContextTimeoutEnabled, DisableIdentity bool
		DialerRetries                          int
		Dial, Read, Write, Pool                time.Duration
	}
	want := pinned{true, true, 1, dial, timeout, timeout, timeout}
	o, oc, of := clientOptions(c), clusterOptions(c), failoverOptions(c)
	for name, got := range map[string]pinned{
		"client":   {o.ContextTimeoutEnabled, o.DisableIdentity, o.DialerRetries, o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout},
		"cluster":  {oc.ContextTimeoutEnabled, oc.DisableIdentity, oc.DialerRetries, oc.DialTimeout, oc.ReadTimeout, oc.WriteTimeout, oc.PoolTimeout},
		"failover": {of.ContextTimeoutEnabled, of.DisableIdentity, of.DialerRetries, of.DialTimeout, of.ReadTimeout, of.WriteTimeout, of.PoolTimeout},
	} {
		if got != want {
			t.Errorf("%s options: got %+v, want %+v", name, got, want)
		}
	}
	for _, got := range []*maintnotifications.Config{o.MaintNotificationsConfig, oc.MaintNotificationsConfig} {
		if got.Mode != maintnotifications.ModeDisabled {
			t.Errorf("maintenance notifications: got mode %v, want %v", got.Mode, maintnotifications.ModeDisabled)
		}
	}
	if oc.MaxRedirects < 0 {
		t.Errorf("MaxRedirects: got %d, want 0 or more", oc.MaxRedirects)
	}
}
