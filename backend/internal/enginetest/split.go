package enginetest

import (
	"errors"
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

// Cluster runs what takes a Redis Cluster.
func Cluster(t *testing.T, connect Connect) {
	server, open := cluster(t, connect)
	store := open(engine.Options{})
	if store.Atomicity() != driver.OneGroup {
		t.Errorf("Atomicity is %v", store.Atomicity())
	}
	t.Run("split", func(t *testing.T) { split(t, server, store) })
	t.Run("one slot", func(t *testing.T) { oneSlot(t, store) })
	t.Run("strict", func(t *testing.T) { strict(t, server, open(engine.Options{Strict: true})) })
	t.Run("no over-admission", func(t *testing.T) { noOverAdmission(t, server, store) })
	t.Run("hostile keys", func(t *testing.T) { hostileKeys(t, store) })
	t.Run("health", func(t *testing.T) {
		if h, err := store.Health(bg); err != nil || h.Version == "" || h.Eviction != "" || h.Evicted != 0 {
			t.Errorf("%+v, %v", h, err)
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

// split: a list over several slots is made whole, or what a slot granted is given back.
func split(t *testing.T, server *server, store *engine.Store) {
	for k := range kinds {
		for _, hide := range []bool{false, true} {
			name := fmt.Sprintf("%s-%v", kindNames[k], hide)
			t.Run(name, func(t *testing.T) {
				a := quota.Must(newRule(k, 10, 1, year)) // in any window, and of the bucket ten years to fill: nothing comes back of itself
				if hide {
					a = hidden{a}
				}
				cs := spread(limitOf(name, a), name, 6)
				ds := takeAll(t, store, cs...)
				for i, d := range ds {
					if !d.Allowed || !d.Split || d.Charged != 1 || d.Remaining != 9 || d.RetryAfter != 0 {
						t.Errorf("charge %d of a granted list: %+v", i, d)
					}
				}
				// One slot's state stays as it is while others grant and give back.
				full := cs[4]
				full.Cost = 9
				take(t, store, full)
				for round := range 5 {
					ds = takeAll(t, store, cs...)
					for i, d := range ds {
						want := int64(9)
						if i == 4 {
							want = 0
						}
						if d.Allowed != (i != 4) || !d.Split || d.Charged != 0 || d.Remaining != want || (d.RetryAfter > 0) != (i == 4) {
							t.Errorf("round %d, charge %d of a denied list: %+v", round, i, d)
						}
					}
				}
				for i, c := range cs {
					c.Op = quota.OpPeek
					if d := take(t, store, c); d.Remaining != ds[i].Remaining {
						t.Errorf("charge %d: %d left, not %d", i, d.Remaining, ds[i].Remaining)
					}
				}
			})
		}
	}

	t.Run("mixed", func(t *testing.T) {
		for _, granted := range []bool{true, false} {
			l := yearly(fmt.Sprintf("mixed%v", granted), 10)
			cs := spread(l, "m", 8)
			receipts := takeAll(t, store, cs...) // one each
			was := make([]string, len(cs))
			for i, c := range cs {
				was[i] = server.held(t, c)
			}
			list := append([]quota.Charge(nil), cs...)
			list[1].Op, list[1].Cost = quota.OpDebit, 1<<62 // much more than is kept: a give-back of it would mint quota
			list[2].Op = quota.OpReset
			list[3] = cs[3].Refund(receipts[3], 1)
			list[4].Op = quota.OpPeek
			list[5].Op, list[5].Cost = quota.OpDebit, 3
			if !granted {
				list[6].Cost = 10
			}
			// 0 is taken from what lies in one slot with a refund, a debit and a take.
			list = append(list, quota.Charge{Limit: yearly(l.Name()+".b", 10), Key: cs[3].Key, Cost: 2}, quota.Charge{Limit: yearly(l.Name()+".c", 10), Key: cs[3].Key, Cost: 2, Op: quota.OpDebit})
			ds := takeAll(t, store, list...)
			if quota.Granted(ds) != granted {
				t.Fatalf("granted %v: %+v", !granted, ds)
			}
			want := []int64{8, 10 - 1<<52 + 1, 10, 10, 9, 6, 8, 8, 8, 8}
			charged := []int64{1, 1 << 62, 0, 0, 0, 3, 1, 1, 2, 2}
			if !granted {
				want, charged = []int64{9, 9, 9, 9, 9, 9, 9, 9, 10, 10}, make([]int64, 10)
			}
			for i, d := range ds {
				if d.Remaining != want[i] || d.Charged != charged[i] || !d.Split || d.Allowed != (granted || i != 6) {
					t.Errorf("granted %v, charge %d: %+v; %d left expected", granted, i, d, want[i])
				}
				if now := ""; !granted {
					if i < len(was) {
						now = was[i]
					}
					if held := server.held(t, list[i]); held != now {
						t.Errorf("charge %d of a denied list changed the state from %x to %x", i, now, held)
					}
				}
			}
		}
	})
}

// oneSlot: different groups that share a slot are one step, for rules without Lua too, and ids of
// several groups are refused before anything is sent.
func oneSlot(t *testing.T, store *engine.Store) {
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
					t.Errorf("%q and %q, rule %s, charge %d: %+v", key, other, l.Name(), j, d)
				}
			}
			limiter := quota.Must(quota.NewLimiter(store, l, nil))
			if _, err := limiter.TakeAll(bg, quota.Charge{Key: key, Cost: 1, ID: "r"}, quota.Charge{Key: other, Cost: 1, ID: "r"}); !errors.Is(err, quota.ErrCrossSlot) {
				t.Errorf("one id for two groups: %v", err)
			}
		}
		return
	}
}

// strict: lists over slots are refused and nothing is charged.
func strict(t *testing.T, server *server, store *engine.Store) {
	if store.Atomicity() != driver.OneGroup {
		t.Errorf("Atomicity is %v", store.Atomicity())
	}
	for i, l := range []*quota.Limit{yearly("strict", 10), limitOf("strictcas", hidden{yearly("x", 10).Algorithm()})} {
		cs := spread(l, "strict", 3)
		if err := store.TakeAll(bg, cs, make([]quota.Decision, 3)); !errors.Is(err, quota.ErrCrossSlot) {
			t.Errorf("limit %d: %v", i, err)
		}
		for _, c := range cs {
			if server.held(t, c) != "" {
				t.Errorf("limit %d: a refused list charged", i)
			}
		}
		group := []quota.Charge{{Limit: l, Key: "g/a", Cost: 1}, {Limit: l, Key: "g/b", Cost: 1}}
		if ds := takeAll(t, store, group...); !quota.Granted(ds) || ds[0].Split {
			t.Errorf("limit %d: one group: %+v", i, ds)
		}
	}
}

// noOverAdmission: concurrent lists over slots charge each key for the lists that were granted, no more
// and no less, and never beyond its limit.
func noOverAdmission(t *testing.T, server *server, store *engine.Store) {
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
		c.Op = quota.OpPeek
		if d := take(t, store, c); budget-d.Remaining != granted[i].Load() || d.Remaining < 0 {
			t.Errorf("key %d: %d granted of %d, %d left", i, granted[i].Load(), budget, d.Remaining)
		}
	}
}
