// Package conformance tests whether a backend keeps the promises of [quota.Store]. The whole test of a backend is:
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
// Authors of backends and of algorithms need this package, in tests; programs that use quotas do not. It imports no
// client of a database and starts no server.
//
// Each rule is a subtest with its cases below it, such as TestConformance/S3_Traceless/lists.
//
// # The rules
//
// S1 to S8 are the rules of [quota.Store], with its numbers:
//
//	S1 Meaning       verdicts are those of driver.Apply on the stored states at one time, the store's
//	S2 AllOrNothing  a list is charged whole or not at all, and of alternatives the first that fits alone
//	S3 Traceless     a denied list and a peek change nothing
//	S4 AtMostOnce    a call that returns nil charged once; one that returns an error charged nothing, unless the error is ErrIndeterminate
//	S5 Forgetting    state is kept at least until its ResetAfter has passed
//	S6 Context       a context that ended before the charge was sent gives the context's error
//	S7 HandsOff      after it returned, a store neither reads the charges nor writes the decisions
//	S8 Close         afterwards every call is ErrClosed, and no goroutine is left
//
// C1 to C9 are the promises that the rest of package quota and package driver make for stores:
//
//	C1 Keys     every limit and key has a quota of its own, whatever bytes the key has
//	C2 Change   limits with one name and different numbers share their consumption; a rule that keeps no state leaves it
//	C3 IDs      a request id is granted once and repeated faithfully; denials and peeks are not remembered
//	C4 Atomic   calls at the same time are decided as in some order, one after the other
//	C5 Bounds   never more is admitted than the limit allows, and never less
//	C6 Graded   a list beyond Atomicity is ErrCrossSlot, decided in one step all the same, or taken in parts
//	            that are given back and marked Split; alternatives beyond it are never taken in parts
//	C7 Prompt   a store that says it is prompt returns by its context's deadline
//	C8 Misfit   state of another rule under a limit's name is ErrMisconfigured, and stays as it is
//	C9 Listing  every key that stays is listed, under its limit, in pages of the size, and no key that the listing does
//	            not name
//
// # No false positives
//
// A correct store passes on any machine and with any clock: the suite never takes passing time for a fault, and waits for a store
// longer where other work slows the machine down. It compares
// verdicts with the Go kernels at Decision.At, the store's own time, so that a real clock is as exact as a clock that
// the suite sets. Some faults show only in some runs; the suite may miss one.
//
// # Failures
//
// A failure names the rule and its meaning, the answer and the right answer, the shortest sequence of charges found
// that shows the fault, and the seed: FLEETQUOTA_SEED in the environment repeats the random choices.
// FLEETQUOTA_FULL=1 makes the suite search ten times as long, and go test -short makes it play random sequences of charges for a
// third of their time. FLEETQUOTA_STRICT=1 has provisional cases fail the test. The last line names the failure to begin with. A
// store that answers none of the simplest calls fails the case answers, within seconds, and the run ends.
//
// # Algorithms
//
// [Algorithm] tests algorithms in the same way: A1 to A7 and A18 are the rules of [quota.Algorithm], A8 to A17 and A19 the
// promises of the types around it. Where the harness evaluates Lua, the Lua text of an algorithm is compared with its Go code.
//
// # Faults
//
// The test of a store must be able to break its connection: Harness.Fault does. [FaultyKV],
// [FaultyStore] and [Proxy] are connections that break. Without Fault, or where it never loses the reply to a charge, the
// last line of the test says so.
//
// A wrapper may decide in the store's place and say so by Decision.Source. The suite tests the calls that the store answered. Of
// a call that is [quota.FromFallback] it demands that the store is charged once for the tokens that it tells, by the end of
// Close, and at most once more, where the call reached the store and the reply was lost; a request id does not make these one.
// Tokens that such a call holds may be held in the store, or lapse where they are.
//
// # Processes, and the race detector
//
// Harness.Process has the suite charge by two processes. Run the test with -race too: a store that writes to the caller's
// slices too late, or to a map of its own without a lock, is found by the race detector and seldom by its answers. Random
// searches are shorter then.
//
// # Reports
//
// With a directory in FLEETQUOTA_CONFORMANCE_REPORT, Run leaves a [Report] there as JSON.
package conformance
