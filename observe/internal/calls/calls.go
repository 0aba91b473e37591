// Package calls has the outcomes of observed calls, by one rule for all packages of metrics.
package calls

import "github.com/fleetquota/fleetquota/quota"

// An Outcome is the outcome of a charge.
type Outcome uint8

const (
	Allowed      Outcome = iota // it was made
	Denied                      // it did not fit, and its list was denied
	NotMade                     // it fits, or was not the alternative taken, and nothing was charged
	ShadowDenied                // a shadow that did not fit
	Failed                      // its call failed
	Refused                     // its call failed before the store was asked
	Outcomes     = iota         // how many there are
)

// String returns the outcome as labels have it.
func (o Outcome) String() string {
	return [Outcomes]string{"allowed", "denied", "not_made", "shadow_denied", "error", "refused"}[o]
}

// OfError returns the outcome of the charges of a call that failed.
func OfError(c *quota.Call) Outcome {
	if c.Refused {
		return Refused
	}
	return Failed
}

// Tokens are a kind of tokens that a charge counts.
type Tokens uint8

const (
	NoTokens     Tokens = iota
	Charged             // by this call
	Returned            // given back
	Replayed            // charged by an earlier call with the same request id
	NotTaken            // asked for by a denied charge
	NotShadowed         // asked for by a shadow that did not fit
	KindsOfToken = iota // how many there are
)

// String returns the kind as labels have it.
func (k Tokens) String() string {
	return [KindsOfToken]string{"", "charged", "returned", "replayed", "denied", "shadow_denied"}[k]
}

// A Charge has the outcome of a charge, and the tokens that count for it.
type Charge struct {
	Outcome Outcome
	Tokens  Tokens
	Count   int64 // of the tokens
}

// Of returns the outcome of charge i of a call that was decided.
func Of(call *quota.Call, i int) Charge {
	c, d := &call.Charges[i], &call.Decisions[i]
	made := call.Granted && d.Alternative == call.Decisions[call.Decider].Alternative
	switch {
	case made && d.Allowed && d.Replayed:
		return Charge{Allowed, Replayed, max(d.Charged, 0)}
	case made && d.Allowed && d.Charged > 0:
		return Charge{Allowed, Charged, d.Charged}
	case made && d.Allowed && d.Charged < 0:
		return Charge{Allowed, Returned, -d.Charged}
	case made && d.Allowed:
		return Charge{Outcome: Allowed}
	case d.Shadow && !d.Allowed:
		return asked(ShadowDenied, NotShadowed, c)
	case !call.Granted && !d.Allowed:
		return asked(Denied, NotTaken, c)
	}
	return Charge{Outcome: NotMade}
}

// asked returns the outcome of a charge that did not fit. A peek asks for no tokens.
func asked(o Outcome, k Tokens, c *quota.Charge) Charge {
	if c.Op == quota.OpPeek {
		return Charge{Outcome: o}
	}
	return Charge{o, k, c.Cost}
}

// Utilization returns how much of the limit was used after a decision; above 1 is debt. It reports false for a peek, and for a
// policy's answer, which has no state of the key.
func Utilization(c *quota.Charge, d *quota.Decision) (used float64, ok bool) {
	if c.Op == quota.OpPeek || d.Capacity <= 0 || d.Source == quota.FromOpen || d.Source == quota.FromClosed {
		return 0, false
	}
	return 1 - float64(d.Remaining)/float64(d.Capacity), true
}

// A Source is where a decision was made: one of quota.Source, UnknownSource or NoSource.
type Source uint8

const (
	UnknownSource = Source(quota.FromLease) + 1 // that this release does not know
	NoSource      = UnknownSource + 1           // of a call that failed
	Sources       = int(NoSource) + 1           // how many there are
)

// SourceOf returns the source of a decision.
func SourceOf(d *quota.Decision) Source { return min(Source(d.Source), UnknownSource) }

// String returns the source as labels have it.
func (s Source) String() string {
	if s == NoSource {
		return "none"
	}
	return quota.Source(s).String()
}
