package resilience

import (
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// The defaults of [StandardOptions].
const (
	DefaultTimeout  = 500 * time.Millisecond
	DefaultInFlight = 256
)

// StandardOptions change the store that [Standard] makes. The zero value, and nil, take the defaults.
type StandardOptions struct {
	// Timeout is the longest time that a decision may take; 0 is DefaultTimeout.
	Timeout time.Duration
	// InFlight bounds the decisions in flight, and the abandoned calls, of each node that the store names; 0 is
	// DefaultInFlight.
	InFlight int
	// Breaker changes the breaker of each node; nil takes its defaults, but a Delay of 1 s for nodes that the
	// store names.
	Breaker *BreakerOptions
	// Notice receives the notices of the policies, those of the breaker only if Breaker has no receiver of
	// its own, and those of a store that has no receiver of its own, such as one opened from a URL. It may be nil.
	// The fallback has its own receiver.
	Notice func(quota.Notice)
}

// Standard puts around a store the policies that most programs need: a timeout, a bulkhead and a breaker, and
// around them the policy that decides while the store cannot: [FailOpen], [FailClosed], [Fallback] or
// [FailWithError]. That choice has no default.
//
// A store that names its nodes (a [driver.Placed]; a Redis Cluster is one) has a breaker, a bulkhead and a timeout for
// each node: a node that fails leaves the keys of the others alone. A list over several nodes is refused, before
// anything is sent, if the breaker of one of them is open. Errors and notices name the node, see [driver.NodeOf]
// and [BreakerStates]. While calls fail, the store is asked every 250 ms to learn anew which node has which keys, on
// a goroutine that ends a second after the last failure, or with Close.
//
// It fails with quota.ErrInvalid as [Wrap] does. The result may be used concurrently.
func Standard(store quota.Store, fallback Policy, o *StandardOptions) (quota.Store, error) {
	if o == nil {
		o = &StandardOptions{}
	}
	if fallback == nil || fallback.kind() != kindFallback {
		return nil, invalid("the policy that decides while the store cannot is missing", "FailOpen, FailClosed, Fallback or FailWithError")
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
	if _, ok := driver.Find[driver.Placed](store); ok {
		return Wrap(store, fallback, nodesPolicy{breaker: b, inFlight: inFlight, timeout: timeout, notice: o.Notice})
	}
	return Wrap(store, fallback, Breaker(&b), Bulkhead(inFlight), Timeout(timeout, &TimeoutOptions{MaxCalls: inFlight, Notice: o.Notice}))
}
