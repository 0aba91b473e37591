package faulttest

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// refusal is a state of a server in which it refuses writes.
type refusal struct {
	name  string
	text  string // what the error says
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
	return func(t *testing.T, s *redisserver.Server) { run(t, s, "CONFIG", "SET", name, value) }
}

var refusals = []refusal{
	{
		name: "out of memory", text: "OOM", reads: true,
		begin: config("maxmemory", "1"), end: config("maxmemory", "0"),
	},
	{
		name: "read-only replica", text: "READONLY", reads: true,
		// A replica of nobody: it keeps its data while it looks for its master.
		begin: func(t *testing.T, s *redisserver.Server) { run(t, s, "REPLICAOF", "127.0.0.1", "1") },
		end:   func(t *testing.T, s *redisserver.Server) { run(t, s, "REPLICAOF", "NO", "ONE") },
	},
	{
		name: "stale replica", text: "MASTERDOWN",
		begin: func(t *testing.T, s *redisserver.Server) {
			run(t, s, "CONFIG", "SET", "replica-serve-stale-data", "no")
			run(t, s, "REPLICAOF", "127.0.0.1", "1")
		},
		end: func(t *testing.T, s *redisserver.Server) { run(t, s, "REPLICAOF", "NO", "ONE") },
	},
	{
		name: "too few replicas", text: "NOREPLICAS", reads: true,
		begin: config("min-replicas-to-write", "1"), end: config("min-replicas-to-write", "0"),
	},
	{
		name: "cannot save", text: "MISCONF", reads: true,
		begin: func(t *testing.T, s *redisserver.Server) {
			dir := run(t, s, "CONFIG", "GET", "dir").([]any)[1].(string)
			ok(t, os.Mkdir(filepath.Join(dir, "dump.rdb"), 0o700)) // where the snapshot should go
			run(t, s, "CONFIG", "SET", "save", "3600 1")
			run(t, s, "BGSAVE")
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
		end:   func(t *testing.T, s *redisserver.Server) { run(t, s, "SCRIPT", "KILL") },
	},
	{
		name: "loading", text: "LOADING", args: []string{"--key-load-delay", "20000", "--loading-process-events-interval-bytes", "1024", "--enable-debug-command", "yes"},
		begin: func(t *testing.T, s *redisserver.Server) {
			run(t, s, "DEBUG", "POPULATE", "500", "filler", "1000")
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

// TestRefusals puts servers into each state in which they refuse charges. The error is ErrUnavailable, which
// promises that nothing was charged; what needs no write is answered where the server can; and the client
// recovers without a restart.
func TestRefusals(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		for _, r := range refusals {
			t.Run(r.name, func(t *testing.T) {
				t.Parallel()
				server := redisserver.Start(t, r.args...)
				s := l.open(t, single(server))
				limit, few := yearly(plenty), yearly(3)
				y := calls(s, limit, keys(4), 40)
				calls(s, few, []string{"poor"}, 3)
				r.begin(t, server)
				z := calls(s, limit, keys(4), 40)
				list := []quota.Charge{{Limit: limit, Key: "a/b", Cost: 1}, {Limit: limit, Key: "a", Cost: 1}}
				for _, id := range []string{"", "request"} { // all of a list, and of a list with an id, or none
					list[0].ID, list[1].ID = id, id
					if err := s.TakeAll(bg, list, make([]quota.Decision, 2)); class(err) != quota.ErrUnavailable {
						t.Errorf("a list: %v", err)
					}
				}
				for text := range z.texts {
					if !strings.Contains(text, r.text) {
						t.Errorf("the error is %q; want one that says %s", text, r.text)
					}
				}
				if r.reads {
					if n := charged(t, s, few, "poor"); n != 3 {
						t.Errorf("a peek finds %d charged, not 3", n)
					}
					if d, err := s.Take(bg, quota.Charge{Limit: few, Key: "poor", Cost: 1}); err != nil || d.Allowed {
						t.Errorf("a denial is %v, %v", d.Allowed, err)
					}
				}
				r.end(t, server)
				if z.only(t, quota.ErrUnavailable); z.ok > 0 {
					t.Errorf("%d charges were granted", z.ok)
				}
				peek := quota.Charge{Limit: limit, Key: "team-0", Op: quota.OpPeek}
				back := until(t, "the client to recover", func() bool { return !s.fails(peek) })
				y.exact(t, charged(t, s, limit, append(keys(4), "a", "a/b")...))
				t.Logf("back after %v; %v", back.Round(time.Millisecond), z)
			})
		}
	})
}

// TestMaxClients fills a server with connections: a client that must connect anew is turned away, often so
// fast that it sees no more than a connection that breaks.
func TestMaxClients(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.Start(t, "--maxclients", "20")
		s := l.open(t, single(server))
		limit := yearly(plenty)
		y := calls(s, limit, keys(4), 40)
		run(t, server, "CLIENT", "KILL", "TYPE", "normal")
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
		if z.ok > 0 {
			t.Errorf("a server with no room: %v", z)
		}
		peek := quota.Charge{Limit: limit, Key: "team-0", Op: quota.OpPeek}
		until(t, "the client to recover", func() bool { return !s.fails(peek) })
		y.exact(t, charged(t, s, limit, keys(4)...))
	})
}

// TestClusterDown takes the majority of the masters away: the one that is left refuses.
func TestClusterDown(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		c := redisserver.StartCluster(t)
		s := l.open(t, clustered(c))
		limit := yearly(plenty)
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
			_, err := s.Take(bg, quota.Charge{Limit: limit, Key: own[0], Op: quota.OpPeek})
			return err != nil && strings.Contains(err.Error(), "CLUSTERDOWN")
		})
		z = calls(s, limit, own, 40)
		z.only(t, quota.ErrUnavailable)
		if z.ok > 0 {
			t.Error(z)
		}
		for _, i := range []int{1, 2, 4, 5} {
			ok(t, c.Nodes[i].Restart())
		}
		peek := quota.Charge{Limit: limit, Key: own[0], Op: quota.OpPeek}
		back := until(t, "the client to recover", func() bool { return !s.fails(peek) })
		y.exact(t, charged(t, s, limit, own...))
		t.Logf("back after %v; %v", back.Round(time.Millisecond), z)
	})
}

// TestReplies classifies what is hard to bring about. rueidis leaves "ERR " out.
func TestReplies(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]error{
		"ERR max number of clients reached":               quota.ErrUnavailable,
		"ERR max number of clients + cluster connections": quota.ErrUnavailable,
		"ERR Error running script (call to f_1): @user_script:9: -OOM command not allowed when used memory > 'maxmemory'.": quota.ErrUnavailable,
		"ERR Error running script (call to f_1): @user_script:9: -READONLY You can't write against a read only replica.":   quota.ErrUnavailable,
		"ERR The user executing the script can't run this command or subcommand script: f1, on @user_script:9.":            quota.ErrMisconfigured,
		"ERR unknown command 'EVALSHA', with args beginning with:":                                                         quota.ErrMisconfigured,
		"UNKILLABLE Sorry the script already executed write commands against the dataset.":                                 quota.ErrUnavailable,
		"CROSSSLOT Keys in request don't hash to the same slot":                                                            quota.ErrMisconfigured,
	} {
		for _, text := range []string{text, strings.TrimPrefix(text, "ERR ")} {
			if err := engine.ReplyError(errors.New(text)); class(err) != want {
				t.Errorf("%q is %v; want %v", text, class(err), want)
			}
		}
	}
}
