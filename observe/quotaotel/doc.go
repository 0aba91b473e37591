// Package quotaotel tells OpenTelemetry of the decisions of limiters: as metrics, as events on the callers' spans, and as spans around
// a store's round trips. It needs the API alone; the SDK is the program's.
//
//	telemetry, err := quotaotel.New(nil)
//	if err != nil {
//		return err
//	}
//	store = telemetry.Trace(store) // below the policies
//	limiter, err := quota.NewLimiter(store, limit, &quota.Options{Observers: []func(context.Context, *quota.Call){telemetry.Observe}})
//	if err != nil {
//		return err
//	}
//	telemetry.Watch(limiter)
//
// # Metrics
//
// They are those of package quotaprom, under names of OpenTelemetry:
//
//	fleetquota.decisions             {decision}  charges, by fleetquota.limit, .op, .outcome and .source
//	fleetquota.tokens                {token}     charged, returned, denied, shadow_denied, and replayed under a request id, by fleetquota.limit and .outcome
//	fleetquota.never_denials         {decision}  denials of charges that can never fit, by fleetquota.limit
//	fleetquota.errors                {call}      calls that failed, by error.type, a word of driver.Class
//	fleetquota.decision.duration     s           the time of calls that asked the store, without waits, by fleetquota.source
//	fleetquota.utilization           1           how much of the limit was used after a decision, by fleetquota.limit
//	fleetquota.denial.retry_after    s           how long denied callers have to wait, by fleetquota.limit
//	fleetquota.wait.duration         s           how long calls of Wait waited for quota, by fleetquota.limit
//	fleetquota.waiters               {call}      calls of Wait that wait now
//	fleetquota.reservations_open                 reservations that are not finished; and so _owed, _settled, _released, _lost and _lapsed
//
// The outcome of a charge is allowed where it was made; denied where it did not fit and its list was denied; not_made where it
// fits, or was not the alternative taken; shadow_denied of a shadow that did not fit; error where the call failed, and refused
// where it failed before the store was asked.
//
// The numbers of stores and policies, see [driver.Metric], are called fleetquota. and their name, such as
// fleetquota.breakers_open, with the attributes fleetquota.store (primary, or fallback for the store of a fallback) and
// fleetquota.node.
//
// Measurements are made in the caller's context, so that the SDK can add exemplars.
//
// # Spans
//
// A call adds events to the span in its context, if that records, and makes none of its own: fleetquota.denied with the
// numbers of the deciding charge, fleetquota.failed with error.type, and fleetquota.waited with the time of a wait.
//
// [Telemetry.Trace] puts a span around each call of a store that has servers. Its parent is the caller's span. It covers the
// time in which the call waited for a batch, for that is the caller's time. A decision that a policy or a lease around the
// store makes by itself has no span, and a store in memory gets none at all.
//
// # Cardinality
//
// No attribute holds a key. At most [Options.MaxLimits] names of limits are told apart, and further ones are "other". With
// [Options.Tenant] decisions and tokens have the attribute fleetquota.tenant too, of at most MaxTenants values and "other".
//
// # Cost
//
// A call of one charge took about a microsecond in the SDK v1.47, on two cores that other programs shared, and no allocation.
// BenchmarkObserve measures it.
//
// # Concurrency
//
// All functions and methods may be called concurrently.
package quotaotel
