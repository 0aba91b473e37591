// Package clienttest has the tests that every client of Redis passes, on real servers that fail on purpose.
// Each test is written once; each adapter runs all of them from its own tests:
//
//	func TestMain(m *testing.M) { clienttest.Main(m) }
//
//	func TestClient(t *testing.T) {
//		clienttest.Run(t, "goredis", func(s quota.Store) *engine.Store { return s.(*goredis.Store).Engine() })
//	}
//
// The README has the list of files and promises.
package clienttest

import (
	"context"
	"flag"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"
	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// tests are the tests, by the promise that they hold a client to. Those that begin with t.Parallel wait more
// than they work, and measure no short time.
var tests = []struct {
	name string
	run  func(*testing.T, library)
}{
	{"scripts/Allocs", allocs}, // while no client of another test allocates

	{"layout/Key", key},
	{"layout/Expiry", expiry},
	{"layout/Foreign", foreign},
	{"layout/Keys", keysOf},
	{"layout/Prefixes", prefixes},
	{"layout/Records", records},
	{"layout/Differential", differential},
	{"layout/Batches", batches},
	{"layout/Releases", releases},

	{"scripts/BatchCalls", batchCalls},
	{"scripts/NoScript", noScript},
	{"scripts/Flush", scriptFlush},
	{"scripts/Kernels", kernels},
	{"scripts/Cached", cachedScripts},
	{"scripts/Replies", replies},
	{"scripts/NoClientClock", noClientClock},
	{"scripts/Swaps", swaps},

	{"split/Cluster", split},
	{"split/Losses", splitLosses},
	{"split/Deadline", splitDeadline},

	{"batching/OneServer", batchingOneServer},
	{"batching/Proxy", batchingProxy},
	{"batching/OneShard", batchingOneShard},
	{"batching/NoRight", batchingNoRight},
	{"batching/Again", batchingAgain},
	{"batching/Work", batchingWork},

	{"faults/AtMostOnce", atMostOnce},
	{"faults/ExactlyOnce", exactlyOnce},
	{"faults/Linearizable", linearizable},
	{"faults/Paused", paused},
	{"faults/Contexts", contexts},
	{"faults/PoolExhausted", poolExhausted},
	{"faults/Close", closing},
	{"faults/Hasty", hasty},
	{"faults/Hooks", hooks},
	{"faults/Idle", idle},
	{"faults/ClockStepsBucket", clockStepsBucket},
	{"faults/ClockStepsWindows", clockStepsWindows},

	{"refusals/States", refusedStates},
	{"refusals/MaxClients", maxClients},
	{"refusals/MemoryFull", memoryFull},
	{"refusals/ClusterDown", clusterDown},
	{"refusals/Health", health},
	{"refusals/Proxies", proxyReplies},
	{"refusals/AnotherRule", anotherRule},
	{"refusals/WrongLua", wrongLua},

	{"failover/MasterKilled", masterKilled},
	{"failover/Manual", manualFailover},
	{"failover/Restart", restart},
	{"failover/Resharding", resharding},
	{"failover/HalfMoved", halfMoved},
	{"failover/Sentinel", sentinel},
	{"failover/Demoted", demoted},
	{"failover/Survey", survey},
	{"failover/Unowned", unowned},

	{"outage/Masters", outageMasters},
	{"outage/Stall", outageStall},
	{"outage/FirstCall", outageFirstCall},
	{"outage/NewMaster", outageNewMaster},

	{"prompt/Deadlines", prompt},
	{"distance/Policies", distance},

	{"miniredis/Conformance", miniConformance},
	{"miniredis/Differential", miniDifferential},
	{"miniredis/Batches", miniBatches},

	{"urls/Single", urlSingle},
	{"urls/TLS", urlTLS},
	{"urls/BrokenTLS", brokenTLS},
	{"urls/ServerName", urlServerName},
	{"urls/ClientCertificate", urlClientCertificate},
	{"urls/Protocol", urlProtocol},
	{"urls/Socket", urlSocket},
	{"urls/Cures", cures},
	{"urls/Cluster", urlCluster},
	{"urls/ClusterTLS", urlClusterTLS},
	{"urls/NotACluster", notACluster},
	{"urls/SentinelTLS", urlSentinelTLS},
	{"urls/ConstructedDown", constructedDown},
	{"urls/Down", down},
	{"urls/NextCallWorks", nextCallWorks},
	{"urls/Silent", silentServer},
	{"urls/CloseWhileConnecting", closeWhileConnecting},
	{"urls/CloseClosesConnections", closeClosesConnections},

	{"rights/Needed", rightsNeeded},
	{"rights/Asking", rightToAsk},
	{"rights/WrongPassword", wrongPassword},
	{"rights/ForeignKeys", foreignKeys},

	{"secrets/Nothing", nothingTellsThePassword},
	{"secrets/User", userIsNotNamed},
	{"secrets/MasterName", masterNamedSo},
	{"secrets/RightPasswords", rightPasswords},
}

// Run runs all tests with the library of a name. The function returns the engine under a store, which only
// the adapter's own tests see.
func Run(t *testing.T, name string, engineOf func(quota.Store) *engine.Store) {
	l := named(t, name)
	l.engine = engineOf
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) { test.run(t, l) })
	}
}

