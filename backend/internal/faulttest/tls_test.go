package faulttest

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestTLS connects as a user does, with the right authority.
func TestTLS(t *testing.T) {
	eachLibrary(t, func(t *testing.T, l library) {
		server := redisserver.StartConfig(t, redisserver.Config{TLS: true, Args: []string{"--tls-auth-clients", "yes"}})
		to := single(server)
		to.tls = server.TLSConfig()
		s := l.open(t, to)
		y := calls(s, yearly(plenty), keys(4), 100)
		y.only(t)
		y.exact(t, charged(t, s, yearly(plenty), keys(4)...))
	})
}

// TestTLSBroken breaks what a client trusts while it runs. Where no connection comes about nothing can be
// charged, and the error says so.
func TestTLSBroken(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*tls.Config)
	}{
		{"unknown authority", func(c *tls.Config) { c.RootCAs = x509.NewCertPool() }},
		{"expired", func(c *tls.Config) { c.Time = func() time.Time { return time.Now().AddDate(100, 0, 0) } }},
		{"another host", func(c *tls.Config) { c.ServerName = "redis.example.com" }},
		{"no client certificate", func(c *tls.Config) { c.Certificates = nil }},
		{"old protocol", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS10 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachLibrary(t, func(t *testing.T, l library) {
				server := redisserver.StartConfig(t, redisserver.Config{TLS: true, Args: []string{"--tls-auth-clients", "yes"}})
				var config atomic.Pointer[tls.Config]
				config.Store(server.TLSConfig())
				to := single(server)
				to.dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
					d := tls.Dialer{Config: config.Load()}
					return d.DialContext(ctx, network, addr)
				}
				s := l.open(t, to)
				limit := yearly(plenty)
				y := calls(s, limit, keys(4), 40)
				broken := server.TLSConfig()
				c.change(broken)
				config.Store(broken)
				run(t, server, "CLIENT", "KILL", "TYPE", "normal")
				// The connection that was killed is the one whose end is not known to all by now.
				until(t, "the connections to break", func() bool {
					_, err := s.Take(bg, quota.Charge{Limit: limit, Key: "team-0", Op: quota.OpPeek})
					return class(err) == quota.ErrUnavailable
				})
				z := calls(s, limit, keys(4), 40)
				t.Log(z, z.texts)
				accepted := []error{quota.ErrUnavailable}
				if c.name == "no client certificate" {
					// The server refuses after the client took the handshake for done, and wrote into a
					// connection that was closed by then.
					accepted = append(accepted, quota.ErrIndeterminate)
				}
				z.only(t, accepted...)
				config.Store(server.TLSConfig())
				until(t, "the client to recover", func() bool { return !s.fails(quota.Charge{Limit: limit, Key: "k", Op: quota.OpPeek}) })
				y.exact(t, charged(t, s, limit, keys(4)...))
			})
		})
	}
}
