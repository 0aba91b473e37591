package redisurl_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestSingle(t *testing.T) {
	server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"u on >p:%/@ ~* +@all"}})
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		for _, url := range []string{
			"redis://" + server.Addr(),
			"redis://" + server.Addr() + "/3?prefix=" + t.Name(),
			"redis://u:p%3A%25%2F%40@" + server.Addr() + "/4?prefix=u:",
		} {
			s := open(t, url)
			works(t, s, t.Name())
			if g := s.(driver.Graded).Atomicity(); g != driver.AnyKeys {
				t.Errorf("%s: atomicity %v", url, g)
			}
		}
		for db, prefix := range map[string]string{"0": "quota:", "3": t.Name(), "4": "u:"} {
			if n := keys(t, server, db, prefix); n != 1 {
				t.Errorf("database %s has %d keys that begin with %s", db, n, prefix)
			}
		}
		if _, err := server.Do("FLUSHALL"); err != nil {
			t.Fatal(err)
		}
	})
}

// plain returns the test's name as a group of its own.
func plain(t *testing.T) string { return strings.ReplaceAll(t.Name(), "/", "-") }

// keys counts keys in a database.
func keys(t *testing.T, s *redisserver.Server, db, prefix string) int {
	t.Helper()
	v, err := s.Do("EVAL", "redis.call('SELECT', ARGV[1]) return #redis.call('KEYS', ARGV[2])", "0", db, strings.ReplaceAll(prefix, "/", "?")+"{*")
	if err != nil {
		t.Fatal(err)
	}
	return int(v.(int64))
}

func TestStrict(t *testing.T) {
	server := redisserver.Start(t)
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		s := open(t, "redis://"+server.Addr()+"?strict=true")
		cs := []quota.Charge{{Limit: limit, Key: "a", Cost: 1}, {Limit: limit, Key: "b", Cost: 1}}
		if err := s.TakeAll(t.Context(), cs, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrCrossSlot) {
			t.Errorf("a list over two groups: %v", err)
		}
	})
}

func TestTLS(t *testing.T) {
	server, dir := tlsServer(t)
	_, other := tlsServer(t) // another authority
	elsewhere := forward(t, "127.0.0.2:0", server.Addr())
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		works(t, open(t, "rediss://"+server.Addr()+"?"+ca(dir)), t.Name())
		works(t, open(t, fmt.Sprintf("rediss://localhost:%d?", server.Port())+ca(dir)), t.Name()+"2")
		for name, url := range map[string]string{
			"an unknown authority": "rediss://" + server.Addr(),
			"another authority":    "rediss://" + server.Addr() + "?" + ca(other),
			"another name":         "rediss://" + elsewhere + "?" + ca(dir),
			"no TLS":               "redis://" + server.Addr(),
		} {
			_, err := take(open(t, url), "k")
			if err == nil {
				t.Errorf("%s is accepted", name)
			}
			if certificate := strings.HasPrefix(name, "a"); certificate && (!errors.Is(err, quota.ErrUnavailable) || !strings.Contains(err.Error(), "certificate")) {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// forward serves an address by another one.
func forward(t *testing.T, listen, target string) string {
	t.Helper()
	l, err := net.Listen("tcp", listen)
	if err != nil {
		t.Skip(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", target)
			if err != nil {
				in.Close()
				continue
			}
			all.Go(func() { io.Copy(out, in); out.Close() })
			all.Go(func() { io.Copy(in, out); in.Close() })
		}
	})
	return l.Addr().String()
}

func TestCluster(t *testing.T) {
	cluster := redisserver.StartCluster(t)
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		for name, url := range map[string]string{
			"one": "redis+cluster://" + cluster.Addrs()[0],
			"all": clusterURL(cluster, "", ""),
			// A node that is away is no reason to fail while another one is there.
			"dead": "redis+cluster://127.0.0.1:1?addr=" + cluster.Addrs()[4],
		} {
			s := open(t, url)
			for i := range 20 { // keys on all masters
				works(t, s, fmt.Sprint(plain(t), name, i))
			}
			cs := make([]quota.Charge, 20)
			for i := range cs {
				cs[i] = quota.Charge{Limit: limit, Key: fmt.Sprint(plain(t), name, "list", i), Cost: 1}
			}
			ds := make([]quota.Decision, len(cs))
			if err := s.TakeAll(t.Context(), cs, ds); err != nil || !quota.Granted(ds) || !ds[0].Split {
				t.Errorf("a list over several slots: %+v, %v", ds[0], err)
			}
			if g := s.(driver.Graded).Atomicity(); g != driver.OneGroup {
				t.Errorf("%s: atomicity %v", url, g)
			}
		}
	})
	t.Run("MOVED", func(t *testing.T) {
		with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
			s := open(t, "redis://"+cluster.Addrs()[0])
			moved := 0
			for i := range 20 {
				_, err := take(s, fmt.Sprint(plain(t), i))
				if err != nil && (!errors.Is(err, quota.ErrMisconfigured) || !strings.Contains(err.Error(), "redis+cluster://")) {
					t.Error(err)
				}
				if err != nil {
					moved++
				}
			}
			if moved == 0 {
				t.Error("one node served all keys")
			}
		})
	})
}

