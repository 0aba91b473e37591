package clienttest

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// refusal is a state of a server in which it refuses writes.
type refusal struct {
	name  string
	text  string // is in the error
	args  []string
	reads bool // peeks and denials are answered all the same
	begin func(t *testing.T, s *redisserver.Server)
	end   func(t *testing.T, s *redisserver.Server)
}

// busy runs a script that takes for ever, and returns when the server is busy with it.
func busy(t *testing.T, s *redisserver.Server) {
	go s.Do("EVAL", "while true do end", "0")
	until(t, "the server to be busy", func() bool {
		_, err := s.Do("PING")
		return err != nil && strings.HasPrefix(err.Error(), "BUSY")
	})
}

func config(name, value string) func(*testing.T, *redisserver.Server) {
	return func(t *testing.T, s *redisserver.Server) { do(t, s, "CONFIG", "SET", name, value) }
}

var refusals = []refusal{
	{
		name: "out of memory", text: "OOM", reads: true,
		begin: config("maxmemory", "1"), end: config("maxmemory", "0"),
	},
	{
		name: "read-only replica", text: "READONLY", reads: true,
		// A replica of no server: it keeps its data while it looks for its master.
		begin: func(t *testing.T, s *redisserver.Server) { do(t, s, "REPLICAOF", "127.0.0.1", "1") },
		end:   func(t *testing.T, s *redisserver.Server) { do(t, s, "REPLICAOF", "NO", "ONE") },
	},
	{
		name: "stale replica", text: "MASTERDOWN",
		begin: func(t *testing.T, s *redisserver.Server) {
			do(t, s, "CONFIG", "SET", "replica-serve-stale-data", "no")
			do(t, s, "REPLICAOF", "127.0.0.1", "1")
		},
		end: func(t *testing.T, s *redisserver.Server) { do(t, s, "REPLICAOF", "NO", "ONE") },
	},
	{
		name: "too few replicas", text: "NOREPLICAS", reads: true,
		begin: config("min-replicas-to-write", "1"), end: config("min-replicas-to-write", "0"),
	},
	{
		name: "cannot save", text: "MISCONF", reads: true,
		begin: func(t *testing.T, s *redisserver.Server) {
			dir := do(t, s, "CONFIG", "GET", "dir").([]any)[1].(string)
			ok(t, os.Mkdir(filepath.Join(dir, "dump.rdb"), 0o700)) // where the snapshot should go
			do(t, s, "CONFIG", "SET", "save", "3600 1")
			do(t, s, "BGSAVE")
			until(t, "the snapshot to fail", func() bool {
				info, err := s.Info("persistence")
				return err == nil && info["rdb_last_bgsave_status"] == "err"
			})
		},
		end: config("stop-writes-on-bgsave-error", "no"),
	},
	{
		name: "busy", text: "BUSY", args: []string{"--busy-reply-threshold", "10"},
		begin: busy,
		end:   func(t *testing.T, s *redisserver.Server) { do(t, s, "SCRIPT", "KILL") },
	},
	{
		name: "loading", text: "LOADING", args: []string{"--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024", "--enable-debug-command", "yes"},
		begin: func(t *testing.T, s *redisserver.Server) {
			do(t, s, "DEBUG", "POPULATE", "500", "filler", "1000")
			go s.Do("DEBUG", "RELOAD") // the data is kept, and loading takes ten seconds
			until(t, "the server to load", func() bool {
				_, err := s.Do("GET", "x")
				return err != nil && strings.HasPrefix(err.Error(), "LOADING")
			})
		},
		end: func(t *testing.T, s *redisserver.Server) {
			until(t, "the server to have loaded", func() bool {
				s.Do("CONFIG", "SET", "key-load-delay", "0")
				_, err := s.Do("GET", "x")
				return err == nil
			})
		},
	},
}