// Conformance runs the suite that every store passes, on a single server that fails, and on a cluster.
func Conformance(t *testing.T, name string) {
	l := named(t, name)
	open := func(t testing.TB, c conn, b engine.Batching, o conformance.Opening) quota.Store {
		s, err := c.open(engine.Options{Prefix: o.Data + ":", Batching: b, Clock: o.Clock})
		ok(t, err)
		return s
	}
	harness := func(name string, c conn, b engine.Batching) conformance.Harness {
		return conformance.Harness{
			Name: name,
			Open: func(t testing.TB, o conformance.Opening) quota.Store { return open(t, c, b, o) },
		}
	}
	t.Run("standalone", func(t *testing.T) { // which learns that there is one server, and promises one group
		t.Parallel()
		server := redisserver.Start(t)
		conformance.Run(t, harness(name+" on a server", l.dial(t, single(server)), engine.BatchAuto))
	})
	t.Run("all", func(t *testing.T) {
		t.Parallel()
		server := redisserver.Start(t)
		h := harness(name, l.dial(t, single(server)), engine.BatchAll)
		h.Fault = func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			proxy := redisserver.StartProxy(t, server.Addr())
			c := l.dial(t, target{addrs: []string{proxy.Addr()}})
			return open(t, c, engine.BatchAll, o), redisserver.Switch(t, server, proxy, conformance.Refused, conformance.LostReply, conformance.Frozen)
		}
		conformance.Run(t, h)
	})
	t.Run("cluster", func(t *testing.T) {
		t.Parallel()
		conformance.Run(t, harness(name+" on a cluster", l.dial(t, clustered(redisserver.StartCluster(t))), engine.BatchAuto))
	})
}

func named(t *testing.T, name string) library {
	t.Helper()
	for _, l := range libraries {
		if l.name == name {
			return l
		}
	}
	t.Fatalf("library: got %q, want one of the table", name)
	return library{}
}

// Main runs the tests of a package that calls Run, some of them at once, and fails where a goroutine is left.
func Main(m *testing.M) {
	goredisclient.SetLogger(&logged) // it tells of every connection that the tests break
	flag.Parse()
	if f := flag.Lookup("test.parallel"); f.Value.String() == strconv.Itoa(runtime.GOMAXPROCS(0)) {
		f.Value.Set("6")
	}
	code := m.Run()
	// Clients that are closed leave goroutines that sleep for up to five seconds.
	var left error
	for start := time.Now(); time.Since(start) < patience; {
		if left = goleak.Find(); left == nil {
			break
		}
	}
	if code == 0 && left != nil {
		fmt.Println(left)
		code = 1
	}
	os.Exit(code)
}

// logged is the text that go-redis logged, which it would write to the standard error.
var logged logs

type logs struct {
	sync.Mutex
	text strings.Builder
}

func (l *logs) Printf(_ context.Context, format string, args ...any) {
	l.Lock()
	defer l.Unlock()
	fmt.Fprintf(&l.text, format+"\n", args...)
}

// take returns the text that was logged since the last call.
func (l *logs) take() string {
	l.Lock()
	defer l.Unlock()
	defer l.text.Reset()
	return l.text.String()
}
