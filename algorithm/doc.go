// Package algorithm has the rules that limits are kept by: token bucket, sliding window, sliding window log,
// fixed window and calendar, and the rules without quota and without limit. Each is a pure function over integers, see
// [quota.Algorithm].
//
//	bucket := algorithm.TokenBucket(1000, 21, 2*time.Second) // 10.5 tokens a second, exactly
//	limit := quota.NewLimit("tokens", bucket)
//	limiter := quota.Must(quota.NewLimiter(local.New(), limit, nil))
//	d, err := limiter.Take(ctx, "agent-123", 250)
//
// A limit never changes, and may be used concurrently; so may the algorithms here.
//
// # Choosing
//
//	rule              admits at most                             state        use it for
//	TokenBucket       capacity + rate·Δ in any interval Δ        2 numbers    bursts over a steady rate; the default
//	SlidingWindow     2·limit in any window, 1·limit if steady   3 numbers    "n a minute", cheaply
//	SlidingWindowLog  limit in any window                        2 a charge   "n a minute", to the letter; few charges
//	FixedWindow       limit in each aligned window               2 numbers    "n a calendar day (UTC)"
//	FixedWindowOffset    limit in each window, begun later       2 numbers    "n an hour, from a quarter past"
//	FixedWindowFromFirst  limit in each window from first use    2 numbers    "n a session", resets spread out
//	Calendar          limit in each day, week, month or year     3 numbers    "n a month, from the 15th, in Berlin"
//	Held(rule, ttl)   as the rule inside, held tokens included   and 38       estimates: hold, then spend; crashes come back
//	Concurrency       n tokens in use at once                    38 numbers   streams, jobs and connections at once
//	DenyAll           nothing                                    none         a plan that is switched off
//	Unlimited         everything                                 none         a plan without this limit
//
// # Numbers
//
// All arithmetic is on integers below 2^53, so that the same rule gives the same answer in Lua. Rates may be
// from one in ten years to 10^13 a second and capacities from 0, which denies, to 2^52-1, within two bounds: every
// number of a state must be below 2^52, and a full debt must be repaid within ten years. Where microseconds are too
// fine for that, a limit counts time in ticks of 10 µs, 100 µs, 1 ms and so on, the finest that fits and divides its
// period; a token bucket then admits at most capacity + rate·(Δ + one tick). Where no tick fits, the constructor
// refuses the numbers: its rule carries a quota.ErrInvalid, which says how much would be accepted, to quota.NewLimit and
// the limiter.
//
// # Changes
//
// The numbers of a limit may change while it is in use, see [quota.NewLimit]: consumed tokens stay consumed. New
// numbers hold for the time since a key's last charge too, because a state has no rate: a bucket that gets a higher
// rate counts the refill of that time by it. Windows that are fixed or slide finish a window by the length that it
// began with, and those of a calendar by the zone and anchor.
//
// # Debt
//
// A debit charges the amount that was really used, even where fewer tokens are left. Debt may grow as far as
// the two bounds allow (Spec.Debt is that depth in tokens); a debit beyond it is forgotten.
//
// # Time
//
// A state more than a second ahead of the clock shows that the clock was set back: the state is moved to the
// clock's time with its consumption unchanged. A state that is up to a second ahead stays, until the clock
// has reached it. A clock set forward by Λ lets a token bucket admit at most min(capacity, rate·Λ) too much,
// and a window one limit.
package algorithm
