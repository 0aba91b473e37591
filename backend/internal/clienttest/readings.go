package clienttest

import (
	"testing"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// readingsOfBatches: a store counts as many scripts as the server ran, and the calls in them, and tells the server as Health saw it.
func readingsOfBatches(t *testing.T, l library) {
	server, open := vouched(l.single(t))
	s := open(engine.Options{})
	get := func(m driver.Metric) (n int64) {
		for _, r := range backend.Readings(s) {
			if r.Metric == m {
				n += r.Value
			}
		}
		return n
	}
	limit := yearly("yearly", 1_000_000)
	ok(t, crowd(s, limit, keys(64), 1).failure())
	if n := get(driver.MetricServers); n != 0 {
		t.Errorf("servers before the first Health: got %d, want 0", n)
	}
	server.resetCounts(t)
	batches, calls := get(driver.MetricBatches), get(driver.MetricBatchedCalls)
	y := crowd(s, limit, keys(64), sized(20, 200))
	ok(t, y.failure())
	chargeAll(t, s, quota.Charge{Limit: limit, Key: "a/1", Cost: 1}, quota.Charge{Limit: limit, Key: "a/2", Cost: 1})
	ran := server.count(t)
	batches, calls = get(driver.MetricBatches)-batches, get(driver.MetricBatchedCalls)-calls
	if scripts := int64(ran["evalsha"].calls + ran["eval"].calls); batches != scripts || batches >= calls/2 {
		t.Errorf("batches: got %d, want %d, as the server ran scripts, and few for %d calls", batches, scripts, calls)
	}
	if want := int64(y.ok) + 1; calls != want {
		t.Errorf("calls in batches: got %d, want %d", calls, want)
	}
	before := get(driver.MetricBatchedCalls)
	take(t, s, quota.Charge{Limit: limitOf("cas", hidden{algorithm.TokenBucket(10, 1, year)}), Key: "k", Cost: 1})
	if n := get(driver.MetricBatchedCalls) - before; n != 1 {
		t.Errorf("calls under a rule without Lua: got %d, want 1", n)
	}
	h, err := s.Health(bg)
	ok(t, err)
	found := false
	for _, r := range backend.Readings(s) {
		found = found || r == driver.Reading{Metric: driver.MetricServers, Value: 1, Server: h.Kind, Version: h.Version}
	}
	if n := get(driver.MetricEvictedKeys); !found || n != h.Evicted {
		t.Errorf("the server of the readings: got %v with %d keys evicted, want %s %s with %d", found, n, h.Kind, h.Version, h.Evicted)
	}
}
