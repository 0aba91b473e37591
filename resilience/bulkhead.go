package resilience

import (
	"context"
	"fmt"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Bulkhead returns the policy that at most n decisions are in flight. A call above that is refused at once,
// with an error that is quota.ErrOverloaded and [ErrRejected]; calls do not queue. A call that a [Timeout]
// inside abandoned is no longer in flight here; it counts against TimeoutOptions.MaxCalls.
//
// Errors of the store pass. An n below 1 is refused by Wrap.
func Bulkhead(n int) Policy { return bulkheadPolicy(n) }

type bulkheadPolicy int

func (bulkheadPolicy) kind() kind { return kindBulkhead }

func (n bulkheadPolicy) wrap(inner quota.Store, _ bool) (quota.Store, error) {
	if n < 1 {
		return nil, invalid(fmt.Sprintf("the bulkhead is %d", n), "1 or more")
	}
	return &bulkhead{
		layer: layer{inner: inner, of: kindBulkhead},
		most:  int64(n),
		full:  fmt.Errorf("resilience: %w: %w: %d decisions are in flight, which is all that the bulkhead allows", quota.ErrOverloaded, ErrRejected, n),
	}, nil
}

type bulkhead struct {
	layer
	most int64
	full error

	inFlight, refused atomic.Int64
}

// Readings tells how many calls are in flight, and how many were refused.
func (s *bulkhead) Readings(tell func(driver.Reading)) {
	tell(driver.Reading{Metric: driver.MetricBulkheadCalls, Value: s.inFlight.Load()})
	tell(driver.Reading{Metric: driver.MetricMaxBulkheadCalls, Value: s.most})
	tell(driver.Reading{Metric: driver.MetricBulkheadRefusals, Value: s.refused.Load()})
}

func (s *bulkhead) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if !s.acquire() {
		return quota.Decision{}, s.orClosed(s.full)
	}
	defer s.inFlight.Add(-1)
	return s.inner.Charge(ctx, c)
}

func (s *bulkhead) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if !s.acquire() {
		return s.orClosed(s.full)
	}
	defer s.inFlight.Add(-1)
	return s.inner.ChargeAll(ctx, cs, out)
}

// acquire takes a slot if one is free. A refused call is never counted, not even for a moment: a storm of
// them would shut out calls for which there is a slot.
func (s *bulkhead) acquire() bool {
	for {
		n := s.inFlight.Load()
		if n >= s.most {
			s.refused.Add(1)
			return false
		}
		if s.inFlight.CompareAndSwap(n, n+1) {
			return true
		}
	}
}
