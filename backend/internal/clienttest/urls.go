package clienttest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// ten is the limit that tests of URLs charge.
var ten = limitOf("tokens", algorithm.TokenBucket(10, 1, time.Hour))

// one charges one of ten.
func one(s quota.Store, key string) (quota.Decision, error) {
	return s.Charge(bg, quota.Charge{Limit: ten, Key: key, Cost: 1})
}

// works checks that a store counts: ten charges fit and no more.
func works(t *testing.T, s quota.Store, key string) {
	t.Helper()
	for n := range int64(11) {
		d, err := one(s, key)
		if err != nil || d.Allowed != (n < 10) || d.Remaining != max(9-n, 0) {
			t.Fatalf("charge %d to %s: got %+v, %v; want allowed=%v, %d left", n+1, key, d, err, n < 10, max(9-n, 0))
		}
	}
}

// eventually waits until a call to the store succeeds.
func eventually(t *testing.T, s quota.Store, most time.Duration) {
	t.Helper()
	start := time.Now()
	until(t, "a call to succeed", func() bool { _, err := one(s, "eventually"); return err == nil })
	if took := time.Since(start); took > most {
		t.Errorf("first call that succeeds: got it after %v, want at most %v", took, most)
	}
}

// group returns the test's name as a group of its own.
func group(t *testing.T) string { return strings.ReplaceAll(t.Name(), "/", "-") }

func urlSingle(t *testing.T, l library) {
	server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"u on >p:%/@ ~* +@all"}})
	for url, grade := range map[string]driver.Atomicity{
		"redis://" + server.Addr() + "?batching=all":                             driver.AnyKeys,
		"redis://" + server.Addr() + "/3?prefix=other":                           driver.OneGroup,
		"redis://u:p%3A%25%2F%40@" + server.Addr() + "/4?prefix=u:":              driver.OneGroup,
		"redis://" + server.Addr() + "/5?prefix=slot:&batching=slot":             driver.OneGroup,
		"redis://" + server.Addr() + "/6?prefix=none:&batching=none":             driver.OneGroup,
		"redis://" + server.Addr() + "/7?prefix=auto:&batching=auto&strict=true": driver.OneGroup,
	} {
		s := l.open(t, patiently(url))
		works(t, s, "k")
		if got := s.(driver.Graded).Atomicity(); got != grade {
			t.Errorf("%s: Atomicity: got %v, want %v", url, got, grade)
		}
	}
	for db, prefix := range map[string]string{"0": "quota:", "3": "other", "4": "u:", "5": "slot:", "6": "none:", "7": "auto:"} {
		if n := countKeys(t, server, db, prefix); n != 1 {
			t.Errorf("keys of database %s that begin with %s: got %d, want 1", db, prefix, n)
		}
	}
	cs := []quota.Charge{{Limit: ten, Key: "a", Cost: 1}, {Limit: ten, Key: "b", Cost: 1}}
	err := l.open(t, patiently("redis://"+server.Addr()+"?strict=true")).ChargeAll(bg, cs, make([]quota.Decision, 2))
	is(t, "a list over two groups with strict=true", err, quota.ErrCrossSlot)
}

func urlTLS(t *testing.T, l library) {
	server, other := tlsServer(t), tlsServer(t) // of another authority
	elsewhere := forward(t, "127.0.0.2:0", server.Addr())
	works(t, l.open(t, "rediss://"+server.Addr()+"?"+ca(server)), "a")
	works(t, l.open(t, fmt.Sprintf("rediss://localhost:%d?", server.Port())+ca(server)), "b")
	for name, url := range map[string]string{
		"an unknown authority": "rediss://" + server.Addr() + "",
		"another authority":    "rediss://" + server.Addr() + "?" + ca(other),
		"another name":         "rediss://" + elsewhere + "?" + ca(server),
		"no TLS":               "redis://" + server.Addr(),
	} {
		_, err := one(l.open(t, patiently(url)), "k")
		want, text := quota.ErrMisconfigured, "certificate"
		if name == "no TLS" {
			want, text = quota.ErrUnavailable, "" // the server may close the connection without a word
		}
		if class(err) != want || !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got error %v, want %v that says %q", name, err, want, text)
		}
	}
	plain := redisserver.Start(t)
	if _, err := one(l.open(t, "rediss://"+plain.Addr()), "k"); class(err) != quota.ErrUnavailable {
		t.Errorf("TLS to a plain port: got error %v, want ErrUnavailable", err)
	}
}

