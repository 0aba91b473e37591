package clienttest

import (
	"errors"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// unhurried is parameters of URLs: a busy machine must not hide a reason behind a timeout.
const unhurried = "dial_timeout=10s&timeout=10s"

// patiently returns a URL with these parameters, unless it has a timeout of its own.
func patiently(url string) string {
	if strings.Contains(url, "timeout=") {
		return url
	}
	if strings.Contains(url, "?") {
		return url + "&" + unhurried
	}
	return url + "?" + unhurried
}

// urlServerName: a server that is reached by another name than its certificate holds, as through a tunnel, is
// verified by the name of the URL.
func urlServerName(t *testing.T, l library) {
	server := tlsServer(t)
	tunnel := forward(t, "127.0.0.2:0", server.Addr())
	base := "rediss://" + tunnel + "?" + unhurried + "&" + ca(server)
	works(t, l.open(t, base+"&server_name=localhost"), "a")
	works(t, l.open(t, base+"&server_name=127.0.0.1"), "b")
	for name, url := range map[string]string{
		"no name":            base,
		"a name of no other": "rediss://" + server.Addr() + "?" + unhurried + "&" + ca(server) + "&server_name=redis.example.com",
	} {
		if _, err := one(l.open(t, url), "k"); class(err) != quota.ErrMisconfigured || !strings.Contains(err.Error(), "server_name") {
			t.Errorf("%s: got error %v, want ErrMisconfigured that names server_name", name, err)
		}
	}
}

// urlClientCertificate: a server that demands a certificate gets the one in the files of the URL, and a renewed one
// without a restart.
func urlClientCertificate(t *testing.T, l library) {
	demanding := tlsServer(t, "--tls-auth-clients", "yes")
	base := "rediss://" + demanding.Addr() + "?" + unhurried + "&" + ca(demanding)
	pair := func(cert, key string) string {
		return base + "&cert=" + url.QueryEscape(cert) + "&key=" + url.QueryEscape(key)
	}
	works(t, l.open(t, pair(demanding.File("redis.crt"), demanding.File("redis.key"))), "a")

	// The server refuses after the client took the handshake for done, and wrote into a connection that was closed
	// by then.
	refused := func(name string, err error, text string) {
		t.Helper()
		if got := class(err); got != quota.ErrUnavailable && got != quota.ErrIndeterminate || got == quota.ErrUnavailable && !strings.Contains(err.Error(), text) {
			t.Errorf("%s: got error %v, want ErrUnavailable that says %q", name, err, text)
		}
	}
	_, err := one(l.open(t, base), "k")
	refused("no certificate", err, "parameters cert and key")

	dir, stranger := t.TempDir(), tlsServer(t)
	cert, key := filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key")
	install := func(of *redisserver.Server) {
		t.Helper()
		for from, to := range map[string]string{of.File("redis.crt"): cert, of.File("redis.key"): key} {
			text, err := os.ReadFile(from)
			ok(t, err)
			ok(t, os.WriteFile(to+".new", text, 0o600))
			ok(t, os.Rename(to+".new", to))
		}
	}
	install(stranger)
	s := l.open(t, pair(cert, key))
	_, err = one(s, "k")
	refused("a certificate of a stranger", err, "certificate")
	install(demanding)
	until(t, "the renewed certificate to be used", func() bool { _, err := one(s, "renewed"); return err == nil })
}

// withoutHello stands before a server and answers HELLO itself where refuses says so: with a reply, or by closing
// the connection if the reply is empty, as twemproxy does.
func withoutHello(t *testing.T, server *redisserver.Server, reply string, refuses func(args []string) bool) string {
	t.Helper()
	return between(t, server.Addr(), func(args []string) (string, bool) {
		return reply, strings.EqualFold(args[0], "hello") && refuses(args)
	})
}

// urlProtocol: a server that refuses HELLO, or version 3 of the protocol, is served in version 2 without a
// parameter; one that closes the connection needs protocol=2, and the error says so.
func urlProtocol(t *testing.T, l library) {
	server := redisserver.StartConfig(t, redisserver.Config{Users: []string{"u on >p ~* +@all"}})
	every := func([]string) bool { return true }
	for name, addr := range map[string]string{
		"old":    withoutHello(t, server, "-ERR unknown command `HELLO`, with args beginning with: `3`, \r\n", every),
		"proxy":  withoutHello(t, server, "-ERR unsupported command 'hello'\r\n", every),
		"RESP2":  withoutHello(t, server, "-NOPROTO unsupported protocol version\r\n", func(args []string) bool { return len(args) > 1 && args[1] == "3" }),
		"modern": server.Addr(),
	} {
		works(t, l.open(t, patiently("redis://"+addr)), name)
		works(t, l.open(t, patiently("redis://"+addr+"?protocol=2")), name+"-2")
	}
	closing := withoutHello(t, server, "", every)
	_, err := one(l.open(t, patiently("redis://"+closing)), "k")
	if class(err) != quota.ErrUnavailable || !strings.Contains(err.Error(), "protocol=2") {
		t.Errorf("a proxy that closes the connection at HELLO: got error %v, want ErrUnavailable that names protocol=2", err)
	}
	works(t, l.open(t, patiently("redis://"+closing+"?protocol=2")), "closing")
	works(t, l.open(t, patiently("redis://u:p@"+closing+"/3?protocol=2")), "closing-3")
	if n := countKeys(t, server, "3", "quota:"); n != 1 {
		t.Errorf("keys of database 3: got %d, want 1", n)
	}
	cluster := redisserver.StartCluster(t)
	works(t, l.open(t, patiently("redis+cluster://"+cluster.Addrs()[0]+"?protocol=2")), "cluster")
	sentinel := redisserver.StartSentinel(t)
	works(t, l.open(t, patiently(sentinelURL(sentinel)+"&protocol=2")), "sentinel")
}

// urlSocket: a server is reached by its Unix socket, with a user and a database, and comes back after a restart.
func urlSocket(t *testing.T, l library) {
	if runtime.GOOS == "windows" {
		t.Skip("redis-server has no Unix socket on Windows")
	}
	dir, err := os.MkdirTemp("", "socket") // a socket's path must be short
	ok(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	path := filepath.Join(dir, "redis server.sock")
	server := redisserver.StartConfig(t, redisserver.Config{Args: []string{"--unixsocket", path}, Users: []string{"u on >p@/:hunter2 ~* +@all"}})
	works(t, l.open(t, "unix://"+(&url.URL{Path: path}).EscapedPath()), "k")
	s := l.open(t, "unix://u:p%40%2F%3Ahunter2@"+(&url.URL{Path: path}).EscapedPath()+"?db=3&prefix=u:")
	works(t, s, "k")
	if n := countKeys(t, server, "3", "u:"); n != 1 {
		t.Errorf("keys of database 3: got %d, want 1", n)
	}
	server.Kill()
	until(t, "calls to be refused", func() bool { _, err := one(s, "k"); return class(err) == quota.ErrUnavailable })
	if _, err := one(s, "k"); strings.Contains(err.Error(), "hunter2") {
		t.Errorf("a server that is down: got error %v, want no password in it", err)
	}
	ok(t, server.Restart())
	do(t, server, "ACL", "SETUSER", "u", "on", ">p@/:hunter2", "~*", "+@all")
	until(t, "the client to recover", func() bool { _, err := one(s, "after"); return err == nil })

	wrong := l.open(t, "unix://u:hunter3@"+(&url.URL{Path: path}).EscapedPath())
	if _, err := one(wrong, "k"); class(err) != quota.ErrMisconfigured || strings.Contains(err.Error(), "hunter3") {
		t.Errorf("a wrong password: got error %v, want ErrMisconfigured without the password", err)
	}
	if _, err := one(l.open(t, "unix:///nonexistent/redis.sock"), "k"); class(err) != quota.ErrUnavailable || !strings.Contains(err.Error(), "/nonexistent/redis.sock") {
		t.Errorf("no socket: got error %v, want ErrUnavailable that names the path", err)
	}
}

// cures: where a setting is wrong, the error says which one is right.
func cures(t *testing.T, l library) {
	secure, plain := tlsServer(t), redisserver.Start(t)
	do(t, plain, "ACL", "SETUSER", "app", "on", ">p", "~quota:*", "+evalsha", "+eval", "+time", "+get", "+del", "+ping")
	do(t, plain, "ACL", "SETUSER", "weak", "on", ">p", "~quota:*", "+get", "+ping")
	for _, c := range []struct {
		name, url string
		want      error
		says      string
	}{
		{"TLS to a plain port", "rediss://" + plain.Addr() + "?dial_timeout=1s", quota.ErrUnavailable, "does not speak TLS, accepted for it: a URL without TLS"},
		{"no TLS to a port with TLS", "redis://" + secure.Addr(), quota.ErrUnavailable, "accepted for it: rediss://, or the parameter tls=true"},
		{"a right that a script lacks", "redis://app:p@" + plain.Addr(), quota.ErrMisconfigured, "accepted: a user with the rights ~quota:* +evalsha +eval +time +get +mget +set +del +scan"},
		{"no right to scripts", "redis://weak:p@" + plain.Addr(), quota.ErrMisconfigured, "the user lacks +eval; accepted: a user with the rights ~quota:* +evalsha"},
		{"keys of another prefix", "redis://app:p@" + plain.Addr() + "?prefix=other:", quota.ErrMisconfigured, "the user lacks ~PREFIX*"},
		{"another authority", "rediss://" + secure.Addr(), quota.ErrMisconfigured, "parameter ca"},
		{"a database that is not there", "redis://" + plain.Addr() + "/99", quota.ErrMisconfigured, "accepted: the number of a database that the server has"},
	} {
		_, err := one(l.open(t, patiently(c.url)), "k")
		if class(err) != c.want || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got error %v, want %v that says %q", c.name, err, c.want, c.says)
		}
	}
	_, err := backend.Open(t.Context(), by("redis+tls://"+plain.Addr(), l.name))
	if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "redis+tls") || !strings.Contains(err.Error(), "rediss") {
		t.Errorf("an unknown scheme: got error %v, want ErrInvalid that names it and those there are", err)
	}
}
