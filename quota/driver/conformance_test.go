package driver_test

import (
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// TestConformance runs the suite on stores over one group that split longer lists, with faults.
func TestConformance(t *testing.T) {
	var mu sync.Mutex
	data := map[string]*memKV{}
	open := func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
		mu.Lock()
		defer mu.Unlock()
		kv := data[o.Data]
		if kv == nil {
			clock := o.Clock
			if clock == nil {
				clock = time.Now
			}
			kv = newKV(func() quota.Micros { return quota.Micros(clock().UnixMicro()) })
			data[o.Data] = kv
		}
		faulty, set := conformance.FaultyKV(unowned{kv, kv}, nil)
		return newCAS(t, faulty, &driver.Options{Atomicity: driver.OneGroup, Split: true}), set
	}
	conformance.Run(t, conformance.Harness{
		Name: "NewCAS over one group, split",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			s, _ := open(t, o)
			return s
		},
		Fault: open,
	})
}

// unowned is a KV whose data outlives its stores.
type unowned struct {
	driver.KV
	driver.KeyLister
}
