package quotahttp

import (
	"fmt"
	"net/http"
	"net/netip"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
)

// An Address finds the address of the client that sent a request. A function of the program's own may stand
// for it, such as one that reads the context in which a router left the address. An address that is not valid
// is [ErrNoKey] at [IP] and [Network].
type Address func(*http.Request) (netip.Addr, error)

// Peer is the address at the other end of the connection. Behind a proxy it is the proxy's, so that all
// clients share one quota.
func Peer(r *http.Request) (netip.Addr, error) {
	return parseAddress(r.RemoteAddr)
}

// Proxies trusts the proxies in some ranges of addresses, each of which must append its peer to
// X-Forwarded-For. The client is the rightmost address, of the header and the peer behind it, in none of the
// ranges; where all are proxies it is the leftmost. A client that connects past the proxies is its peer
// address, whatever its header says. A range of all addresses is [quota.ErrInvalid], at each request.
func Proxies(ranges ...netip.Prefix) Address {
	trusted := func(a netip.Addr) bool {
		for _, p := range ranges {
			if p.Contains(a) {
				return true
			}
		}
		return false
	}
	for _, p := range ranges {
		if !p.IsValid() || p.Bits() == 0 {
			return wrongAddress("range of Proxies is %v; accepted: a valid range that is not of all addresses, such as 10.0.0.0/8", p)
		}
	}
	return func(r *http.Request) (netip.Addr, error) {
		client, err := Peer(r)
		if err != nil {
			return client, err
		}
		for hop := range hops(r) {
			if !trusted(client) {
				break
			}
			if client, err = parseAddress(hop); err != nil {
				return client, err
			}
		}
		return client, nil
	}
}

// ProxyCount trusts n proxies in a row, each of which must append its peer to X-Forwarded-For: the client is
// the n-th address from the right, and the others are not looked at. A header with fewer addresses is
// [ErrNoKey]. It must not be possible to reach the server past the proxies, where a client writes the header
// itself: [Proxies] bears that. An n below 1 is [quota.ErrInvalid], at each request.
func ProxyCount(n int) Address {
	if n < 1 {
		return wrongAddress("number of ProxyCount is %d; accepted: 1 or more", n)
	}
	return func(r *http.Request) (netip.Addr, error) {
		i := 0
		for hop := range hops(r) {
			if i++; i == n {
				return parseAddress(hop)
			}
		}
		return netip.Addr{}, fmt.Errorf("%w: X-Forwarded-For has %d addresses, fewer than the %d proxies", ErrNoKey, i, n)
	}
}

// AddressHeader trusts a header with one address, such as CF-Connecting-IP or X-Real-IP. The proxy must set
// it on every request in place of the client's, and must not be possible to pass by. A header that is absent,
// or that has more than one value, is [ErrNoKey].
func AddressHeader(name string) Address {
	name = http.CanonicalHeaderKey(name)
	return func(r *http.Request) (netip.Addr, error) {
		values := r.Header[name]
		if len(values) != 1 {
			return netip.Addr{}, fmt.Errorf("%w: header %s has %d values, not one", ErrNoKey, name, len(values))
		}
		return parseAddress(values[0])
	}
}

// wrongAddress is an Address that fails.
func wrongAddress(format string, args ...any) Address {
	err := fmt.Errorf("quotahttp: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
	return func(*http.Request) (netip.Addr, error) { return netip.Addr{}, err }
}

// hops yields the elements of X-Forwarded-For from the right.
func hops(r *http.Request) func(yield func(string) bool) {
	return func(yield func(string) bool) {
		lines := r.Header["X-Forwarded-For"]
		for i := len(lines) - 1; i >= 0; i-- {
			for rest, more := lines[i], true; more; {
				hop := rest
				if comma := strings.LastIndexByte(rest, ','); comma >= 0 {
					rest, hop = rest[:comma], rest[comma+1:]
				} else {
					more = false
				}
				if !yield(hop) {
					return
				}
			}
		}
	}
}

// parseAddress reads an address with or without a port, brackets and zone. IPv4 inside IPv6 becomes IPv4. The
// error does not repeat the text, which any sender may have written.
func parseAddress(text string) (netip.Addr, error) {
	text = strings.Trim(text, " \t")
	var a netip.Addr
	var err error
	switch n := len(text); { // a form that is tried in vain costs as much as one that fits, and an error
	case n > 0 && text[0] == '[' && text[n-1] == ']':
		a, err = netip.ParseAddr(text[1 : n-1])
	case n > 0 && text[0] == '[', strings.Count(text, ":") == 1:
		var with netip.AddrPort
		with, err = netip.ParseAddrPort(text)
		a = with.Addr()
	default:
		a, err = netip.ParseAddr(text)
	}
	if err != nil {
		return netip.Addr{}, fmt.Errorf("%w: a client's address of %d bytes is none", ErrNoKey, len(text))
	}
	return a.Unmap().WithZone(""), nil
}
