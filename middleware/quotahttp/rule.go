package quotahttp

import (
	"net/http"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
)

// A Rule makes the charges of a request. No charges and no error skip the rule; an error refuses the request
// with the status 500. A charge without a limit goes to the limiter's own, or to that of
// [quota.Options.LimitFor], by the plan of the key for example. A program's own function is a rule as well; it
// must return charges of its own at each call.
type Rule func(*http.Request) ([]quota.Charge, error)

// By is the rule that takes one token of each limit for the key. Without limits it is one of the limiter's
// own limit. A limit that is not valid refuses each request with the status 500, and Options.Error is told:
// a program that makes limits of numbers from outside asks their Err first.
func By(key Key, limits ...*quota.Limit) Rule {
	limits = slices.Clone(limits)
	if len(limits) == 0 {
		limits = []*quota.Limit{nil}
	}
	return func(r *http.Request) ([]quota.Charge, error) {
		k, err := key(r)
		if err != nil {
			return nil, err
		}
		charges := make([]quota.Charge, len(limits))
		for i, limit := range limits {
			c := &charges[i]
			c.Limit, c.Key, c.Cost = limit, k, 1
		}
		return charges, nil
	}
}

// Cost is the rule with another cost, such as an estimate of the tokens that an answer will take.
func (rule Rule) Cost(cost func(*http.Request) int64) Rule {
	return rule.with(func(r *http.Request, charges []quota.Charge) {
		n := cost(r)
		for i := range charges {
			charges[i].Cost = n
		}
	})
}

// Floor is the rule with a floor in percent of each limit's capacity, 0 to 100, which must be left after the
// charge: with 20 for free clients and 0 for paid ones, a fifth is left to these. See [quota.Charge].
func (rule Rule) Floor(percent func(*http.Request) int64) Rule {
	return rule.with(func(r *http.Request, charges []quota.Charge) {
		n := percent(r)
		for i := range charges {
			charges[i].Floor, charges[i].FloorOf = n, 100
		}
	})
}

// Shadow is the rule with charges that never deny a request, to try a limit on real traffic, see
// [quota.Charge].
func (rule Rule) Shadow() Rule {
	return rule.with(func(_ *http.Request, charges []quota.Charge) {
		for i := range charges {
			charges[i].Shadow = true
		}
	})
}

// Skip is the rule for the requests for which skip reports false. It is asked before the key is looked for.
func (rule Rule) Skip(skip func(*http.Request) bool) Rule {
	return func(r *http.Request) ([]quota.Charge, error) {
		if skip(r) {
			return nil, nil
		}
		return rule(r)
	}
}

// with is the rule with a change to its charges.
func (rule Rule) with(change func(*http.Request, []quota.Charge)) Rule {
	return func(r *http.Request) ([]quota.Charge, error) {
		charges, err := rule(r)
		if err == nil && len(charges) > 0 {
			change(r, charges)
		}
		return charges, err
	}
}
