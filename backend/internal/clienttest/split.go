package clienttest

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// split runs the tests of lists that take a Redis Cluster.
func split(t *testing.T, l library) {
	server, open := l.cluster(t)
	store := open(engine.Options{})
	t.Run("lists", func(t *testing.T) { splitLists(t, server, store) })
	t.Run("granted", func(t *testing.T) { splitMixed(t, server, store, true) })
	t.Run("denied", func(t *testing.T) { splitMixed(t, server, store, false) })
	t.Run("one slot", func(t *testing.T) { oneSlot(t, store) })
	t.Run("strict", func(t *testing.T) { strict(t, server, open(engine.Options{Strict: true})) })
	t.Run("race", func(t *testing.T) { splitRace(t, store) })
	t.Run("hostile keys", func(t *testing.T) { hostileKeys(t, store) })
	t.Run("health", func(t *testing.T) {
		if h, err := store.Health(bg); err != nil || h.Version == "" || h.Eviction != "" || h.Evicted != 0 {
			t.Errorf("Health: got %+v, %v; want a version and no eviction", h, err)
		}
	})
}

// spread returns charges to one limit whose keys lie in different slots of all three masters.
func spread(l *quota.Limit, name string, n int) []quota.Charge {
	var cs []quota.Charge
	for i := 0; len(cs) < n; i++ {
		c := quota.Charge{Limit: l, Key: fmt.Sprintf("%s%d", name, i), Cost: 1}
		if redisserver.Slot(c.Key)*3/16384 == len(cs)%3 {
			cs = append(cs, c)
		}
	}
	return cs
}

// splitLists: a list over several slots is made whole, or the grants of its slots are given back.
func splitLists(t *testing.T, server *data, store store) {
	for k := range kinds {
		for _, hide := range []bool{false, true} {
			name := fmt.Sprintf("%s-%v", kindNames[k], hide)
			t.Run(name, func(t *testing.T) {
				a := quota.Must(newRule(k, 10, 1, year)) // in any window, and of the bucket ten years to fill: no token comes back of itself
				if hide {
					a = hidden{a}
				}
				cs := spread(limitOf(name, a), name, 6)
				for i, d := range takeAll(t, store, cs...) {
					if !d.Allowed || !d.Split || d.Charged != 1 || d.Remaining != 9 || d.RetryAfter != 0 {
						t.Errorf("charge %d of a granted list: got %+v, want it allowed, split, 1 charged, 9 left", i, d)
					}
				}
				// One slot's state stays as it is while others grant and give back.
				const full = 4
				take(t, store, quota.Charge{Limit: cs[full].Limit, Key: cs[full].Key, Cost: 9})
				for round := range 5 {
					for i, d := range takeAll(t, store, cs...) {
						wantLeft, denies := int64(9), i == full
						if denies {
							wantLeft = 0
						}
						if d.Allowed == denies || !d.Split || d.Charged != 0 || d.Remaining != wantLeft || (d.RetryAfter > 0) != denies {
							t.Errorf("round %d, charge %d of a denied list: got %+v, want denied=%v, split, 0 charged, %d left", round, i, d, denies, wantLeft)
						}
						if got := left(t, store, cs[i].Limit, cs[i].Key); got != wantLeft {
							t.Errorf("round %d, charge %d: got %d left on the server, want %d", round, i, got, wantLeft)
						}
					}
				}
			})
		}
	}
}

// splitMixed: lists of every kind of charge, granted or denied by one of them. A denied list leaves no trace.
func splitMixed(t *testing.T, server *data, store store, granted bool) {
	l := yearly(fmt.Sprintf("mixed%v", granted), 10)
	list := spread(l, "m", 8)
	receipts := takeAll(t, store, list...) // one each
	was := make([]string, 10)
	for i, c := range list {
		was[i] = server.held(t, c)
	}
	list[1].Op, list[1].Cost = quota.OpDebit, 1<<62 // much more than is kept: a give-back of it would mint quota
	list[2].Op = quota.OpReset
	list[3] = list[3].Refund(receipts[3], 1)
	list[4].Op = quota.OpPeek
	list[5].Op, list[5].Cost = quota.OpDebit, 3
	if !granted {
		list[6].Cost = 10
	}
	// A take and a debit lie in one slot with a refund.
	list = append(list, quota.Charge{Limit: yearly(l.Name()+".b", 10), Key: list[3].Key, Cost: 2}, quota.Charge{Limit: yearly(l.Name()+".c", 10), Key: list[3].Key, Cost: 2, Op: quota.OpDebit})
	remaining := []int64{8, 10 - 1<<52 + 1, 10, 10, 9, 6, 8, 8, 8, 8}
	charged := []int64{1, 1 << 62, 0, 0, 0, 3, 1, 1, 2, 2}
	if !granted {
		remaining, charged = []int64{9, 9, 9, 9, 9, 9, 9, 9, 10, 10}, make([]int64, 10)
	}
	for i, d := range takeAll(t, store, list...) {
		if allowed := granted || i != 6; d.Remaining != remaining[i] || d.Charged != charged[i] || !d.Split || d.Allowed != allowed {
			t.Errorf("charge %d: got %+v; want allowed=%v, split, %d charged, %d left", i, d, allowed, charged[i], remaining[i])
		}
		if held := server.held(t, list[i]); !granted && held != was[i] {
			t.Errorf("state after charge %d of a denied list: got %x, want %x", i, held, was[i])
		}
	}
}

