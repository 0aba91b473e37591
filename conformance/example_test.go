package conformance_test

import (
	"context"
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
)

// The test of a backend opens stores for the suite, and declares the features that the backend lacks.
func ExampleRun() {
	var t *testing.T // the argument of func TestConformance(t *testing.T)
	conformance.Run(t, conformance.Harness{
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			return local.New(&local.Options{Clock: o.Clock})
		},
		Lacks: []conformance.Lack{{Feature: conformance.Shared, Reason: "its state is the memory of one store"}},
	})
}

// The test of algorithms evaluates their Lua text with a client of Redis. Without Eval, rule A15 is skipped.
func ExampleAlgorithm() {
	var t *testing.T // the argument of func TestConformance(t *testing.T)

	client := redis.NewClient(&redis.Options{Addr: "localhost:6379"}) // or Addr: miniredis.RunT(t).Addr()
	defer client.Close()
	conformance.Algorithm(t, conformance.AlgorithmHarness{
		Algorithms: []quota.Algorithm{
			quota.Must(algorithm.TokenBucket(10, 10, time.Minute)),
			quota.Must(algorithm.TokenBucket(1<<40, 1<<30, time.Hour)),
		},
		Eval: func(ctx context.Context, script string, args []any) (any, error) {
			return client.Eval(ctx, script, nil, args...).Result()
		},
	})
}

// A program reads the reports that Run leaves in the directory FLEETQUOTA_CONFORMANCE_REPORT.
func ExampleReport() {
	text := `{"suite": "1.0", "backend": "mystore", "seed": 7, "atomicity": "any keys", "results": [
		{"rule": "S1", "name": "Meaning", "case": "lists", "outcome": "passed"},
		{"rule": "S4", "name": "AtMostOnce", "case": "faults", "outcome": "skipped", "text": "Harness.Fault is nil"}]}`
	var r conformance.Report
	if err := json.Unmarshal([]byte(text), &r); err != nil {
		fmt.Println(err)
	}
	for _, c := range r.Results {
		fmt.Printf("%s: %s %s/%s: %s %q\n", r.Backend, c.Rule, c.Name, c.Case, c.Outcome, c.Text)
	}
	// Output:
	// mystore: S1 Meaning/lists: passed ""
	// mystore: S4 AtMostOnce/faults: skipped "Harness.Fault is nil"
}
