// Package top ranks keys: those that a limit denies most, and those that use most of it. It is an observer of calls, with a
// page and JSON for operators, and keeps a bounded number of keys however many come.
//
//	offenders, err := top.New(nil)
//	if err != nil {
//		return err
//	}
//	limiter, err := quota.NewLimiter(store, limit, &quota.Options{Observers: []func(context.Context, *quota.Call){offenders.Observe}})
//	if err != nil {
//		return err
//	}
//	http.Handle("GET /top", offenders)
//
// # Rankings
//
// A limit has two rankings, with weights in its tokens:
//
//   - Denied: of each denied call, the cost of the charges that did not fit. A cost above the capacity counts as the capacity,
//     and one of 0 as 1. Not counted are peeks, renewals of holds, shadows, and denials by a policy that
//     cannot ask the store ([quota.FromClosed]). Of alternatives those of the decider's list are counted.
//   - Used: the tokens that were charged. Tokens given back, by refunds and settles, are told beside them in [Row.Back], and
//     not subtracted: the order is by use before corrections. A repeat of a request id or correction counts nothing.
//
// Failed calls charge and deny no key, and are in neither.
//
// # Error bounds
//
// The rankings are counted by the algorithm Space-Saving (Metwally, Agrawal and El Abbadi, 2005). Each row has its own error
// bound: the true weight is at least Weight-Error and at most Weight. No error is above Total/Keys of [Options.Keys], so each
// key with a larger part of the total has a row, whatever the order of the calls; and a key without a row has a weight of at
// most [Ranking.Absent]. Most errors are far smaller, often 0.
//
// # Time
//
// Rankings cover the time since [Report.Since]: between one and two of [Options.Window], or less right after the start. A
// whole window is dropped at once, so that the numbers are sums over a definite time.
//
// # A fleet
//
// Each process ranks its own calls. [Merge] adds the reports of several processes up, which may come as JSON from their
// handlers, and keeps the bounds; [Handler] shows the result.
//
// # Memory
//
// A limit takes at most 32 x Keys rows, of about 150 bytes beside the key, and at most [MaxLimits] limits have rankings. A
// call allocates memory only for a key that has no row yet.
//
// # Keys in pages
//
// Keys are names of customers, and chosen by strangers. The page escapes them, has no script, and forbids scripts by its
// Content-Security-Policy. All readers of the page see the keys: serve it behind the checks that operators pass.
// Options.Key can hide them.
//
// # Concurrency
//
// All functions and methods may be called concurrently.
package top
