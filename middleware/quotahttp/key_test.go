package quotahttp_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
)

// request returns a request from a peer with some fields, each of the form "Name: value".
func request(peer string, fields ...string) *http.Request {
	r := httptest.NewRequest("GET", "/", nil)
	r.RemoteAddr = peer
	for _, f := range fields {
		name, value, _ := strings.Cut(f, ": ")
		r.Header.Add(name, value)
	}
	return r
}

// wantKey checks the key of a request; "" wants ErrNoKey.
func wantKey(t *testing.T, key quotahttp.Key, r *http.Request, want string) {
	t.Helper()
	got, err := key(r)
	if got != want || (want == "") != errors.Is(err, quotahttp.ErrNoKey) || want != "" && quota.CheckKey(got) != nil {
		t.Errorf("key of %v from %s: got %q, %v; want %q", r.Header, r.RemoteAddr, got, err, want)
	}
}

// TestSpoofing: twenty combinations of fields that a client may send. None changes the key, unless the
// strategy trusts the field and the proxy, and then it is the address that the proxy wrote.
func TestSpoofing(t *testing.T) {
	const client, proxy = "203.0.113.9", "10.0.0.1"
	trusted := quotahttp.Proxies(netip.MustParsePrefix("10.0.0.0/8"))
	// Behind one proxy that appends its peer, 203.0.113.9, to the client's own fields, and sets X-Real-IP.
	for _, sent := range [][]string{
		{},
		{"X-Forwarded-For: 1.2.3.4"},
		{"X-Forwarded-For: 1.2.3.4, 5.6.7.8"},
		{"X-Forwarded-For: 10.0.0.7"},
		{"X-Forwarded-For: 10.0.0.7, 10.0.0.8"},
		{"X-Forwarded-For: 1.2.3.4", "X-Forwarded-For: 5.6.7.8"},
		{"X-Forwarded-For: "},
		{"X-Forwarded-For: ,,,"},
		{"X-Forwarded-For: unknown"},
		{"X-Forwarded-For: 127.0.0.1:80"},
		{"X-Forwarded-For: [::1]:80"},
		{"X-Forwarded-For: ::ffff:10.0.0.1"},
		{"X-Forwarded-For: 1.2.3.4\t"},
		{"X-Forwarded-For: " + strings.Repeat("1.2.3.4,", 1000)},
		{"X-Real-Ip: 1.2.3.4"},
		{"True-Client-Ip: 1.2.3.4"},
		{"Cf-Connecting-Ip: 1.2.3.4"},
		{"Forwarded: for=1.2.3.4"},
		{"X-Client-Ip: 1.2.3.4", "X-Cluster-Client-Ip: 1.2.3.4", "Fastly-Client-Ip: 1.2.3.4"},
		{"X-Forwarded-For: 1.2.3.4", "X-Real-Ip: 1.2.3.4", "Forwarded: for=1.2.3.4", "Via: 1.1 x"},
	} {
		direct := request(client+":4711", sent...)
		wantKey(t, quotahttp.IP(quotahttp.Peer), direct, client+"/ip")
		wantKey(t, quotahttp.IP(trusted), direct, client+"/ip") // past the proxy

		behind := request(proxy+":4711", sent...)
		behind.Header.Add("X-Forwarded-For", client)
		behind.Header.Set("X-Real-Ip", client)
		wantKey(t, quotahttp.IP(quotahttp.Peer), behind, proxy+"/ip")
		wantKey(t, quotahttp.IP(trusted), behind, client+"/ip")
		wantKey(t, quotahttp.IP(quotahttp.ProxyCount(1)), behind, client+"/ip")
		wantKey(t, quotahttp.IP(quotahttp.AddressHeader("X-Real-IP")), behind, client+"/ip")

		behind.Header.Add("X-Forwarded-For", "10.9.9.9") // a second proxy, in front of the server
		wantKey(t, quotahttp.IP(trusted), behind, client+"/ip")
		wantKey(t, quotahttp.IP(quotahttp.ProxyCount(2)), behind, client+"/ip")
	}
}

