package quotahttp

import (
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/dunglas/httpsfv"

	"github.com/fleetquota/fleetquota/quota"
)

// This file holds the syntax of draft-ietf-httpapi-ratelimit-headers-11, of 23 May 2026, and nothing else
// does: the draft may still change. Both fields are lists of strings with parameters, of RFC 9651:
//
//	RateLimit-Policy: "minute";q=100;w=60    q: the capacity; w: the window in seconds
//	RateLimit: "minute";r=0;t=12             r: the tokens left; t: the seconds within which r may be spent
const (
	policyField = "Ratelimit-Policy" // as package http writes them
	limitField  = "Ratelimit"
)

// maxQuota is the least number that the syntax cannot write. Limits of so many tokens are not told.
const maxQuota = 1_000_000_000_000_000

// Problem types of the draft.
const (
	typeQuotaExceeded   = "https://iana.org/assignments/http-problem-types#quota-exceeded"
	typeReducedCapacity = "https://iana.org/assignments/http-problem-types#temporary-reduced-capacity"
)

// policy is the text of a limit in the two fields: the string with which both begin, and its parameters in
// the policy.
type policy struct{ name, parameters string }

var (
	policies     sync.Map // *quota.Limit to *policy
	policiesKept atomic.Int64
)

// maxPolicies bounds the texts that are kept. A program that makes limits as it goes pays for each text anew
// beyond that.
const maxPolicies = 1 << 12

// policyOf returns the text of a limit.
func policyOf(limit *quota.Limit) *policy {
	if p, ok := policies.Load(limit); ok {
		return p.(*policy)
	}
	item := httpsfv.NewItem(limit.Name())
	name, err := httpsfv.Marshal(item)
	if err != nil { // a limit's name is letters, digits, '.', '_' and '-'
		return &policy{}
	}
	item.Params.Add("q", limit.Capacity())
	if w := limit.Window(); w > 0 {
		item.Params.Add("w", seconds(w))
	}
	whole, err := httpsfv.Marshal(item)
	if err != nil { // a limit that is told has less than maxQuota tokens
		return &policy{}
	}
	p := &policy{name, whole[len(name):]}
	if policiesKept.Load() < maxPolicies {
		policiesKept.Add(1)
		policies.Store(limit, p)
	}
	return p
}

// appendPolicy appends a limit's element of RateLimit-Policy.
func appendPolicy(b []byte, limit *quota.Limit) []byte {
	p := policyOf(limit)
	return append(append(b, p.name...), p.parameters...)
}

// appendLimit appends a limit's element of RateLimit.
func appendLimit(b []byte, limit *quota.Limit, d *quota.Decision) []byte {
	b = append(append(b, policyOf(limit).name...), ";r="...)
	b = strconv.AppendInt(b, left(d), 10)
	if t := effective(limit, d); t != quota.Never {
		b = strconv.AppendInt(append(b, ";t="...), seconds(t), 10)
	}
	return b
}

// effective returns the time within which the tokens that are left may be spent: until the denied request
// fits, or else until more is there. A bucket without a token has the next one long before it is full. A limit of how
// many run at once has no such time: its slots come back whenever a request ends.
func effective(limit *quota.Limit, d *quota.Decision) time.Duration {
	switch {
	case limit.TTL() > 0 && limit.Window() == 0:
		return quota.Never
	case !d.Allowed:
		return retryAfter(limit, d)
	case d.Remaining == 0 && limit.Spec().Ahead && limit.Capacity() > 0 && limit.Window() > 0:
		return min(d.ResetAfter, limit.Window()/time.Duration(limit.Capacity())+1)
	}
	return d.ResetAfter
}

// left returns the tokens that can be taken: none in debt.
func left(d *quota.Decision) int64 { return max(d.Remaining, 0) }

// seconds rounds up.
func seconds(d time.Duration) int64 {
	s := int64(d / time.Second)
	if d%time.Second > 0 {
		s++
	}
	return s
}
