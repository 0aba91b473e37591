package quotahttp

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/fleetquota/fleetquota/quota"
)

// ErrNoKey is the error of a request that has no owner: a header, cookie or value is absent, or an address
// cannot be read. The answer is 500, for the program should have refused such a request before or skipped it;
// Options.Refuse may answer 401 instead, for example.
var ErrNoKey = errors.New("quotahttp: the request has no key")

// A Key finds the key of a request: the owner of the quota. The keys of this package end in their kind, such
// as "203.0.113.9/ip", so those of two kinds differ, and on a cluster they spread. Identifiers of more than
// 64 bytes are replaced by a hash, and so are those that may be secret. A program's own function may use
// [quota.Key].
type Key func(*http.Request) (string, error)

// IP is the key of a client's address: of an IPv4 address the whole, of an IPv6 address the first 64 bits,
// since a client commonly has all addresses of such a range.
func IP(find Address) Key {
	return address(find, 32, 64, "/ip")
}

// Network is the key of a range of addresses: the first v4 bits of an IPv4 address, and the first v6 bits of
// an IPv6 address. Numbers that are not 1 to 32 and 1 to 128 are [quota.ErrInvalid], at each request.
func Network(find Address, v4, v6 int) Key {
	if v4 < 1 || v4 > 32 || v6 < 1 || v6 > 128 {
		find = wrongAddress("bits of Network are %d and %d; accepted: 1 to 32 for IPv4, 1 to 128 for IPv6", v4, v6)
	}
	return address(find, v4, v6, "/net-"+strconv.Itoa(v4)+"-"+strconv.Itoa(v6))
}

func address(find Address, v4, v6 int, kind string) Key {
	return func(r *http.Request) (string, error) {
		a, err := find(r)
		if err != nil {
			return "", err
		}
		a = a.Unmap().WithZone("")
		if !a.IsValid() {
			return "", fmt.Errorf("%w: no address of the client", ErrNoKey)
		}
		bits := v6
		if a.Is4() {
			bits = v4
		}
		if bits < a.BitLen() {
			p, _ := a.Prefix(bits) // cannot fail: the bits are within the address
			a = p.Addr()
		}
		var room [64]byte
		return string(append(a.AppendTo(room[:0]), kind...)), nil
	}
}

// Header is the key of a header's first value, such as an API key; its hash stands in the key, for it may be
// secret. Of Authorization the letters' case in the scheme and spaces around it do not matter. Requests with
// an invented value have a quota of their own each: limit addresses as well, or check the value before.
func Header(name string) Key {
	name = http.CanonicalHeaderKey(name)
	kind := strings.ToLower(name)
	return func(r *http.Request) (string, error) {
		value := ""
		if values := r.Header[name]; len(values) > 0 {
			value = strings.Trim(values[0], " \t")
		}
		if scheme, rest, ok := strings.Cut(value, " "); ok && name == "Authorization" {
			value = strings.ToLower(scheme) + " " + strings.TrimLeft(rest, " \t")
		}
		return identified(value, true, "header", kind)
	}
}

// Cookie is the key of a cookie's value, such as a session; its hash stands in the key, for it may be secret.
func Cookie(name string) Key {
	return func(r *http.Request) (string, error) {
		c, err := r.Cookie(name)
		if err != nil {
			c = &http.Cookie{}
		}
		return identified(c.Value, true, "cookie", name)
	}
}

// PathValue is the key of a part of the path, such as "id" of "/users/{id}", see [http.Request.PathValue].
// The middleware must stand inside the router, around the handler of the route.
func PathValue(name string) Key {
	return func(r *http.Request) (string, error) { return identified(r.PathValue(name), false, "path", name) }
}

// Context is the key of a value of the request's context, a string or [fmt.Stringer], such as the user whom a
// middleware around this one has found. The name tells such keys apart.
func Context(name string, key any) Key {
	return func(r *http.Request) (string, error) {
		id := ""
		switch v := r.Context().Value(key).(type) {
		case string:
			id = v
		case fmt.Stringer:
			id = v.String()
		}
		return identified(id, false, "context", name)
	}
}

// Route is the key of the pattern that the router matched, such as "GET /v1/things", for all clients
// together; see [Join]. The middleware must stand inside the router, around the handler of the route.
func Route(r *http.Request) (string, error) { return identified(r.Pattern, false, "route") }

// Join is the key of several together, such as one client's quota for one route. The group is that of the
// first.
func Join(keys ...Key) Key {
	return func(r *http.Request) (string, error) {
		parts := make([]string, len(keys))
		for i, key := range keys {
			var err error
			if parts[i], err = key(r); err != nil {
				return "", err
			}
		}
		return strings.Join(parts, "/"), nil
	}
}

// identified returns the key of an identifier and its kind. One that is secret, long or no UTF-8 is hashed,
// and marked, so that no identifier looks like the hash of another.
func identified(id string, secret bool, kind ...string) (string, error) {
	if id == "" {
		return "", fmt.Errorf("%w: no %s", ErrNoKey, strings.Join(kind, " "))
	}
	if secret || len(id) > 64 || !utf8.ValidString(id) {
		sum := sha256.Sum256([]byte(id))
		id, kind = hex.EncodeToString(sum[:16]), append([]string{"sha256"}, kind...)
	}
	var room [4]string
	return quota.Key(append(append(room[:0], id), kind...)...), nil
}
