package goredis_test

import (
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisfault"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// harness is one of stores on a client, with data apart by prefix.
func harness(name string, client redis.UniversalClient) conformance.Harness {
	return conformance.Harness{
		Name: name,
		Open: func(t testing.TB, o conformance.Opening) quota.Store { return open(t, client, o) },
	}
}

func open(t testing.TB, client redis.UniversalClient, o conformance.Opening) quota.Store {
	s, err := goredis.New(client, &goredis.Options{Prefix: o.Data + ":", Clock: o.Clock})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// breakable is a Harness.Fault: a client of its own behind a proxy, and a server that can be paused.
func breakable(server *redisserver.Server) func(testing.TB, conformance.Opening) (quota.Store, func(conformance.Fault)) {
	return func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
		proxy := redisserver.StartProxy(t, server.Addr())
		client := redis.NewClient(&redis.Options{Addr: proxy.Addr(), ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		return open(t, client, o), redisfault.Set(t, server, proxy)
	}
}

func TestConformance(t *testing.T) {
	t.Run("standalone", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		client := redis.NewClient(&redis.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		h := harness("goredis", client)
		h.Fault = breakable(server)
		conformance.Run(t, h)
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		client := redis.NewClusterClient(&redis.ClusterOptions{Addrs: redisserver.StartCluster(t).Addrs(), ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		conformance.Run(t, harness("goredis on a cluster", client))
	})
}
