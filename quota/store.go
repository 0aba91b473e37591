package quota

import "context"

// A Store keeps the state of limits and applies charges atomically. Programs make one and hand it to a [Limiter], which
// calls it; authors of backends implement it, or the methods of a driver.Transactor or driver.KV.
//
// Any method may be called concurrently with itself and with the others. The charges that a store gets have passed
// [Check]. It must keep these rules, which package conformance checks:
//
//  1. Meaning: verdicts are those of driver.Apply on the stored states at one time, the store's.
//  2. All-or-nothing: a list is charged whole or not at all, and of alternatives the first that fits alone.
//  3. Traceless: a denied list and a peek change nothing.
//  4. At most once: a call that returns nil charged once; one that returns an error charged nothing,
//     unless the error is ErrIndeterminate.
//  5. Forgetting: state is kept at least until its ResetAfter has passed.
//  6. Context: a context that ended before the charge was sent gives the context's error.
//  7. Hands off: after it returned, a store neither reads the charges nor writes the decisions.
//  8. Close: afterwards every call is ErrClosed, and no goroutine is left.
type Store interface {
	// Charge decides one charge.
	Charge(ctx context.Context, c Charge) (Decision, error)
	// ChargeAll decides a list of charges all-or-nothing and writes a decision for each to out, which is as long as cs.
	// The list is granted if all are allowed. After an error out has no meaning.
	ChargeAll(ctx context.Context, cs []Charge, out []Decision) error
	// Close ends the store. It may be called twice.
	Close() error
}
