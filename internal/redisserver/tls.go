package redisserver

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"path/filepath"

	"github.com/fleetquota/fleetquota/internal/testcert"
)

// writeCerts makes a certificate authority and one certificate signed by it, for the server and for its
// clients. It writes ca.crt, redis.crt and redis.key to dir and returns the clients' configuration.
func writeCerts(dir string) (*tls.Config, error) {
	ca, err := testcert.NewAuthority()
	if err != nil {
		return nil, err
	}
	pair, err := ca.Issue("redisserver", "localhost", "127.0.0.1")
	if err != nil {
		return nil, err
	}
	for name, text := range map[string][]byte{"ca.crt": ca.PEM, "redis.crt": pair.Certificate, "redis.key": pair.Key} {
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			return nil, err
		}
	}
	certificate, err := tls.X509KeyPair(pair.Certificate, pair.Key)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca.PEM)
	return &tls.Config{MinVersion: tls.VersionTLS12, ServerName: "127.0.0.1", RootCAs: pool, Certificates: []tls.Certificate{certificate}}, nil
}
