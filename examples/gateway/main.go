// Command gateway is the quota side of a gateway to language models: plans in JSON that may change while it runs, an estimate
// that is charged to three limits in one step and settled when the answer is over, and counts of all outcomes.
//
//	go run ./examples/gateway
//
// Its store is that of REDIS_URL, or its own memory.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

const plans = `{
	"plans": {
		"free": {"tokens": "2000 burst 2000/m bucket", "requests": "4/1m sliding", "budget": "10000/24h fixed"},
		"paid": {"tokens": "9000 burst 9000/m bucket", "requests": "60/1m sliding", "budget": "unlimited"}
	},
	"tenants": {"acme": "paid", "guest": "free"}
}`

// A plan is the three limits of a tenant, by name.
type plan map[string]algorithm.Text

// gateway decides requests.
type gateway struct {
	limiter *fleetquota.Limiter
	tenants atomic.Pointer[map[string][]*quota.Limit] // tokens, requests and budget, by tenant

	mu       sync.Mutex
	outcomes map[string]int
}

// load puts plans into force, or none of them.
func (g *gateway) load(text string) error {
	var config struct {
		Plans   map[string]plan
		Tenants map[string]string
	}
	if err := json.Unmarshal([]byte(text), &config); err != nil {
		return err
	}
	tenants := map[string][]*quota.Limit{}
	var wrong []error
	for tenant, name := range config.Tenants {
		for _, limit := range []string{"tokens", "requests", "budget"} {
			l := quota.NewLimit(limit, config.Plans[name][limit].Algorithm)
			wrong = append(wrong, l.Err())
			tenants[tenant] = append(tenants[tenant], l)
		}
	}
	if err := errors.Join(wrong...); err != nil {
		return err
	}
	g.tenants.Store(&tenants)
	return nil
}

// answer charges an estimate, has the model answer, and settles the tokens that the model used.
func (g *gateway) answer(ctx context.Context, tenant string, estimate int64, model func() (used int64)) error {
	limits := (*g.tenants.Load())[tenant]
	if limits == nil {
		return fmt.Errorf("tenant %q has no plan", tenant)
	}
	key := quota.Key(tenant, "model")
	charges := []quota.Charge{
		{Limit: limits[0], Key: key, Cost: estimate}, {Limit: limits[1], Key: key, Cost: 1}, {Limit: limits[2], Key: tenant, Cost: estimate},
	}
	r, err := g.limiter.ChargeAll(ctx, charges...)
	if err != nil {
		return err
	}
	if !r.Granted {
		return fmt.Errorf("%s is over its limit %v", tenant, charges[r.Decider].Limit)
	}
	used := model()
	_, err = g.limiter.ChargeAll(ctx, charges[0].Settle(r.Decisions[0], used), charges[2].Settle(r.Decisions[2], used)) // outlives ctx
	return err
}

// observe counts outcomes.
func (g *gateway) observe(_ context.Context, c *quota.Call) {
	outcome := "granted"
	switch {
	case c.Err != nil:
		outcome = "failed"
	case !c.Granted:
		outcome = "denied by " + c.Charges[c.Decider].Limit.Name()
	case c.Charges[0].Op != quota.OpTake:
		outcome = "settled"
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.outcomes[outcome]++
}

// open returns the gateway of a configuration.
func open(ctx context.Context, config fleetquota.Config) (*gateway, error) {
	g := &gateway{outcomes: map[string]int{}}
	config.Observers = append(config.Observers, g.observe)
	var err error
	if g.limiter, err = fleetquota.New(ctx, config); err != nil {
		return nil, err
	}
	if err := g.load(plans); err != nil {
		g.limiter.Close()
		return nil, err
	}
	return g, nil
}

func run(ctx context.Context) error {
	config, err := fleetquota.ConfigFromEnv()
	if err != nil {
		return err
	}
	g, err := open(ctx, config)
	if err != nil {
		return err
	}
	defer g.limiter.Close()
	for i := range 6 {
		for _, tenant := range []string{"acme", "guest"} {
			if err := g.answer(ctx, tenant, 500, func() int64 { return 300 }); err != nil {
				fmt.Printf("request %d: %v\n", i, err)
			}
		}
	}
	for _, outcome := range slices.Sorted(maps.Keys(g.outcomes)) {
		fmt.Println(outcome, g.outcomes[outcome])
	}
	return nil
}

func main() {
	if err := run(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
