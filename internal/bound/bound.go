// Package bound keeps account of the tokens that a fleet admits through outages, and computes how many these
// may be: the bound that resilience.Fallback states, for one key of a token bucket. The tests of package
// resilience and examples/outage check themselves by it.
package bound

import (
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Rule is a token bucket that instances share.
type Rule struct {
	Capacity  int64 // tokens
	Refill    int64 // tokens a second
	Instances int64
	// AtLeastOne says that a share is at least one token, see resilience.FallbackOptions.
	AtLeastOne bool
}

// Terms are the terms of the bound, in tokens, each rounded up.
type Terms struct {
	Burst, Refill             int64 // of the bucket
	ShareBursts, ShareRefills int64 // of all instances' shares
	Losses                    int64 // for all losses of state
}

// Sum is how many tokens the fleet may admit.
func (t Terms) Sum() int64 { return t.Burst + t.Refill + t.ShareBursts + t.ShareRefills + t.Losses }

// Share returns the capacity of one instance's share. A share of 0 admits nothing, so its refill does not count.
func (r Rule) Share() int64 {
	share := r.Capacity / r.Instances
	if r.AtLeastOne {
		share = max(share, 1)
	}
	return share
}

// Bound returns the bound for a time in which the instances served the key in the primary's place for so long
// together, and the primary lost its state so often.
func (r Rule) Bound(elapsed, served time.Duration, losses int) Terms {
	gains := func(d time.Duration, n int64) int64 { // in d, and a tick of the rule
		return (r.Refill*(d.Microseconds()+1) + n*micros - 1) / (n * micros)
	}
	t := Terms{Burst: r.Capacity, Refill: gains(elapsed, 1)}
	if share := r.Share(); share > 0 {
		t.ShareBursts, t.ShareRefills = r.Instances*share, gains(served, r.Instances)
	}
	t.Losses = int64(losses) * (t.Burst + t.ShareBursts)
	return t
}

const micros = 1_000_000 // in a second

// Account is the account of one instance for one key. The zero value is ready to use; methods may be called
// concurrently.
type Account struct {
	mu      sync.Mutex
	sum     Sum
	serving bool      // in the primary's place
	since   time.Time // it was, if serving
	fell    time.Time // when the latest decision of its own was known
}

// Sum is the sum of the accounts of instances.
type Sum struct {
	Store    int64         // tokens, by the primary
	Fallback int64         // tokens, in its place
	Served   time.Duration // how long the key was served in its place
}

// Add returns the sum of both.
func (s Sum) Add(o Sum) Sum {
	return Sum{s.Store + o.Store, s.Fallback + o.Fallback, s.Served + o.Served}
}

// Admitted returns the tokens of both, the primary and its substitute.
func (s Sum) Admitted() int64 { return s.Store + s.Fallback }

// Add notes a decision on a take of cost tokens that was asked for at a time and has just been made. Calls
// overlap, so the order of their decisions is unknown: the time in the primary's place counts from the call
// for its first decision to the primary's answer to a call that was made after all of them.
func (a *Account) Add(asked time.Time, cost int64, d quota.Decision) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !d.Allowed {
		cost = 0
	}
	now := time.Now()
	if d.Source == quota.FromStore {
		a.sum.Store += cost
		if a.serving && asked.After(a.fell) {
			a.serving = false
			a.sum.Served += now.Sub(a.since) + time.Microsecond // a tick of the rule
		}
		return
	}
	a.sum.Fallback += cost
	a.fell = now
	if !a.serving {
		a.serving, a.since = true, asked
	}
}

// Sum returns the account as it is now.
func (a *Account) Sum() Sum {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.sum
	if a.serving {
		s.Served += time.Since(a.since)
	}
	return s
}
