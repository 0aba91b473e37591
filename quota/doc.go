// Package quota keeps limits that a fleet of processes shares: requests, LLM tokens, jobs.
//
//	bucket, err := algorithm.TokenBucket(1000, 10, time.Second) // 1000 tokens, 10 more each second
//	limit, err := quota.NewLimit("tokens", bucket)
//	limiter, err := quota.NewLimiter(local.New(nil), limit, nil)
//
//	d, err := limiter.Take(ctx, "team-7/agent-123", 250)
//	if err == nil && !d.Allowed {
//		time.Sleep(d.RetryAfter)
//	}
//
// A [Limit] names a rule, an [Algorithm]: a pure function over integers. A [Store] keeps what each
// limit and key has consumed and applies charges atomically. A [Limiter] is what programs call. Any
// algorithm runs on any store, and gives the same integers on each of them.
//
// # Decisions
//
// A denial is a [Decision], never an error; an error is never a denial. A denied charge and a peek
// change nothing. A list of charges is decided all-or-nothing, at one time.
//
// # Keys
//
// A key is a path, "team-7/agent-123". Its first segment is the co-location group: keys of one group
// stay together on a partitioned store (in Redis Cluster it is the hash tag), so they can be decided
// in one step. Build keys from identifiers that others choose with [Key], which escapes them.
//
// # Time
//
// Shared decisions use the store's time, in whole microseconds ([Micros]); no client's wall clock
// reaches them. Durations given back are rounded against the caller: never too early.
//
// # Errors
//
// See the variables Err…: each says whether the call was charged. Match with [errors.Is].
//
// # Concurrency
//
// All types here are safe for concurrent use, or are plain values.
package quota
