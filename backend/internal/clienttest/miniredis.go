package clienttest

import (
	"fmt"
	"testing"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

// The tests in this file run on miniredis, a server inside the test's own process, which needs no redis-server.
// They are there beside those on real servers: users test their programs on it.

// startMiniredis starts a miniredis whose keys expire as time passes.
func startMiniredis(t testing.TB) *miniredis.Miniredis {
	t.Helper()
	m := miniredis.RunT(t)
	m.ClockTTL(true)
	return m
}

// mini starts a miniredis, connects, and returns its data with a function that opens stores.
func (l library) mini(t testing.TB) (*miniredis.Miniredis, *data, func(engine.Options) store) {
	t.Helper()
	m := startMiniredis(t)
	raw := redis.NewClient(&redis.Options{Addr: m.Addr()})
	t.Cleanup(func() { raw.Close() })
	s, open := vouched(l.data(t, raw, target{addrs: []string{m.Addr()}}))
	return m, s, open
}

// Miniredis is slow, for its Lua is, and a client has little to do with it. So tests that only compute there run with one
// client, but where the tests run at full size.
func (l library) only(t *testing.T, name string) {
	t.Helper()
	if l.name != name && !testenv.Full() {
		t.Skipf("this test runs with %s, and with %s at full size", name, l.name)
	}
}

// withoutRace skips a test under the race detector, which makes miniredis ten times as slow: ./test runs these without it.
func withoutRace(t *testing.T) {
	t.Helper()
	if testenv.Race && !testenv.Full() {
		t.Skip("this test runs without the race detector, and with it at full size")
	}
}

// miniConformance runs the suite that every store passes. How the charges of several keys are batched is tested by the
// whole suite only where the tests run at full size, and else by miniBatches.
func miniConformance(t *testing.T, l library) {
	l.only(t, "rueidis")
	withoutRace(t)
	c := l.dial(t, target{addrs: []string{startMiniredis(t).Addr()}})
	ways := map[string]engine.Batching{"auto": engine.BatchAuto}
	var exempt []conformance.Exemption
	if testenv.Full() {
		ways["all"] = engine.BatchAll
	} else {
		for _, long := range []string{"S2/every length", "C1/thousands", "C1/largest keys", "C1/ids that meet", "C1/two handles", "C3/thousands", "C3/handles", "C3/one field", "C3/large", "C9/keys"} {
			exempt = append(exempt, conformance.Exemption{Rule: long, Reason: "it takes long on miniredis, and runs on servers, and here at full size"})
		}
	}
	for name, batching := range ways {
		t.Run(name, func(t *testing.T) {
			conformance.Run(t, conformance.Harness{
				Name:   l.name + " on miniredis",
				Exempt: exempt,
				Open: func(t testing.TB, o conformance.Opening) quota.Store {
					s, err := c.open(engine.Options{Prefix: o.Data + ":", Batching: batching, Clock: o.Clock})
					ok(t, err)
					return s
				},
			})
		})
	}
}

// miniDifferential: random requests make exactly the decisions and the states of the Go kernels, byte for byte.
func miniDifferential(t *testing.T, l library) {
	l.only(t, "goredis")
	withoutRace(t)
	for _, injected := range []bool{true, false} {
		t.Run(fmt.Sprintf("injected=%v", injected), func(t *testing.T) {
			_, server, open := l.mini(t)
			r := replay(t, server, open, l.volume(1_500, 40_000), injected, nil)
			t.Logf("%d lists, %d charges, %d granted; %d unsure", r.lists.Load(), r.charges.Load(), r.granted.Load(), r.unsure.Load())
		})
	}
	t.Run("without Lua", func(t *testing.T) {
		_, server, open := l.mini(t)
		replay(t, server, open, l.volume(1_000, 20_000), true, func(kind) bool { return true })
	})
}

// miniBatches does the same with charges that go together.
func miniBatches(t *testing.T, l library) {
	l.only(t, "goredis")
	withoutRace(t)
	_, server, open := l.mini(t)
	replayBatches(t, l, server, open, l.volume(4_000, 80_000))
}

// miniListings: a listing has all its keys there too, under prefixes whose pattern miniredis turns into a regular expression.
func miniListings(t *testing.T, l library) {
	l.only(t, "goredis")
	withoutRace(t)
	listingsOf(t, func(t testing.TB) (*data, func(engine.Options) store) {
		_, server, open := l.mini(t)
		return server, open
	})
}