// TestClusterTLS uses a cluster of one node: it serves all slots and announces its port for TLS.
func TestClusterTLS(t *testing.T) {
	server, dir := tlsServer(t, "--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-announce-ip", "127.0.0.1", "--cluster-config-file", filepath.Join(t.TempDir(), "nodes.conf"))
	if _, err := server.Do("CLUSTER", "ADDSLOTSRANGE", "0", "16383"); err != nil {
		t.Fatal(err)
	}
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		s := open(t, "redis+cluster://"+server.Addr()+"?tls=true&"+ca(dir))
		eventually(t, s, 10*time.Second) // the cluster may not be up yet
		works(t, s, t.Name())
		works(t, s, "other"+t.Name())
		if _, err := take(open(t, "redis+cluster://"+server.Addr()+"?tls=true"), "k"); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("an unknown authority: %v", err)
		}
	})
}

// TestNotACluster: a store that believes itself on a cluster while it is not would decide lists in pieces,
// and one that reaches a single node of a cluster only would fail for most keys.
func TestNotACluster(t *testing.T) {
	single := redisserver.Start(t)
	cluster := redisserver.StartCluster(t, "--user", "noslots", "on", ">p", "~*", "+@all", "-cluster")
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		for name, url := range map[string]string{
			"a single server":            "redis+cluster://" + single.Addr(),
			"no right to CLUSTER SLOTS":  "redis+cluster://noslots:p@" + cluster.Addrs()[0],
			"no right, several adresses": clusterURL(cluster, "noslots:p@", ""),
		} {
			s := open(t, url)
			for range 3 {
				if _, err := take(s, "k"); !errors.Is(err, quota.ErrMisconfigured) {
					t.Errorf("%s: %v", name, err)
				}
			}
		}
		if v, err := single.Do("DBSIZE"); err != nil || v.(int64) != 0 {
			t.Errorf("the single server holds %v keys, %v", v, err)
		}
	})
}

func TestSentinel(t *testing.T) {
	sentinel := redisserver.StartSentinel(t)
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		s := open(t, sentinelURL(sentinel, "", ""))
		master, err := sentinel.Master()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := master.Do("FLUSHALL"); err != nil {
			t.Fatal(err)
		}
		works(t, s, t.Name())
		if n := keys(t, master, "2", "quota:"); n != 1 {
			t.Errorf("database 2 of the master has %d keys", n)
		}
		if err := sentinel.Failover(); err != nil {
			t.Fatal(err)
		}
		t.Logf("works %v after the failover was settled", eventually(t, s, 6*time.Second))
		if _, err := take(open(t, "redis+sentinel://"+sentinel.Addrs()[0]+"?master=nobody"), "k"); !errors.Is(err, quota.ErrMisconfigured) {
			t.Errorf("a master that nobody knows: %v", err)
		}
	})
}

