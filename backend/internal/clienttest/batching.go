package clienttest

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A script holds keys of two hash tags only where one server is known to have all keys.

// crowd makes calls from 64 goroutines to as many keys as there are goroutines, unless it is given others.
func crowd(s quota.Store, l *quota.Limit, keys []string, calls int) *tally {
	return crowdOf(calls, func(y *tally, w, i int) {
		y.do(bg, s, quota.Charge{Limit: l, Key: keys[(w+i*64)%len(keys)], Cost: 1})
	})
}

// crowdOf makes calls from 64 goroutines.
func crowdOf(calls int, do func(y *tally, w, i int)) *tally {
	y := &tally{}
	var wg sync.WaitGroup
	for w := range 64 {
		wg.Go(func() {
			for i := range calls {
				do(y, w, i)
			}
		})
	}
	wg.Wait()
	return y
}

// learnt asks a store for its health. With it the store learns whether its address is one server.
func learnt(t testing.TB, s quota.Store) {
	t.Helper()
	_, err := s.(driver.HealthReporter).Health(bg)
	ok(t, err)
}

// inOneStep reports whether a store decides a list over three groups in one step, and not in parts.
func inOneStep(t testing.TB, s quota.Store) bool {
	t.Helper()
	ds := chargeAll(t, s, spread(yearly("steps", plenty), "steps", 3)...)
	for _, d := range ds {
		if !d.Allowed || d.Split != ds[0].Split {
			t.Errorf("a list: got %+v, want grants, all split or none", ds)
		}
	}
	return !ds[0].Split
}

// batchingOneServer: where one server is known charges to any keys share scripts, unless an option forbids it.
func batchingOneServer(t *testing.T, l library) {
	server := redisserver.Start(t)
	limit := counted(plenty)
	for _, test := range []struct {
		parameters string
		together   bool // of any keys
		oneStep    bool // of lists
	}{
		{"", true, true},
		{"&batching=auto", true, true},
		{"&batching=all", true, true},
		{"&batching=slot", false, false},
		{"&batching=none", false, true},
		{"&strict=true", false, false},
	} {
		s := l.open(t, "redis://"+server.Addr()+"?timeout=10s"+test.parameters)
		list := keys(64) // a goroutine has a key: without other keys its calls go alone
		ok(t, crowd(s, limit, list, 1).failure())
		learnt(t, s)
		calls := sized(50, 500)
		charge := func(w, i int) quota.Charge { return quota.Charge{Limit: limit, Key: list[w], Cost: 1} }
		withID := func(w, i int) quota.Charge {
			c := charge(w, i)
			c.ID = fmt.Sprint(test.parameters, w, "-", i)
			return c
		}
		for name, do := range map[string]func(y *tally, w, i int){
			"charges":          func(y *tally, w, i int) { y.do(bg, s, charge(w, i)) },
			"charges with ids": func(y *tally, w, i int) { y.do(bg, s, withID(w, i)) },
			"lists with ids": func(y *tally, w, i int) {
				cs := []quota.Charge{withID(w, i), withID(w, i)}
				cs[1].Key, cs[0].ID = list[w]+"/sub", cs[0].ID+"l"
				cs[1].ID = cs[0].ID
				out := make([]quota.Decision, 2)
				err := s.ChargeAll(bg, cs, out)
				y.add(out[0], err, 0)
			},
		} {
			before := runs(t, server)
			y := crowdOf(calls, do)
			ok(t, y.failure())
			if n := runs(t, server) - before; test.together != (n < y.ok/2) || !test.together && n != y.ok {
				t.Errorf("%q: scripts of %d %s: got %d, want batches of any keys: %v", test.parameters, y.ok, name, n, test.together)
			}
		}
		if test.parameters == "&strict=true" {
			cs := spread(limit, "steps", 3)
			is(t, "a list with strict=true", s.ChargeAll(bg, cs, make([]quota.Decision, 3)), quota.ErrCrossSlot)
		} else if got := inOneStep(t, s); got != test.oneStep {
			t.Errorf("%q: a list in one step: got %v, want %v", test.parameters, got, test.oneStep)
		}
	}
	// A store over the caller's client learns after its first decision.
	s := l.dial(t, single(server))
	until(t, "the store to learn", func() bool { return inOneStep(t, s) })
}

