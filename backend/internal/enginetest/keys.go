package enginetest

import (
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Keys: whatever a key is, it is refused or has a quota of its own; prefixes keep stores apart; strict
// mode refuses on a single server what a cluster would.
func Keys(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	t.Run("hostile", func(t *testing.T) { hostileKeys(t, open(engine.Options{})) })
	t.Run("strict", func(t *testing.T) { strict(t, server, open(engine.Options{Strict: true})) })
	t.Run("any keys", func(t *testing.T) {
		store := open(engine.Options{})
		if store.Atomicity() != driver.AnyKeys {
			t.Errorf("Atomicity is %v", store.Atomicity())
		}
		for _, a := range []quota.Algorithm{yearly("x", 10).Algorithm(), hidden{quota.Must(newRule(first, 10, 1, year))}} {
			if ds := takeAll(t, store, spread(limitOf("any."+a.Spec().Rule.String(), a), "any", 6)...); !quota.Granted(ds) || ds[0].Split {
				t.Errorf("%+v", ds)
			}
		}
	})
	t.Run("prefix", func(t *testing.T) { prefixes(t, server, connect, open) })
}

func hostileKeys(t *testing.T, store *engine.Store) {
	refused := []string{"", "/", "a/", "/a", "a//b", "\xff", "a\xc3", "a/\xed\xa0\x80", strings.Repeat("k", 513), strings.Repeat("k", 10_000)}
	accepted := []string{"}", "{", "a{b}", "{a}b", "{{a}}", "a:b", "a:b:c", ":", "%", "%7D", "%257D", "a%2Fb", "\x00", "a\x00b", "\x00/\x00", "a\r\nGET x\r\n", "#", "a#r",
		" ", "\x7f", "é", "日本/語", "KEYS[1]", "']]..redis.call('FLUSHALL')--", strings.Repeat("}", 512), strings.Repeat("k", 512), "a/}", "a/{b}", "}/a", "a{/b}"}
	for a := byte('!'); a <= '~'; a++ {
		for b := byte('!'); b <= '~'; b++ {
			if key := string([]byte{a, b}); a == '/' || b == '/' {
				refused = append(refused, key)
			} else {
				accepted = append(accepted, key)
			}
		}
	}
	a, b := yearly("hostile.a", 1000), yearly("hostile.b", 1000)
	limiter := quota.Must(quota.NewLimiter(store, a, nil))
	for _, key := range refused {
		if _, err := limiter.Take(bg, key, 1); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("%.40q: %v", key, err)
		}
		if _, err := limiter.TakeAll(bg, quota.Charge{Key: key, Cost: 1}, quota.Charge{Key: "ok", Cost: 1}); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("%.40q in a list: %v", key, err)
		}
	}
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := g; i < len(accepted); i += 16 {
				key := accepted[i]
				if len(key) > 500 { // alone: a sub-key would be too long
					if d, err := limiter.Take(bg, key, 1); err != nil || d.Remaining != 999 {
						t.Errorf("%.40q: %+v, %v", key, d, err)
					}
					continue
				}
				r, err := limiter.TakeAll(bg, quota.Charge{Key: key, Cost: 1, ID: key}, quota.Charge{Key: key, Limit: b, Cost: 2, ID: key}, quota.Charge{Key: key + "/sub/}{", Limit: b, Cost: 3, ID: key})
				if err != nil || !r.Granted {
					t.Errorf("%q: %+v, %v", key, r, err)
					continue
				}
				for j, d := range r.Decisions {
					if d.Split || d.Replayed || d.Remaining != 1000-int64(j+1) {
						t.Errorf("%q, charge %d: shares its quota or its slot wrongly: %+v", key, j, d)
					}
				}
			}
		})
	}
	wg.Wait()
}

func prefixes(t *testing.T, server *server, connect Connect, open func(engine.Options) *engine.Store) {
	c := quota.Charge{Limit: yearly("p", 10), Key: "k", Cost: 1}
	for prefix, key := range map[string]string{"": "quota:{k}:p", "app:": "app:{k}:p", "x": "x{k}:p", strings.Repeat("~", 64): strings.Repeat("~", 64) + "{k}:p"} {
		store := open(engine.Options{Prefix: prefix})
		if d := take(t, store, c); d.Remaining != 9 {
			t.Errorf("prefix %q shares a quota: %+v", prefix, d)
		}
		if server.Exists(bg, key).Val() != 1 {
			t.Errorf("prefix %q: no key %q", prefix, key)
		}
		h := c
		h.Limit = limitOf("p", hidden{c.Limit.Algorithm()})
		other := open(engine.Options{Prefix: prefix})
		if d := take(t, other, h); d.Remaining != 8 {
			t.Errorf("prefix %q: compare-and-swap uses another key: %+v", prefix, d)
		}
		h.ID = "r"
		take(t, other, h)
		if server.Exists(bg, strings.TrimSuffix(key, ":p")+"#r").Val() != 1 {
			t.Errorf("prefix %q: no record of the id", prefix)
		}
	}
	try := connect(t, false, server.UniversalClient.(*redis.Client).Options().Addr)
	for _, prefix := range []string{" ", "a b", "{", "}", "a{b}", "\n", "\x00", "\x7f", "é", strings.Repeat("p", 65)} {
		if _, err := try(engine.Options{Prefix: prefix}); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "Options.Prefix") {
			t.Errorf("prefix %q: %v", prefix, err)
		}
	}
}