// TestSentinelTLS has a user on the server, another password on the sentinel, and TLS to both.
func TestSentinelTLS(t *testing.T) {
	server, dir := tlsServer(t, "--user", "u", "on", ">server-password", "~*", "+@all", "--user", "default", "off")
	file := func(name string) string { return filepath.Join(dir, name) }
	sentinel := startSentinel(t, server.Port(), "port 0\ntls-port PORT\ntls-replication yes\ntls-auth-clients no\nrequirepass sentinel-password\n"+
		"tls-cert-file "+file("redis.crt")+"\ntls-key-file "+file("redis.key")+"\ntls-ca-cert-file "+file("ca.crt"))
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		url := "redis+sentinel://u:server-password@" + sentinel + "?master=fleet&tls=true&" + ca(dir)
		s := open(t, url+"&sentinel_password=sentinel-password")
		works(t, s, t.Name())
		works(t, open(t, url+"&sentinel_user=default&sentinel_password=sentinel-password"), t.Name()+"2")
		for name, url := range map[string]string{
			"no password for the sentinel":      url,
			"a wrong password for the sentinel": url + "&sentinel_password=server-password",
		} {
			if _, err := take(open(t, url), "k"); !errors.Is(err, quota.ErrMisconfigured) || strings.Contains(err.Error(), "-password") {
				t.Errorf("%s: %v", name, err)
			}
		}
	})
}

// TestDown: with nothing there, a store is made at once, and works when the server has come up.
func TestDown(t *testing.T) {
	server := redisserver.Start(t)
	cluster := redisserver.StartCluster(t)
	sentinel := redisserver.StartSentinel(t)
	for _, deployment := range []struct {
		name, url string
		down, up  func() error
	}{
		{"redis", "redis://" + server.Addr(), func() error { server.Kill(); return nil }, server.Restart},
		{"redis+cluster", clusterURL(cluster, "", ""),
			func() error {
				for _, n := range cluster.Nodes {
					n.Kill()
				}
				return nil
			},
			func() error {
				for _, n := range cluster.Nodes {
					if err := n.Restart(); err != nil {
						return err
					}
				}
				return cluster.WaitOK()
			}},
		{"redis+sentinel", sentinelURL(sentinel, "", ""),
			func() error {
				for _, s := range sentinel.Sentinels {
					s.Kill()
				}
				return nil
			},
			func() error {
				for _, s := range sentinel.Sentinels {
					if err := s.Restart(); err != nil {
						return err
					}
				}
				return nil
			}},
	} {
		t.Run(deployment.name, func(t *testing.T) {
			with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
				if err := deployment.down(); err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				s := open(t, deployment.url)
				if took := time.Since(start); took > 100*time.Millisecond {
					t.Errorf("a store with nothing there took %v", took)
				}
				var all sync.WaitGroup
				for i := range 50 {
					all.Go(func() {
						start := time.Now()
						_, err := take(s, fmt.Sprint("k", i))
						if !errors.Is(err, quota.ErrUnavailable) || errors.Is(err, quota.ErrIndeterminate) {
							t.Errorf("with nothing there: %v", err)
						}
						if took := time.Since(start); took > time.Second {
							t.Errorf("with nothing there a call took %v", took)
						}
					})
				}
				all.Wait()
				if err := deployment.up(); err != nil {
					t.Fatal(err)
				}
				// go-redis looks again once a second after many failures.
				t.Logf("works %v after the server was up", eventually(t, s, 1500*time.Millisecond))
				works(t, s, t.Name())
			})
		})
	}
}

// TestNextCallWorks: rueidis keeps no grudge, so that the very next call finds the server.
func TestNextCallWorks(t *testing.T) {
	server := redisserver.Start(t)
	server.Kill()
	s, err := backend.Open(t.Context(), by("redis://"+server.Addr(), "rueidis"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for range 100 {
		if _, err := take(s, "k"); !errors.Is(err, quota.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	if err := server.Restart(); err != nil {
		t.Fatal(err)
	}
	works(t, s, "k")
}

// silent accepts connections and answers nothing. It counts them.
func silent(t *testing.T) (addr string, connections *atomic.Int64) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	connections = new(atomic.Int64)
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			connections.Add(1)
			all.Go(func() { io.Copy(io.Discard, c); c.Close() })
		}
	})
	return l.Addr().String(), connections
}

