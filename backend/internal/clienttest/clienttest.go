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
	"os/exec"
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
	"github.com/fleetquota/fleetquota/internal/testenv"
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

	{"listing/Pages", listings},
	{"listing/Broken", listingsBroken},

	{"readings/Batches", readingsOfBatches},

	{"scripts/BatchCalls", batchCalls},
	{"scripts/NoScript", noScript},
	{"scripts/Flush", scriptFlush},
	{"scripts/Kernels", kernels},
	{"scripts/Cached", cachedScripts},
	{"scripts/Replies", replies},
	{"scripts/NoClientClock", noClientClock},
	{"scripts/Swaps", swaps},

	{"calendar/Skew", calendars},
	{"calendar/Cluster", calendarsOfCluster},

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

	{"holds/Killed", holderKilled},
	{"holds/Frozen", holdsFrozen},
	{"holds/Once", holdsOnce},
	{"holds/Fleet", holdsFleet},
	{"holds/Records", holdRecords},

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
	{"miniredis/Listings", miniListings},

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

// addrsVariable names the servers to the process that the suite starts.
const addrsVariable = "CLIENTTEST_ADDRS"

// Conformance runs the suite that every store passes, on a server, on one whose scripts take any keys, and on a cluster, all
// through connections that fail, and in two processes. Under the race detector each client has a server of another kind, but where
// the tests run at full size: ./test has both clients on a cluster without it, and package resilience one with it.
func Conformance(t *testing.T, name string) {
	l := named(t, name)
	watched := map[string]string{"goredis": "on a server", "rueidis": "in any batches"}[name]
	run := func(name string, b engine.Batching, start func(t *testing.T) target) {
		t.Run(name, func(t *testing.T) {
			if testenv.Race && !testenv.Full() && name != watched {
				t.Skipf("under the race detector %s runs %s alone, and the rest at full size", l.name, watched)
			}
			t.Parallel()
			to := start(t)
			c := l.dial(t, to)
			open := func(t testing.TB, c conn, o conformance.Opening) quota.Store {
				s, err := c.open(engine.Options{Prefix: o.Data + ":", Batching: b, Clock: o.Clock})
				ok(t, err)
				return s
			}
			conformance.Run(t, conformance.Harness{
				Name: strings.TrimSuffix(l.name+" "+name, " in any batches"),
				Open: func(t testing.TB, o conformance.Opening) quota.Store { return open(t, c, o) },
				Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
					broken := to
					var set func(conformance.Fault)
					broken.dialer, set = redisserver.Breakable(t, to.addrs...)
					return open(t, l.dial(t, broken), o), set
				},
				Process: func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, addrsVariable+"="+strings.Join(to.addrs, ",")) },
			})
		})
	}
	server := func(t *testing.T) target {
		return reach(target{}, func() target { return single(redisserver.Start(t)) })
	}
	run("on a server", engine.BatchAuto, server) // which learns that there is one server, and promises one group
	run("in any batches", engine.BatchAll, server)
	run("on a cluster", engine.BatchAuto, func(t *testing.T) target {
		return reach(target{cluster: true}, func() target { return clustered(redisserver.StartCluster(t)) })
	})
}

// reach returns the target whose addresses the environment has, or else starts one.
func reach(to target, start func() target) target {
	addrs := os.Getenv(addrsVariable)
	if addrs == "" {
		return start()
	}
	to.addrs = strings.Split(addrs, ",")
	return to
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
