package resilience_test

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"
	rueidisclient "github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// inPreset puts a store inside the preset, whose policies are not to be noticed while it works. Where the breaker
// opens all the same, it is not for long.
func inPreset(t testing.TB, s quota.Store, err error) quota.Store {
	if err == nil {
		s, err = resilience.Standard(s, resilience.FailClosed(nil), &resilience.StandardOptions{
			Timeout: 10 * time.Second, Breaker: &resilience.BreakerOptions{Delay: 50 * time.Millisecond},
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// addrsVariable names the servers to the process that the suite starts.
const addrsVariable = "RESILIENCE_TEST_ADDRS"

// addrs returns the addresses that the environment has, or those of servers that it starts.
func addrs(start func() []string) []string {
	if text := os.Getenv(addrsVariable); text != "" {
		return strings.Split(text, ",")
	}
	return start()
}

// dialer connects to the proxies of connections that can be broken; nil is a client's own.
type dialer = func(ctx context.Context, network, addr string) (net.Conn, error)

// onRedis runs the suite on a backend inside the preset, through connections that fail, and in two processes.
func onRedis(t *testing.T, name string, addrs []string, open func(t testing.TB, d dialer) func(conformance.Opening) (quota.Store, error)) {
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		sound := open(t, nil)
		conformance.Run(t, conformance.Harness{
			Name: name + " in resilience.Standard",
			Open: func(t testing.TB, o conformance.Opening) quota.Store {
				s, err := sound(o)
				return inPreset(t, s, err)
			},
			Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
				dial, set := redisserver.Breakable(t, addrs...)
				s, err := open(t, dial)(o)
				return inPreset(t, s, err), set
			},
			Process: func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, addrsVariable+"="+strings.Join(addrs, ",")) },
		})
	})
}

func overGoredis(addrs []string, cluster bool) func(testing.TB, dialer) func(conformance.Opening) (quota.Store, error) {
	return func(t testing.TB, d dialer) func(conformance.Opening) (quota.Store, error) {
		client := goredisclient.NewUniversalClient(&goredisclient.UniversalOptions{Addrs: addrs, IsClusterMode: cluster, Dialer: d, ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		return func(o conformance.Opening) (quota.Store, error) {
			return goredis.New(client, &goredis.Options{Prefix: o.Data + ":", Clock: o.Clock})
		}
	}
}

func overRueidis(addrs []string, cluster bool) func(testing.TB, dialer) func(conformance.Opening) (quota.Store, error) {
	return func(t testing.TB, d dialer) func(conformance.Opening) (quota.Store, error) {
		o := rueidisclient.ClientOption{InitAddress: addrs, ForceSingleClient: !cluster, AlwaysPipelining: true}
		o.ClusterOption.MaxMovedRedirections = 3
		if d != nil {
			o.DialCtxFn = func(ctx context.Context, addr string, _ *net.Dialer, _ *tls.Config) (net.Conn, error) {
				return d(ctx, "tcp", addr)
			}
		}
		client, err := rueidisclient.NewClient(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(client.Close)
		return func(o conformance.Opening) (quota.Store, error) {
			return rueidis.New(client, &rueidis.Options{Prefix: o.Data + ":", Clock: o.Clock})
		}
	}
}

// inMemory runs the suite on the preset around stores in memory, which fail under it. Handles of one name share their data.
func inMemory(t *testing.T) {
	var mu sync.Mutex
	stores := map[string]*local.Store{}
	t.Cleanup(func() {
		for _, s := range stores {
			s.Close()
		}
	})
	below := func(o conformance.Opening) quota.Store {
		mu.Lock()
		defer mu.Unlock()
		if stores[o.Data] == nil {
			stores[o.Data] = quota.Must(local.NewWithOptions(local.Options{Clock: o.Clock}))
		}
		return &session{Store: stores[o.Data]}
	}
	conformance.Run(t, conformance.Harness{
		Name: "local in resilience.Standard",
		Open: func(t testing.TB, o conformance.Opening) quota.Store { return inPreset(t, below(o), nil) },
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			s, set := conformance.FaultyStore(below(o))
			return inPreset(t, s, nil), set
		},
	})
}

// session is a handle on a store that other handles use too.
type session struct {
	quota.Store
	gate driver.Gate
}

func (s *session) Unwrap() quota.Store { return s.Store }

func (s *session) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if err := s.gate.Ready(ctx); err != nil {
		return quota.Decision{}, err
	}
	return s.Store.Charge(ctx, c)
}

func (s *session) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	return s.Store.ChargeAll(ctx, cs, out)
}

func (s *session) Close() error {
	s.gate.Close()
	return nil
}

// At normal sizes each client and each deployment comes once: the clients' own suites have them all.
func TestConformance(t *testing.T) {
	t.Run("local", func(t *testing.T) {
		t.Parallel()
		inMemory(t)
	})
	t.Run("standalone", func(t *testing.T) {
		t.Parallel()
		at := addrs(func() []string { return []string{redisserver.Start(t).Addr()} })
		onRedis(t, "goredis", at, overGoredis(at, false))
		if testenv.Full() {
			onRedis(t, "rueidis", at, overRueidis(at, false))
		}
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		at := addrs(func() []string { return redisserver.StartCluster(t).Addrs() })
		if testenv.Full() {
			onRedis(t, "goredis on a cluster", at, overGoredis(at, true))
		}
		onRedis(t, "rueidis on a cluster", at, overRueidis(at, true))
	})
}
