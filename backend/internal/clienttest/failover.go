package clienttest

import (
	"context"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// outage is how long a failure of a master may last, on a loaded machine: a second until it is taken for
// down, an election, and the client's discovery. It tells seconds from the minute after which go-redis
// looks at the cluster anew by itself.
const outage = 12 * time.Second

// stateOf returns the key of a state of the limit that tests of faults count with.
func stateOf(key string) string { return place(quota.Charge{Limit: counted(1), Key: key}) }

// masterKilled kills a master under load whose replica missed its last writes: the client must find the
// replica, and the lost tokens may be granted again, once.
func masterKilled(t *testing.T, l library) {
	t.Parallel()
	const capacity = 40 // of a key: so much may a failover admit again
	c := redisserver.StartCluster(t)
	s := l.dial(t, clustered(c))
	limit := counted(capacity)
	victim, err := c.MasterFor(stateOf("team-0"))
	ok(t, err)
	var own []string // keys of other masters would hide the outage
	for _, k := range keys(64) {
		if n, err := c.MasterFor(stateOf(k)); err == nil && n == victim {
			own = append(own, k)
		}
	}
	replicas, err := c.Replicas(victim)
	ok(t, err)
	y, stop := load(t, s, limit, own)
	y.more(t, int64(len(own)))
	ok(t, replicas[0].Pause())
	do(t, victim.Server, "CLIENT", "KILL", "TYPE", "replica") // it must not find the writes in its socket either
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
		t.Errorf("outage: got %v, want at most %v", out, outage)
	}
	if most := int64(capacity * 2 * len(own)); y.ok > most {
		t.Errorf("tokens granted: got %d, want at most %d, twice the limit of each key", y.ok, most)
	}
	if y.ok == held {
		t.Error("tokens lost: got none, want some, or the test proves no loss")
	}
}

// manualFailover promotes replicas under load, as operators do before they restart a server.
func manualFailover(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	s := l.dial(t, clustered(c))
	limit, list := counted(plenty), keys(32)
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
		t.Errorf("longest time without a grant: got %v, want at most %v", y.gap, outage)
	}
}

// restart restarts a single server under load. It keeps no data, so every key is fresh once more.
func restart(t *testing.T, l library) {
	t.Parallel()
	const capacity, losses = 50, 3
	server := redisserver.Start(t)
	s := l.dial(t, single(server))
	limit, list := counted(capacity), keys(8)
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
		t.Errorf("tokens granted: got %d, want at most %d, a limit for each key and loss", y.ok, most)
	}
	if y.gap > outage {
		t.Errorf("longest time without a grant: got %v, want at most %v", y.gap, outage)
	}
}

// resharding moves slots, with their keys, under load. No token is lost and callers see TRYAGAIN at most.
func resharding(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	s := l.dial(t, clustered(c))
	limit, list := counted(plenty), keys(8)
	y, stop := load(t, s, limit, list)
	y.more(t, 100)
	moves := sized(16, 1000)
	for i := range moves {
		// A call follows a move at a time: it meets a few, not hundreds, which no client would follow.
		slot := redisserver.Slot(stateOf(list[i%len(list)]))
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
		t.Errorf("failed calls: got %d of %d, want one in a hundred at most", n, y.ok)
	}
	y.exact(t, charged(t, s, limit, list...))
}

// halfMoved leaves a slot on its way: keys that are not there yet are taken at the new place (ASK),
// lists over keys of which some are there get TRYAGAIN. The redirected calls lose replies too.
func halfMoved(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	proxies := redisserver.StartProxies(t, c.Addrs()...)
	s, direct := l.dial(t, clustered(c).through(proxies)), l.dial(t, clustered(c))
	limit := counted(plenty)
	old, fresh := "team/old", "team/new"
	y := calls(s, limit, []string{old}, 10)
	slot := redisserver.Slot(stateOf("team"))
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
	is(t, "a list over a slot that is half moved (TRYAGAIN)", s.ChargeAll(bg, list, out), quota.ErrUnavailable)
	y.exact(t, charged(t, direct, limit, old, fresh))

	lost := proxies.Inject(redisserver.Fault{
		Action: redisserver.DropReply, Match: redisserver.Commands("EVALSHA", "EVAL"), Every: 10, Seed: seed(t),
	})
	z = calls(s, limit, []string{fresh}, 300)
	proxies.Clear()
	t.Logf("%d replies to redirected calls lost: %v", lost.Fired(), z)
	z.only(t, quota.ErrIndeterminate)
	z.bounds(t, charged(t, direct, limit, old, fresh)-y.ok)
	if lost.Fired() == 0 {
		t.Error("lost replies: got none, want some")
	}
	ok(t, c.MoveSlot(slot, from, target))
	ok(t, direct.ChargeAll(bg, list, out))
}