// brokenTLS breaks the trust of a client while it runs. Where no connection comes about no token can be
// charged, and the error says so.
func brokenTLS(t *testing.T, l library) {
	for _, c := range []struct {
		name   string
		change func(*tls.Config)
		want   error
	}{
		{"unknown authority", func(c *tls.Config) { c.RootCAs = x509.NewCertPool() }, quota.ErrMisconfigured},
		{"expired", func(c *tls.Config) { c.Time = func() time.Time { return time.Now().AddDate(100, 0, 0) } }, quota.ErrUnavailable},
		{"another host", func(c *tls.Config) { c.ServerName = "redis.example.com" }, quota.ErrMisconfigured},
		{"no client certificate", func(c *tls.Config) { c.Certificates = nil }, quota.ErrUnavailable},
		{"old protocol", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS10 }, quota.ErrUnavailable},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			server := redisserver.StartConfig(t, redisserver.Config{TLS: true, Args: []string{"--tls-auth-clients", "yes"}})
			var config atomic.Pointer[tls.Config]
			config.Store(server.TLSConfig())
			to := single(server)
			to.dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
				d := tls.Dialer{Config: config.Load()}
				return d.DialContext(ctx, network, addr)
			}
			s := l.dial(t, to)
			limit := counted(plenty)
			y := calls(s, limit, keys(4), 40)
			broken := server.TLSConfig()
			c.change(broken)
			config.Store(broken)
			do(t, server, "CLIENT", "KILL", "TYPE", "normal")
			// The connection that was killed is the one whose end is not known to all by now.
			until(t, "the connections to break", func() bool {
				_, err := s.Charge(bg, quota.Charge{Limit: limit, Key: "team-0", Op: quota.OpPeek})
				return class(err) == c.want
			})
			z := calls(s, limit, keys(4), 40)
			t.Log(z, z.texts)
			accepted := []error{c.want}
			if c.name == "no client certificate" {
				// The server refuses after the client took the handshake for done, and wrote into a
				// connection that was closed by then.
				accepted = append(accepted, quota.ErrIndeterminate)
			}
			z.only(t, accepted...)
			config.Store(server.TLSConfig())
			until(t, "the client to recover", func() bool { return !s.fails(quota.Charge{Limit: limit, Key: "k", Op: quota.OpPeek}) })
			y.exact(t, charged(t, s, limit, keys(4)...))
		})
	}
}

func urlCluster(t *testing.T, l library) {
	cluster := redisserver.StartCluster(t)
	for name, url := range map[string]string{
		"one": "redis+cluster://" + cluster.Addrs()[0] + "",
		"all": clusterURL(cluster, ""),
		// A node that is away is no reason to fail while another one is there.
		"dead": "redis+cluster://127.0.0.1:1?addr=" + cluster.Addrs()[4],
	} {
		s := l.open(t, patiently(url))
		for i := range 20 { // keys on all masters
			works(t, s, fmt.Sprint(name, i))
		}
		if ds := chargeAll(t, s, spread(ten, name+"list", 20)...); !quota.Granted(ds) || !ds[0].Split {
			t.Errorf("%s: a list over several slots: got %+v, want a grant that is split", name, ds[0])
		}
		if got := s.(driver.Graded).Atomicity(); got != driver.OneGroup {
			t.Errorf("%s: Atomicity: got %v, want %v", name, got, driver.OneGroup)
		}
	}
	s := l.open(t, "redis://"+cluster.Addrs()[0])
	moved := 0
	for i := range 20 {
		if _, err := one(s, fmt.Sprint("moved", i)); err != nil {
			moved++
			if !errors.Is(err, quota.ErrMisconfigured) || !strings.Contains(err.Error(), "redis+cluster://") {
				t.Errorf("a key of another node: got error %v, want ErrMisconfigured that names redis+cluster://", err)
			}
		}
	}
	if moved == 0 {
		t.Error("keys of other nodes: got none of 20, want some")
	}
}

// urlClusterTLS uses a cluster of one node: it serves all slots and announces its port for TLS.
func urlClusterTLS(t *testing.T, l library) {
	server := tlsServer(t, "--cluster-enabled", "yes", "--tls-cluster", "yes", "--cluster-announce-ip", "127.0.0.1", "--cluster-config-file", filepath.Join(t.TempDir(), "nodes.conf"))
	if err := server.AddSlots(0, 16384); err != nil {
		t.Fatal(err)
	}
	s := l.open(t, "redis+cluster://"+server.Addr()+"?tls=true&"+ca(server))
	eventually(t, s, 10*time.Second) // the cluster may not be up yet
	works(t, s, "a")
	works(t, s, "b")
	_, err := one(l.open(t, "redis+cluster://"+server.Addr()+"?tls=true"), "k")
	is(t, "an unknown authority", err, quota.ErrMisconfigured)
}

