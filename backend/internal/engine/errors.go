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

// refusals are the replies by which a server that cannot serve now says so. The scripts read before they
// write and only their first write can be refused, so none of these charged anything.
var refusals = [...]string{
	"LOADING", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "READONLY", "NOREPLICAS", "OOM", "MISCONF", "BUSY",
	"MOVED", "ASK", "max number of clients", "UNKILLABLE",
}

// ReplyError classifies an error reply of the server. The reply's text is kept: it names no key and no
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
	// Up to Redis 6 an error inside a script is wrapped in a text of the script's own.
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

// KeysError is a refusal that is about some keys of a call and would not have come for the others: a slot is
// being moved and has keys on either node, or the user may not touch them all.
type KeysError struct{ Err error }

func (e KeysError) Error() string { return e.Err.Error() }
func (e KeysError) Unwrap() error { return e.Err }

// ofSomeKeys reports whether a call with fewer keys may do better.
func ofSomeKeys(err error) bool {
	_, is := errors.AsType[KeysError](err)
	return is
}

// IsNoScript reports whether a reply says that the server does not know a script; then nothing ran.
func IsNoScript(err error) bool { return strings.HasPrefix(err.Error(), "NOSCRIPT") }

// TransportError classifies an error that is no reply of the server: what never left was not charged,
// of all else the outcome is unknown.
func TransportError(err error) error {
	var op *net.OpError
	if errors.As(err, &op) && op.Op == "dial" || errors.Is(err, syscall.ECONNREFUSED) || handshakeFailed(err) {
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
	}
	return fmt.Errorf("redis: %w: %w", quota.ErrIndeterminate, err)
}

// handshakeFailed reports whether a TLS connection did not come about, on either side's account: then no
// server read a command.
func handshakeFailed(err error) bool {
	var certificate *tls.CertificateVerificationError
	var noTLS tls.RecordHeaderError
	if errors.As(err, &certificate) || errors.As(err, &noTLS) {
		return true
	}
	// The server's alert may come after the client took the handshake for done.
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
