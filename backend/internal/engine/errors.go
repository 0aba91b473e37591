package engine

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"

	"github.com/fleetquota/fleetquota/quota"
)

// An error reply is 'not charged' only where that is known. So there are two closed lists, of refusals and of
// faults of the configuration, and a reply on neither has an unknown outcome: proxies answer in words of their
// own when they lost a server's reply to a script that ran.

// refusals are the codes of replies by which a server does not run a script at the moment, or not its first
// write: the scripts read before they write, and after such a reply nothing is charged.
var refusals = [...]string{
	"LOADING", "CLUSTERDOWN", "TRYAGAIN", "MASTERDOWN", "READONLY", "NOREPLICAS", "OOM", "MISCONF", "BUSY",
	"MOVED", "ASK", "NOSCRIPT", "DENIED", "NOPROTO",
}

// refusalTexts are refusals without a code. A server kills only a script that has not written. Envoy has "no
// upstream host" where it sent the command to no server.
var refusalTexts = [...]string{"max number of clients", "Script killed by user", "no upstream host"}

// crossesSlots reports whether a reply without the code CROSSSLOT refuses a script because of keys in several slots.
// Proxies before clusters have such words; no server got the script.
func crossesSlots(said string) bool {
	return strings.HasSuffix(said, "command keys must in same slot") ||
		begins(said, []string{"eval/evalsha command keys must be in same slot", "Cross-slot queries are disabled"})
}

// misconfigurations are the codes of replies that stay until a person changes a right, a password or data.
// The scripts' rights are asked, and the keys' types are seen, before the first write.
var misconfigurations = [...]string{"NOPERM", "NOAUTH", "WRONGPASS", "WRONGTYPE", "FLEETQUOTA"}

// misconfigurationTexts are misconfigurations without a code. Those about passwords and databases answer a
// client's handshake, and that about clusters its question for the slots: no script was sent.
var misconfigurationTexts = [...]string{
	"unknown command", "unsupported command", "Unknown Redis command called from", "Unknown command called from",
	"This Redis command is not allowed from script",
	"ACL failure in script", "The user executing the script can't",
	"Error compiling script", "Error while compiling new script",
	"invalid password", "Client sent AUTH", "AUTH <password> called",
	databases[0], databases[1], databases[2],
	"This instance has cluster support disabled",
	"bad lua script for redis cluster", // a proxy's, which sent it to no server
	"No such master with that name",    // a sentinel's, while a client connects
}

// databases are misconfigurations of the number of the database.
var databases = [...]string{"DB index is out of range", "invalid DB index", "SELECT is not allowed"}

// handshakeCodes and handshakeTexts are of replies that only a connection's handshake gets, or that all commands get
// until a connection is authenticated.
var (
	handshakeCodes = [...]string{"NOAUTH", "WRONGPASS", "NOPROTO", "DENIED"}
	handshakeTexts = [...]string{"max number of clients", "invalid password", "Client sent AUTH", "AUTH <password> called",
		databases[0], databases[1], databases[2], "No such master with that name"}
)

// WhileConnecting ends an error reply that a connection's handshake got: nothing was sent behind it.
const WhileConnecting = " (while connecting)"

// ReplyError classifies an error reply of the server: as ErrUnavailable if the server cannot serve at the
// moment, as ErrMisconfigured if it never will as things are set up, and as ErrCrossSlot if the keys of a call
// lie in several slots. The charge was not made then. Any other reply is ErrIndeterminate, and the error of a
// script that ran is ErrMisconfigured too. The reply's text is kept: it names no key and no credential.
func ReplyError(err error) error {
	text := strings.TrimPrefix(err.Error(), "ERR ") // rueidis leaves it out
	said, ran := scriptError(text)
	code, _, _ := strings.Cut(said, " ")
	switch {
	case code == "CROSSSLOT" || crossesSlots(said):
		return fmt.Errorf("redis: %w: %w", quota.ErrCrossSlot, KeysError{err})
	case code == "TRYAGAIN":
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, KeysError{err})
	case slices.Contains(refusals[:], code) || begins(said, refusalTexts[:]):
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
	case code == "NOPERM":
		return fmt.Errorf("redis: %w: %w%s", quota.ErrMisconfigured, KeysError{err}, cure(said))
	case slices.Contains(misconfigurations[:], code) || begins(said, misconfigurationTexts[:]):
		return fmt.Errorf("redis: %w: %w%s", quota.ErrMisconfigured, err, cure(said))
	case ran:
		return fmt.Errorf("redis: %w: %w: the script failed, and may have charged: %w", quota.ErrIndeterminate, quota.ErrMisconfigured, err)
	case strings.HasSuffix(text, WhileConnecting):
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
	}
	return fmt.Errorf("redis: %w: the reply is on no list of refusals: %w", quota.ErrIndeterminate, err)
}

// scriptError returns the text that a script failed with, and whether the text is of a script that ran. Since
// Redis 7 the place stands behind the text, and up to Redis 6 before it.
func scriptError(text string) (said string, ran bool) {
	const place = "user_script:"
	if strings.HasPrefix(text, "Error running script") {
		said = text
		if i := strings.LastIndex(said, place); i >= 0 {
			said = strings.TrimLeft(said[i+len(place):], " 0123456789")
			said = strings.TrimPrefix(said, ": ")
		}
		return strings.TrimPrefix(strings.TrimPrefix(said, "-"), "ERR "), true
	}
	said = text
	if strings.HasPrefix(said, place) { // an error of Lua
		said = strings.TrimPrefix(strings.TrimLeft(said[len(place):], " 0123456789"), ": ")
		if !strings.HasPrefix(said, "FLEETQUOTA") {
			return text, true // the words of an error of Lua are no code
		}
	}
	return said, strings.Contains(text, "@"+place)
}

