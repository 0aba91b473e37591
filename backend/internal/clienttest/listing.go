package clienttest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// listed is a key of a listing, with its state.
type listed struct {
	limit, key                string
	capacity, remaining, used int64
}

// walk returns all pages of a listing, without repetitions, and calls between after each.
func walk(t testing.TB, s quota.Store, l backend.Listing, between func()) map[listed]bool {
	t.Helper()
	all := map[listed]bool{}
	for {
		var keys []backend.Listed
		var next string
		var err error
		until(t, "the nodes of the slots", func() bool {
			keys, next, err = backend.List(bg, s, l)
			return class(err) != quota.ErrUnavailable
		})
		ok(t, err)
		if len(keys) > l.Size {
			t.Fatalf("keys of a page: got %d, want up to %d", len(keys), l.Size)
		}
		for _, k := range keys {
			ok(t, k.Err)
			all[listed{k.Limit, k.Key, k.Decision.Capacity, k.Decision.Remaining, k.Decision.Capacity - k.Decision.Remaining}] = true
		}
		if l.Cursor = next; next == "" {
			return all
		}
		between()
	}
}

// listings compares the listings of a server and of a cluster with those of a store in memory, after the same charges: under a prefix and limits with
// characters of patterns, beside keys of others, while the server's table grows and shrinks by keys that come and go.
func listings(t *testing.T, l library) {
	t.Run("single", func(t *testing.T) { listingsOf(t, l.single) })
	t.Run("cluster", func(t *testing.T) { listingsOf(t, l.cluster) })
}

