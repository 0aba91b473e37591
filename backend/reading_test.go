package backend_test

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/lease"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

func ExampleReadings() {
	store := quota.Must(resilience.Standard(local.New(), resilience.FailWithError(), nil))
	limiter := quota.Must(quota.NewLimiter(store, tokens(), nil))
	defer limiter.Close()
	limiter.Take(context.Background(), "team-7/agent-123", 1)

	for _, r := range backend.Readings(limiter.Store()) {
		if r.Value != 0 {
			fmt.Println(r.Metric, r.Value)
		}
	}
	// Output:
	// store_keys 1
	// store_max_keys 1048576
	// breakers_closed 1
	// bulkhead_max_calls 256
}

// twice tells each of its numbers in two parts.
type twice struct{ quota.Store }

func (s twice) Unwrap() quota.Store { return s.Store }

func (s twice) Readings(tell func(driver.Reading)) {
	for range 2 {
		tell(driver.Reading{Metric: driver.MetricBreakersOpen, Node: "b", Value: 1})
		tell(driver.Reading{Metric: driver.MetricBreakersOpen, Node: "a", Value: 2})
	}
	tell(driver.Reading{Metric: driver.MetricKeys, Fallback: true, Value: 7})
}

// TestReadings: what a store holds and did is told, through wrappers, added up and in order.
func TestReadings(t *testing.T) {
	bg := context.Background()
	now := time.Unix(1_700_000_000, 0)
	memory := quota.Must(local.NewWithOptions(local.Options{MaxKeys: 1000, MaxIDs: 10, Clock: func() time.Time { return now }}))
	for i := range 1200 { // more than a group may have
		memory.Charge(bg, quota.Charge{Limit: tokens(), Key: fmt.Sprint("group/", i), Cost: 1})
	}
	if _, err := memory.Charge(bg, quota.Charge{Limit: tokens(), Key: "other", Cost: 1, ID: "id"}); err != nil {
		t.Fatal(err)
	}
	get := func(s quota.Store) map[driver.Reading]int64 {
		all := map[driver.Reading]int64{}
		for _, r := range backend.Readings(s) {
			value := r.Value
			r.Value = 0
			if _, again := all[r]; again {
				t.Errorf("%v comes twice", r)
			}
			all[r] = value
		}
		return all
	}
	check := func(when string, s quota.Store, want map[driver.Metric]int64) {
		t.Helper()
		got := get(s)
		for m, n := range want {
			if got[driver.Reading{Metric: m}] != n {
				t.Errorf("%s %s: got %d, want %d", m, when, got[driver.Reading{Metric: m}], n)
			}
		}
	}
	kept := int64(memory.Len())
	check("of a full store", memory, map[driver.Metric]int64{driver.MetricKeys: kept, driver.MetricMaxKeys: 1000, driver.MetricIDs: 1, driver.MetricSweptKeys: 0,
		driver.MetricFullCalls: 1201 - kept})
	now = now.Add(time.Hour)
	for memory.Len() > 1 {
		memory.Charge(bg, quota.Charge{Limit: tokens(), Key: "k", Cost: 1})
		memory.Charge(bg, quota.Charge{Limit: tokens(), Key: "k", Op: quota.OpReset})
	}
	if swept := get(memory)[driver.Reading{Metric: driver.MetricSweptKeys}]; swept < kept {
		t.Errorf("keys swept: got %d, want at least the %d that were whole again", swept, kept)
	}

	test := quotatest.New(t, nil)
	test.Charge(bg, quota.Charge{Limit: tokens(), Key: "k", Cost: 1})
	check("of quotatest", test, map[driver.Metric]int64{driver.MetricKeys: 1})

	clock := time.Unix(0, 0)
	read := func() time.Time { return clock }
	below := yielding{quota.Must(local.NewWithOptions(local.Options{Clock: read}))}
	leases := quota.Must(lease.New(below, &lease.Options{Instances: func() int64 { return 1 }, Clock: read}))
	limit := quota.NewLimit("many", algorithm.TokenBucket(1_000_000, 1000, time.Second))
	below.Charge(bg, quota.Charge{Limit: limit, Key: "k", Cost: 500_000}) // no tokens are given back to a bucket that may be whole by then
	var fromLease, fromStore atomic.Int64
	take := func() {
		d, err := leases.Charge(bg, quota.Charge{Limit: limit, Key: "k", Cost: 1})
		if err != nil {
			t.Error(err)
		}
		if d.Source == quota.FromLease {
			fromLease.Add(1)
		} else {
			fromStore.Add(1)
		}
	}
	for range 20 {
		clock = clock.Add(time.Millisecond)
		var calls sync.WaitGroup
		for range 16 { // some of them wait for a chunk of another one
			calls.Go(take)
		}
		calls.Wait()
	}
	granted := func() int64 { return get(leases)[driver.Reading{Metric: driver.MetricChunkTokens}] }
	if granted() == fromLease.Load() {
		take() // all chunks are spent: one more has tokens left
	}
	chunks := get(leases)[driver.Reading{Metric: driver.MetricChunks}]
	if chunks < 1 || granted() < 2*chunks {
		t.Errorf("chunks: got %d of %d tokens, want some", chunks, granted())
	}
	// The first caller of a chunk has its decision from the lease, though it asked.
	check("of leases", leases, map[driver.Metric]int64{driver.MetricLeaseKeys: 1, driver.MetricLeaseHits: fromLease.Load() - chunks, driver.MetricKeys: 1})
	unspent := granted() - fromLease.Load()
	leases.Close()
	if returned := get(leases)[driver.Reading{Metric: driver.MetricReturnedTokens}]; returned <= 0 || returned > unspent {
		t.Errorf("tokens given back at Close: got %d, want up to the %d that were not spent", returned, unspent)
	}

	all := backend.Readings(twice{twice{plainStore{local.New()}}})
	if len(all) != 3 || all[0].Value != 14 || !all[0].Fallback || all[1].Node != "a" || all[1].Value != 8 || all[2].Node != "b" || all[2].Value != 4 {
		t.Errorf("the sums: got %v, want 14 keys of a fallback's store, 8 open breakers of a and 4 of b", all)
	}
	if none := backend.Readings(nil); none != nil {
		t.Errorf("the numbers of nil: got %v, want none", none)
	}
}

type plainStore struct{ quota.Store }

// yielding is a store that lets other goroutines run while it is asked.
type yielding struct{ *local.Store }

func (s yielding) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	for range 100 {
		runtime.Gosched()
	}
	return s.Store.Charge(ctx, c)
}