// notACluster: a store that believes itself on a cluster while it is not would decide lists in pieces, and
// one that reaches a single node of a cluster only would fail for most keys.
func notACluster(t *testing.T, l library) {
	single := redisserver.Start(t)
	cluster := redisserver.StartCluster(t, "--user", "noslots", "on", ">p", "~*", "+@all", "-cluster")
	for name, url := range map[string]string{
		"a single server":             "redis+cluster://" + single.Addr(),
		"no right to CLUSTER SLOTS":   "redis+cluster://noslots:p@" + cluster.Addrs()[0],
		"no right, several addresses": clusterURL(cluster, "noslots:p@"),
	} {
		s := l.open(t, patiently(url))
		for range 3 {
			_, err := one(s, "k")
			is(t, name, err, quota.ErrMisconfigured)
		}
	}
	if n := do(t, single, "DBSIZE").(int64); n != 0 {
		t.Errorf("keys of the single server: got %d, want none", n)
	}
}

// urlSentinelTLS has a user on the server, another password on the sentinel, and TLS to both.
func urlSentinelTLS(t *testing.T, l library) {
	server := tlsServer(t, "--user", "u", "on", ">server-password", "~*", "+@all", "--user", "default", "off")
	sentinel := startSentinel(t, server.Port(), "port 0\ntls-port PORT\ntls-replication yes\ntls-auth-clients no\nrequirepass sentinel-password\n"+
		"tls-cert-file "+server.File("redis.crt")+"\ntls-key-file "+server.File("redis.key")+"\ntls-ca-cert-file "+server.File("ca.crt"))
	url := "redis+sentinel://u:server-password@" + sentinel + "?master=fleet&tls=true&" + ca(server)
	works(t, l.open(t, url+"&sentinel_password=sentinel-password"), "a")
	works(t, l.open(t, url+"&sentinel_user=default&sentinel_password=sentinel-password"), "b")
	for name, url := range map[string]string{
		"no password for the sentinel":      url,
		"a wrong password for the sentinel": url + "&sentinel_password=server-password",
	} {
		if _, err := one(l.open(t, patiently(url)), "k"); !errors.Is(err, quota.ErrMisconfigured) || strings.Contains(err.Error(), "-password") {
			t.Errorf("%s: got error %v, want ErrMisconfigured without a password", name, err)
		}
	}
}

// down: while no server is there, a store is made at once, and works when the servers have come up.
func down(t *testing.T, l library) {
	server := redisserver.Start(t)
	cluster := redisserver.StartCluster(t)
	sentinel := redisserver.StartSentinel(t)
	for _, deployment := range []struct {
		name, url string
		servers   []*redisserver.Server
		settled   func() error
	}{
		{"redis", "redis://" + server.Addr(), []*redisserver.Server{server}, nil},
		{"redis+cluster", clusterURL(cluster, ""), servers(cluster), cluster.WaitOK},
		{"redis+sentinel", sentinelURL(sentinel), sentinel.Sentinels, nil},
	} {
		t.Run(deployment.name, func(t *testing.T) {
			for _, s := range deployment.servers {
				s.Kill()
			}
			start := time.Now()
			s := l.open(t, deployment.url)
			if took := time.Since(start); took > 100*time.Millisecond {
				t.Errorf("Open with no server: got %v, want at most 100ms", took)
			}
			var all sync.WaitGroup
			for i := range 50 {
				all.Go(func() {
					start := time.Now()
					_, err := one(s, fmt.Sprint("k", i))
					is(t, "a call with no server", err, quota.ErrUnavailable)
					if took := time.Since(start); took > time.Second {
						t.Errorf("a call with no server: got %v, want at most a second", took)
					}
				})
			}
			all.Wait()
			for _, s := range deployment.servers {
				ok(t, s.Restart())
			}
			if deployment.settled != nil {
				ok(t, deployment.settled())
			}
			eventually(t, s, 1500*time.Millisecond) // go-redis looks again once a second after many failures
			works(t, s, "works")
		})
	}
}

// nextCallWorks: after many failures a client without a pool finds the server as soon as the pause between attempts is
// over.
func nextCallWorks(t *testing.T, l library) {
	if l.pooled {
		return
	}
	server := redisserver.Start(t)
	server.Kill()
	s := l.open(t, "redis://"+server.Addr())
	for range 100 {
		_, err := one(s, "k")
		is(t, "a call with no server", err, quota.ErrUnavailable)
	}
	ok(t, server.Restart())
	eventually(t, s, 300*time.Millisecond)
	works(t, s, "k")
}

