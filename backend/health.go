package backend

import (
	"context"
	"errors"
	"fmt"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Health asks the servers of a store for their software, version and evictions, in one round trip. The store may stand
// inside policies, leases or other wrappers; of a limiter's store, pass limiter.Store(). The request goes to the
// servers as it is, past breakers, timeouts and other policies: give ctx a deadline.
//
// A failure is one of the errors of package quota, such as [quota.ErrUnavailable], or the context's own
// error. A store without servers, such as one in memory, gives an error that is [errors.ErrUnsupported]; a
// nil store is [quota.ErrInvalid]. Health may be called concurrently, and charges nothing.
func Health(ctx context.Context, s quota.Store) (driver.Health, error) {
	if s == nil {
		return driver.Health{}, invalid("the store is nil; accepted: a store, such as limiter.Store()")
	}
	reporter, ok := driver.Find[driver.HealthReporter](s)
	if !ok {
		return driver.Health{}, fmt.Errorf("backend: %w: the store has no servers to ask; accepted: a store whose driver reports health, "+
			"such as goredis, rueidis or postgres", errors.ErrUnsupported)
	}
	return reporter.Health(ctx)
}