// sentinel kills the master that sentinels watch, under load, and then has an operator fail over: a client of
// the caller's and a store of a URL must follow both.
func sentinel(t *testing.T, l library) {
	t.Parallel()
	n := redisserver.StartSentinel(t)
	limit, list := counted(plenty), keys(8)
	peek := quota.Charge{Limit: limit, Key: list[0], Op: quota.OpPeek}
	stores := map[string]quota.Store{
		"client": l.dial(t, target{addrs: n.Addrs(), master: n.MasterName}),
		"URL":    l.open(t, sentinelURL(n)), // in another database
	}
	tallies, stops := map[string]*tally{}, map[string]func() *tally{}
	for name, s := range stores {
		tallies[name], stops[name] = load(t, s, limit, list)
	}
	granted := func() {
		t.Helper()
		for _, y := range tallies {
			y.more(t, 100)
		}
	}
	granted()
	old, err := n.Master()
	ok(t, err)
	if got := countKeys(t, old, "2", "quota:"); got != int64(len(list)) {
		t.Errorf("keys in database 2 of the master: got %d, want %d", got, len(list))
	}
	old.Kill()
	killed := time.Now()
	failing := func(name string) bool { _, err := stores[name].Charge(bg, peek); return err != nil }
	until(t, "the failure", func() bool { return failing("client") })
	for name := range stores {
		until(t, "the client to find the new master", func() bool { return !failing(name) })
	}
	if out := time.Since(killed); out > outage {
		t.Errorf("outage: got %v, want at most %v", out, outage)
	}
	granted()
	ok(t, old.Restart())
	ok(t, n.WaitOK())
	ok(t, n.Failover())
	ok(t, n.WaitOK())
	granted()
	for name, s := range stores {
		y := stops[name]()
		t.Log(name, y)
		// The old master takes writes for some seconds that are lost: see redisserver.
		y.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
		most := y.ok + y.failed[quota.ErrIndeterminate]
		if held := charged(t, s, limit, list...); held == 0 || held > most {
			t.Errorf("%s: got %d charged, want 1 to %d", name, held, most)
		}
	}
	_, err = l.open(t, "redis+sentinel://"+n.Addrs()[0]+"?master=unknown").Charge(bg, peek)
	is(t, "a master that the sentinels do not know", err, quota.ErrMisconfigured)
}

// demoted makes a primary a replica while its address comes to lead to another server, as a name that is resolved anew
// or a virtual address does. Within a moment all calls must go to the other one, and peeks too, which a replica answers
// from its old data. The user has no right but those to the scripts. A store that only peeks, and denies, cannot notice.
func demoted(t *testing.T, l library) {
	t.Parallel()
	const back = outage / 2
	for _, test := range []struct{ name, stale, kind string }{
		{"READONLY", "yes", "client"}, {"READONLY", "yes", "URL"},
		{"MASTERDOWN", "no", "client"}, {"MASTERDOWN", "no", "URL"},
		{"Peeks", "yes", "client"}, {"Peeks", "yes", "URL"},
	} {
		t.Run(test.name+"/"+test.kind, func(t *testing.T) {
			t.Parallel()
			user := []string{"app on >" + secret + " " + strings.Join(rightsOf(l.name, false), " ")}
			old := redisserver.StartConfig(t, redisserver.Config{Users: user})
			fresh := redisserver.StartConfig(t, redisserver.Config{Users: user})
			proxy := redisserver.StartProxy(t, old.Addr())
			var s quota.Store
			if test.kind == "URL" {
				s = l.open(t, "redis://app:"+secret+"@"+proxy.Addr()+"?timeout=2s&dial_timeout=2s") // as those of dial
			} else {
				s = l.dial(t, target{addrs: []string{proxy.Addr()}, user: "app", password: secret})
			}
			limit, list := counted(plenty), keys(8)
			y, stop := load(t, s, limit, list)
			y.more(t, 400)
			if test.name == "Peeks" {
				stop()
			}
			do(t, old, "CONFIG", "SET", "replica-serve-stale-data", test.stale)
			do(t, old, "REPLICAOF", "127.0.0.1", "1")
			proxy.Lead(fresh.Addr())
			var took time.Duration
			if test.name == "Peeks" { // which meet no refusal by themselves
				_, err := s.Charge(bg, quota.Charge{Limit: limit, Key: list[0], Cost: 1})
				is(t, "a charge over an old connection", err, quota.ErrUnavailable)
				took = until(t, "peeks to go to the new primary", func() bool {
					d, err := s.Charge(bg, quota.Charge{Limit: limit, Key: list[0], Op: quota.OpPeek})
					return err == nil && d.Remaining == plenty
				})
			} else {
				took = until(t, "calls to go to the new primary", func() bool { return calls(s, limit, list, 400).errors() == 0 })
			}
			if took > back {
				t.Errorf("calls went to the new primary after %v, want %v at most", took, back)
			}
			stop()
			t.Log(y)
			y.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
			until(t, "the old connections to be closed", func() bool {
				return !strings.Contains(do(t, old, "CLIENT", "LIST").(string), " user=app ")
			})
			want := left(t, l.dial(t, single(fresh)), limit, list[0])
			calls(peeker{s, t, want}, limit, list[:1], 400).only(t)
			calls(s, limit, list, 400).only(t)
		})
	}
	t.Run("remains", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		s := l.open(t, patiently("redis://"+server.Addr()))
		limit, list := counted(plenty), keys(8)
		calls(s, limit, list, 100)
		connections := func() (n int) {
			stats, err := server.Info("stats")
			ok(t, err)
			n, _ = strconv.Atoi(stats["total_connections_received"])
			return n
		}
		do(t, server, "REPLICAOF", "127.0.0.1", "1")
		before := connections()
		for since := time.Now(); time.Since(since) < 2*time.Second; time.Sleep(5 * time.Millisecond) {
			_, err := s.Charge(bg, quota.Charge{Limit: limit, Key: list[0], Cost: 1})
			is(t, "a call to a replica", err, quota.ErrUnavailable)
		}
		if n := connections() - before; !l.pooled && n > 32 { // a pool makes one for each refusal
			t.Errorf("connections made to a server that remains a replica: got %d in 2 s, want 32 at most", n)
		}
		do(t, server, "REPLICAOF", "NO", "ONE")
		until(t, "the server to decide again", func() bool { return calls(s, limit, list, 16).errors() == 0 })
	})
}