// silentServer takes connections and answers no command.
func silentServer(t *testing.T, l library) {
	second, _ := silent(t)
	third, _ := silent(t)
	for _, scheme := range []string{
		"redis://%s?", "rediss://%s?", "redis+cluster://%s?", "redis+sentinel://%s?master=fleet&",
		"redis+sentinel://%s?master=fleet&addr=" + second + "&addr=" + third + "&", // rueidis asks one after the other
	} {
		addr, connections := silent(t)
		url := fmt.Sprintf(scheme, addr) + "timeout=100ms&dial_timeout=200ms"
		s := l.open(t, patiently(url))
		const most = 900 * time.Millisecond // an attempt: rueidis asks three sentinels for 200 ms each
		var all sync.WaitGroup
		for i := range 20 {
			all.Go(func() {
				start := time.Now()
				_, err := one(s, fmt.Sprint("k", i))
				if took := time.Since(start); took > most {
					t.Errorf("%s: a call: got %v, want at most %v: %v", scheme, took, most, err)
				}
				if got := class(err); got != quota.ErrUnavailable && got != quota.ErrOverloaded { // the pool is full of waiting callers
					t.Errorf("%s: got error %v, want ErrUnavailable or ErrOverloaded", scheme, err)
				}
			})
		}
		all.Wait()
		if n := connections.Load(); n > 8 {
			t.Errorf("%s: connections for 20 calls at once: got %d, want at most 8", scheme, n)
		}
		heedsContext(t, l, url)
		start := time.Now()
		s.Close()
		if took := time.Since(start); took > time.Second {
			t.Errorf("%s: Close: got %v, want at most a second", scheme, took)
		}
		_, err := one(s, "k")
		is(t, scheme+" after Close", err, quota.ErrClosed)
	}
}

// heedsContext checks that a call that waits for a connection ends with its context, was not sent, and is no failure of
// the store.
func heedsContext(t *testing.T, l library, url string) {
	t.Helper()
	for _, want := range []error{context.DeadlineExceeded, context.Canceled} {
		s := l.open(t, patiently(url))
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if want == context.Canceled {
			ctx, cancel = context.WithCancel(t.Context())
			time.AfterFunc(20*time.Millisecond, cancel)
		}
		start := time.Now()
		_, err := s.Charge(ctx, quota.Charge{Limit: ten, Key: "k", Cost: 1})
		cancel()
		if took := time.Since(start); took > 120*time.Millisecond || !errors.Is(err, want) || class(err) != quota.ErrUnavailable {
			t.Errorf("%s: with a context of 20 ms: got error %v after %v, want ErrUnavailable of %v", url, err, took, want)
		}
		if e, early := errors.AsType[driver.GettingReady](err); !early || !e.GettingReady() {
			t.Errorf("%s: with a context of 20 ms: got error %v, want one that says that the store gets ready", url, err)
		}
	}
}

// closeWhileConnecting: Close ends an attempt at connecting and the goroutines of it.
func closeWhileConnecting(t *testing.T, l library) {
	before := runtime.NumGoroutine()
	for range 20 {
		addr, _ := silent(t)
		s := l.open(t, "redis://"+addr+"?timeout=50ms&dial_timeout=100ms")
		done := make(chan error)
		go func() {
			_, err := one(s, "k")
			done <- err
		}()
		time.Sleep(5 * time.Millisecond)
		s.Close()
		if err := <-done; err == nil {
			t.Error("a call while the store is closed: got no error, want one")
		}
	}
	until(t, "the goroutines to end", func() bool { return runtime.NumGoroutine() <= before+45 }) // of the silent servers
}

// closeClosesConnections: the store owns its client, also one that is made while the store is closed.
func closeClosesConnections(t *testing.T, l library) {
	server := redisserver.Start(t)
	gone := func() {
		t.Helper()
		until(t, "all connections but the one that asks to end", func() bool {
			return strings.Count(do(t, server, "CLIENT", "LIST").(string), "\n") == 1
		})
	}
	s := l.open(t, "redis://"+server.Addr())
	works(t, s, "k")
	s.Close()
	gone()

	s = l.open(t, patiently("redis://"+server.Addr()))
	ok(t, server.Pause())
	done := make(chan error, 2)
	go func() { _, err := one(s, "k"); done <- err }()
	time.Sleep(20 * time.Millisecond)
	go func() { done <- s.Close() }()
	time.Sleep(20 * time.Millisecond)
	ok(t, server.Resume())
	<-done
	<-done
	gone()
}

// constructedDown makes a store over the caller's client while its servers are not there. rueidis makes no
// client then.
func constructedDown(t *testing.T, l library) {
	if !l.lazy {
		return
	}
	t.Parallel()
	server := redisserver.Start(t)
	cluster := redisserver.StartCluster(t)
	server.Kill()
	for _, n := range cluster.Nodes {
		n.Kill()
	}
	c := quota.Charge{Limit: counted(plenty), Key: "k", Cost: 1}
	for _, to := range []target{single(server), clustered(cluster)} {
		start := time.Now()
		s := l.dial(t, to)
		if took := time.Since(start); took > time.Second {
			t.Errorf("New with no server: got %v, want at most a second", took)
		}
		_, err := s.Charge(bg, c)
		is(t, "a call with no server", err, quota.ErrUnavailable)
		if !to.cluster {
			ok(t, server.Restart())
			until(t, "the client to connect", func() bool { return !s.fails(c) })
		}
	}
}
