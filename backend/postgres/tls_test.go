package postgres

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/quota"
)

// authority makes a certificate authority and a certificate of it for 127.0.0.1, as texts in PEM.
func authority(t *testing.T) (root, certificate, key string) {
	t.Helper()
	parent := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "server"}, NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	signer, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	text := func(kind string, der []byte, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	made := func(template *x509.Certificate) string {
		der, err := x509.CreateCertificate(rand.Reader, template, parent, &signer.PublicKey, signer)
		return text("CERTIFICATE", der, err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(signer)
	return made(parent), made(leaf), text("PRIVATE KEY", der, err)
}

// A URL with sslmode=verify-full opens a store where the server's certificate is of the authority that the URL names and
// of the host. Otherwise every call fails, charges nothing, and says why, without the password.
func TestTLS(t *testing.T) {
	server := pgserver.Start(t)
	root, certificate, key := authority(t)
	other, _, _ := authority(t)
	dir := t.TempDir()
	for name, text := range map[string]string{"root": root, "other": other} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	const password = "pa55-w0rd"
	at := func(host, mode, root string) string {
		u := url.URL{Scheme: "postgres", User: url.UserPassword(pgserver.PasswordUser, password), Host: host, Path: "/postgres",
			RawQuery: url.Values{"sslmode": {mode}, "sslrootcert": {filepath.Join(dir, root)}}.Encode()}
		return u.String()
	}
	port := server.Addr()[strings.LastIndexByte(server.Addr(), ':'):]
	doAt(t, address(server.Addr()), "CREATE ROLE "+pgserver.PasswordUser+" LOGIN SUPERUSER PASSWORD '"+password+"'")
	refused := func(name, rawURL, says string) {
		t.Helper()
		s, err := backend.Open(t.Context(), rawURL)
		if err == nil {
			defer s.Close()
			_, err = s.Charge(t.Context(), take(plenty, "k", 1))
		}
		if !errors.Is(err, quota.ErrMisconfigured) || quota.Charged(err) != quota.NotCharged {
			t.Errorf("%s: got error %v, want one that is ErrMisconfigured and says that nothing was charged", name, err)
		} else if text := err.Error(); !strings.Contains(text, says) || strings.Contains(text, password) || strings.Contains(text, "\n") {
			t.Errorf("%s: got error %q, want one line with %q and without the password", name, text, says)
		}
	}
	refused("a server without TLS", at(server.Addr(), "verify-full", "root"), "refused TLS")
	for name, text := range map[string]string{"server.crt": certificate, "server.key": key} { // the server must own them
		doAt(t, address(server.Addr()), "COPY (SELECT regexp_split_to_table('"+text+"', '\n')) TO PROGRAM 'umask 077; cat > "+name+"'")
	}
	if err := server.Restart("ssl=on"); err != nil {
		t.Fatal(err)
	}
	for name, rawURL := range map[string]string{"the authority": at(server.Addr(), "verify-full", "root"), "any name": at(server.Addr(), "verify-ca", "root")} {
		s := openURL(t, rawURL)
		if d, err := s.Charge(t.Context(), take(plenty, name, 1)); err != nil || !d.Allowed {
			t.Errorf("%s: got %v, error %v, want a grant", name, d, err)
		}
	}
	if got := doAt(t, at(server.Addr(), "verify-full", "root"), "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"); got != "t" {
		t.Errorf("TLS of a connection: got %q, want \"t\"", got)
	}
	refused("another authority", at(server.Addr(), "verify-full", "other"), "unknown authority")
	refused("another host", at("localhost"+port, "verify-full", "root"), "to match localhost")
}