func listingsOf(t *testing.T, start func(testing.TB) (*data, func(engine.Options) store)) {
	t.Parallel()
	server, open := start(t)
	const prefix = `q*[a-z]\?:`
	s, twin := open(engine.Options{Prefix: prefix}), local.New()
	defer twin.Close()
	bucket, log := algorithm.TokenBucket(1000, 1, time.Hour), algorithm.SlidingWindowLog(1000, year)
	limits := []*quota.Limit{limitOf("tokens", bucket), limitOf("log", log), limitOf("cas", hidden{bucket}), yearly("t", 1000)}
	rng := rand.New(rand.NewPCG(seed(t), 0))
	list := []string{"*", "**", "?", "[a-z]", `\`, `\*`, "a*b", "axb", "acme", "acme/", "acme/a", "acme/b/c", "acme*", "acmes/a", "\x00/\x7f", "a b", "{a}", "}{", "%", "%2A", "é/è", "日本/語", "a:t", "a:tokens", "#id"}
	for i := range 150 {
		list = append(list, fmt.Sprintf("key-%d/%d", i%40, i))
	}
	list = slices.DeleteFunc(list, func(k string) bool { return quota.CheckKey(k) != nil })
	for i, key := range list {
		c := quota.Charge{Limit: limits[i%len(limits)], Key: key, Cost: 1 + rng.Int64N(1000), ID: []string{"", fmt.Sprint("id-", i)}[i%2]}
		take(t, s, c)
		take(t, twin, c)
	}
	for _, other := range []string{`qX[a-z]\?:{acme}:tokens`, `q*a\?:{acme}:tokens`, prefix + "{acme}:tokens:more", prefix + "{acme}#acme:tokens", prefix + "acme", "quota:{acme}:tokens"} {
		ok(t, server.Set(bg, other, "another's", 0).Err())
	}
	all := []backend.Listing{{Limits: limits, Size: driver.MaxPage}, {Limits: limits, Size: 7}, {Limits: limits[:1], Size: 3}, {Limits: limits[2:], Size: 20},
		{LimitFor: func(string) *quota.Limit { return limits[1] }, Size: 10}, {LimitFor: func(string) *quota.Limit { return nil }, Limits: limits[3:], Size: 10}}
	for _, p := range []string{"*", "a*", "a", "acme", "acme/", "acme/b", "key-1", "key-1/", "[", `\`, `\E[`, "é", "\xc3", "%", "%2", "{", "none", "a b", "\x00"} {
		all = append(all, backend.Listing{Limits: limits, Prefix: p, Size: 1 + rng.IntN(20)})
	}
	churn, brief := 0, prefix+"{brief-%d}"
	for _, l := range all {
		want := walk(t, twin, l, func() {})
		got := walk(t, s, l, func() { // keys of others, of which the table grows fourfold and shrinks again
			pipe := server.Pipeline()
			for range 100 {
				if churn++; churn/2000%2 == 0 {
					pipe.Set(bg, fmt.Sprintf(brief, churn%2000), "another's", 0)
				} else {
					pipe.Del(bg, fmt.Sprintf(brief, churn%2000))
				}
			}
			pipe.Exec(bg)
		})
		for k := range want {
			if !got[k] {
				t.Errorf("listing of prefix %q, size %d: got no %+v, want it", l.Prefix, l.Size, k)
			}
		}
		for k := range got {
			if !want[k] {
				t.Errorf("listing of prefix %q, size %d: got %+v, want none such", l.Prefix, l.Size, k)
			}
		}
	}
	// Without limits there is no state, and a state that is another rule's is that key's error alone.
	keys, _, err := backend.List(bg, s, backend.Listing{Prefix: "acme/a"})
	if ok(t, err); len(keys) != 1 || keys[0].Decision != (quota.Decision{}) || keys[0].Err != nil {
		t.Errorf("a listing without limits: got %+v, want one key without a state", keys)
	}
	wrong := make([]*quota.Limit, len(limits))
	for i, limit := range limits {
		wrong[i] = limitOf(limit.Name(), algorithm.FixedWindowFromFirst(1000, year))
	}
	keys, _, err = backend.List(bg, s, backend.Listing{Limits: wrong, Size: driver.MaxPage})
	if ok(t, err); len(keys) == 0 {
		t.Error("a listing by limits of another rule: got no keys, want some")
	}
	for _, k := range keys {
		is(t, "the state of a key under a limit of another rule", k.Err, quota.ErrMisconfigured)
	}
}

// listingsBroken: a cursor is refused after a restart, after a failover, and by another store, and a new listing is whole; a
// closed store lists nothing.
func listingsBroken(t *testing.T, l library) {
	t.Parallel()
	limit, list := counted(plenty), keys(200)
	page := backend.Listing{Limits: []*quota.Limit{limit}, Size: 20}
	begin := func(t *testing.T, s quota.Store) string {
		t.Helper()
		for _, k := range list {
			take(t, s, quota.Charge{Limit: limit, Key: k, Cost: 1})
		}
		_, next, err := backend.List(bg, s, page)
		if ok(t, err); next == "" {
			t.Fatal("first page: got the last page, want a cursor")
		}
		return next
	}
	refused := func(t *testing.T, s quota.Store, cursor string) {
		t.Helper()
		p := page
		p.Cursor = cursor
		var err error
		until(t, "the server", func() bool {
			var next string
			if _, next, err = backend.List(bg, s, p); next != "" { // another node's keys, which may be listed to the end
				p.Cursor = next
				return false
			}
			return class(err) != quota.ErrUnavailable
		})
		if class(err) != quota.ErrInvalid || !strings.Contains(err.Error(), "to begin anew") {
			t.Errorf("a cursor of before: got error %v, want ErrInvalid that says to begin anew", err)
		}
	}
	t.Run("restart", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		s := l.open(t, patiently("redis://"+server.Addr()))
		cursor := begin(t, s)
		server.Kill()
		ok(t, server.Restart())
		refused(t, s, cursor)
	})
	t.Run("failover", func(t *testing.T) {
		t.Parallel()
		c := redisserver.StartCluster(t)
		s := l.open(t, patiently(clusterURL(c, "")))
		cursor := begin(t, s)
		_, err := c.Failover(c.Nodes[0])
		ok(t, err)
		ok(t, s.(driver.Placed).Refresh(bg))
		refused(t, s, cursor)
		until(t, "the client to know the new master", func() bool {
			_, _, err := backend.List(bg, s, backend.Listing{Size: driver.MaxPage})
			return class(err) != quota.ErrUnavailable
		})
		if got := walk(t, s, page, func() {}); len(got) != len(list) {
			t.Errorf("keys of a listing that began anew: got %d, want %d", len(got), len(list))
		}
	})
	t.Run("several servers", func(t *testing.T) {
		t.Parallel()
		a, b := redisserver.Start(t), redisserver.Start(t)
		s := l.open(t, "redis://"+routed(t, "127.0.0.1:0", a.Addr(), b.Addr())+"?timeout=10s")
		take(t, s, quota.Charge{Limit: limit, Key: "k", Cost: 1})
		var err error
		until(t, "the store to learn", func() bool { _, _, err = backend.List(bg, s, page); return errors.Is(err, errors.ErrUnsupported) })
	})
	t.Run("closed", func(t *testing.T) {
		t.Parallel()
		s := l.open(t, patiently("redis://"+redisserver.Start(t).Addr()))
		p := page
		p.Cursor = begin(t, s)
		s.Close()
		_, _, err := backend.List(bg, s, p)
		is(t, "a listing of a closed store", err, quota.ErrClosed)
	})
}
