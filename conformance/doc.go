// Package conformance decides whether a backend keeps the promises of [quota.Store]. The author of one
// writes a test:
//
//	func TestConformance(t *testing.T) {
//		conformance.Run(t, conformance.Harness{
//			Open: func(t testing.TB, o conformance.Opening) quota.Store {
//				store, err := mystore.New(server, &mystore.Options{Table: o.Data, Clock: o.Clock})
//				if err != nil {
//					t.Fatal(err)
//				}
//				return store
//			},
//		})
//	}
//
// Each rule is a subtest with its cases below it, such as TestConformance/S3_Traceless/list.
//
// # The rules
//
// S1 to S8 are those of the [quota.Store], with its numbers:
//
//	S1 Meaning       verdicts are those of driver.Apply on the stored states at one time, the store's
//	S2 AllOrNothing  a list is charged whole or not at all
//	S3 Traceless     a denied list and a peek change nothing
//	S4 AtMostOnce    a call that returns nil charged once; one that returns an error charged nothing, unless the error is ErrIndeterminate
//	S5 Forgetting    state is kept at least until its ResetAfter has passed
//	S6 Context       a context that is done before anything was sent gives the context's error
//	S7 HandsOff      after it returned, a store neither reads the charges nor writes the decisions
//	S8 Close         afterwards every call is ErrClosed, and no goroutine is left
//
// C1 to C8 are what the rest of package quota says of stores:
//
//	C1 Keys     every limit and key has a quota of its own, whatever bytes the key has
//	C2 Change   limits with one name and different numbers share their consumption
//	C3 IDs      a request id is granted once and repeated faithfully; denials and peeks are not remembered
//	C4 Atomic   calls at the same time are decided as in some order, one after the other
//	C5 Bounds   never more is admitted than the limit allows, and never less
//	C6 Graded   a list beyond Atomicity is ErrCrossSlot, or taken in parts that are given back and marked Split
//	C7 Prompt   a store that says it is prompt returns by its context's deadline
//	C8 Misfit   state of another rule under a limit's name is ErrMisconfigured, and stays as it is
//
// # No false positives
//
// A correct store passes on any machine and with any clock: time that passes is never taken for a fault.
// Verdicts are compared with the Go kernels at Decision.At, the store's own time, so that a real clock is as
// exact as one that the suite sets. Some faults show only at times; the suite may miss one.
//
// # Failures
//
// A failure names the rule and what it means, what was answered and what should have been, the shortest
// sequence of charges that was found to show it, and the seed: FLEETQUOTA_SEED in the environment repeats
// the random choices. FLEETQUOTA_FULL=1 makes the suite search ten times as long.
//
// # Algorithms
//
// [Algorithm] does the same for a rule of one's own: A1 to A7 are the rules of [quota.Algorithm], A8 to A17 what
// the types around it say. Where it has Lua, and a redis-server is there, Lua is compared with Go.
//
// # Reports
//
// With a directory in FLEETQUOTA_CONFORMANCE_REPORT, Run leaves a [Report] there as JSON.
package conformance
