package goredis

import (
	"net/url"
	"testing"
	"time"

	"github.com/redis/go-redis/v9/maintnotifications"

	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
)

// TestOptions pins what only a rare fault would show.
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
	if o := clientOptions(c); !o.ContextTimeoutEnabled || o.DialerRetries != 1 || o.DialTimeout != dial || o.ReadTimeout != timeout || o.WriteTimeout != timeout ||
		o.PoolTimeout != timeout || !o.DisableIdentity || o.MaintNotificationsConfig.Mode != maintnotifications.ModeDisabled {
		t.Errorf("%+v", o)
	}
	if o := clusterOptions(c); !o.ContextTimeoutEnabled || o.DialerRetries != 1 || o.DialTimeout != dial || o.ReadTimeout != timeout || o.WriteTimeout != timeout ||
		o.PoolTimeout != timeout || !o.DisableIdentity || o.MaintNotificationsConfig.Mode != maintnotifications.ModeDisabled || o.MaxRedirects < 0 {
		t.Errorf("%+v", o)
	}
	if o := failoverOptions(c); !o.ContextTimeoutEnabled || o.DialerRetries != 1 || o.DialTimeout != dial || o.ReadTimeout != timeout || o.WriteTimeout != timeout ||
		o.PoolTimeout != timeout || !o.DisableIdentity {
		t.Errorf("%+v", o)
	}
}
