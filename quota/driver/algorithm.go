package driver

import "github.com/fleetquota/fleetquota/quota"

// Scripted is what an Algorithm adds to run inside Redis, in the same round trip. Without it a store on
// Redis hosts the algorithm by compare-and-swap, in two.
type Scripted interface {
	// Lua returns the body of a Lua 5.1 function with the meaning of Decide. It is pure arithmetic: no
	// redis.call, no globals but floor, ceil, min, max and the table library. Its parameters are
	//
	//	u, a, b, c, tail   the state: Unit (0 in the zero State), A, B, C; Tail as a table, or nil
	//	op, cost, at, now  the request: Op as a number, Cost (2^52 for any above), At; the time
	//	unit, p1 … p6      Spec.Unit and Spec.Params
	//
	// and it returns
	//
	//	allowed, changed   Verdict.Allowed, Verdict.Write
	//	reset              Verdict.ResetAfter
	//	u, a, b, c, tail   the state to keep, u 0 for the zero State; its numbers are 0 or more
	//
	// Numbers are doubles: keep every intermediate below 2^53, and dividends and divisors below 2^52.
	// Do not change the table tail; make a new one.
	Lua() string
}

// A Sharer is an Algorithm that can be split among the instances of a fleet: each keeps a share on its own
// while they cannot ask the store they have in common.
type Sharer interface {
	// Share returns the rule for one of n instances: one n-th of the capacity, rounded down but at least 1,
	// and of the rate, never more than an n-th. The same rule, so that a state carries over from one share
	// to another. An n of 1 or less is the whole. It fails with ErrInvalid where the share is too slow for
	// the rule's numbers.
	Share(n int64) (quota.Algorithm, error)
}
