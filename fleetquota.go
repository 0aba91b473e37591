// Package fleetquota keeps the quotas of a fleet of processes: requests, LLM tokens, jobs. It is the
// front door; package quota has the types and the rules.
//
//	limiter, err := fleetquota.FromEnv(ctx)
//	if err != nil {
//		return err
//	}
//	defer limiter.Close()
//
//	d, err := limiter.Take(ctx, "team-7/agent-123", 250)
//	if err == nil && !d.Allowed {
//		time.Sleep(d.RetryAfter)
//	}
//
// Programs that need other limits, other algorithms or a store of their own put the same parts together:
// see packages quota, algorithm and backend.
package fleetquota

import (
	"context"
	"fmt"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis" // so that REDIS_URL works out of the box
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
)

// FromEnv returns a limiter that the environment configures: a token bucket for each key, under a limit
// called "tokens".
//
//	REDIS_URL          the store, such as redis://:password@host:6379/0; default: the memory of this process
//	TOKEN_BUCKET_SIZE  capacity in tokens; default 1000
//	TOKEN_REFILL_RATE  tokens a second, such as 10.5; default 10.0
//
// Nothing is sent yet: with Redis down a limiter is made all the same, its calls fail with
// [quota.ErrUnavailable], and it works once Redis is there.
//
// Close the limiter to close its store. A variable with a value that is not accepted is
// [quota.ErrInvalid]; the error names it and what it accepts, and holds no credentials. See
// backend.FromEnv for the ranges.
func FromEnv(ctx context.Context) (*quota.Limiter, error) {
	env, err := backend.FromEnv(ctx)
	if err != nil {
		return nil, err
	}
	limiter, err := newLimiter(env)
	if err != nil {
		env.Store.Close()
		return nil, fmt.Errorf("fleetquota: %w", err)
	}
	return limiter, nil
}

func newLimiter(env backend.Env) (*quota.Limiter, error) {
	bucket, err := algorithm.TokenBucket(env.Capacity, env.Refill, env.Per)
	if err != nil {
		return nil, err
	}
	limit, err := quota.NewLimit("tokens", bucket)
	if err != nil {
		return nil, err
	}
	return quota.NewLimiter(env.Store, limit, nil)
}
