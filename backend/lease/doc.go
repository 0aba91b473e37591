// Package lease spends a shared limit at the speed of memory. Its store takes quota from the store below in
// chunks, and decides most charges out of what it holds:
//
//	store, err := lease.New(shared, &lease.Options{Instances: func() int64 { return 8 }})
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// It pays where one key is charged often: a limit of the whole fleet, a busy tenant. A key that is charged once in
// a while goes to the store below, decision by decision, as if there were no leases.
//
// # Promises
//
// B is the capacity of a token bucket, r its rate, L Options.Lifetime, n what Options.Instances reports.
//
//   - What is admitted was charged before: in total, at any moment, at most what was charged to the store below and not
//     given back.
//   - Over any interval Δ the fleet admits at most B + r·(Δ + L), and what the rule's tick adds. A lease is not
//     spent after L has passed, counted from before its request was sent.
//   - A process holds at most B/(8·n) tokens of a key, and one such chunk more that is on its way in or back. One that
//     vanishes loses no more than that, until refill.
//   - A denial is the store's: nothing is denied from memory. So the last tokens are not kept from anyone who asks, up
//     to what others hold.
//   - A caller's context ends that caller's wait only. An error of the store reaches those who waited for it, and
//     what is leased is still spent.
//   - Memory and goroutines are bounded: MaxKeys keys, one goroutine, one for each request for a chunk under way, and
//     up to 16 while something goes back.
//
// They hold where no process reports fewer instances than there are, the store's clock does not jump, and a give-back
// takes effect within its timeout of L/10 or not at all. Debits, resets and losses of the store's state add what
// they add without leases; a reset, and a loss, also what other processes hold then.
//
// # Chunks
//
// The next chunk is what the process spent of the key in the last quarter of a lifetime, and at most one part in
// 8·n of what the store has left. So it doubles from one token until it lasts for about that time, and shrinks as
// the limit comes to its end: where it would be no larger than the charge that asks, that charge goes to the
// store as it is, together with what is left of the lease. Limits with a capacity below 16·n are never leased.
//
// A lease that was not touched for a quarter of a lifetime is given back, and so is everything on Close. What is
// given back is what refill cannot have replaced meanwhile: all of it where the bucket is far from full, otherwise
// less by what was refilled since. Giving back more would let the fleet save up quota that the bucket forgets.
//
// # What is leased
//
// Only token buckets (and GCRA, the same rule). The tokens of a window are worthless in the next one: a chunk that
// crosses the boundary would be spent twice or lost.
//
//	charge                         decided by
//	take, debit of 1 or more       the lease if it holds enough; else the store: a debit as it is, a take as above
//	peek of 1 or more              the lease if it holds enough; else the store, which does not count what is leased
//	refund of a FromLease receipt  the lease if it is still the one that was charged; else the store
//	other refunds                  the store
//	reset                          the store; the key's lease is dropped
//	a list, a request id, cost 0   the store; if a list is denied, the leases of its keys go back and it asks again
//	other rules or limits          the store
//
// Decisions out of a lease are [quota.FromLease]. Their Remaining is an estimate: what the lease and, when it was
// charged, the store had left; at least the former can be taken. Their ResetAfter is an estimate too, and At the time
// at which the tokens were charged.
//
// # Policies
//
// Put policies of package resilience around the store below, so that a breaker counts requests and not decisions; a
// memory of denials there spares the store those that a limit at its end costs. A fallback may stand outside.
package lease
