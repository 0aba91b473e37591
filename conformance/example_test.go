package conformance_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The test of a backend opens stores for the suite, and declares the features that the backend lacks.
func ExampleRun() {
	var t *testing.T // the argument of func TestConformance(t *testing.T)
	conformance.Run(t, conformance.Harness{
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			return quota.Must(local.NewWithOptions(local.Options{Clock: o.Clock}))
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
			algorithm.TokenBucket(10, 10, time.Minute),
			algorithm.TokenBucket(1<<40, 1<<30, time.Hour),
		},
		Eval: func(ctx context.Context, script string, args []any) (any, error) {
			return client.Eval(ctx, script, nil, args...).Result()
		},
	})
}

// A backend of a KV is tested with a KV that misbehaves. The set function breaks its connection.
func ExampleFaultyKV() {
	var t *testing.T                                           // the argument of func TestConformance(t *testing.T)
	open := func(conformance.Opening) driver.KV { return nil } // yours

	conformance.Run(t, conformance.Harness{
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			return quota.Must(driver.NewCAS(open(o), nil))
		},
		Fault: func(t testing.TB, o conformance.Opening) (quota.Store, func(conformance.Fault)) {
			kv, set := conformance.FaultyKV(open(o), nil)
			return quota.Must(driver.NewCAS(kv, nil)), set
		},
	})
}

// A wrapper meets a store below it that executes a charge, and does not say so.
func ExampleFaultyStore() {
	store, set := conformance.FaultyStore(local.New())
	defer store.Close()
	charge := quota.Charge{Limit: quota.NewLimit("calls", algorithm.TokenBucket(10, 10, time.Hour)), Key: "agent-1", Cost: 4}

	set(conformance.LostReply)
	_, err := store.Charge(context.Background(), charge)
	fmt.Println("charged:", quota.Charged(err))

	set(conformance.Refused)
	_, err = store.Charge(context.Background(), charge)
	fmt.Println("charged:", quota.Charged(err))

	set(conformance.NoFault)
	charge.Op = quota.OpPeek
	d, err := store.Charge(context.Background(), charge)
	fmt.Println(d.Remaining, "remain", err)
	// Output:
	// charged: unknown
	// charged: no
	// 6 remain <nil>
}

// The proxy stands before a server that answers "ok" to a line. It loses the reply to commits alone.
func ExampleProxy() {
	server, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer server.Close()
	go func() {
		for {
			c, err := server.Accept()
			if err != nil {
				return
			}
			go func() {
				for lines := bufio.NewScanner(c); lines.Scan(); fmt.Fprintln(c, "ok") {
				}
			}()
		}
	}()

	proxy, err := conformance.NewProxy(server.Addr().String(), func(request, reply []byte) bool {
		return bytes.Contains(request, []byte("COMMIT"))
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer proxy.Close()
	client, err := net.Dial("tcp", proxy.Addr())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()
	replies := bufio.NewScanner(client)
	proxy.Set(conformance.LostReply)
	for _, line := range []string{"BEGIN", "COMMIT"} {
		fmt.Fprintln(client, line)
		fmt.Println(line, "answered:", replies.Scan())
	}
	// Output:
	// BEGIN answered: true
	// COMMIT answered: false
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