// batchingProxy: behind a proxy that routes by the first key no limit is exceeded.
func batchingProxy(t *testing.T, l library) {
	t.Parallel()
	for _, parameters := range []string{"", "&strict=true", "&batching=slot", "&batching=none"} {
		t.Run(parameters, func(t *testing.T) {
			a, b := redisserver.Start(t), redisserver.Start(t)
			s := l.open(t, "redis://"+routed(t, "127.0.0.1:0", a.Addr(), b.Addr())+"?timeout=30s"+parameters)
			exact(t, s, "first")
			exact(t, s, "second") // after it has learnt
			for _, server := range []*redisserver.Server{a, b} {
				if n := countKeys(t, server, "0", "quota:"); n < 10 {
					t.Errorf("keys of a server: got %d, want both to have many", n)
				}
			}
		})
	}
}

// exact charges keys of a limit from 64 goroutines beyond it, one by one and in lists: each grants its limit, no more
// and no less.
func exact(t testing.TB, s quota.Store, name string) {
	t.Helper()
	most := sized(40, 100)
	limit, list := yearly(name, int64(most)), keys(20)
	y := crowd(s, limit, list, 2*most*len(list)/64)
	ok(t, y.failure())
	if want := int64(most * len(list)); y.ok != want {
		t.Errorf("%s: granted to %d keys of limit %d: got %d, want %d", name, len(list), most, y.ok, want)
	}
	fleet := yearly(name+".fleet", int64(most))
	granted := 0
	for i := range 2 * most {
		cs := []quota.Charge{{Limit: fleet, Key: list[i%2], Cost: 1}, {Limit: fleet, Key: "fleet", Cost: 1}}
		out := make([]quota.Decision, 2)
		err := s.ChargeAll(bg, cs, out)
		if class(err) == quota.ErrCrossSlot { // strict
			return
		}
		ok(t, err)
		if !out[0].Split {
			t.Fatalf("%s: a list over two servers: got %+v, want it split", name, out)
		}
		if quota.Granted(out) {
			granted++
		}
	}
	if granted != most || left(t, s, fleet, "fleet") != 0 {
		t.Errorf("%s: lists granted to a key of limit %d: got %d with %d left, want %d with 0 left", name, most, granted, left(t, s, fleet, "fleet"), most)
	}
}

// batchingOneShard: a plain URL of a node that is a cluster of its own decides all, and never crosses slots.
func batchingOneShard(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t, "--cluster-enabled", "yes")
	if err := server.AddSlots(0, 16384); err != nil {
		t.Fatal(err)
	}
	until(t, "the cluster", func() bool {
		return strings.Contains(fmt.Sprint(do(t, server, "CLUSTER", "INFO")), "cluster_state:ok")
	})
	limit, list := counted(plenty), keys(64)
	for _, parameters := range []string{"", "&strict=true", "&batching=slot", "&batching=all"} {
		s := l.open(t, "redis://"+server.Addr()+"?timeout=30s"+parameters)
		y := crowd(s, limit, list, sized(50, 500))
		if ok(t, y.failure()); y.ok != 64*int64(sized(50, 500)) {
			t.Errorf("%q: got %v, want all granted", parameters, y)
		}
		err := s.ChargeAll(bg, spread(limit, "steps", 3), make([]quota.Decision, 3))
		if want := map[bool]error{true: quota.ErrCrossSlot}[parameters == "&strict=true" || parameters == "&batching=all"]; class(err) != want {
			t.Errorf("%q: a list over several slots: got error %v, want %v", parameters, err, want)
		}
	}
	var told []string
	to := single(server)
	to.timeout = patience
	to.options = engine.Options{Batching: engine.BatchAll, Notice: func(n quota.Notice) { told = append(told, n.Name+": "+n.Text) }}
	s := l.dial(t, to)
	ok(t, crowd(s, limit, list, 10).failure())
	if told = slices.DeleteFunc(told, func(n string) bool { return !strings.HasPrefix(n, "batching: ") }); len(told) != 1 || !strings.Contains(told[0], "CROSSSLOT") {
		t.Errorf("notices of a store that was told of one server: got %q, want one about CROSSSLOT", told)
	}
}

