package redisserver

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"testing"

	"github.com/fleetquota/fleetquota/conformance"
)

// Breakable starts a proxy of package conformance before each address, for Harness.Fault: a client that dials by the first
// result meets the faults that the second sets. The replies that are lost are those to scripts.
func Breakable(tb testing.TB, addrs ...string) (dial func(ctx context.Context, network, addr string) (net.Conn, error), set func(conformance.Fault)) {
	tb.Helper()
	proxies := map[string]*conformance.Proxy{}
	for _, addr := range addrs {
		p, err := conformance.NewProxy(addr, func(request, _ []byte) bool {
			return bytes.Contains(request, []byte("EVAL")) || bytes.Contains(request, []byte("eval"))
		})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { p.Close() })
		proxies[addr] = p
	}
	dial = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if proxies[addr] == nil {
			return nil, fmt.Errorf("redisserver: no proxy before %s", addr)
		}
		return new(net.Dialer).DialContext(ctx, network, proxies[addr].Addr())
	}
	return dial, func(f conformance.Fault) {
		for _, p := range proxies {
			p.Set(f)
		}
	}
}
