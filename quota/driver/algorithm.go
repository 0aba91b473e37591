package driver

import "github.com/fleetquota/fleetquota/quota"

// A Scripted Algorithm can run inside Redis, so that a decision takes one round trip. Without Lua a store on Redis
// decides by compare-and-swap, in two, and so it does with the rules of a program beyond the first 64. A server keeps three
// scripts or so for each rule. Stores on Redis call it; authors of rules implement it.
type Scripted interface {
	// Lua returns the body of a Lua 5.1 function that decides exactly as Decide does. It must be pure arithmetic: no
	// redis.call, no globals but floor, ceil, min, max and the table library. It must be a constant of the Rule. Its
	// parameters are
	//
	//	u, a, b, c, tail   the state: Unit (0 in the zero State), A, B, C; Tail as a table, or nil
	//	op, cost, at, now  the request: Op as a number (5, OpAhead, only where Spec.Ahead is set; 6 is OpUpTo; 7, 8 and
	//	                   9, OpHold, OpSpend and OpRenew, only where Spec.TTL is set), Cost (2^52 for any above), Arg;
	//	                   the time
	//	unit, p1 … p8      Spec.Unit and Spec.Params
	//	keep               the request's Floor (2^52 for any above): of OpSpend and OpRenew how many tokens were held
	//
	// and it returns
	//
	//	allowed, changed   Verdict.Allowed, Verdict.Write; nil, false only as [Moving] says
	//	reset              Verdict.ResetAfter
	//	u, a, b, c, tail   the state to keep, u 0 for the zero State; its numbers are 0 or more
	//	taken              the tokens that an allowed OpUpTo takes, the time at which an allowed OpHold or OpRenew lapses, 0
	//	                   for OpSpend; anything for other operations
	//
	// Numbers are doubles: keep every intermediate below 2^53, and dividends and divisors below 2^52.
	// Do not change the table tail; make a new one. In an assignment of several values, do not read a variable that
	// the same assignment sets: miniredis assigns before it evaluates the rest.
	Lua() string
}

// A Moving Algorithm is a Scripted one whose Lua needs numbers that change as time goes by, such as the boundaries of a calendar's
// windows. A store on Redis sends it those for the time that the server's clock probably shows. Where it shows another, for which
// they do not serve, the store, which learns that time from the reply, sends the charge again with the right ones. Stores
// that run Lua must ask for them; authors of rules implement it.
type Moving interface {
	Scripted
	// ParamsAt returns p1 to p8 for Lua, in place of Spec.Params, and the times [from, to), around now, for which they serve: at
	// these Lua decides with them as Decide does, and from any such numbers alike. At other times it must return nil for
	// allowed, and false for changed. It is a pure function, and safe for concurrent use.
	ParamsAt(now quota.Micros) (params [8]int64, from, to quota.Micros)
}

// A Listed Algorithm keeps a list in its states, see State.Tail. A decision takes time that grows with the list, and a server
// that runs a script does nothing else meanwhile. So a store on Redis lets the fewer charges share a script the longer their
// lists are: it goes by the lists that it read lately, and before by MaxTail. A list of charges goes in one script
// whatever its size, so a rule for lists of many charges should have short states. Stores on Redis call it; authors of rules
// implement it.
type Listed interface {
	// MaxTail returns how many numbers a State.Tail may have, as a rule.
	MaxTail() int
}

// A Sharer is an Algorithm that can be split among the instances of a fleet: each instance decides on a share of its own
// while the common store cannot be reached. A fallback policy calls it; authors of rules implement it.
type Sharer interface {
	// Share returns the rule for one of n instances: one n-th of the capacity, rounded down, and never more than one
	// n-th of the rate. A capacity below n gives a share of 0, which denies every cost above 0. The share has the same
	// Rule, so that a state carries over from one share to another. For an n of 1 or less Share returns the whole. It
	// fails with ErrInvalid where a share above 0 is too slow for the rule's numbers.
	Share(n int64) (quota.Algorithm, error)
}

// A OneSharer is a Sharer whose shares can be kept at one token or more. Such shares of a capacity below n add up to more
// than the capacity, though not to more than the rate. A fallback policy calls it where it is told to.
type OneSharer interface {
	Sharer
	// ShareAtLeastOne is Share, with a capacity of at least 1 unless the whole capacity is 0. It fails with ErrInvalid
	// where that is too slow for the rule's numbers.
	ShareAtLeastOne(n int64) (quota.Algorithm, error)
}
