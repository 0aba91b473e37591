package resilience

import (
	"fmt"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A Policy is one protection that [Wrap] puts around a store. The functions of this package make policies. A
// policy is a description: it may be given to Wrap again, and each store gets state of its own (but see
// [Failsafe] and [Fallback]).
type Policy interface {
	// kind is the policy's position in the order.
	kind() kind
	// wrap returns the policy around inner. alarms says that this policy must report a misconfigured store,
	// because no policy outside it does. It fails with ErrInvalid where the policy's own settings are wrong
	// or do not fit the store inside.
	wrap(inner quota.Store, alarms bool) (quota.Store, error)
}

// kind is a position in the order, outermost first.
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

// outside gives the reason why no policy of a later kind may be outside a policy of this one.
var outside = [...]string{
	kindFallback: "a policy outside a fallback sees its answers instead of the store's failures: a breaker there would never open",
	kindMemory:   "a memory of denials must spare the store a request, and every policy inside it costs one",
	kindBreaker:  "a breaker must count a decision once, and refuse it before slots or attempts are spent on it",
	kindBulkhead: "a bulkhead bounds decisions; a retry outside it would repeat the calls that it refuses because there are too many",
	kindRetry:    "every attempt needs its timeout, and a hedge races single attempts",
	kindHedge:    "every attempt needs its timeout",
}

// reporter is a policy that may report a misconfigured store.
type reporter interface {
	reports() bool
}

// Wrap puts policies around a store, the first one outermost. Without policies it returns the store itself.
//
// It fails with quota.ErrInvalid, and gives the reason, if a policy is given twice or out of the order that
// the package documentation explains, the policies already around the store included, or if one has settings
// or neighbours that are not sound. The store is then unchanged.
//
// Close closes the store inside, the fallback's included, and ends everything that the policies run. The
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
	for l, ok := layerIn(store); ok; l, ok = layerIn(l.Unwrap()) {
		kinds = append(kinds, l.layerKind())
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
	reporting := -1 // the outermost policy that can report
	for i, p := range policies {
		if r, ok := p.(reporter); ok && r.reports() {
			reporting = i
			break
		}
	}
	for i := len(policies) - 1; i >= 0; i-- {
		var err error
		if store, err = policies[i].wrap(store, i == reporting); err != nil {
			return nil, err
		}
	}
	return store, nil
}

// layer is the part that the stores of all policies have in common.
type layer struct {
	inner quota.Store
	of    kind
	gate  driver.Gate
	once  sync.Once // of Close
}

// layered is the store of a policy.
type layered interface {
	driver.Wrapper
	layerKind() kind
}

// layerIn returns the outermost policy of a store.
func layerIn(s quota.Store) (layered, bool) { return driver.Find[layered](s) }

func (l *layer) layerKind() kind { return l.of }

// Unwrap returns the store inside.
func (l *layer) Unwrap() quota.Store { return l.inner }

// Atomicity returns how far the store inside decides several keys in one step.
func (l *layer) Atomicity() driver.Atomicity { return driver.AtomicityOf(l.inner) }

// Prompt reports whether the store inside returns by its context's deadline.
func (l *layer) Prompt() bool { return driver.IsPrompt(l.inner) }

// Close closes the store inside.
func (l *layer) Close() error { return l.end(l.inner.Close) }

// end closes the policy by a function, once. Another Close waits for the end of that: until then calls reach the store inside,
// and no Close may return.
func (l *layer) end(closing func() error) (err error) {
	l.once.Do(func() {
		l.gate.Close()
		err = closing()
	})
	return err
}

// orClosed returns err, or ErrClosed if the policy was closed. Answers that the policy itself gives need it.
func (l *layer) orClosed(err error) error {
	if closed := l.gate.Open(); closed != nil {
		return closed
	}
	return err
}

// bounded is the store of a timeout.
type bounded interface {
	bound() time.Duration
}

// invalid returns an ErrInvalid that names a wrong setting and the accepted ones.
func invalid(problem, accepted string) error {
	return fmt.Errorf("resilience: %w: %s; accepted: %s", quota.ErrInvalid, problem, accepted)
}
