// Package lease spends a shared limit at the speed of memory. Its store takes quota from the store below in
// chunks, keeps each chunk as a lease, for a second by default, and decides most charges out of the lease:
//
//	store, err := lease.New(shared, &lease.Options{Instances: func() int64 { return 8 }})
//	if err != nil {
//		return err
//	}
//	limiter, err := quota.NewLimiter(store, limit, nil) // limit is a token bucket
//
// It pays for keys that are charged often: a limit of the whole fleet, a busy tenant. A key that is charged
// once in a while goes to the store below, decision by decision, as if there were no leases.
//
// # Promises
//
// B is the capacity of a token bucket, r its rate, L Options.Lifetime, n the number that Options.Instances
// reports.
//
//   - Tokens are charged before they are admitted: in total, at any moment, the fleet has admitted at most
//     the tokens charged to the store below and not given back.
//   - Over any interval Δ the fleet admits at most B + r·(Δ + L), and the addition of the rule's tick. A
//     lease may not be spent after L has passed, counted from before its request was sent. A take that costs
//     more than the lease has spends it when it asks the store for the rest, however late the answer comes.
//   - A take is charged once, however late answers come. Tokens charged to the store below are granted, leased,
//     given back, or of a request that ended in quota.ErrIndeterminate; those of a failed give-back are lost.
//   - A process holds at most B/(8·n) tokens of a key, and one such chunk more while a chunk is requested or
//     given back. A process that vanishes loses no more than that, until refill.
//   - A denial is the store's: memory denies no charge. So the last tokens stay open to every process, except
//     those that other processes hold.
//   - A caller's context ends only that caller's wait, and no give-back. An error of the store reaches the callers
//     that waited for the request, a panic too, as quota.ErrIndeterminate; leased tokens may still be spent.
//   - Memory and goroutines are bounded: MaxKeys keys, one goroutine, one more for each request in flight,
//     and up to 16 while tokens are given back.
//
// The promises hold where each process reports at least the true number of instances, the store's clock does not
// jump, and a give-back takes effect within its timeout of L/10 or not at all. Debits, resets and losses of the
// store's state admit as much more as they do without leases; a reset, and a loss, also the tokens that other
// processes hold at that time.
//
// # Chunks
//
// The next chunk is the number of tokens of the key that the process spent in the last quarter of a lifetime,
// and at most one part in 8·n of the tokens that the store has left. So it doubles from one token until it
// lasts for about that time, and shrinks as the limit comes to its end: where it would be no larger than the
// charge that asks for it, that charge goes to the store as it is, together with the tokens left in the
// lease. Limits with a capacity below 16·n are never leased.
//
// A lease that was not spent for a quarter of a lifetime is given back, and Close gives back every lease.
// Only tokens that refill cannot have replaced meanwhile are given back: all of the lease where the bucket is
// far from full, otherwise less by the refill since the charge. Giving back more would let the fleet save up
// quota that the bucket forgets.
//
// # Which charges are leased
//
// Only token buckets (and GCRA, the same rule). The tokens of a window are worthless in the next one: a chunk
// that crosses the boundary would be spent twice or lost.
//
//	charge                         decided by
//	take, debit of 1 or more       the lease if it holds enough; else the store: a debit as it is, a take as above
//	take ahead of 1 or more        the lease if it holds enough; else the store, as it is
//	take of up to 1 or more        the lease if it holds the most; else the store, as it is
//	charge with a floor, shadow    the store, which counts leased tokens as taken
//	peek of 1 or more              the lease if it holds enough; else the store, which does not count leased tokens
//	refund of a FromLease receipt  the lease if it is still the one that was charged; else the store
//	other refunds                  the store
//	reset                          the store; the key's lease is dropped, or goes back if the store did not reset
//	hold, renewal, spend           the store
//	a list, a request id, cost 0   the store; if a list is denied, the leases of its keys go back and it asks again
//	other rules or limits          the store
//
// Decisions out of a lease are [quota.FromLease]. Their Remaining is an estimate: the tokens of the lease
// and, when it was charged, of the store; at least the lease's tokens can be taken. Their ResetAfter is an
// estimate too, and At the time at which the tokens were charged.
//
// # Policies
//
// Put policies of package resilience around the store below, so that a breaker counts requests and not
// decisions; a memory of denials there saves the store the requests for a limit at its end. A fallback may
// stand outside.
package lease
