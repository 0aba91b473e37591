package resilience

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// The defaults of [StandardOptions].
const (
	DefaultTimeout  = 100 * time.Millisecond
	DefaultInFlight = 256
)

// StandardOptions change what [Standard] makes. The zero value, and nil, take the defaults.
type StandardOptions struct {
	// Timeout is when a decision comes at the latest; 0 is DefaultTimeout.
	Timeout time.Duration
	// InFlight bounds the decisions in flight, and the abandoned calls; 0 is DefaultInFlight.
	InFlight int
	// Breaker changes the breaker; nil takes its defaults.
	Breaker *BreakerOptions
	// Notice is told what the policies have to tell, unless Breaker names somebody else; nil is nobody.
	// The fallback is told of its own.
	Notice func(quota.Notice)
}

// Standard puts around a store what most programs want: a timeout, a bulkhead, a breaker, and around
// them what decides while the store cannot: [FailOpen], [FailClosed], a fallback store or
// [FailWithError]. That choice has no default.
//
// It fails with quota.ErrInvalid as [Wrap] does.
func Standard(store quota.Store, fallback Policy, o *StandardOptions) (quota.Store, error) {
	if o == nil {
		o = &StandardOptions{}
	}
	if fallback == nil || fallback.kind() != kindFallback {
		return nil, invalid("what decides while the store cannot is not given", "FailOpen, FailClosed, a fallback or FailWithError")
	}
	timeout, inFlight, b := o.Timeout, o.InFlight, BreakerOptions{}
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	if inFlight == 0 {
		inFlight = DefaultInFlight
	}
	if o.Breaker != nil {
		b = *o.Breaker
	}
	if b.Notice == nil {
		b.Notice = o.Notice
	}
	return Wrap(store, fallback, Breaker(&b), Bulkhead(inFlight), Timeout(timeout, &TimeoutOptions{MaxCalls: inFlight, Notice: o.Notice}))
}
