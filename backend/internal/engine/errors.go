package engine

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"strings"
	"syscall"

	"github.com/fleetquota/fleetquota/quota"
)

// refusals begin the error replies of a server that cannot serve at the moment. The scripts read before they
// write, and only their first write can be refused: after such a reply nothing is charged.
var refusals = [...]string{
	"LOADING", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "READONLY", "NOREPLICAS", "OOM", "MISCONF", "BUSY",
	"MOVED", "ASK", "max number of clients", "UNKILLABLE",
}

// ReplyError classifies an error reply of the server: as ErrUnavailable if the server cannot serve at the
// moment, else as ErrMisconfigured. The charge was not made. The reply's text is kept: it names no key and no
// credential.
func ReplyError(err error) error {
	text := strings.TrimPrefix(err.Error(), "ERR ") // rueidis leaves it out
	for _, prefix := range refusals {
		if strings.HasPrefix(text, prefix) {
			if prefix == "TRYAGAIN" {
				err = KeysError{err}
			}
			return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
		}
	}
	// Up to Redis 6 the text of an error inside a script stands in a text about the script.
	if strings.HasPrefix(text, "Error running script") {
		for _, prefix := range refusals {
			if strings.Contains(text, "-"+prefix) {
				return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
			}
		}
	}
	if strings.HasPrefix(text, "NOPERM") {
		err = KeysError{err}
	}
	return fmt.Errorf("redis: %w: %w", quota.ErrMisconfigured, err)
}

// KeysError is a refusal of a call because of some of its keys: a slot is being moved and has keys on both
// nodes, or the user has no right to all of the keys. A call with the other keys may succeed.
type KeysError struct{ Err error }

func (e KeysError) Error() string { return e.Err.Error() }
func (e KeysError) Unwrap() error { return e.Err }

// ofSomeKeys reports whether an error is a KeysError: a call with fewer keys may succeed.
func ofSomeKeys(err error) bool {
	_, is := errors.AsType[KeysError](err)
	return is
}

// IsNoScript reports whether an error reply says that the server does not know the script. Then nothing ran.
func IsNoScript(err error) bool { return strings.HasPrefix(err.Error(), "NOSCRIPT") }

// TransportError classifies an error that is no reply of the server: as ErrUnavailable if no connection came
// about, and nothing was sent, else as ErrIndeterminate.
func TransportError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" || errors.Is(err, syscall.ECONNREFUSED) || handshakeFailed(err) {
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
	}
	return fmt.Errorf("redis: %w: %w", quota.ErrIndeterminate, err)
}

// handshakeFailed reports whether a TLS handshake failed, by either side's refusal: then no server read a
// command.
func handshakeFailed(err error) bool {
	var certificate *tls.CertificateVerificationError
	var noTLS tls.RecordHeaderError
	if errors.As(err, &certificate) || errors.As(err, &noTLS) {
		return true
	}
	// The server's alert may come after the client finished its side of the handshake.
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "remote error" {
		text := op.Err.Error()
		for _, alert := range [...]string{"certificate", "handshake failure", "protocol version"} {
			if strings.Contains(text, alert) {
				return true
			}
		}
	}
	return false
}