// peeker makes a peek of each charge, and fails the test unless its answer is the one wanted.
type peeker struct {
	quota.Store
	t    *testing.T
	want int64
}

func (p peeker) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	c.Op, c.Cost = quota.OpPeek, 0
	d, err := p.Store.Charge(ctx, c)
	if err == nil && d.Remaining != p.want {
		p.t.Errorf("a peek: got %d tokens, want the %d of the new primary", d.Remaining, p.want)
	}
	return d, err
}

// survey has one of three masters hang, and the store learn the topology from the others at once.
func survey(t *testing.T, l library) {
	t.Parallel()
	const questions, soon, late = 30, 200 * time.Millisecond, 3
	c := redisserver.StartCluster(t, "--cluster-require-full-coverage", "no")
	s := l.open(t, clusterURL(c, ""))
	limit, list := counted(plenty), keys(64)
	until(t, "the store to decide", func() bool { return calls(s, limit, list, 64).errors() == 0 })
	for _, n := range c.Nodes[3:] {
		n.Kill()
	}
	ok(t, c.Nodes[0].Pause())
	slow := 0
	for range questions {
		began := time.Now()
		ok(t, s.(driver.Placed).Refresh(bg))
		if time.Since(began) > soon {
			slow++
		}
	}
	if slow > late {
		t.Errorf("questions for the topology that took more than %v: got %d of %d, want %d at most", soon, slow, questions, late)
	}
	if name := s.(driver.Placed).Node(quota.Charge{Limit: limit, Key: keyAt(t, c, c.Nodes[1], list)}); name != c.Nodes[1].Addr() {
		t.Errorf("the node of a key: got %q, want %q", name, c.Nodes[1].Addr())
	}
}

// keyAt returns one of some keys that a master has.
func keyAt(t *testing.T, c *redisserver.Cluster, n *redisserver.Node, list []string) string {
	t.Helper()
	for _, key := range list {
		if m, err := c.MasterFor(stateOf(key)); err == nil && m == n {
			return key
		}
	}
	t.Fatal("keys of a master: got none, want some")
	return ""
}

// unowned takes a slot from its master, and gives it to no other. No node is named for it.
func unowned(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t, "--cluster-require-full-coverage", "no")
	limit, list := counted(plenty), keys(8)
	stores := map[string]quota.Store{"client": l.dial(t, clustered(c)).store, "URL": l.open(t, patiently(clusterURL(c, "")))}
	for _, s := range stores {
		until(t, "the store to decide", func() bool { return calls(s, limit, list, 64).errors() == 0 })
	}
	slot := redisserver.Slot(stateOf(list[0]))
	since := time.Now()
	until(t, "all nodes to forget the slot", func() bool { // a message under way may tell a node of it again
		for _, n := range c.Nodes {
			for _, r := range do(t, n.Server, "CLUSTER", "SLOTS").([]any) {
				if r := r.([]any); r[0].(int64) <= int64(slot) && int64(slot) <= r[1].(int64) {
					do(t, n.Server, "CLUSTER", "DELSLOTS", strconv.Itoa(slot))
					since = time.Now()
				}
			}
		}
		return time.Since(since) > time.Second
	})
	for name, s := range stores {
		placed := s.(driver.Placed)
		ok(t, placed.Refresh(bg))
		for range 20 {
			if node := placed.Node(quota.Charge{Limit: limit, Key: list[0]}); node != "" {
				t.Fatalf("%s: the node of a slot that none has: got %q, want none", name, node)
			}
		}
		if node := placed.Node(quota.Charge{Limit: limit, Key: list[1]}); node == "" {
			t.Errorf("%s: the node of another slot: got none, want one", name)
		}
	}
}
