// Package fleetquota keeps the quotas of a fleet of processes: requests, LLM tokens, jobs. It makes a limiter
// from environment variables; package quota has the types and the rules.
//
//	limiter, err := fleetquota.FromEnv(ctx)
//	if err != nil {
//		return err
//	}
//	defer limiter.Close()
//
//	d, err := limiter.Take(ctx, "team-7/agent-123", 250)
//	if err != nil {
//		return err
//	}
//	if !d.Allowed {
//		return fmt.Errorf("over quota: %v", d)
//	}
//
// A caller that can wait calls limiter.Wait instead of Take: it returns once the tokens are taken, and fails
// at once where they can never fit.
//
// The first segment of a key, here team-7, is the hash tag of a Redis Cluster: all keys with that segment are
// in one slot, on one node.
//
// Programs that need other limits, other algorithms or a store of their own use the same parts directly: see
// packages quota, algorithm and backend.
package fleetquota

import (
	"context"

	_ "github.com/fleetquota/fleetquota/backend/goredis" // opens redis:// in REDIS_URL
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
)

// maxFleet and maxKeys are the largest FLEET_SIZE and FALLBACK_MAX_KEYS.
const (
	maxFleet = 1_000_000
	maxKeys  = 1 << 30
)

// FromEnv returns a limiter that the environment configures: without other variables, a token bucket for each key, under a
// limit called "tokens".
//
//	REDIS_URL          the store, such as redis://:password@host:6379/0; default: the memory of this process
//	TOKEN_BUCKET_SIZE  capacity in tokens; default 1000
//	TOKEN_REFILL_RATE  tokens a second, such as 10.5; default 10.0
//	FLEET_SIZE         how many processes share the store, 1 to 1000000; default: not known
//	FALLBACK_MAX_KEYS  how many keys the fallback of FLEET_SIZE keeps account of, 1 to 2^30; default 131072
//
// [ConfigFromEnv] has all variables, and FromEnv is [New] of its result. A program that sets more than the environment says,
// such as observers, calls the two.
//
// FromEnv sends no request: it makes a limiter also while Redis is down, and the limiter works once Redis is up.
//
// Around a store in Redis are the policies of [resilience.Standard]: a decision comes within half a second,
// at most 256 decisions are in flight, and where all calls have failed for half a second Redis gets no request
// for a quarter of a second, then for twice as long each time up to 30 seconds, until it answers. FLEET_SIZE decides about a request that Redis cannot decide:
//
//   - Without FLEET_SIZE the caller gets the error, such as [quota.ErrUnavailable].
//   - With FLEET_SIZE this process decides on its share of the limit, one part in FLEET_SIZE, rounded down, as
//     [resilience.Fallback] describes; such a decision is [quota.FromFallback]. A fleet that grows beyond
//     FLEET_SIZE admits more than its limit in an outage. A FLEET_SIZE above TOKEN_BUCKET_SIZE gives shares of
//     0, which deny; FromEnv logs that at the start.
//
// FALLBACK_MAX_KEYS must be above the number of keys in use, or keys that used little are forgotten, see
// [resilience.FallbackOptions]; a key takes some 250 bytes beside its own text.
//
// FromEnv logs notices for operators, such as an open breaker, with slog.Warn. Without REDIS_URL the store
// cannot fail, and FLEET_SIZE changes nothing. backend.Health(ctx, limiter.Store()) asks the servers for
// their version and evictions.
//
// The caller must close the limiter, which closes its store. A variable with a value that is not accepted is
// [quota.ErrInvalid]; the error names the variable and the accepted values, and holds no credentials. See
// backend.FromEnv for the ranges.
func FromEnv(ctx context.Context) (*quota.Limiter, error) {
	c, err := ConfigFromEnv()
	if err != nil {
		return nil, err
	}
	limiter, err := New(ctx, c)
	if err != nil {
		return nil, err
	}
	return limiter.Limiter, nil
}