// oneSlot: different groups that share a slot are one step, for rules without Lua too, and ids of
// several groups are refused before anything is sent.
func oneSlot(t *testing.T, store store) {
	seen := map[int]string{}
	for i := 0; ; i++ {
		key := fmt.Sprintf("s%d", i)
		slot := redisserver.Slot(key)
		other, found := seen[slot]
		seen[slot] = key
		if !found {
			continue
		}
		for _, a := range []quota.Algorithm{yearly("x", 10).Algorithm(), hidden{quota.Must(newRule(first, 10, 1, year))}} {
			l := limitOf(a.Spec().Rule.String(), a)
			for j, d := range takeAll(t, store, quota.Charge{Limit: l, Key: key, Cost: 1}, quota.Charge{Limit: l, Key: other, Cost: 1}) {
				if !d.Allowed || d.Split || d.Remaining != 9 {
					t.Errorf("%q and %q, rule %s, charge %d: got %+v, want it allowed, not split, 9 left", key, other, l.Name(), j, d)
				}
			}
			limiter := quota.Must(quota.NewLimiter(store, l, nil))
			_, err := limiter.TakeAll(bg, quota.Charge{Key: key, Cost: 1, ID: "r"}, quota.Charge{Key: other, Cost: 1, ID: "r"})
			is(t, "one id for two groups", err, quota.ErrCrossSlot)
		}
		return
	}
}

// strict: lists over slots are refused and charge no key.
func strict(t *testing.T, server *data, store store) {
	if got := store.Atomicity(); got != driver.OneGroup {
		t.Errorf("Atomicity: got %v, want %v", got, driver.OneGroup)
	}
	for i, l := range []*quota.Limit{yearly("strict", 10), limitOf("strictcas", hidden{yearly("x", 10).Algorithm()})} {
		cs := spread(l, "strict", 3)
		is(t, "a list of several slots", store.TakeAll(bg, cs, make([]quota.Decision, 3)), quota.ErrCrossSlot)
		for _, c := range cs {
			if got := server.held(t, c); got != "" {
				t.Errorf("limit %d: state after a refused list: got %x, want none", i, got)
			}
		}
		group := []quota.Charge{{Limit: l, Key: "g/a", Cost: 1}, {Limit: l, Key: "g/b", Cost: 1}}
		if ds := takeAll(t, store, group...); !quota.Granted(ds) || ds[0].Split {
			t.Errorf("limit %d: one group: got %+v, want a grant that is not split", i, ds)
		}
	}
}

// splitRace: concurrent lists over slots charge each key for the lists that were granted, no more
// and no less, and never beyond its limit.
func splitRace(t *testing.T, store store) {
	const budget = 60
	n := seed(t)
	cs := spread(yearly("race", budget), "race", 4)
	granted := make([]atomic.Int64, len(cs))
	var wg sync.WaitGroup
	for g := range 8 {
		rng := rand.New(rand.NewPCG(n, uint64(g)))
		wg.Go(func() {
			for range sized(60, 400) {
				var places []int
				for i := range cs {
					if rng.IntN(2) == 0 {
						places = append(places, i)
					}
				}
				if len(places) == 0 {
					continue
				}
				list, out := make([]quota.Charge, len(places)), make([]quota.Decision, len(places))
				for j, i := range places {
					list[j] = cs[i]
				}
				if err := store.TakeAll(bg, list, out); err != nil {
					t.Error(err)
					return
				}
				if quota.Granted(out) {
					for _, i := range places {
						granted[i].Add(1)
					}
				}
			}
		})
	}
	wg.Wait()
	for i, c := range cs {
		if got, want := left(t, store, c.Limit, c.Key), budget-granted[i].Load(); got != want || got < 0 {
			t.Errorf("key %d: got %d left, want %d, of %d that were granted", i, got, want, budget)
		}
	}
}
