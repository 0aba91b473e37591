package clienttest

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
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
	t.Run("alternatives", func(t *testing.T) { splitAlternatives(t, store) })
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
				a := newRule(k, 10, 1, year) // in any window, and of the bucket ten years to fill: no token comes back of itself
				if hide {
					a = hidden{a}
				}
				cs := spread(limitOf(name, a), name, 6)
				for i, d := range chargeAll(t, store, cs...) {
					if !d.Allowed || !d.Split || d.Charged != 1 || d.Remaining != 9 || d.RetryAfter != 0 {
						t.Errorf("charge %d of a granted list: got %+v, want it allowed, split, 1 charged, 9 left", i, d)
					}
				}
				// One slot's state stays as it is while others grant and give back.
				const full = 4
				take(t, store, quota.Charge{Limit: cs[full].Limit, Key: cs[full].Key, Cost: 9})
				for round := range 5 {
					for i, d := range chargeAll(t, store, cs...) {
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

// splitAlternatives: of lists over several slots each, the first that fits is taken in its order, and no other has a token
// charged.
func splitAlternatives(t *testing.T, store store) {
	l := yearly("first", 10)
	lim := quota.Must(quota.NewLimiter(store, l, nil))
	cs := spread(l, "f", 6)
	cs[2].Cost, cs[4].Cost = 11, 6
	lists := [][]quota.Charge{cs[0:3], cs[3:6], {cs[0], cs[4]}}
	used := make([]int64, 6)
	for i, want := range []struct {
		taken   int
		granted bool
	}{{1, true}, {0, false}} { // of the second list 6 and no more than 4 are left
		r, err := lim.TakeFirst(bg, lists...)
		if err != nil || r.Granted != want.granted || r.Granted && r.Taken != want.taken {
			t.Fatalf("call %d: got %+v, %v; want list %d, granted %v", i, r, err, want.taken, want.granted)
		}
		for n, list := range r.Lists {
			for k, d := range list {
				if charged := want.granted && n == want.taken; !d.Split || (d.Charged > 0) != charged {
					t.Errorf("call %d, list %d, charge %d: got %+v; want it split, charged %v", i, n, k, d, charged)
				}
			}
		}
		for k := 3; k < 6 && want.granted; k++ {
			used[k] += cs[k].Cost
		}
		for k, c := range cs {
			if got := left(t, store, l, c.Key); got != 10-used[k] {
				t.Errorf("call %d, key %d: got %d left on the server, want %d", i, k, got, 10-used[k])
			}
		}
	}
}

// splitMixed: lists of every kind of charge, granted or denied by one of them. A denied list leaves no trace.
func splitMixed(t *testing.T, server *data, store store, granted bool) {
	l := yearly(fmt.Sprintf("mixed%v", granted), 10)
	list := spread(l, "m", 8)
	list[7].Limit = limitOf(l.Name()+".ahead", algorithm.TokenBucket(10, 1, time.Hour))
	receipts := chargeAll(t, store, list...) // one each
	was := make([]string, 10)
	for i, c := range list {
		was[i] = server.held(t, c)
	}
	list[1].Op, list[1].Cost = quota.OpDebit, 1<<62 // much more than is kept: a give-back of it would mint quota
	list[2].Op = quota.OpReset
	list[3] = list[3].Refund(receipts[3], 1)
	list[4].Op = quota.OpPeek
	list[5].Op, list[5].Cost = quota.OpDebit, 3
	list[7].Op, list[7].Cost, list[7].Within = quota.OpAhead, 10, quota.Never // 9 are left
	if !granted {
		list[6].Cost = 10
	}
	// A take and a debit lie in one slot with a refund.
	list = append(list, quota.Charge{Limit: yearly(l.Name()+".b", 10), Key: list[3].Key, Cost: 2}, quota.Charge{Limit: yearly(l.Name()+".c", 10), Key: list[3].Key, Cost: 2, Op: quota.OpDebit})
	remaining := []int64{8, 10 - 1<<52 + 1, 10, 10, 9, 6, 8, -1, 8, 8}
	charged := []int64{1, 1 << 62, -1, -1, 0, 3, 1, 10, 2, 2} // below 0 where tokens came back
	if !granted {
		remaining, charged = []int64{9, 9, 9, 9, 9, 9, 9, 9, 10, 10}, make([]int64, 10)
	}
	for i, d := range chargeAll(t, store, list...) {
		if allowed := granted || i != 6; d.Remaining != remaining[i] || d.Charged != charged[i] || !d.Split || d.Allowed != allowed || d.Delay > 0 != (granted && i == 7) {
			t.Errorf("charge %d: got %+v; want allowed=%v, split, %d charged, %d left", i, d, allowed, charged[i], remaining[i])
		}
		if held := server.held(t, list[i]); !granted && held != was[i] && i != 7 { // a bucket that was given back counts refill up to then
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
		for _, a := range []quota.Algorithm{yearly("x", 10).Algorithm(), hidden{newRule(first, 10, 1, year)}} {
			l := limitOf(a.Spec().Rule.String(), a)
			for j, d := range chargeAll(t, store, quota.Charge{Limit: l, Key: key, Cost: 1}, quota.Charge{Limit: l, Key: other, Cost: 1}) {
				if !d.Allowed || d.Split || d.Remaining != 9 {
					t.Errorf("%q and %q, rule %s, charge %d: got %+v, want it allowed, not split, 9 left", key, other, l.Name(), j, d)
				}
			}
			limiter := quota.Must(quota.NewLimiter(store, l, nil))
			_, err := limiter.ChargeAll(bg, quota.Charge{Key: key, Cost: 1, ID: "r"}, quota.Charge{Key: other, Cost: 1, ID: "r"})
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
		is(t, "a list of several slots", store.ChargeAll(bg, cs, make([]quota.Decision, 3)), quota.ErrCrossSlot)
		for _, c := range cs {
			if got := server.held(t, c); got != "" {
				t.Errorf("limit %d: state after a refused list: got %x, want none", i, got)
			}
		}
		group := []quota.Charge{{Limit: l, Key: "g/a", Cost: 1}, {Limit: l, Key: "g/b", Cost: 1}}
		if ds := chargeAll(t, store, group...); !quota.Granted(ds) || ds[0].Split {
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
				if err := store.ChargeAll(bg, list, out); err != nil {
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

// splitLosses: lists over several slots, most of them denied by one charge, while replies are lost. Every token
// that a slot granted comes back, or the error says that it may stay charged; and no list takes longer than its
// caller's deadline.
func splitLosses(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	proxies := redisserver.StartProxies(t, c.Addrs()...)
	s := l.dial(t, clustered(c).through(proxies))
	bulk, full := yearly("bulk", plenty), yearly("full", 1)
	list := spread(bulk, "bulk", 12)
	gate := spread(full, "full", 3)
	for _, c := range append(list, gate...) {
		take(t, s, c)
	}
	lost := proxies.Inject(drops(seed(t)))
	const wait = 2 * time.Second
	var mu sync.Mutex
	granted, maybe := make([]int64, len(list)), make([]int64, len(list))
	var denials, unknown int
	var slowest time.Duration
	var wg sync.WaitGroup
	n := seed(t)
	for g := range 8 {
		rng := rand.New(rand.NewPCG(n, uint64(g)))
		wg.Go(func() {
			for range sized(120, 1000) {
				i, j := rng.IntN(len(list)), rng.IntN(len(list))
				cs := []quota.Charge{list[i], list[j]}
				if i == j {
					cs = cs[:1]
				}
				if rng.IntN(4) > 0 {
					cs = append(cs, gate[rng.IntN(len(gate))])
				}
				out := make([]quota.Decision, len(cs))
				ctx, cancel := context.WithTimeout(bg, wait)
				start := time.Now()
				err := s.ChargeAll(ctx, cs, out)
				took := time.Since(start)
				cancel()
				mu.Lock()
				slowest = max(slowest, took)
				counts := granted
				switch {
				case err != nil && class(err) != quota.ErrIndeterminate:
					t.Errorf("a list while replies are lost: got error %v, want ErrIndeterminate", err)
				case err != nil:
					unknown++
					counts = maybe
				case !quota.Granted(out):
					denials++
					counts = nil
				}
				if counts != nil {
					counts[i]++
					if j != i {
						counts[j]++
					}
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	proxies.Clear()
	t.Logf("%d denials, %d of unknown outcome, %d replies lost, the slowest list took %v", denials, unknown, lost.Fired(), slowest)
	direct := l.dial(t, clustered(c))
	for i, c := range list {
		if got, least := charged(t, direct, bulk, c.Key)-1, granted[i]; got < least || got > least+maybe[i] {
			t.Errorf("key %d: got %d charged, want %d, and up to %d more", i, got, least, maybe[i])
		}
	}
	if lost.Fired() == 0 || denials == 0 {
		t.Errorf("lost replies: got %d, denials: got %d; want some of both", lost.Fired(), denials)
	}
	if slowest > wait+200*time.Millisecond {
		t.Errorf("the slowest list: got %v, want at most %v", slowest, wait)
	}
}

// splitDeadline: a give-back to a node that does not answer holds its caller no longer than the deadline.
func splitDeadline(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	proxies := redisserver.StartProxies(t, c.Addrs()...)
	s := l.dial(t, clustered(c).through(proxies))
	bulk, full := yearly("bulk", plenty), yearly("full", 1)
	list := append(spread(bulk, "bulk", 2), spread(full, "full", 3)[2])
	for _, c := range list {
		take(t, s, c)
	}
	_, err := s.Charge(bg, quota.Charge{Limit: bulk, Key: list[0].Key, Cost: 1, ID: "known"}) // its script, too
	ok(t, err)
	// A give-back has a request id, so its script has two keys.
	proxies.Inject(redisserver.Fault{Action: redisserver.DelayReply, Delay: 600 * time.Millisecond, Match: func(args []string) bool {
		return redisserver.Commands("EVALSHA", "EVAL")(args) && len(args) > 4 && args[2] == "2"
	}})
	const wait = 150 * time.Millisecond
	ctx, cancel := context.WithTimeout(bg, wait)
	defer cancel()
	start := time.Now()
	err = s.ChargeAll(ctx, list, make([]quota.Decision, len(list)))
	took := time.Since(start)
	is(t, "a list whose give-back is late", err, quota.ErrIndeterminate)
	if took > wait+100*time.Millisecond {
		t.Errorf("a list whose give-back is late: got %v, want at most %v", took, wait)
	}
	proxies.Clear()
	until(t, "the give-backs that go on", func() bool { return charged(t, s, bulk, list[0].Key, list[1].Key) == 3 })
}
