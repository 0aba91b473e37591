package driver

import (
	"context"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Atomicity says how many keys a store decides in one step. The zero value is the strongest.
type Atomicity uint8

const (
	// AnyKeys: any list is one step.
	AnyKeys Atomicity = iota
	// OneGroup: a list is one step where its keys have one [quota.Group].
	OneGroup
	// OneKey: only a single charge is one step.
	OneKey
)

// A Graded store says how many keys it decides in one step. A store without this method is AnyKeys.
type Graded interface {
	// Atomicity must always return the same value.
	Atomicity() Atomicity
}

// A Prompt store declares that its calls always return by their context's deadline, even if its server hangs. A timeout
// around it then needs no goroutine for each call. A store without this method is not prompt.
type Prompt interface {
	// Prompt reports whether every call returns by its context's deadline. It must always return the same value.
	Prompt() bool
}

// A Clocked store has a time of its own, which a test moves, and callers that wait follow it: quotatest.Store is one. Stores
// of programs have no such methods, for their callers wait by the time of the process.
type Clocked interface {
	// Now returns the store's time, at which it decides.
	Now() time.Time
	// After returns a channel that gets an element, or is closed, once the store's time is d after from, or later. The
	// caller calls stop when it does not read the channel any more.
	After(from time.Time, d time.Duration) (due <-chan time.Time, stop func())
}

// A Placed store keeps its keys on several nodes, and says which of them will decide a charge. Nodes fail one by one, so
// policies may keep what they know of failures by node. A store without these methods is one node.
type Placed interface {
	// Node names the node that would decide a charge now, as far as the store knows: a short text without
	// credentials, such as the node's address. "" stands for a node that the store does not know, and is the only
	// name in a store of one node. Node does no I/O and does not wait for any.
	Node(c quota.Charge) string
	// Refresh learns anew which node has which keys, and returns when that is known or the context ends. A
	// store of one node has nothing to learn and returns nil.
	Refresh(ctx context.Context) error
}

// A Reporter is a store that reports what it learns of its servers while it runs. A policy asks for reports when it is
// put around the store. A store without this method has nothing to report.
type Reporter interface {
	// Report has the store call these functions from now on, beside those of earlier calls.
	Report(r Reports)
}

// Reports are the functions that a [Reporter] calls: outside its locks, and possibly at the same time. A nil function is
// not called.
type Reports struct {
	// Notice receives the notices for operators of a store that was given no receiver of its own, such as one that
	// was opened from a URL.
	Notice func(quota.Notice)
	// RoundTrip receives the time of a round trip to a node, named as [Placed] names it, whenever the store has
	// measured one.
	RoundTrip func(node string, d time.Duration)
}

// Health is the state of a store's servers, in their own words.
type Health struct {
	// Kind is the server's software in lower case, such as redis, valkey or dragonfly; of several servers that of
	// Version. It is empty where the server does not tell.
	Kind string
	// Version is the server's own version, and not the version of Redis that it claims to match; of several servers
	// the lowest. It is empty where the server does not tell.
	Version string
	// Eviction is the server's policy of eviction, if it may drop quota keys that still hold consumption; each loss
	// admits up to one limit again. It is empty where no server evicts.
	Eviction string
	// Evicted counts the keys that the servers evicted since they started.
	Evicted int64
}

// A HealthReporter is a Store whose servers can be asked how they are.
type HealthReporter interface {
	// Health asks the servers, in one round trip. It fails as a decision does, see the errors of package quota.
	Health(ctx context.Context) (Health, error)
}

// A Wrapper is a Store around another one, such as a policy. Optional interfaces are found through it, see [Find].
type Wrapper interface {
	// Unwrap returns the store inside.
	Unwrap() quota.Store
}

// Find returns the first of a store and the stores inside it, see [Wrapper], that is a T.
func Find[T any](s quota.Store) (found T, ok bool) {
	for s != nil {
		if found, ok = s.(T); ok {
			return found, true
		}
		w, wraps := s.(Wrapper)
		if !wraps {
			break
		}
		s = w.Unwrap()
	}
	return found, false
}

// AtomicityOf returns how far a store decides several keys in one step, asked through its wrappers.
func AtomicityOf(s quota.Store) Atomicity {
	if g, ok := Find[Graded](s); ok {
		return g.Atomicity()
	}
	return AnyKeys
}

// IsPrompt reports whether every call of a store returns by its context's deadline, asked through its wrappers.
func IsPrompt(s quota.Store) bool {
	p, ok := Find[Prompt](s)
	return ok && p.Prompt()
}
