package resilience_test

import (
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"
	rueidisclient "github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
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

// preset returns a harness of a backend inside the preset.
func preset(name string, open func(o conformance.Opening) (quota.Store, error)) conformance.Harness {
	return conformance.Harness{
		Name: name + " in resilience.Standard",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			s, err := open(o)
			return inPreset(t, s, err)
		},
	}
}

// breakable is a Harness.Fault: a client of its own behind a proxy, and a server that can be paused.
func breakable(server *redisserver.Server) func(testing.TB, conformance.Opening) (quota.Store, func(conformance.Fault)) {
	return func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
		proxy := redisserver.StartProxy(t, server.Addr())
		client := goredisclient.NewClient(&goredisclient.Options{Addr: proxy.Addr(), ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		s, err := goredis.New(client, &goredis.Options{Prefix: o.Data + ":", Clock: o.Clock})
		return inPreset(t, s, err), redisserver.Switch(t, server, proxy, conformance.Refused, conformance.LostReply, conformance.Frozen)
	}
}

func TestConformance(t *testing.T) {
	t.Run("local", func(t *testing.T) {
		t.Parallel()
		h := preset("local", func(o conformance.Opening) (quota.Store, error) {
			return local.New(&local.Options{Clock: o.Clock}), nil
		})
		h.Lacks = []conformance.Lack{{Feature: conformance.Shared, Reason: "its state is the memory of one store"}}
		conformance.Run(t, h)
	})
	overGoredis := func(client goredisclient.UniversalClient) func(conformance.Opening) (quota.Store, error) {
		return func(o conformance.Opening) (quota.Store, error) {
			return goredis.New(client, &goredis.Options{Prefix: o.Data + ":", Clock: o.Clock})
		}
	}
	overRueidis := func(t testing.TB, o rueidisclient.ClientOption) func(conformance.Opening) (quota.Store, error) {
		o.AlwaysPipelining, o.ClusterOption.MaxMovedRedirections = true, 3
		client, err := rueidisclient.NewClient(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(client.Close)
		return func(o conformance.Opening) (quota.Store, error) {
			return rueidis.New(client, &rueidis.Options{Prefix: o.Data + ":", Clock: o.Clock})
		}
	}
	t.Run("standalone", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		addr := server.Addr()
		t.Run("goredis", func(t *testing.T) {
			t.Parallel()
			client := goredisclient.NewClient(&goredisclient.Options{Addr: addr, ContextTimeoutEnabled: true})
			t.Cleanup(func() { client.Close() })
			h := preset("goredis", overGoredis(client))
			h.Fault = breakable(server)
			conformance.Run(t, h)
		})
		t.Run("rueidis", func(t *testing.T) {
			t.Parallel()
			conformance.Run(t, preset("rueidis", overRueidis(t, rueidisclient.ClientOption{InitAddress: []string{addr}, ForceSingleClient: true})))
		})
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		addrs := redisserver.StartCluster(t).Addrs()
		t.Run("goredis", func(t *testing.T) {
			t.Parallel()
			client := goredisclient.NewClusterClient(&goredisclient.ClusterOptions{Addrs: addrs, ContextTimeoutEnabled: true})
			t.Cleanup(func() { client.Close() })
			conformance.Run(t, preset("goredis on a cluster", overGoredis(client)))
		})
		t.Run("rueidis", func(t *testing.T) {
			t.Parallel()
			conformance.Run(t, preset("rueidis on a cluster", overRueidis(t, rueidisclient.ClientOption{InitAddress: addrs})))
		})
	})
}
