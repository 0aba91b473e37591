// Package resilience keeps the fleet's promise while its store is slow, overloaded or gone. A policy
// wraps a [quota.Store] and the result is a quota.Store:
//
//	store, err := resilience.Wrap(store,
//		resilience.FailClosed(nil),
//		resilience.Breaker(nil),
//		resilience.Bulkhead(256),
//		resilience.Timeout(100*time.Millisecond, nil))
//
// or, which is the same, [Standard]:
//
//	store, err := resilience.Standard(store, resilience.FailClosed(nil), nil)
//
// # The order
//
// Policies are given outermost first, in the one order that is sound; [Wrap] refuses every other and
// says why. Any of them may be left out.
//
//	fallback( memory( breaker( bulkhead( retry( hedge( timeout( store )))))))
//
// The reasons:
//
//   - The fallback, or [FailOpen] or [FailClosed] in its place, answers what everything inside failed to.
//     Anything around it would take its answers for the store's: a breaker there would never open.
//   - The [DenialMemory] answers without the store, so it costs no probe, no slot and no attempt, and
//     answers while the breaker is open; but it must learn from the store alone, so it is inside the
//     fallback.
//   - The [Breaker] counts a decision once, however many attempts were made for it, and refuses before a
//     slot or an attempt is spent.
//   - The [Bulkhead] bounds decisions. Inside a retry its refusals would be tried again: more load
//     because there is too much.
//   - [Retry] and [HedgeFailsafe] repeat an attempt, and every attempt has its timeout.
//   - The [Timeout] is next to the store, so that nothing else ever waits for it.
//
// # The policies
//
// What each guarantees, what it costs, and what it does with the three errors that are about the store
// and not about the request. Any other error passes every policy as it is.
//
//	policy        guarantees                                costs
//	Fallback      a share of the limit in an outage         a map; in an outage two local operations a decision
//	FailOpen      an answer: admitted, FromOpen             nothing while healthy; the quota is not kept in an outage
//	FailClosed    an answer: denied, FromClosed             nothing while healthy; an outage denies everyone
//	DenialMemory  an exhausted key costs the store nothing  a map; denies too long after another process's refund
//	Breaker       an outage costs microseconds a decision   nothing while healthy; a wrong guess costs one delay
//	Bulkhead      at most n decisions in flight             an atomic counter; refuses above n
//	Retry         a short fault is not seen                 load during faults; only for peeks and request ids
//	Timeout       a decision by T, whatever the store does  one allocation; for a store that is not prompt a goroutine
//
//	policy        ErrMisconfigured     ErrOverloaded                       ErrIndeterminate
//	Fallback      passes               answers                             answers
//	FailOpen      passes, notice       passes; answers if so set           answers
//	FailClosed    passes, notice       passes; answers if so set           answers
//	DenialMemory  passes               passes                              passes; forgets the key if it was a refund
//	Breaker       not counted, notice  counted, unless by a policy inside  counted, unless the caller's context ended
//	Bulkhead      passes               its own refusals, at once           passes
//	Retry         passes               passes                              repeats a peek or a request id
//	Timeout       passes               its own, of abandoned calls         its own, where T came after the send
//
// The notice of a misconfigured store is given by the outermost policy that has somebody to tell, at
// most once a minute.
//
// # Requests that may be repeated
//
// A charge without a request id is sent at most once, whatever the policies: who repeats one whose
// outcome is unknown charges twice. Retries and hedges apply to peeks and to charges with a
// [quota.Charge.ID]; every other charge goes straight through them, once.
//
// # Errors of one round trip
//
// Where several calls share a round trip, their errors should be [Shared]: a breaker then counts one
// failure for it.
//
// # Unwrapping
//
// Every store this package makes has the methods Unwrap, Atomicity and Prompt, which tell of the store
// inside what it says of itself. [BreakerState] looks through them.
package resilience