// refusedStates puts servers into each state in which they refuse charges. The error is ErrUnavailable, which
// promises that no token was charged; a call that needs no write is answered where the server can; and the
// client recovers without a restart.
func refusedStates(t *testing.T, l library) {
	t.Parallel()
	for _, r := range refusals {
		t.Run(r.name, func(t *testing.T) {
			t.Parallel()
			server := redisserver.Start(t, r.args...)
			s := l.dial(t, single(server))
			limit, few := counted(plenty), counted(3)
			y := calls(s, limit, keys(4), 40)
			calls(s, few, []string{"poor"}, 3)
			r.begin(t, server)
			z := calls(s, limit, keys(4), 40)
			list := []quota.Charge{{Limit: limit, Key: "a/b", Cost: 1}, {Limit: limit, Key: "a", Cost: 1}}
			for _, id := range []string{"", "request"} { // all of a list, and of a list with an id, or none
				list[0].ID, list[1].ID = id, id
				is(t, "a list", s.ChargeAll(bg, list, make([]quota.Decision, 2)), quota.ErrUnavailable)
			}
			for text := range z.texts {
				if !strings.Contains(text, r.text) {
					t.Errorf("got error %q, want one that says %s", text, r.text)
				}
			}
			if r.reads {
				if n := charged(t, s, few, "poor"); n != 3 {
					t.Errorf("a peek: got %d charged, want 3", n)
				}
				if take(t, s, quota.Charge{Limit: few, Key: "poor", Cost: 1}).Allowed {
					t.Error("a charge beyond the limit: got a grant, want a denial")
				}
			}
			r.end(t, server)
			z.only(t, quota.ErrUnavailable)
			z.none(t, r.name)
			peek := quota.Charge{Limit: limit, Key: "team-0", Op: quota.OpPeek}
			back := until(t, "the client to recover", func() bool { return !s.fails(peek) })
			y.exact(t, charged(t, s, limit, append(keys(4), "a", "a/b")...))
			t.Logf("back after %v; %v", back.Round(time.Millisecond), z)
		})
	}
}

// maxClients fills a server with connections: a client that must connect anew is turned away, often so
// fast that it sees a connection that breaks and no more.
func maxClients(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t, "--maxclients", "20")
	s := l.dial(t, single(server))
	limit := counted(plenty)
	y := calls(s, limit, keys(4), 40)
	do(t, server, "CLIENT", "KILL", "TYPE", "normal")
	until(t, "the connections to end", func() bool {
		info, err := server.Info("clients")
		return err == nil && info["connected_clients"] == "1" // which asks
	})
	var hogs []net.Conn
	until(t, "the server to be full", func() bool {
		for range 30 {
			c, err := net.Dial("tcp", server.Addr())
			ok(t, err)
			hogs = append(hogs, c)
		}
		_, err := server.Do("PING")
		return err != nil && strings.Contains(err.Error(), "max number")
	})
	z := calls(s, limit, keys(4), 40)
	for _, c := range hogs {
		c.Close()
	}
	t.Log(z, z.texts)
	z.only(t, quota.ErrUnavailable, quota.ErrIndeterminate)
	z.none(t, "a server with no room")
	peek := quota.Charge{Limit: limit, Key: "team-0", Op: quota.OpPeek}
	until(t, "the client to recover", func() bool { return !s.fails(peek) })
	y.exact(t, charged(t, s, limit, keys(4)...))
}

// memoryFull fills a server that evicts no key with quota keys. The account stays exact to the last one.
func memoryFull(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t, "--maxmemory-policy", "noeviction")
	s := l.dial(t, single(server))
	limit, few := counted(plenty), counted(5)
	y := calls(s, few, []string{"poor"}, 5)
	info, err := server.Info("memory")
	ok(t, err)
	used, err := strconv.Atoi(info["used_memory"])
	ok(t, err)
	do(t, server, "CONFIG", "SET", "maxmemory", strconv.Itoa(used+1<<19))
	list := make([]string, 6000)
	for i := range list {
		list[i] = fmt.Sprintf("team-%d/agent-%d", i%100, i)
	}
	z := calls(s, limit, list, len(list))
	z.only(t, quota.ErrUnavailable)
	if z.errors() == 0 {
		t.Fatalf("with the memory full: got %v, want errors", z)
	}
	t.Log(z)
	if take(t, s, quota.Charge{Limit: few, Key: "poor", Cost: 1}).Allowed {
		t.Error("a charge beyond the limit, with the memory full: got a grant, want a denial")
	}
	// A reset frees memory and is no first write that can be refused; the charges behind it in a list are
	// made too.
	out := make([]quota.Decision, 2)
	mixed := []quota.Charge{{Limit: few, Key: "poor", Op: quota.OpReset}, {Limit: few, Key: "poor/other", Cost: 1}}
	err = s.ChargeAll(bg, mixed, out)
	want := int64(1)
	if err != nil {
		want = y.ok
	}
	if n := charged(t, s, few, "poor", "poor/other"); n != want {
		t.Errorf("a list with a reset, and error %v: got %d charged, want %d", err, n, want)
	}
	do(t, server, "CONFIG", "SET", "maxmemory", "0")
	z.exact(t, charged(t, s, limit, list...))
}

