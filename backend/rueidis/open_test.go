package rueidis

import (
	"net/url"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
)

// TestOptions pins what only a rare fault would show: see the package documentation.
func TestOptions(t *testing.T) {
	for text, single := range map[string]bool{"redis://h?timeout=50ms": true, "redis+cluster://h?timeout=50ms": false, "redis+sentinel://h?master=m&timeout=50ms": false} {
		u, err := url.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		c, err := redisurl.Parse(u)
		if err != nil {
			t.Fatal(err)
		}
		o := options(c, newLazy(c).dial)
		switch {
		case o.ConnLifetime != 0, !o.AlwaysPipelining, !o.DisableCache, o.ForceSingleClient != single, o.ClusterOption.MaxMovedRedirections != 3,
			o.ConnWriteTimeout != 100*time.Millisecond, o.Dialer.Timeout != time.Second, o.Dialer.KeepAlive != time.Second, o.DialCtxFn == nil,
			o.ClientSetInfo == nil, len(o.ClientSetInfo) != 0:
			t.Errorf("%s: %+v", text, o)
		case c.Cluster != (o.MaxFlushDelay == 20*time.Microsecond), !c.Cluster && o.MaxFlushDelay != 0:
			t.Errorf("%s: MaxFlushDelay %v", text, o.MaxFlushDelay)
		case c.Master != "" && (o.Sentinel.MasterSet != "m" || o.Sentinel.TopologyRefreshInterval != 5*time.Second || o.Sentinel.Dialer.Timeout != time.Second):
			t.Errorf("%s: %+v", text, o.Sentinel)
		}
	}
}