// batchingNoRight: a user without the right to INFO is told, once, and its charges go by group.
func batchingNoRight(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t)
	user := app{server}
	var list []string
	for _, right := range rightsOf(l.name, false) {
		if right != infoRight {
			list = append(list, right)
		}
	}
	user.may(t, list...)
	var mu sync.Mutex
	var told []string
	to := single(server)
	to.user, to.password, to.timeout = "app", secret, patience
	to.options.Notice = func(n quota.Notice) {
		mu.Lock()
		defer mu.Unlock()
		if n.Name == "batching" {
			told = append(told, n.Text)
		}
	}
	s := l.dial(t, to)
	take(t, s, quota.Charge{Limit: counted(plenty), Key: "k", Cost: 1})
	until(t, "the notice", func() bool { mu.Lock(); defer mu.Unlock(); return len(told) > 0 })
	s.Health(bg) // which learns again
	if len(told) != 1 || !strings.Contains(told[0], "+info") || !strings.Contains(told[0], "batching=all") || strings.Contains(told[0], secret) {
		t.Errorf("notices: got %q, want one that names +info and batching=all", told)
	}
	if inOneStep(t, s) {
		t.Error("a list over several groups: got one step, want parts")
	}
	before := runs(t, server)
	y := crowd(s, counted(plenty), keys(64), 20)
	ok(t, y.failure())
	if n := runs(t, server) - before; n != y.ok {
		t.Errorf("scripts of %d charges to as many keys as callers: got %d, want one each", y.ok, n)
	}
	user.may(t, append(list, infoRight)...)
	learnt(t, s)
	if !inOneStep(t, s) {
		t.Errorf("a list with the right %s: got parts, want one step", infoRight)
	}
}

// batchingAgain: an address that led to one server leads to a proxy over two after an outage. No limit is exceeded.
func batchingAgain(t *testing.T, l library) {
	t.Parallel()
	one, a, b := redisserver.Start(t), redisserver.Start(t), redisserver.Start(t)
	s := l.open(t, "redis://"+one.Addr()+"?timeout=10s")
	defer s.Close() // before the proxy ends, which waits for its connections
	learnt(t, s)
	if !inOneStep(t, s) {
		t.Error("a list at one server: got parts, want one step")
	}
	one.Kill()
	routed(t, one.Addr(), a.Addr(), b.Addr())
	until(t, "a decision", func() bool {
		_, err := s.Charge(bg, quota.Charge{Limit: counted(plenty), Key: "k", Cost: 1})
		return err == nil
	})
	exact(t, s, "again")
}

// batchingWork: large states go few at a time in a script, and small ones together, so that no script holds up the server
// for long.
func batchingWork(t *testing.T, l library) {
	t.Parallel()
	server, open := l.single(t)
	s := open(engine.Options{})
	for _, entries := range []int64{4000, 10} {
		limit := limitOf(fmt.Sprint("log", entries), algorithm.SlidingWindowLog(entries+100, year))
		var it driver.Item
		var d quota.Decision
		now := take(t, s, quota.Charge{Limit: limit, Key: "now", Op: quota.OpPeek}).At
		for i := range entries {
			ok(t, driver.ApplyOne(&quota.Charge{Limit: limit, Key: "k", Cost: 1}, &it, now-quota.Micros(entries-i), &d))
		}
		list := keys(64)
		for _, key := range list {
			ok(t, server.Set(bg, place(quota.Charge{Limit: limit, Key: key}), packed(&it), time.Hour).Err())
		}
		take(t, s, quota.Charge{Limit: limit, Key: list[0], Cost: 1})
		server.resetCounts(t)
		y := crowd(s, limit, list, 5)
		ok(t, y.failure())
		n := int64(server.count(t)["time"].calls)
		t.Logf("states of %d entries: %d charges in %d scripts", entries, y.ok, n)
		if large := entries > 1000; large && n < y.ok/5 || !large && n > y.ok/4 {
			t.Errorf("scripts of %d charges to states of %d entries: got %d, want %d", y.ok, entries, n, map[bool]int64{true: y.ok / 4, false: y.ok / 16}[large])
		}
	}
}