// TestSilent: a server that takes connections and says nothing.
func TestSilent(t *testing.T) {
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		second, _ := silent(t)
		third, _ := silent(t)
		for _, scheme := range []string{
			"redis://%s?", "rediss://%s?", "redis+cluster://%s?", "redis+sentinel://%s?master=fleet&",
			"redis+sentinel://%s?master=fleet&addr=" + second + "&addr=" + third + "&", // rueidis asks one after the other
		} {
			addr, connections := silent(t)
			s := open(t, fmt.Sprintf(scheme, addr)+"timeout=100ms&dial_timeout=200ms")
			var all sync.WaitGroup
			for i := range 20 {
				all.Go(func() {
					start := time.Now()
					_, err := take(s, fmt.Sprint("k", i))
					if !errors.Is(err, quota.ErrUnavailable) && !errors.Is(err, quota.ErrOverloaded) { // the pool is full of waiters
						t.Errorf("%s: %v", scheme, err)
					}
					most := 250 * time.Millisecond // the store's own patience
					if strings.HasSuffix(t.Name(), "goredis") {
						most = 650 * time.Millisecond // it connects, waits for the greeting, and for its pool
					}
					if took := time.Since(start); took > most {
						t.Errorf("%s: a call took %v: %v", scheme, took, err)
					}
				})
			}
			all.Wait()
			n := connections.Load()
			t.Logf("%s: %d connections for 20 calls", scheme, n)
			if strings.HasSuffix(t.Name(), "rueidis") {
				if n > 2 {
					t.Errorf("%s: %d connections for 20 calls at once", scheme, n)
				}
				heedsContext(t, open, fmt.Sprintf(scheme, addr)+"timeout=100ms&dial_timeout=200ms")
			}
			start := time.Now()
			s.Close()
			if took := time.Since(start); took > time.Second {
				t.Errorf("%s: Close took %v", scheme, took)
			}
			if _, err := take(s, "k"); !errors.Is(err, quota.ErrClosed) {
				t.Errorf("%s: after Close: %v", scheme, err)
			}
		}
	})
}

// heedsContext checks that a call that waits for a connection ends with its context, and with its error.
func heedsContext(t *testing.T, open func(testing.TB, string) quota.Store, url string) {
	t.Helper()
	for _, want := range []error{context.DeadlineExceeded, context.Canceled} {
		s := open(t, url)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if want == context.Canceled {
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, cancel)
		}
		start := time.Now()
		_, err := s.Take(ctx, quota.Charge{Limit: limit, Key: "k", Cost: 1})
		cancel()
		if took := time.Since(start); took > 120*time.Millisecond || !errors.Is(err, want) || errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("%s: with a context of 20 ms: %v after %v", url, err, took)
		}
	}
}

// TestCloseWhileConnecting: Close ends an attempt at connecting and what it started.
func TestCloseWhileConnecting(t *testing.T) {
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		before := runtime.NumGoroutine()
		for range 20 {
			addr, _ := silent(t)
			s := open(t, "redis://"+addr+"?timeout=50ms&dial_timeout=100ms")
			done := make(chan error)
			go func() {
				_, err := take(s, "k")
				done <- err
			}()
			time.Sleep(5 * time.Millisecond)
			s.Close()
			if err := <-done; err == nil {
				t.Error("a call succeeds")
			}
		}
		for end := time.Now().Add(5 * time.Second); runtime.NumGoroutine() > before+45; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
			}
		}
	})
}

// TestCloseClosesConnections: the store owns its client, also one that is made while it is closed.
func TestCloseClosesConnections(t *testing.T) {
	server := redisserver.Start(t)
	with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
		gone := func(when string) {
			t.Helper()
			for end := time.Now().Add(3 * time.Second); ; time.Sleep(5 * time.Millisecond) {
				v, err := server.Do("CLIENT", "LIST")
				if err == nil && strings.Count(v.(string), "\n") == 1 {
					return
				}
				if time.Now().After(end) {
					t.Fatalf("%s there are connections left: %v, %v", when, v, err)
				}
			}
		}
		s := open(t, "redis://"+server.Addr())
		works(t, s, t.Name())
		s.Close()
		gone("after Close")

		s = open(t, "redis://"+server.Addr()+"?dial_timeout=10s&timeout=10s")
		if err := server.Pause(); err != nil {
			t.Fatal(err)
		}
		done := make(chan error, 2)
		go func() { _, err := take(s, "k"); done <- err }()
		time.Sleep(20 * time.Millisecond)
		go func() { done <- s.Close() }()
		time.Sleep(20 * time.Millisecond)
		if err := server.Resume(); err != nil {
			t.Fatal(err)
		}
		<-done
		<-done
		gone("after Close while connecting")
	})
}
