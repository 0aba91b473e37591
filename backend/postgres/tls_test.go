package postgres

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/pgserver"
	"github.com/fleetquota/fleetquota/internal/testcert"
	"github.com/fleetquota/fleetquota/quota"
)

// A URL with sslmode=verify-full opens a store where the server's certificate is of the authority that the URL names and
// of the host. Otherwise every call fails, charges nothing, and says why, without the password.
func TestTLS(t *testing.T) {
	server := pgserver.Start(t)
	root, other := quota.Must(testcert.NewAuthority()), quota.Must(testcert.NewAuthority())
	pair := quota.Must(root.Issue("server", "127.0.0.1"))
	dir := t.TempDir()
	for name, a := range map[string]*testcert.Authority{"root": root, "other": other} {
		if err := os.WriteFile(filepath.Join(dir, name), a.PEM, 0o600); err != nil {
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
	for name, text := range map[string][]byte{"server.crt": pair.Certificate, "server.key": pair.Key} { // the server must own them
		doAt(t, address(server.Addr()), "COPY (SELECT regexp_split_to_table('"+string(text)+"', '\n')) TO PROGRAM 'umask 077; cat > "+name+"'")
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
