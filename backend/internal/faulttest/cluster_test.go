package faulttest

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// outage is how long a failure of a master may last, on a loaded machine: a second until it is taken for
// down, an election, and the client's discovery. It tells seconds from the minute after which go-redis
// looks at the cluster anew by itself.
const outage = 12 * time.Second

// TestMasterKilled kills a master under load whose replica missed its last writes: the client must find the
// replica, and what was lost may be granted again, once.
func TestMasterKilled(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		const capacity = 40 // of a key: what a failover may admit again
		c := redisserver.StartCluster(t)
		s := l.open(t, clustered(c))
		limit := yearly(capacity)
		place := func(key string) string { return "quota:{" + key + "}:yearly" }
		victim, err := c.MasterFor(place("team-0"))
		ok(t, err)
		var own []string // keys of other masters would hide the outage
		for _, k := range keys(64) {
			if n, err := c.MasterFor(place(k)); err == nil && n == victim {
				own = append(own, k)
			}
		}
		replicas, err := c.Replicas(victim)
		ok(t, err)
		y, stop := load(t, s, limit, own)
		y.more(t, int64(len(own)))
		ok(t, replicas[0].Pause())
		run(t, victim.Server, "CLIENT", "KILL", "TYPE", "replica") // it must not find the writes in its socket either
		y.more(t, int64(len(own)))
		victim.Kill()
		killed := time.Now()
		ok(t, replicas[0].Resume())
		// A peek is never denied, so only the outage keeps it from its answer.
		peek := quota.Charge{Limit: limit, Key: own[0], Op: quota.OpPeek}
		until(t, "the failure", func() bool { return s.fails(peek) })
		until(t, "the client to find the new master", func() bool { return !s.fails(peek) })
		out := time.Since(killed)
		y.more(t, 1)
		time.Sleep(time.Second) // time to take all there is
		stop()
		held := charged(t, s, limit, own...)
		t.Logf("outage %v, %d tokens lost: %v", out.Round(time.Millisecond), y.ok-held, y)
		y.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
		if out > outage {
			t.Errorf("the outage lasted %v", out)
		}
		if most := int64(capacity * 2 * len(own)); y.ok > most {
			t.Errorf("%d tokens were granted; accepted: %d, twice the limit of each key", y.ok, most)
		}
		if y.ok == held {
			t.Error("nothing was lost: the test is none")
		}
	})
}

// fails reports whether a call fails.
func (c conn) fails(charge quota.Charge) bool {
	_, err := c.Take(bg, charge)
	return err != nil
}

// TestManualFailover promotes replicas under load, as operators do before they restart a server.
func TestManualFailover(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		c := redisserver.StartCluster(t)
		s := l.open(t, clustered(c))
		limit, list := yearly(plenty), keys(32)
		y, stop := load(t, s, limit, list)
		y.more(t, 100)
		for _, n := range c.Nodes[:sized(1, 3)] {
			_, err := c.Failover(n)
			ok(t, err)
			y.more(t, 200)
		}
		stop()
		t.Log(y)
		y.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
		// The old master hands over without loss, so the account is exact.
		y.bounds(t, charged(t, s, limit, list...))
		if y.gap > outage {
			t.Errorf("no grant for %v", y.gap)
		}
	})
}

// TestRestart restarts a single server under load. It keeps nothing, so every key is fresh once more.
func TestRestart(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		const capacity, losses = 50, 3
		server := redisserver.Start(t)
		s := l.open(t, single(server))
		limit, list := yearly(capacity), keys(8)
		y, stop := load(t, s, limit, list)
		for range losses {
			y.more(t, capacity*int64(len(list))/2)
			server.Kill()
			ok(t, server.Restart())
		}
		y.more(t, 1)
		time.Sleep(time.Second) // time to take all there is
		stop()
		t.Log(y)
		y.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
		if most := int64(capacity * len(list) * (1 + losses)); y.ok > most {
			t.Errorf("%d tokens were granted; accepted: %d, a limit a key and loss", y.ok, most)
		}
		if y.gap > outage {
			t.Errorf("no grant for %v", y.gap)
		}
	})
}

// TestResharding moves slots, with their keys, under load. Nothing is lost and nobody notices.
func TestResharding(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		c := redisserver.StartCluster(t)
		s := l.open(t, clustered(c))
		limit, list := yearly(plenty), keys(8)
		y, stop := load(t, s, limit, list)
		y.more(t, 100)
		moves := sized(16, 1000)
		for i := range moves {
			// A call follows a move at a time: it meets a few, not hundreds, which no client would follow.
			slot := redisserver.Slot("quota:{" + list[i%len(list)] + "}:yearly")
			from, err := c.MasterForSlot(slot)
			ok(t, err)
			to := c.Nodes[0]
			for n := range 3 {
				if c.Nodes[n] == from {
					to = c.Nodes[(n+1)%3]
				}
			}
			ok(t, c.MoveSlot(slot, from, to))
		}
		y.more(t, 100)
		stop()
		t.Logf("%d moves: %v", moves, y)
		y.only(t, quota.ErrUnavailable) // TRYAGAIN at most
		if n := y.failed[quota.ErrUnavailable]; n > y.ok/100 {
			t.Errorf("%d of %d calls failed", n, y.ok)
		}
		y.exact(t, charged(t, s, limit, list...))
	})
}

// TestHalfMoved leaves a slot on its way: keys that are not there yet are taken at the new place (ASK),
// lists over keys of which some are there get TRYAGAIN. The redirected calls lose replies too.
func TestHalfMoved(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		c := redisserver.StartCluster(t)
		proxies := redisserver.StartProxies(t, c.Addrs()...)
		s, direct := l.open(t, clustered(c).through(proxies)), l.open(t, clustered(c))
		limit := yearly(plenty)
		old, fresh := "team/old", "team/new"
		y := calls(s, limit, []string{old}, 10)
		slot := redisserver.Slot("quota:{team}:yearly")
		from, err := c.MasterForSlot(slot)
		ok(t, err)
		target := c.Nodes[0]
		if target == from {
			target = c.Nodes[1]
		}
		ok(t, c.BeginMove(slot, from, target))
		z := calls(s, limit, []string{fresh, old}, 100)
		z.only(t)
		y.ok += z.ok
		y.exact(t, charged(t, direct, limit, old, fresh))

		out := make([]quota.Decision, 2)
		list := []quota.Charge{{Limit: limit, Key: old, Cost: 1}, {Limit: limit, Key: fresh, Cost: 1}}
		if err := s.TakeAll(bg, list, out); class(err) != quota.ErrUnavailable {
			t.Errorf("a list over a slot that is half moved: %v; want ErrUnavailable (TRYAGAIN)", err)
		}
		y.exact(t, charged(t, direct, limit, old, fresh))

		lost := proxies.Inject(redisserver.Fault{
			Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA", "EVAL"), Probability: 0.1, Seed: seed(t),
		})
		z = calls(s, limit, []string{fresh}, 300)
		proxies.Clear()
		t.Logf("%d replies to redirected calls lost: %v", lost.Fired(), z)
		z.only(t, quota.ErrIndeterminate)
		z.bounds(t, charged(t, direct, limit, old, fresh)-y.ok)
		if lost.Fired() == 0 {
			t.Error("nothing was lost")
		}
		ok(t, c.MoveSlot(slot, from, target))
		ok(t, direct.TakeAll(bg, list, out))
	})
}
