package resilience_test

import (
	"context"
	"crypto/tls"
	"fmt"
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

var presetOptions = &resilience.StandardOptions{Timeout: 10 * time.Second, Breaker: &resilience.BreakerOptions{Delay: 50 * time.Millisecond}}

// inPreset puts a store inside the preset, whose policies are not to be noticed while it works. Where the breaker
// opens all the same, it is not for long.
func inPreset(t testing.TB, s quota.Store, err error) quota.Store {
	if err == nil {
		s, err = resilience.Standard(s, resilience.FailClosed(nil), presetOptions)
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

// long are the cases that take most work of a client and a server, for the size or number of keys, and none of the policies. The
// clients' own suites have them, and so has the preset in memory.
var long = []string{"S2/every length", "C1/thousands", "C1/largest keys", "C1/ids that meet", "C3/thousands"}

// onRedis runs the suite on a backend inside the preset, through connections that fail, and in two processes. At normal sizes it
// leaves out the long cases.
func onRedis(t *testing.T, name string, addrs []string, open func(t testing.TB, d dialer) func(conformance.Opening) (quota.Store, error)) {
	t.Run(name, func(t *testing.T) {
		t.Parallel()
		sound := open(t, nil)
		var exempt []conformance.Exemption
		for _, name := range long {
			if !testenv.Full() {
				exempt = append(exempt, conformance.Exemption{Rule: name, Reason: "it runs without policies, and at full size"})
			}
		}
		conformance.Run(t, conformance.Harness{
			Name:   name + " in resilience.Standard",
			Exempt: exempt,
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

// inMemoryWithFallback runs the suite on the preset with a fallback of n instances, whose store fails under it. It promises
// for the calls that the store answered whatever the store promises. Those that it admitted in the store's place are charged to
// the store when the fallback is closed at the latest, and once more only where a call had reached the store and its reply was
// lost. Limits of which one of several instances has no share are refused, so that cases that draw limits at random are
// for one instance.
func inMemoryWithFallback(t *testing.T, n int64) {
	var exempt []conformance.Exemption
	if n > 1 {
		for _, rule := range []string{"S1", "S2", "S3", "S5", "C2", "C3/repeats", "C3/clock steps back", "C3/shadows", "C3/alternatives", "C3/up to", "C3/holds"} {
			exempt = append(exempt, conformance.Exemption{Rule: rule, Reason: "of some limits one of several instances has no share"})
		}
	}
	inMemory(t, fmt.Sprintf("local in resilience.Standard with a fallback, instances: %d", n), exempt, func(t testing.TB, s quota.Store) quota.Store {
		s, err := resilience.Standard(s, resilience.Fallback(local.New(), resilience.Instances(n), &resilience.FallbackOptions{CloseWithin: time.Minute}), presetOptions)
		if err != nil {
			t.Fatal(err)
		}
		return s
	})
}

// inMemory runs the suite on the preset around stores in memory, which fail under it. Handles of one name share their data.
func inMemory(t *testing.T, name string, exempt []conformance.Exemption, preset func(testing.TB, quota.Store) quota.Store) {
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
		Name:   name,
		Exempt: exempt,
		Open:   func(t testing.TB, o conformance.Opening) quota.Store { return preset(t, below(o)) },
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			s, set := conformance.FaultyStore(below(o))
			return preset(t, s), set
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
		inMemory(t, "local in resilience.Standard", nil, func(t testing.TB, s quota.Store) quota.Store { return inPreset(t, s, nil) })
	})
	for _, n := range []int64{1, 4} {
		t.Run(fmt.Sprintf("fallback of %d", n), func(t *testing.T) {
			t.Parallel()
			inMemoryWithFallback(t, n)
		})
	}
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
