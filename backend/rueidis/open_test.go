package rueidis

import (
	"net/url"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/redisurl"
)

// TestOptions pins options whose loss only a rare fault would show: see the package documentation.
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
		type pinned struct {
			ConnLifetime                                      time.Duration
			AlwaysPipelining, DisableCache, ForceSingleClient bool
			Redirections                                      int
			ConnWriteTimeout, DialTimeout, KeepAlive, Flush   time.Duration
			HasDial, SetsNoInfo                               bool
		}
		want := pinned{0, true, true, single, 3, 100 * time.Millisecond, time.Second, time.Second, 0, true, true}
		if c.Cluster {
			want.Flush = 20 * time.Microsecond
		}
		got := pinned{o.ConnLifetime, o.AlwaysPipelining, o.DisableCache, o.ForceSingleClient, o.ClusterOption.MaxMovedRedirections, o.ConnWriteTimeout,
			o.Dialer.Timeout, o.Dialer.KeepAlive, o.MaxFlushDelay, o.DialCtxFn != nil, o.ClientSetInfo != nil && len(o.ClientSetInfo) == 0}
		if got != want {
			t.Errorf("%s: got %+v, want %+v", text, got, want)
		}
		if got := o.Sentinel; c.Master != "" && (got.MasterSet != "m" || got.TopologyRefreshInterval != 5*time.Second || got.Dialer.Timeout != time.Second) {
			t.Errorf("%s: got %+v, want master m, refreshed every 5s, dialled within a second", text, got)
		}
	}
}