// health: an operator hears a server's version, of a policy by which it may drop quotas, and of evictions,
// once each.
func health(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t, "--maxmemory", "2mb", "--maxmemory-policy", "noeviction")
	version := versionOf(t, server)
	var told []string
	to := single(server)
	to.options.Notice = func(n quota.Notice) { told = append(told, n.Name) }
	s := l.dial(t, to)
	ask := func(policy string, evicted bool, notices ...string) {
		t.Helper()
		told = nil
		h, err := s.Health(bg)
		ok(t, err)
		if h.Eviction != policy || h.Evicted > 0 != evicted || h.Version != version || !slices.Equal(told, notices) {
			t.Errorf("Health: got %+v and notices %q; want policy %q, evictions=%v, version %s and notices %q", h, told, policy, evicted, version, notices)
		}
	}
	ask("", false)
	for _, policy := range []string{"volatile-lru", "volatile-lfu", "volatile-random", "volatile-ttl", "allkeys-lfu", "allkeys-random", "allkeys-lru"} {
		do(t, server, "CONFIG", "SET", "maxmemory-policy", policy)
		ask(policy, false, "eviction")
	}
	for i := range 40 {
		do(t, server, "SET", fmt.Sprint("filler", i), strings.Repeat("x", 100_000))
	}
	ask("allkeys-lru", true, "eviction", "evicted")
	ask("allkeys-lru", true, "eviction")
	do(t, server, "CONFIG", "SET", "maxmemory-policy", "noeviction")
	ask("", true)
}

// clusterDown takes the majority of the masters away: the one that is left refuses.
func clusterDown(t *testing.T, l library) {
	t.Parallel()
	c := redisserver.StartCluster(t)
	s := l.dial(t, clustered(c))
	limit := counted(plenty)
	var own []string
	for _, k := range keys(32) {
		if n, err := c.MasterFor("quota:{" + k + "}:yearly"); err == nil && n == c.Nodes[0] {
			own = append(own, k)
		}
	}
	y := calls(s, limit, own, 40)
	for _, i := range []int{4, 5, 1, 2} {
		c.Nodes[i].Kill()
	}
	var z *tally
	until(t, "the cluster to be down", func() bool {
		_, err := s.Charge(bg, quota.Charge{Limit: limit, Key: own[0], Op: quota.OpPeek})
		return err != nil && strings.Contains(err.Error(), "CLUSTERDOWN")
	})
	z = calls(s, limit, own, 40)
	z.only(t, quota.ErrUnavailable)
	z.none(t, "a cluster that is down")
	for _, i := range []int{1, 2, 4, 5} {
		ok(t, c.Nodes[i].Restart())
	}
	peek := quota.Charge{Limit: limit, Key: own[0], Op: quota.OpPeek}
	back := until(t, "the client to recover", func() bool { return !s.fails(peek) })
	y.exact(t, charged(t, s, limit, own...))
	t.Logf("back after %v; %v", back.Round(time.Millisecond), z)
}

// proxyReplies: a reply that is on no list of refusals does not say that a charge was not made. A breaker counts
// it, and the fallback decides.
func proxyReplies(t *testing.T, l library) {
	t.Parallel()
	for _, reply := range []string{
		"-upstream failure", "-no upstream host", "-ERR Connection timed out", "-ERR Proxy error", "-ERR internal error",
		"-ERR max daily request limit exceeded", "-UNAVAILABLE try again", "-ERR user_script:1: attempt to index a nil value", "+OK", "*-1",
	} {
		var asked atomic.Int64
		s := l.dial(t, target{addrs: []string{fakeRedis(t, func([]string) string {
			asked.Add(1)
			return reply + "\r\n"
		})}})
		limit := counted(plenty)
		c := quota.Charge{Limit: limit, Key: "k", Cost: 1}
		_, err := s.Charge(bg, c)
		if got, want := quota.Charged(err), quota.ChargeUnknown; got != want && reply != "-no upstream host" {
			t.Errorf("%s: Charged(%v): got %v, want %v", reply, err, got, want)
		}
		stack, err := resilience.Standard(s, resilience.Fallback(local.New(), resilience.Instances(4), nil), nil)
		ok(t, err)
		before := asked.Load()
		for range 20 {
			if d, err := stack.Charge(bg, c); err != nil || d.Source != quota.FromFallback {
				t.Fatalf("%s, under Standard with a fallback: got %+v, error %v; want a decision of the fallback", reply, d, err)
			}
		}
		until(t, "the breaker to open for "+reply, func() bool {
			stack.Charge(bg, c)
			return resilience.BreakerState(stack) == "open"
		})
		t.Logf("%s: asked %d times", reply, asked.Load()-before)
		stack.Close()
	}
}

