package quota

import "context"

// A Store keeps the state of limits and applies charges atomically. Programs call a [Limiter]; authors
// of backends implement a Store, or the two methods of a [KV] and get one from [NewCAS].
//
// Any method may be called concurrently with itself and with the others. The charges a store gets have
// passed [Check]. The rules:
//
//  1. Meaning: verdicts are those of [Apply] on the stored states at one time, the store's.
//  2. All-or-nothing: a list is charged whole or not at all.
//  3. Traceless: a denied list and a peek change nothing.
//  4. At most once: a call that returns nil charged once; one that returns an error charged nothing,
//     unless the error is ErrIndeterminate.
//  5. Forgetting: state is kept at least until its ResetAfter has passed.
//  6. Context: a context that is done before anything was sent gives the context's error.
//  7. Hands off: after it returned, a store neither reads the charges nor writes the decisions.
//  8. Close: afterwards every call is ErrClosed, and no goroutine is left.
type Store interface {
	// Take decides one charge.
	Take(ctx context.Context, c Charge) (Decision, error)
	// TakeAll decides a list of charges all-or-nothing and writes a decision for each to out, which is
	// as long as cs. The list is granted if all are allowed. On an error out holds nothing of meaning.
	TakeAll(ctx context.Context, cs []Charge, out []Decision) error
	// Close ends the store. Closing twice is allowed.
	Close() error
}
