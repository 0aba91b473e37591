// Package resilience keeps a fleet's limits working while their store is slow, overloaded or gone.
//
//	store := quota.Must(backend.Open(ctx, "redis://127.0.0.1:6379"))
//	store = quota.Must(resilience.Standard(store, resilience.FailClosed(nil), nil))
//	limiter := quota.Must(quota.NewLimiter(store, limit, nil))
//	d, err := limiter.Take(ctx, "team-7/agent-123", 250) // within 500 ms; denied while Redis is down
//
// A policy wraps a [quota.Store], and the result is a quota.Store. [Standard] puts the usual policies around
// a store, [Wrap] those that the program chooses:
//
//	store, err := resilience.Wrap(store,
//		resilience.FailClosed(nil),
//		resilience.Breaker(nil),
//		resilience.Bulkhead(256),
//		resilience.Timeout(100*time.Millisecond, nil))
//
// # The order
//
// Policies are given outermost first, in the one order that is sound; [Wrap] refuses every other order and
// gives the reason. Any of them may be left out.
//
//	fallback( memory( breaker( bulkhead( retry( hedge( timeout( store )))))))
//
// The reasons:
//
//   - The fallback, or [FailOpen] or [FailClosed] in its position, answers where the store and the policies
//     inside failed. A policy outside would take its answers for the store's: a breaker there would never
//     open.
//   - The [DenialMemory] answers without the store, so its answer costs no probe, slot or attempt, and is
//     there while the breaker is open. But it must remember denials of the store alone, so it is inside the
//     fallback.
//   - The [Breaker] counts a decision once, however many attempts were made for it, and refuses before a slot
//     or an attempt is spent.
//   - The [Bulkhead] bounds decisions. Inside a retry its refusals would be tried again: more load because of
//     too much load.
//   - [Retry] and [HedgeFailsafe] repeat an attempt, and every attempt has its timeout.
//   - The [Timeout] is next to the store, so that no other policy ever waits for it.
//
// # The policies
//
// The first table gives the guarantee and the cost of each policy. The second one gives its reaction to the
// three errors that are about the store and not about the request. Any other error passes every policy
// unchanged.
//
//	policy        guarantees                                costs
//	Fallback      a share of the limit in an outage         a map; in an outage two local operations a decision
//	FailOpen      an answer: admitted, FromOpen             nothing while healthy; the quota is not kept in an outage
//	FailClosed    an answer: denied, FromClosed             nothing while healthy; an outage denies everyone
//	DenialMemory  an exhausted key costs the store nothing  a map; denies too long after another process's refund
//	Breaker       an outage costs microseconds a decision   nothing while healthy; a wrong guess costs one opening
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
// A misconfigured store is reported by the outermost policy that has a receiver of notices, at most once a
// minute.
//
// # Requests that may be repeated
//
// A charge without a request id is sent at most once, whatever the policies, because the repeat of a charge
// whose outcome is unknown would charge twice. Retries and hedges apply to peeks and to charges with a
// [quota.Charge.ID]; every other charge passes them and is sent once.
//
// # Errors of one round trip
//
// Where several calls share a round trip, their errors should be [driver.RoundTripError], which [driver.WithRoundTrip] makes.
// A breaker counts one failure for all errors of one round trip, provided that no more than some hundred
// other round trips failed in between.
//
// # Unwrapping
//
// Every store that this package makes is a [driver.Wrapper]. So [driver.Find] finds an optional interface of
// the store inside, such as [driver.HealthReporter], through all policies, and [BreakerState] finds the
// breaker. [driver.AtomicityOf] and [driver.IsPrompt] answer for all of them together.
package resilience
