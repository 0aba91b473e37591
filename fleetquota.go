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
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	_ "github.com/fleetquota/fleetquota/backend/goredis" // opens redis:// in REDIS_URL
	"github.com/fleetquota/fleetquota/backend/local"
	_ "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// timeout bounds a decision. It is long enough for the first one, which also connects, with TLS and to a
// cluster.
const timeout = 500 * time.Millisecond

// maxFleet and maxKeys are the largest FLEET_SIZE and FALLBACK_MAX_KEYS.
const (
	maxFleet = 1_000_000
	maxKeys  = 1 << 30
)

// FromEnv returns a limiter that the environment configures: a token bucket for each key, under a limit
// called "tokens".
//
//	REDIS_URL          the store, such as redis://:password@host:6379/0; default: the memory of this process
//	TOKEN_BUCKET_SIZE  capacity in tokens; default 1000
//	TOKEN_REFILL_RATE  tokens a second, such as 10.5; default 10.0
//	FLEET_SIZE         how many processes share the store, 1 to 1000000; default: not known
//	FALLBACK_MAX_KEYS  how many keys the fallback of FLEET_SIZE keeps account of, 1 to 2^30; default 131072
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
	fleet, err := number("FLEET_SIZE", "the number of processes", maxFleet)
	if err != nil {
		return nil, err
	}
	keys, err := number("FALLBACK_MAX_KEYS", "the number of keys", maxKeys)
	if err != nil {
		return nil, err
	}
	env, err := backend.FromEnv(ctx)
	if err != nil {
		return nil, err
	}
	limiter, err := newLimiter(env, fleet, int(keys))
	if err != nil {
		env.Store.Close()
		return nil, err
	}
	return limiter, nil
}

// number reads a variable, and returns 0 where it is absent.
func number(name, meaning string, most int64) (int64, error) {
	s := os.Getenv(name)
	if s == "" {
		return 0, nil
	}
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > most {
		return 0, fmt.Errorf("fleetquota: %w: %s is %.40q; accepted: %s, 1 to %d", quota.ErrInvalid, name, s, meaning, most)
	}
	return n, nil
}

func newLimiter(env backend.Env, fleet int64, keys int) (*quota.Limiter, error) {
	bucket, err := algorithm.TokenBucket(env.Capacity, env.Refill, env.Per)
	if err != nil {
		return nil, fmt.Errorf("fleetquota: %w", err)
	}
	limit, err := quota.NewLimit("tokens", bucket)
	if err != nil {
		return nil, fmt.Errorf("fleetquota: %w", err)
	}
	store := env.Store
	if _, ok := store.(*local.Store); !ok {
		if store, err = guard(store, bucket, fleet, keys); err != nil {
			return nil, err
		}
	}
	return quota.NewLimiter(store, limit, nil)
}

// guard puts policies around a store that fleet processes share; 0 is an unknown number. The fallback keeps account of so
// many keys; 0 is its default.
func guard(store quota.Store, a quota.Algorithm, fleet int64, keys int) (quota.Store, error) {
	fallback := resilience.FailWithError()
	if fleet > 0 {
		tell := warn
		if s, ok := a.(driver.Sharer); ok {
			share, err := s.Share(fleet)
			if err != nil {
				return nil, fmt.Errorf("fleetquota: FLEET_SIZE is %d: %w", fleet, err)
			}
			if share.Spec().Capacity == 0 {
				warn(quota.Notice{Name: "share", Text: fmt.Sprintf("FLEET_SIZE is %d and TOKEN_BUCKET_SIZE is %d, which is less than one token for each process: "+
					"while Redis cannot decide, this process denies", fleet, a.Spec().Capacity)})
				tell = func(n quota.Notice) {
					if n.Name != "share" { // the only limit there is
						warn(n)
					}
				}
			}
		}
		here := local.New(&local.Options{MaxKeys: max(keys, local.DefaultMaxKeys)})
		fallback = resilience.Fallback(here, resilience.Instances(fleet), &resilience.FallbackOptions{MaxKeys: keys, Notice: tell})
	}
	return resilience.Standard(store, fallback, &resilience.StandardOptions{Timeout: timeout, Notice: warn})
}

func warn(n quota.Notice) {
	if n.Err != nil {
		slog.Warn("fleetquota: "+n.Text, "err", n.Err)
		return
	}
	slog.Warn("fleetquota: " + n.Text)
}
