package rueidis_test

import (
	"testing"

	"github.com/redis/rueidis"

	fleetrueidis "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisfault"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// dial makes a client as the package documentation advises.
func dial(t testing.TB, cluster bool, addrs ...string) rueidis.Client {
	client, err := rueidis.NewClient(rueidis.ClientOption{
		InitAddress: addrs, ForceSingleClient: !cluster, AlwaysPipelining: true,
		ClusterOption: rueidis.ClusterOption{MaxMovedRedirections: 3},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func open(t testing.TB, client rueidis.Client, o conformance.Opening) quota.Store {
	s, err := fleetrueidis.New(client, &fleetrueidis.Options{Prefix: o.Data + ":", Clock: o.Clock})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// harness is one of stores on a client, with data apart by prefix.
func harness(name string, client rueidis.Client) conformance.Harness {
	return conformance.Harness{
		Name: name,
		Open: func(t testing.TB, o conformance.Opening) quota.Store { return open(t, client, o) },
	}
}

// breakable is a Harness.Fault: a client of its own behind a proxy, and a server that can be paused.
func breakable(server *redisserver.Server) func(testing.TB, conformance.Opening) (quota.Store, func(conformance.Fault)) {
	return func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
		proxy := redisserver.StartProxy(t, server.Addr())
		return open(t, dial(t, false, proxy.Addr()), o), redisfault.Set(t, server, proxy)
	}
}

func TestConformance(t *testing.T) {
	t.Run("standalone", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		h := harness("rueidis", dial(t, false, server.Addr()))
		h.Fault = breakable(server)
		conformance.Run(t, h)
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		conformance.Run(t, harness("rueidis on a cluster", dial(t, true, redisserver.StartCluster(t).Addrs()...)))
	})
}
