package quota

import (
	"context"
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

// ChargeState says whether a call was charged.
type ChargeState uint8

const (
	// NotCharged: the call charged nothing, and may be repeated.
	NotCharged ChargeState = iota
	// WasCharged: the decisions say how much, see Decision.Charged; of a denial it is 0.
	WasCharged
	// ChargeUnknown: the call may have been charged. With a request id it may be repeated, else not.
	ChargeUnknown
)

var chargeStates = [...]string{"no", "yes", "unknown"}

// String returns "no", "yes" or "unknown".
func (c ChargeState) String() string {
	if int(c) < len(chargeStates) {
		return chargeStates[c]
	}
	return "invalid"
}

// Charged says whether a call that returned err was charged. An error that is neither one of this package's nor a
// context's own is ChargeUnknown.
func Charged(err error) ChargeState {
	if err == nil {
		return WasCharged
	}
	if errors.Is(err, ErrIndeterminate) {
		return ChargeUnknown
	}
	for _, definite := range [...]error{ErrInvalid, ErrUnavailable, ErrConflict, ErrCrossSlot, ErrOverloaded, ErrMisconfigured, ErrClosed,
		context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, definite) {
			return NotCharged
		}
	}
	return ChargeUnknown
}

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
