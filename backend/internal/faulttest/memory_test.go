package faulttest

import (
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestMemoryFull fills a server that evicts nothing with quota keys. The account stays exact to the last one.
func TestMemoryFull(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.Start(t, "--maxmemory-policy", "noeviction")
		s := l.open(t, single(server))
		limit, few := yearly(plenty), yearly(5)
		y := calls(s, few, []string{"poor"}, 5)
		info, err := server.Info("memory")
		ok(t, err)
		used, err := strconv.Atoi(info["used_memory"])
		ok(t, err)
		run(t, server, "CONFIG", "SET", "maxmemory", strconv.Itoa(used+1<<19))
		list := make([]string, 6000)
		for i := range list {
			list[i] = fmt.Sprintf("team-%d/agent-%d", i%100, i)
		}
		z := calls(s, limit, list, len(list))
		z.only(t, quota.ErrUnavailable)
		if z.errors() == 0 {
			t.Fatal("the memory is not full: ", z)
		}
		t.Log(z)
		if d, err := s.Take(bg, quota.Charge{Limit: few, Key: "poor", Cost: 1}); err != nil || d.Allowed {
			t.Errorf("a denial with the memory full is %+v, %v", d, err)
		}
		// A reset frees memory and is no first write that can be refused; what follows it in a list is made too.
		out := make([]quota.Decision, 2)
		mixed := []quota.Charge{{Limit: few, Key: "poor", Op: quota.OpReset}, {Limit: few, Key: "poor/other", Cost: 1}}
		err = s.TakeAll(bg, mixed, out)
		want := int64(1)
		if err != nil {
			want = y.ok
		}
		if n := charged(t, s, few, "poor", "poor/other"); n != want {
			t.Errorf("a list with a reset failed with %v, and left %d charged, not %d", err, n, want)
		}
		run(t, server, "CONFIG", "SET", "maxmemory", "0")
		z.exact(t, charged(t, s, limit, list...))
	})
}

// TestEvictionNotices checks that an operator hears of a server that may drop quotas, and that did.
func TestEvictionNotices(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		var mu sync.Mutex
		heard := map[string]int{}
		server := redisserver.Start(t, "--maxmemory", "2mb")
		to := single(server)
		to.notice = func(n quota.Notice) {
			mu.Lock()
			defer mu.Unlock()
			heard[n.Name]++
		}
		s := l.open(t, to)
		clear(heard)
		for _, policy := range []string{"noeviction", "allkeys-lru", "allkeys-lfu", "allkeys-random", "volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl"} {
			run(t, server, "CONFIG", "SET", "maxmemory-policy", policy)
			clear(heard)
			h, err := s.Health(bg)
			ok(t, err)
			want := 1
			if policy == "noeviction" {
				want, policy = 0, ""
			}
			if heard["eviction"] != want || h.Eviction != policy || heard["evicted"] != 0 {
				t.Errorf("with policy %q: %v, %+v", policy, heard, h)
			}
		}
		for i := range 40 {
			run(t, server, "SET", fmt.Sprint("filler", i), strings.Repeat("x", 100_000), "EX", "1000")
		}
		clear(heard)
		if h, err := s.Health(bg); err != nil || h.Evicted == 0 || heard["evicted"] != 1 {
			t.Errorf("after evictions: %+v, %v, %v", h, err, heard)
		}
		clear(heard)
		if _, err := s.Health(bg); err != nil || heard["evicted"] != 0 {
			t.Errorf("the same evictions are told twice: %v, %v", heard, err)
		}
	})
}
