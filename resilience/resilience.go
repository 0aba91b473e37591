package resilience

import (
	"fmt"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A Policy is what [Wrap] puts around a store. The functions of this package make them. A policy is a
// description: it may be given to Wrap again, and each store gets state of its own (but see [Failsafe] and [Fallback]).
type Policy interface {
	// kind is the policy's place in the order.
	kind() kind
	// wrap returns the policy around inner, which has the place p among its neighbours. It fails with
	// ErrInvalid where the policy's own settings are wrong or do not fit what is inside.
	wrap(inner quota.Store, p place) (quota.Store, error)
}

// kind is a place in the order, outermost first.
type kind uint8

const (
	kindFallback kind = iota
	kindMemory
	kindBreaker
	kindBulkhead
	kindRetry
	kindHedge
	kindTimeout
)

const order = "fallback( memory( breaker( bulkhead( retry( hedge( timeout( store )))))))"

var kindNames = [...]string{"fallback", "memory of denials", "breaker", "bulkhead", "retry", "hedge", "timeout"}

func (k kind) String() string { return kindNames[k] }

// outside says why nothing of a later kind may stand outside a policy of this one.
var outside = [...]string{
	kindFallback: "what is outside a fallback sees its answers instead of the store's failures: a breaker there would never open",
	kindMemory:   "a memory of denials is to spare the store a request, and everything inside costs one",
	kindBreaker:  "a breaker is to count a decision once and to refuse before slots or attempts are spent on it",
	kindBulkhead: "a bulkhead bounds decisions; what it refuses because there is too much would be tried again outside",
	kindRetry:    "every attempt needs its timeout, and a hedge races single attempts",
	kindHedge:    "every attempt needs its timeout",
}

// place is what a policy is told about the others.
type place struct {
	// loud says that this policy tells of a misconfigured store, because none outside it does.
	loud bool
}

// telling is a policy that can tell of a misconfigured store.
type telling interface {
	tells() bool
}

// Wrap puts policies around a store, the first outermost. No policies leave the store as it is.
//
// It fails with quota.ErrInvalid, and says why, if a policy is given twice or out of the order that the
// package documentation explains, the policies already around the store counted in, or if one is set
// or combined in a way that is not sound. The store is then as it was.
//
// Close closes the store inside, the fallback's included, and ends everything the policies run. The
// result may be used concurrently.
func Wrap(store quota.Store, policies ...Policy) (quota.Store, error) {
	if store == nil {
		return nil, invalid("the store is nil", "a store")
	}
	kinds := make([]kind, 0, len(policies))
	for i, p := range policies {
		if p == nil {
			return nil, invalid(fmt.Sprintf("policy %d is nil", i+1), "policies that this package makes")
		}
		kinds = append(kinds, p.kind())
	}
	for s := store; s != nil; s = unwrap(s) {
		if l, ok := s.(interface{ layerKind() kind }); ok {
			kinds = append(kinds, l.layerKind())
		}
	}
	for i := 1; i < len(kinds); i++ {
		for j := range i {
			switch outer, inner := kinds[j], kinds[i]; {
			case outer == inner:
				return nil, invalid(fmt.Sprintf("there are two policies of the kind %s", inner), "one of each kind: "+order)
			case outer > inner:
				return nil, invalid(fmt.Sprintf("the %s is inside the %s", inner, outer), order+", because "+outside[inner])
			}
		}
	}
	loudest := -1
	for i, p := range policies {
		if t, ok := p.(telling); ok && t.tells() {
			loudest = i
			break
		}
	}
	for i := len(policies) - 1; i >= 0; i-- {
		var err error
		if store, err = policies[i].wrap(store, place{loud: i == loudest}); err != nil {
			return nil, err
		}
	}
	return store, nil
}

// layer is what the stores of all policies have in common.
type layer struct {
	inner  quota.Store
	of     kind
	closed atomic.Bool
}

func (l *layer) layerKind() kind { return l.of }

// Unwrap returns the store inside.
func (l *layer) Unwrap() quota.Store { return l.inner }

// Atomicity says how far the store inside decides several keys in one step.
func (l *layer) Atomicity() driver.Atomicity {
	if g, ok := find[driver.Graded](l.inner); ok {
		return g.Atomicity()
	}
	return driver.AnyKeys
}

// Prompt says whether the store inside returns by its context's deadline.
func (l *layer) Prompt() bool { return prompt(l.inner) }

// Close closes the store inside.
func (l *layer) Close() error {
	if l.closed.Swap(true) {
		return nil
	}
	return l.inner.Close()
}

// unless returns err, or ErrClosed where the policy was closed: for what a policy answers itself.
func (l *layer) unless(err error) error {
	if l.closed.Load() {
		return errClosed
	}
	return err
}

func prompt(s quota.Store) bool {
	p, ok := find[driver.Prompt](s)
	return ok && p.Prompt()
}

func unwrap(s quota.Store) quota.Store {
	if u, ok := s.(interface{ Unwrap() quota.Store }); ok {
		return u.Unwrap()
	}
	return nil
}

// find returns the first of a store and the stores inside it that is a T.
func find[T any](s quota.Store) (v T, ok bool) {
	for ; s != nil; s = unwrap(s) {
		if v, ok = s.(T); ok {
			return v, true
		}
	}
	return v, false
}

func invalid(what, accepted string) error {
	return fmt.Errorf("resilience: %w: %s; accepted: %s", quota.ErrInvalid, what, accepted)
}
