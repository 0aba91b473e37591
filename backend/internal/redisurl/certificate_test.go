package redisurl

import (
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/fleetquota/fleetquota/internal/testcert"
	"github.com/fleetquota/fleetquota/quota"
)

// writePair writes a certificate of a name, and its key, to files in dir.
func writePair(t *testing.T, dir, name string) (cert, key string) {
	t.Helper()
	pair := quota.Must(quota.Must(testcert.NewAuthority()).Issue(name))
	cert, key = filepath.Join(dir, name+".crt"), filepath.Join(dir, name+".key")
	for file, text := range map[string][]byte{cert: pair.Certificate, key: pair.Key} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert, key
}

// TestRenewedCertificate: a handshake has the certificate that the files hold at the time, and the one before it
// while they hold none.
func TestRenewedCertificate(t *testing.T) {
	dir := t.TempDir()
	cert, key := writePair(t, dir, "before")
	u := &url.URL{Scheme: "rediss", Host: "h", RawQuery: url.Values{"cert": {cert}, "key": {key}}.Encode()}
	c, err := Parse(u)
	if err != nil {
		t.Fatal(err)
	}
	shows := func(when, want string) {
		t.Helper()
		pair, err := c.TLS.GetClientCertificate(nil)
		if err != nil {
			t.Fatalf("%s: got error %v, want none", when, err)
		}
		if got := pair.Leaf.Subject.CommonName; got != want {
			t.Errorf("%s: got the certificate of %q, want that of %q", when, got, want)
		}
	}
	replace := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	shows("at first", "before")
	renewed, secret := writePair(t, dir, "renewed")
	replace(renewed, cert)
	shows("with a new certificate and an old key", "before")
	replace(secret, key)
	shows("with both files new", "renewed")
	if err := os.Remove(cert); err != nil {
		t.Fatal(err)
	}
	shows("without a file", "renewed")
	rewritten, secret := writePair(t, dir, "again")
	replace(rewritten, cert)
	replace(secret, key)
	shows("with new files after none", "again")
}
