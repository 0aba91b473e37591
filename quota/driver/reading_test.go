package driver_test

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// TestMetrics: each metric has a name of its own in the form of metrics' names, and a sentence.
func TestMetrics(t *testing.T) {
	names := map[string]driver.Metric{}
	for m := range driver.Metrics() {
		if !regexp.MustCompile(`^[a-z]+(_[a-z]+)*$`).MatchString(m.String()) {
			t.Errorf("name of metric %d: got %q, want words in lower case with underscores between", m, m)
		}
		if other, twice := names[m.String()]; twice {
			t.Errorf("name of metric %d: got %q, which metric %d has", m, m, other)
		}
		if names[m.String()] = m; !strings.HasSuffix(m.Help(), ".") {
			t.Errorf("help of metric %s: got %q, want a sentence", m, m.Help())
		}
	}
	if len(names) < 30 {
		t.Errorf("metrics: got %d, want at least 30", len(names))
	}
	none := driver.Metric(len(names))
	if got := fmt.Sprintf("%s %q %t %t", none, none.Help(), none.Counter(), none.ByNode()); got != `unknown "" false false` {
		t.Errorf("a value that is no metric: got %q", got)
	}
}

// told returns the readings of a store that are not 0.
func told(s quota.Store) string {
	var all []string
	driver.Readings(s, func(r driver.Reading) {
		if r.Value != 0 {
			all = append(all, strings.TrimSpace(fmt.Sprint(r.Metric, " ", r.Value, " ", r.Server, r.Version)))
		}
	})
	return strings.Join(all, ", ")
}

// healthyKV is a KV that can be asked how its servers are.
type healthyKV struct {
	*memKV
	health driver.Health
}

func (k healthyKV) Health(context.Context) (driver.Health, error) { return k.health, nil }

// TestReadings: the numbers of a store come through wrappers, those of nil and of a store without any are none, and those of
// servers come after Health.
func TestReadings(t *testing.T) {
	memory := local.New()
	l := quota.NewLimit("n", algorithm.TokenBucket(10, 1, time.Second))
	take := func(s quota.Store) { must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1})) }
	take(memory)
	kv := healthyKV{newKV(testkit.NewClock().Micros), driver.Health{Kind: "redis", Version: "7", Evicted: 3}}
	cas := newCAS(t, kv, nil)
	take(cas)
	take(cas)
	batches := "store_batches 2, store_batched_calls 2"
	for _, test := range []struct {
		name  string
		store quota.Store
		want  string
	}{
		{"nil", nil, ""},
		{"a store without numbers", plain{memory}, ""},
		{"a wrapper", wrapper{plain{wrapper{plain{memory}}}}, "store_keys 1, store_max_keys 1048576"},
		{"an adapter", cas, batches},
	} {
		if got := told(test.store); got != test.want {
			t.Errorf("%s: got %q, want %q", test.name, got, test.want)
		}
	}
	if _, err := cas.(driver.HealthReporter).Health(bg); err != nil {
		t.Fatal(err)
	}
	if got, want := told(cas), batches+", server_info 1 redis7, server_evicted_keys 3"; got != want {
		t.Errorf("after Health: got %q, want %q", got, want)
	}
}
