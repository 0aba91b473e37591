// Package quota is for programs that spend shared quotas: requests, LLM tokens, jobs. Its types Limiter, Limit,
// Charge and Decision are all that such programs need; authors of stores and of rules read [Store] and [Algorithm]
// as well, and package quota/driver.
//
//	limiter, err := quota.NewLimiter(local.New(), quota.NewLimit("tokens", algorithm.TokenBucket(1000, 10, time.Second)), nil)
//	if err != nil {
//		return err
//	}
//	defer limiter.Close()
//
//	d, err := limiter.Take(ctx, "team-7/agent-123", 250)
//	switch {
//	case err != nil: // the store failed; quota.Charged(err) says whether it charged
//	case d.Allowed: // go on
//	case d.RetryAfter == quota.Never: // 250 can never fit
//	default: // denied; the same request fits after d.RetryAfter, and limiter.Wait waits for it
//	}
//
// A [Limit] is a rule, an [Algorithm], under a name: here a bucket of 1000 tokens that gets 10 more each second. A
// [Store] keeps the consumption of each limit and key, and applies charges in one step. A [Limiter] is the front of
// both, and a [Charger] that of a store and many limits. Every algorithm runs on every store, and gives the same integers on each.
//
// # Decisions
//
// A denial is a [Decision], never an error; an error is never a denial. Only [Limiter.Allow], for callers who check an error
// and nothing else, returns a denial as an error, which is [ErrDenied]. A denied charge and a peek change nothing.
// [Charger.ChargeAll] decides a list of charges all-or-nothing, at one time. [Limiter.Wait] and [Charger.WaitAll] wait for their
// turn.
//
// Where the cost is known when the work ends, [Limiter.Reserve] sets an estimate aside and [Reservation.Settle] charges the real
// cost; under a limit with holds the estimate comes back by itself if the process dies. [Limiter.Acquire] waits for one of the
// slots of a limit of how many run at once.
//
// # Keys
//
// A key is a path, such as "team-7/agent-123". Its first segment is its group: keys of one group stay together on
// a store that is spread over several machines, and are decided in one step there. In Redis Cluster the group is
// the hash tag, so all keys of a group live in one slot, on one node. Begin a key with the segment that differs, such as
// "203.0.113.9/ip": keys such as "ip/203.0.113.9" and "user/42" put a whole fleet's keys on one node. Build keys
// from identifiers that others choose with [Key], which escapes them.
//
// # Time
//
// Shared decisions use the store's time, in whole microseconds ([Micros]); no client's wall clock reaches them.
// Durations in decisions are rounded up: a caller that waits that long is never too early.
//
// # Errors
//
// See the variables Err…; match them with [errors.Is]. [Charged] says of any error whether the call was charged.
//
// # Concurrency
//
// All types here are safe for concurrent use, or are plain values.
package quota
