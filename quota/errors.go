package quota

import (
	"errors"
	"fmt"
)

// The errors of this library. Match them with [errors.Is]; the cause is wrapped. Where the context
// was done before anything was sent, the context's own error is returned instead and nothing was
// charged.
var (
	// ErrInvalid: a key, cost, limit or option was refused before any I/O. Not charged.
	ErrInvalid = errors.New("invalid request")
	// ErrUnavailable: the store refused or could not be reached. Not charged.
	ErrUnavailable = errors.New("store unavailable")
	// ErrIndeterminate: the connection or the time ran out after the charge may have left. Whether it
	// was charged is unknown, so it is not ErrUnavailable, and retrying it by habit would charge twice;
	// a charge with a request id may be repeated safely.
	ErrIndeterminate = errors.New("outcome unknown")
	// ErrConflict: a compare-and-swap lost too often, and each attempt was definitely not applied. Not charged.
	ErrConflict = errors.New("too many conflicting updates")
	// ErrCrossSlot: the charges cannot be decided in one step on this store, and the caller asked for
	// nothing less. Not charged.
	ErrCrossSlot = errors.New("keys in different slots")
	// ErrOverloaded: a bound of this process (waiters, keys, calls in flight) is reached. Not charged.
	ErrOverloaded = errors.New("overloaded")
	// ErrMisconfigured: what the store holds or allows does not fit: another rule's state under the
	// key, a newer release's layout, a missing permission. Not charged.
	ErrMisconfigured = errors.New("misconfigured")
	// ErrClosed: the store was closed. Not charged.
	ErrClosed = errors.New("closed")
)

// invalid returns an ErrInvalid that names the field, the value and what is accepted.
func invalid(field string, value any, accepted string) error {
	if s, ok := value.(string); ok {
		const most = 64
		if len(s) > most {
			s = s[:most] + "…"
		}
		value = fmt.Sprintf("%q", s)
	}
	return fmt.Errorf("quota: %w: %s is %v; accepted: %s", ErrInvalid, field, value, accepted)
}
