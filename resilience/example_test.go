package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// server is a store that stands for Redis in these examples. It can be down.
type server struct {
	quota.Store
	down bool
}

func newServer() *server { return &server{Store: local.New()} }

func (s *server) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.down {
		return quota.Decision{}, fmt.Errorf("redis: %w: connection refused", quota.ErrUnavailable)
	}
	return s.Store.Charge(ctx, c)
}

func show(d quota.Decision, err error) {
	if err != nil {
		fmt.Println("no decision:", err)
		return
	}
	fmt.Printf("allowed %v by %v, %d of %d left\n", d.Allowed, d.Source, d.Remaining, d.Capacity)
}

// An outage denies every request, because the program chose FailClosed.
func Example() {
	ctx := context.Background()
	redis := newServer() // or quota.Must(backend.Open(ctx, "redis://127.0.0.1:6379"))
	store := quota.Must(resilience.Standard(redis, resilience.FailClosed(nil), nil))
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Hour))
	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
	defer limiter.Close()

	show(limiter.Take(ctx, "team-7/agent-123", 250))
	redis.down = true
	show(limiter.Take(ctx, "team-7/agent-123", 250))
	redis.down = false
	show(limiter.Take(ctx, "team-7/agent-123", 250))
	// Output:
	// allowed true by store, 750 of 1000 left
	// allowed false by closed, 0 of 1000 left
	// allowed true by store, 500 of 1000 left
}

// The policy that decides in an outage has no default.
func ExampleStandard() {
	ctx := context.Background()
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Hour))
	for _, outage := range []resilience.Policy{
		resilience.FailOpen(nil),
		resilience.FailClosed(nil),
		resilience.Fallback(local.New(), resilience.Instances(4), nil),
		resilience.FailWithError(),
	} {
		redis := newServer()
		redis.down = true
		store := quota.Must(resilience.Standard(redis, outage, nil))
		show(store.Charge(ctx, quota.Charge{Limit: limit, Key: "agent-123", Cost: 50}))
		store.Close()
	}
	_, err := resilience.Standard(newServer(), nil, nil)
	fmt.Println(err)
	// Output:
	// allowed true by open, 1000 of 1000 left
	// allowed false by closed, 0 of 1000 left
	// allowed true by fallback, 200 of 250 left
	// no decision: redis: store unavailable: connection refused
	// resilience: invalid request: the policy that decides while the store cannot is missing; accepted: FailOpen, FailClosed, Fallback or FailWithError
}

// Policies are given outermost first. Another order is refused, with the reason.
func ExampleWrap() {
	store := quota.Must(resilience.Wrap(newServer(),
		resilience.FailOpen(nil),
		resilience.Breaker(nil),
		resilience.Bulkhead(256),
		resilience.Timeout(100*time.Millisecond, nil)))
	defer store.Close()
	fmt.Println("the breaker is", resilience.BreakerState(store))

	_, err := resilience.Wrap(newServer(), resilience.Breaker(nil), resilience.FailOpen(nil))
	fmt.Println("invalid:", errors.Is(err, quota.ErrInvalid))
	// Output:
	// the breaker is closed
	// invalid: true
}

// An instance of a fleet of four decides on a quarter of the limit while the server is down. The quota that it admits is
// charged to the server afterwards.
func ExampleFallback() {
	ctx := context.Background()
	redis := newServer()
	store := quota.Must(resilience.Wrap(redis, resilience.Fallback(local.New(), resilience.Instances(4), nil)))
	defer store.Close()
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 1, time.Hour))
	take := func(n int64) { show(store.Charge(ctx, quota.Charge{Limit: limit, Key: "agent-123", Cost: n})) }

	take(200)
	redis.down = true
	take(150) // of a quarter of the 800 that are left
	take(100)
	redis.down = false
	take(100) // after the 150
	// Output:
	// allowed true by store, 800 of 1000 left
	// allowed true by fallback, 50 of 250 left
	// allowed false by fallback, 50 of 250 left
	// allowed true by store, 550 of 1000 left
}

// A breaker spares a store that keeps failing, and the callers that would wait for it.
func ExampleBreaker() {
	ctx := context.Background()
	redis := newServer()
	redis.down = true
	store := quota.Must(resilience.Wrap(redis, resilience.Breaker(&resilience.BreakerOptions{Failures: 2, FailingFor: -1})))
	defer store.Close()
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Hour))

	for range 3 {
		_, err := store.Charge(ctx, quota.Charge{Limit: limit, Key: "agent-123", Cost: 1})
		fmt.Println(quota.Charged(err), errors.Is(err, resilience.ErrOpen), resilience.BreakerState(store))
	}
	// Output:
	// no false closed
	// no false open
	// no true open
}

// A program can show the state of its breaker, for example to its health check.
func ExampleBreakerState() {
	store := quota.Must(resilience.Standard(newServer(), resilience.FailClosed(nil), nil))
	defer store.Close()
	fmt.Println(resilience.BreakerState(store))
	// Output:
	// closed
}