// anotherRule: a limit whose algorithm changed under its name is told both rules and the cure, also where its
// charge goes alone.
func anotherRule(t *testing.T, l library) {
	t.Parallel()
	s := l.dial(t, single(redisserver.Start(t)))
	before, after := yearly("same", 10), limitOf("same", newRule(bucket, 10, 1, year))
	take(t, s, quota.Charge{Limit: before, Key: "k", Cost: 1})
	c := quota.Charge{Limit: after, Key: "k", Cost: 1}
	for name, call := range map[string]func() error{
		"alone": func() error { _, err := s.Charge(bg, c); return err },
		"in a list": func() error {
			return s.ChargeAll(bg, []quota.Charge{c, {Limit: before, Key: "l", Cost: 1}}, make([]quota.Decision, 2))
		},
	} {
		err := call()
		is(t, name, err, quota.ErrMisconfigured)
		for _, part := range []string{before.Spec().Rule.String(), after.Spec().Rule.String(), `limit "same`, "another name"} {
			if err == nil || !strings.Contains(err.Error(), part) {
				t.Errorf("%s: got error %v, want one that says %s", name, err, part)
			}
		}
	}
	if n := charged(t, s, before, "k"); n != 1 {
		t.Errorf("the key of the rule before: got %d charged, want 1", n)
	}
}

// wrongLua: a server whose struct packs numbers of 7 bytes wrongly, as Garnet's does, runs the scripts and corrupts
// each state in silence. It is told by its first call, before it writes, and by Health.
func wrongLua(t *testing.T, l library) {
	t.Parallel()
	server := redisserver.Start(t)
	// pack writes 4 bytes in front of the 7.
	const library = `{unpack = struct.unpack, pack = function(_, ...)
		local bytes = ''
		for _, n in ipairs({...}) do bytes = bytes .. struct.pack('>I4', n % 4294967296) .. '\0\0\0' end
		return bytes
	end}`
	addr := between(t, server.Addr(), func(args []string) (string, bool) {
		switch strings.ToUpper(args[0]) {
		case "EVALSHA":
			return "-NOSCRIPT No matching script.\r\n", true
		case "EVAL":
			args[1] = strings.Replace(args[1], "rawget(_G, 'struct')", library, 1)
		}
		return "", false
	})
	s := l.open(t, patiently("redis://"+addr))
	for range 2 {
		_, err := one(s, "k")
		tellsOfLua(t, "a charge", err)
	}
	_, err := s.(driver.HealthReporter).Health(bg)
	tellsOfLua(t, "Health", err)
	if n := do(t, server, "DBSIZE").(int64); n != 0 {
		t.Errorf("keys: got %d, want none", n)
	}
	own := l.dial(t, target{addrs: []string{addr}})
	_, err = own.Charge(bg, quota.Charge{Limit: ten, Key: "own", Cost: 1})
	tellsOfLua(t, "a client of the caller's", err)
}

func tellsOfLua(t *testing.T, call string, err error) {
	t.Helper()
	if class(err) != quota.ErrMisconfigured || quota.Charged(err) != quota.NotCharged {
		t.Errorf("%s: got error %v, want ErrMisconfigured, not charged", call, err)
		return
	}
	for _, part := range []string{"struct.pack", "accepted: "} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%s: got error %v, want one that says %q", call, err, part)
		}
	}
	if !slices.ContainsFunc([]string{"the server, redis ", "the server, valkey "}, func(s string) bool { return strings.Contains(err.Error(), s) }) {
		t.Errorf("%s: got error %v, want one that names the server and its version", call, err)
	}
}