// begins reports whether a text begins with one of the beginnings.
func begins(text string, beginnings []string) bool {
	return slices.ContainsFunc(beginnings, func(b string) bool { return strings.HasPrefix(text, b) })
}

// cure returns what a person can do about a reply by which a setting is wrong, or "".
func cure(said string) string {
	if begins(said, databases[:]) {
		return "; accepted: the number of a database that the server has, and 0 in a cluster"
	}
	if !strings.HasPrefix(said, "NOPERM") && !strings.HasPrefix(said, "ACL failure") && !strings.HasPrefix(said, "The user executing") {
		return ""
	}
	lacks := ""
	if _, rest, found := strings.Cut(said, "run the '"); found {
		if command, _, found := strings.Cut(rest, "'"); found {
			lacks = fmt.Sprintf("the user lacks +%s; ", strings.ToLower(command))
		}
	} else if strings.Contains(said, "key") {
		lacks = "the user lacks ~PREFIX*, where PREFIX is quota: by default; "
	}
	return "; " + lacks + "accepted: a user with the rights ~quota:* +evalsha +eval +time +get +mget +set +del +scan +info, and +ping for rueidis"
}

// WarmError classifies an error reply to a question that Warm asks to see whether a connection is there: nil if it
// shows that the connection was made and authenticated.
func WarmError(err error) error {
	text := strings.TrimPrefix(err.Error(), "ERR ")
	code, _, _ := strings.Cut(text, " ")
	if strings.HasSuffix(text, WhileConnecting) || slices.Contains(handshakeCodes[:], code) || begins(text, handshakeTexts[:]) ||
		code == "NOPERM" && strings.Contains(text, "run the '") && !strings.Contains(text, "'get'") {
		return ConnectError(err, true)
	}
	return nil
}

// ConnectError classifies an error of an attempt at connecting. Whatever it is, no charge was sent.
func ConnectError(err error, reply bool) error {
	classified := TransportError(err)
	if reply {
		classified = ReplyError(err)
	}
	if errors.Is(classified, quota.ErrIndeterminate) {
		return fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err)
	}
	return classified
}

// uncertain returns an error of a script that ran and whose decision is not to be had: it may have charged, and
// a fault of the configuration is the reason.
func uncertain(format string, args ...any) error {
	return fmt.Errorf("redis: %w: %w: "+format, append([]any{quota.ErrIndeterminate, quota.ErrMisconfigured}, args...)...)
}

// ofRead returns an error of a script that reads only: it charged nothing.
func ofRead(err error) error {
	switch {
	case !errors.Is(err, quota.ErrIndeterminate):
		return err
	case errors.Is(err, quota.ErrMisconfigured):
		return fmt.Errorf("redis: %w: %w: of a script that only reads: %v", quota.ErrUnavailable, quota.ErrMisconfigured, err)
	}
	return fmt.Errorf("redis: %w: of a script that only reads: %v", quota.ErrUnavailable, err)
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

// isForeign reports whether an error is that of a script that found another rule's state, or no state. Then it
// wrote nothing.
func isForeign(err error) bool {
	return err != nil && errors.Is(err, quota.ErrMisconfigured) && strings.Contains(err.Error(), foreign)
}

// IsNoScript reports whether an error reply says that the server does not know the script. Then nothing ran.
func IsNoScript(err error) bool { return strings.HasPrefix(err.Error(), "NOSCRIPT") }

// TransportError classifies an error that is no reply of the server: as ErrMisconfigured if the server's
// certificate is for another name or of an unknown authority, as ErrUnavailable if no connection came about
// for another reason, else as ErrIndeterminate. Before there is a connection, nothing is sent.
func TransportError(err error) error {
	var op *net.OpError
	var noTLS tls.RecordHeaderError
	switch {
	case distrusted(err):
		return noReply(fmt.Errorf("redis: %w: %w; accepted: a server whose certificate holds for the host that was dialled, or for the URL's parameter server_name, and is of an authority that the client knows, as by the URL's parameter ca", quota.ErrMisconfigured, err), err)
	case errors.As(err, &noTLS):
		return noReply(fmt.Errorf("redis: %w: the server's port does not speak TLS; accepted for it: a URL or client without TLS: %w", quota.ErrUnavailable, err), err)
	case errors.As(err, &op) && op.Op == "dial", errors.Is(err, syscall.ECONNREFUSED), handshakeFailed(err):
		return noReply(fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, err), err)
	}
	return noReply(fmt.Errorf("redis: %w: %w", quota.ErrIndeterminate, err), err)
}

// distrusted reports whether the client refused the server's certificate for its name or its authority. A
// certificate that expired is another matter: it was right, and may be renewed at any time.
func distrusted(err error) bool {
	var name x509.HostnameError
	var authority x509.UnknownAuthorityError
	return errors.As(err, &name) || errors.As(err, &authority)
}

// handshakeFailed reports whether a TLS handshake failed, by either side's refusal: then no server read a
// command.
func handshakeFailed(err error) bool {
	if _, refused := errors.AsType[*tls.CertificateVerificationError](err); refused {
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
