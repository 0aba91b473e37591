// Package driver is for authors of stores and of wrappers around stores. Programs that spend quotas do not need it: they
// use package quota.
//
// The shortest store is a KV, which loads and compares-and-swaps a few texts:
//
//	type table struct{ … }
//
//	func (t *table) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error)
//	func (t *table) Swap(ctx context.Context, changes []driver.Change) (swapped bool, err error)
//
//	store, err := driver.NewCAS(&table{}, nil)
//
// It has every algorithm, lists of charges, request ids and retries. A database with transactions is a [Transactor], of one
// method, of which [NewTransactional] makes a store with the same properties. A store that can run Go beside its data
// implements [quota.Store] itself: it reads an [Item] for each charge, calls [Apply], and
// writes the items that Apply marked, under the key that [AppendKey] gives, for at least Decision.ResetAfter and
// [ExpirySlack]. Package conformance checks either kind.
//
// # Input
//
// A store gets charges that have passed [quota.Check]: 1 to [quota.MaxCharges] of them, with limits that NewLimit made, valid
// keys, costs of 0 or more, no limit and key twice, and one request id for all. A store that sends a charge to another
// place to be decided there sends the numbers of [quota.Charge.Request].
//
// # Optional interfaces
//
// [Graded], [Prompt], [Placed] and [HealthReporter] tell callers more about a store, a [Measured] tells numbers for metrics, and a
// [Lister] lists its keys. [Find]
// finds them through wrappers, so a [Wrapper] need not pass on those that it does not change. [KeyLister] extends a [KV] or
// [Transactor]. [Scripted], [Moving], [Sharer] and [OneSharer] extend a [quota.Algorithm].
//
// # Errors
//
// A store's error must carry one of package quota's errors, or be the context's own, so that callers know whether they
// were charged; [Classify] and [Sentinel] help. An error that several calls got from one round trip should be a
// [RoundTripError], made by [WithRoundTrip]. An error of a part of a list that one node of several decides should name the node,
// see [AtNode].
//
// # Concurrency
//
// All functions may be called concurrently, on charges, items and decisions of the caller's own.
package driver