func TestAddress(t *testing.T) {
	trusted := quotahttp.IP(quotahttp.Proxies(netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/8")))
	for _, test := range []struct {
		key  quotahttp.Key
		r    *http.Request
		want string
	}{
		{quotahttp.IP(quotahttp.Peer), request("203.0.113.9:1"), "203.0.113.9/ip"},
		{quotahttp.IP(quotahttp.Peer), request("203.0.113.9"), "203.0.113.9/ip"},
		{quotahttp.IP(quotahttp.Peer), request("[2001:db8:1:2:3:4:5:6]:1"), "2001:db8:1:2::/ip"},
		{quotahttp.IP(quotahttp.Peer), request("[2001:db8:1:2:ffff::1]:1"), "2001:db8:1:2::/ip"},
		{quotahttp.IP(quotahttp.Peer), request("[2001:db8:1:3::1]:1"), "2001:db8:1:3::/ip"},
		{quotahttp.IP(quotahttp.Peer), request("[::ffff:203.0.113.9]:1"), "203.0.113.9/ip"},
		{quotahttp.IP(quotahttp.Peer), request("[fe80::1%eth0]:1"), "fe80::/ip"},
		{quotahttp.IP(quotahttp.Peer), request("[::1]:1"), "::/ip"},
		{quotahttp.IP(quotahttp.Peer), request("@"), ""}, // of a Unix socket
		{quotahttp.IP(quotahttp.Peer), request(""), ""},
		{quotahttp.Network(quotahttp.Peer, 24, 56), request("203.0.113.9:1"), "203.0.113.0/net-24-56"},
		{quotahttp.Network(quotahttp.Peer, 24, 56), request("[2001:db8:1:2ff:3:4:5:6]:1"), "2001:db8:1:200::/net-24-56"},
		{quotahttp.Network(quotahttp.Peer, 24, 128), request("[2001:db8::6]:1"), "2001:db8::6/net-24-128"},
		{trusted, request("10.0.0.1:1"), "10.0.0.1/ip"}, // such as a check of the proxy's own
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: 10.0.0.3, 10.0.0.2"), "10.0.0.3/ip"},
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: 203.0.113.9:4711"), "203.0.113.9/ip"},
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: [2001:db8:1:2::3]:4711"), "2001:db8:1:2::/ip"},
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: [2001:db8:1:2::3]"), "2001:db8:1:2::/ip"},
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: 2001:db8:1:2::3"), "2001:db8:1:2::/ip"},
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: fe80::3%25eth0"), "fe80::/ip"},
		{trusted, request("[::ffff:10.0.0.1]:1", "X-Forwarded-For: ::ffff:203.0.113.9"), "203.0.113.9/ip"},
		{trusted, request("[fd00::1]:1", "X-Forwarded-For: 203.0.113.9"), "203.0.113.9/ip"},
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: unknown"), ""}, // a proxy of ours wrote it
		{trusted, request("10.0.0.1:1", "X-Forwarded-For: "), ""},
		{quotahttp.IP(quotahttp.ProxyCount(2)), request("10.0.0.1:1", "X-Forwarded-For: 203.0.113.9"), ""},
		{quotahttp.IP(quotahttp.ProxyCount(1)), request("10.0.0.1:1"), ""},
		{quotahttp.IP(quotahttp.ProxyCount(1)), request("10.0.0.1:1", "X-Forwarded-For: a"), ""},
		{quotahttp.IP(quotahttp.AddressHeader("cf-connecting-ip")), request("10.0.0.1:1", "Cf-Connecting-Ip: 203.0.113.9"), "203.0.113.9/ip"},
		{quotahttp.IP(quotahttp.AddressHeader("CF-Connecting-IP")), request("10.0.0.1:1"), ""},
		{quotahttp.IP(quotahttp.AddressHeader("CF-Connecting-IP")), request("10.0.0.1:1", "Cf-Connecting-Ip: 203.0.113.9", "Cf-Connecting-Ip: 203.0.113.10"), ""},
		{quotahttp.IP(quotahttp.AddressHeader("CF-Connecting-IP")), request("10.0.0.1:1", "Cf-Connecting-Ip: 203.0.113.9, 203.0.113.10"), ""},
		{quotahttp.IP(func(*http.Request) (netip.Addr, error) { return addr("::ffff:203.0.113.9"), nil }), request(""), "203.0.113.9/ip"},
		{quotahttp.IP(func(*http.Request) (netip.Addr, error) { return netip.Addr{}, nil }), request(""), ""},
		{quotahttp.Network(func(*http.Request) (netip.Addr, error) { return addr("fe80::1%eth0"), nil }, 32, 128), request(""), "fe80::1/net-32-128"},
	} {
		wantKey(t, test.key, test.r, test.want)
	}
	for name, key := range map[string]quotahttp.Key{
		"all of IPv4":      quotahttp.IP(quotahttp.Proxies(netip.MustParsePrefix("0.0.0.0/0"))),
		"all of IPv6":      quotahttp.IP(quotahttp.Proxies(netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("::/0"))),
		"no range":         quotahttp.IP(quotahttp.Proxies(netip.Prefix{})),
		"no proxy":         quotahttp.IP(quotahttp.ProxyCount(0)),
		"no bits":          quotahttp.Network(quotahttp.Peer, 0, 64),
		"too many bits":    quotahttp.Network(quotahttp.Peer, 33, 64),
		"no bits of IPv6":  quotahttp.Network(quotahttp.Peer, 32, 0),
		"too many of IPv6": quotahttp.Network(quotahttp.Peer, 32, 129),
	} {
		if got, err := key(request("203.0.113.9:1", "X-Forwarded-For: 1.2.3.4")); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "; accepted: ") {
			t.Errorf("%s: got %q, %v; want an ErrInvalid", name, got, err)
		}
	}
}

type contextKey struct{}

func TestKeys(t *testing.T) {
	secret := "sk-4711"
	value := func(v any) *http.Request {
		r := request("")
		return r.WithContext(context.WithValue(r.Context(), contextKey{}, v))
	}
	path := request("")
	path.SetPathValue("id", "a/b%")
	path.Pattern = "GET /things/{id}"
	long := request("")
	long.SetPathValue("id", strings.Repeat("x", 65))
	bytes := request("")
	bytes.SetPathValue("id", "\xff")
	key := func(r *http.Request, k quotahttp.Key) string {
		t.Helper()
		got, err := k(r)
		if err != nil || quota.CheckKey(got) != nil {
			t.Errorf("key of %v: got %q, %v; want a valid one", r.Header, got, err)
		}
		return got
	}
	apiKey := quotahttp.Header("x-api-key")
	got := key(request("", "X-Api-Key: "+secret), apiKey)
	if strings.Contains(got, secret) || !strings.HasSuffix(got, "/sha256/header/x-api-key") || len(got) != 32+len("/sha256/header/x-api-key") {
		t.Errorf("key of a header: got %q, want a hash of 32 digits and the kind", got)
	}
	if other := key(request("", "X-Api-Key: sk-4712"), apiKey); other == got {
		t.Errorf("keys of two values: got %q twice, want two", got)
	}
	if again := key(request("", "X-Api-Key: "+secret+" ", "X-Api-Key: other"), apiKey); again != got {
		t.Errorf("key of the first value: got %q, want %q", again, got)
	}
	bearer := key(request("", "Authorization: Bearer abc"), quotahttp.Header("authorization"))
	for _, v := range []string{"bearer abc", "BEARER  abc", " Bearer \t abc "} {
		if got := key(request("", "Authorization: "+v), quotahttp.Header("Authorization")); got != bearer {
			t.Errorf("key of Authorization %q: got %q, want %q", v, got, bearer)
		}
	}
	if got := key(request("", "Authorization: Bearer ABC"), quotahttp.Header("Authorization")); got == bearer {
		t.Errorf("key of another token: got %q, want another", got)
	}
	cookie := key(request("", "Cookie: a=1; session="+secret), quotahttp.Cookie("session"))
	if strings.Contains(cookie, secret) || !strings.HasSuffix(cookie, "/sha256/cookie/session") || cookie[:32] != got[:32] {
		t.Errorf("key of a cookie: got %q, want the hash and the kind", cookie)
	}
	wantKey(t, quotahttp.PathValue("id"), path, "a%2Fb%25/path/id")
	wantKey(t, quotahttp.Route, path, "GET %2Fthings%2F{id}/route")
	wantKey(t, quotahttp.Join(quotahttp.PathValue("id"), quotahttp.Route), path, "a%2Fb%25/path/id/GET %2Fthings%2F{id}/route")
	wantKey(t, quotahttp.Context("user", contextKey{}), value("42"), "42/context/user")
	wantKey(t, quotahttp.Context("user", contextKey{}), value(&url.URL{Path: "x"}), "x/context/user")
	for _, r := range []*http.Request{long, bytes} {
		if got := key(r, quotahttp.PathValue("id")); !strings.HasSuffix(got, "/sha256/path/id") || len(got) > 64 {
			t.Errorf("key of a long or broken identifier: got %q, want a hash", got)
		}
	}
	for name, key := range map[string]quotahttp.Key{
		"header": apiKey, "cookie": quotahttp.Cookie("session"), "path": quotahttp.PathValue("id"), "route": quotahttp.Route,
		"context": quotahttp.Context("user", contextKey{}), "join": quotahttp.Join(quotahttp.IP(quotahttp.Peer), quotahttp.Route),
	} {
		for _, r := range []*http.Request{request("192.0.2.1:1"), request("192.0.2.1:1", "X-Api-Key: ", "Cookie: session="), value(42), value(nil)} {
			r.Pattern = ""
			if got, err := key(r); got != "" || !errors.Is(err, quotahttp.ErrNoKey) {
				t.Errorf("key by %s of a request without: got %q, %v; want ErrNoKey", name, got, err)
			}
		}
	}
}

// FuzzAddress: whatever stands in the fields and in the peer's address, the key is valid or there is none, it
// is short, and no panic.
func FuzzAddress(f *testing.F) {
	for _, s := range []string{"203.0.113.9", "10.0.0.1, 203.0.113.9:80", "[::1]:80", "::ffff:1.2.3.4", "fe80::1%eth0", ",", "", "[", "[]", "unknown", "1.2.3.4.5", "[::1]", "[1.2.3.4]", "[1.2.3.4]:80", "[::1]:80]", "::1:80", "1.2.3.4:99999", "fe80::1%a:b", "[fe80::1%a]:80", " 1.2.3.4:5\t", strings.Repeat("1.1.1.1,", 64)} {
		f.Add(s, "10.0.0.1:1")
		f.Add("", s)
	}
	trusted := quotahttp.Proxies(netip.MustParsePrefix("10.0.0.0/8"))
	f.Fuzz(func(t *testing.T, field, peer string) {
		r := &http.Request{RemoteAddr: peer, Header: http.Header{"X-Forwarded-For": {field}}}
		want, wantErr := anyForm(strings.Trim(peer, " \t"))
		if got, err := quotahttp.Peer(r); got != want.Unmap().WithZone("") || (err == nil) != (wantErr == nil) {
			t.Errorf("address of the peer %q: got %v, %v; want %v, %v", peer, got, err, want, wantErr)
		}
		for _, find := range []quotahttp.Address{quotahttp.Peer, trusted, quotahttp.ProxyCount(1), quotahttp.ProxyCount(3), quotahttp.AddressHeader("X-Forwarded-For")} {
			for _, key := range []quotahttp.Key{quotahttp.IP(find), quotahttp.Network(find, 8, 128)} {
				got, err := key(r)
				if err == nil && (quota.CheckKey(got) != nil || len(got) > 64) || err != nil && !errors.Is(err, quotahttp.ErrNoKey) {
					t.Errorf("key: got %q, %v; want a short valid one, or ErrNoKey", got, err)
				}
				if err != nil && len(field) > 40 && strings.Contains(err.Error(), field) {
					t.Errorf("error: got %v, want none of the field's text", err)
				}
			}
		}
	})
}

// anyForm reads an address in each form that is accepted, one after the other.
func anyForm(text string) (netip.Addr, error) {
	a, err := netip.ParseAddr(text)
	if err == nil {
		return a, nil
	}
	if with, err := netip.ParseAddrPort(text); err == nil {
		return with.Addr(), nil
	}
	if n := len(text); n > 2 && text[0] == '[' && text[n-1] == ']' {
		return netip.ParseAddr(text[1 : n-1])
	}
	return netip.Addr{}, err
}

// FuzzHeader: whatever a field says, the key is valid, tells nothing of it, or there is none.
func FuzzHeader(f *testing.F) {
	for _, s := range []string{"sk-4711", "Bearer x", "\xff\x00", "", " ", strings.Repeat("x", 5000), "session=1; session=2", "a/b/c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, value string) {
		r := &http.Request{Header: http.Header{"Authorization": {value}, "Cookie": {"session=" + value}}}
		r.SetPathValue("id", value)
		for i, key := range []quotahttp.Key{quotahttp.Header("Authorization"), quotahttp.Cookie("session"), quotahttp.PathValue("id")} {
			got, err := key(r)
			if err == nil && quota.CheckKey(got) != nil || err != nil && !errors.Is(err, quotahttp.ErrNoKey) {
				t.Errorf("key: got %q, %v; want a valid one, or ErrNoKey", got, err)
			}
			if i < 2 && len(value) > 16 && strings.Contains(fmt.Sprint(got, err), value) {
				t.Errorf("key: got %q, %v; want nothing of the value", got, err)
			}
		}
	})
}
