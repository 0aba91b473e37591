package enginetest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// Health: a server's version and what endangers quotas are told, and evictions once each.
func Health(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	var told []string
	store := open(engine.Options{Notice: func(n quota.Notice) {
		if n.Name != "deadline" {
			told = append(told, n.Name)
		}
	}})
	ask := func(eviction string, evicted bool, notices ...string) {
		t.Helper()
		told = nil
		h, err := store.Health(bg)
		if err != nil || h.Eviction != eviction || h.Evicted > 0 != evicted || !slices.Equal(told, notices) {
			t.Errorf("%+v, %v, notices %q, not %q", h, err, told, notices)
		}
		if info := server.Info(bg, "server").Val(); h.Version == "" || !strings.Contains(info, "redis_version:"+h.Version+"\r\n") {
			t.Errorf("version %q", h.Version)
		}
	}
	set := func(name, value string) {
		t.Helper()
		if err := server.ConfigSet(bg, name, value).Err(); err != nil {
			t.Fatal(err)
		}
	}
	ask("", false)
	set("maxmemory-policy", "allkeys-lru")
	ask("allkeys-lru", false, "eviction")
	set("maxmemory", "3mb")
	for i := range 100 {
		server.Set(bg, fmt.Sprint("filler", i), strings.Repeat("x", 100_000), 0)
	}
	ask("allkeys-lru", true, "eviction", "evicted")
	ask("allkeys-lru", true, "eviction")
	set("maxmemory-policy", "noeviction")
	ask("", true)

	// With noeviction a full server refuses, and what it refuses is not charged.
	set("maxmemory", "1")
	c := quota.Charge{Limit: yearly("h", 10), Key: "k", Cost: 1}
	for _, cs := range [][]quota.Charge{{c}, {c, {Limit: c.Limit, Key: "l", Cost: 1}}} {
		if err := store.TakeAll(bg, cs, make([]quota.Decision, len(cs))); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("a full server: %v", err)
		}
	}
	c.Op = quota.OpPeek
	if d := take(t, store, c); d.Remaining != 10 {
		t.Errorf("%+v", d)
	}
	store.Close()
	if _, err := store.Health(bg); !errors.Is(err, quota.ErrClosed) {
		t.Errorf("a closed store: %v", err)
	}
}
