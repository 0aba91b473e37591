package quota

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// The errors of this library. Match them with [errors.Is]; the cause is wrapped. A context that ended before
// the charge was sent gives the context's own error instead: not charged. [Charged] answers for all of them.
var (
	// ErrInvalid: a key, cost, limit or option was refused before any I/O. Not charged.
	ErrInvalid = errors.New("invalid request")
	// ErrDenied: [Limiter.Allow] and [Charger.AllowAll] say so of a call that a limit denied, by a [*Denial]. Other methods,
	// and stores, answer with a decision that is not Allowed. Not charged.
	ErrDenied = errors.New("denied")
	// ErrUnavailable: the store refused or could not be reached. Not charged.
	ErrUnavailable = errors.New("store unavailable")
	// ErrIndeterminate: the connection or the time ran out after the charge may have been sent, or the store's answer is
	// no answer to it; such an error may carry another one too, as its reason. It is unknown whether it was charged: a
	// call without a request id must not be repeated by habit, or it may charge twice; a call with one may.
	ErrIndeterminate = errors.New("outcome unknown")
	// ErrConflict: a compare-and-swap lost too often, and no attempt was applied. Not charged.
	ErrConflict = errors.New("too many conflicting updates")
	// ErrCrossSlot: this store cannot decide the charges in one step, and no other way was allowed. Not charged.
	ErrCrossSlot = errors.New("keys in different slots")
	// ErrOverloaded: a bound of this process was reached: waiters, keys, or calls in flight. Not charged.
	ErrOverloaded = errors.New("overloaded")
	// ErrMisconfigured: the store's content or rights do not fit: another rule's state under the key, a newer
	// release's layout, a missing permission. Not charged, unless the error is ErrIndeterminate too.
	ErrMisconfigured = errors.New("misconfigured")
	// ErrClosed: the store was closed. Not charged, unless the error is ErrIndeterminate too.
	ErrClosed = errors.New("closed")
	// ErrExpired: a reservation was finished later than IDWindow after its hold lapsed, see [Reservation.Settle]. Not charged.
	ErrExpired = errors.New("expired")
)

// ChargeState is the answer of [Charged].
type ChargeState uint8

const (
	// NotCharged: the call charged nothing, and may be repeated.
	NotCharged ChargeState = iota
	// WasCharged: the call returned decisions, and charged as much as they say: 0 where denied.
	WasCharged
	// ChargeUnknown: the call may have charged. It may be repeated only with the request id that it had.
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

// Charged says whether a call that returned err was charged. An error that is neither of this package nor a
// context's own is ChargeUnknown.
func Charged(err error) ChargeState {
	if err == nil {
		return WasCharged
	}
	if errors.Is(err, ErrIndeterminate) {
		return ChargeUnknown
	}
	for _, definite := range [...]error{ErrInvalid, ErrDenied, ErrUnavailable, ErrConflict, ErrCrossSlot, ErrOverloaded, ErrMisconfigured, ErrClosed, ErrExpired,
		context.Canceled, context.DeadlineExceeded} {
		if errors.Is(err, definite) {
			return NotCharged
		}
	}
	return ChargeUnknown
}

// A Denial is the error of [Limiter.Allow] and [Charger.AllowAll] where a limit denied the call; it is ErrDenied.
//
//	var denial *quota.Denial
//	if errors.As(err, &denial) {
//		wait, ever := denial.RetryAfter()
type Denial struct {
	Limit    *Limit   // the limit that denied; of a list the one of which the denial lasts longest
	Key      string   // the key of that charge; the error's text does not show it
	Decision Decision // the answer to that charge
}

// Error returns a text such as `quota: denied by limit "tokens: 1000 burst 10/s bucket": 50 of 1000 left, retry after 20s`.
func (d *Denial) Error() string {
	text := fmt.Sprintf("quota: denied by limit %q: %d of %d left", d.Limit, d.Decision.Remaining, d.Decision.Capacity)
	if wait, ever := d.RetryAfter(); ever {
		return fmt.Sprintf("%s, retry after %v", text, wait)
	}
	return text + ", and the request can never fit"
}

// RetryAfter returns how long until the same call fits, if no other charge comes in between. Where it can never fit the
// result is false, and 0, never the 292 years of Decision.RetryAfter.
func (d *Denial) RetryAfter() (wait time.Duration, ever bool) {
	if d.Decision.RetryAfter == Never {
		return 0, false
	}
	return d.Decision.RetryAfter, true
}

// Is reports whether target is ErrDenied.
func (d *Denial) Is(target error) bool { return target == ErrDenied }

// invalid returns an ErrInvalid that names the field, the value and the accepted values.
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
