package clienttest

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// hostile are passwords that parsers and messages stumble over. Each holds "unter2".
var hostile = []string{
	"hunter2", "p@hunter2", "hunter2@127.0.0.1:1/0", "a:hunter2", "/hunter2", "?hunter2=1", "#hunter2", "%68unter2", "hunter2\r\n-ERR", "hunter2 `'\"",
	"127.0.0.1:hunter2", "+hunter2&client=goredis", "hunter2é", strings.Repeat("hunter2-", 100), strings.Repeat("x", 5000) + "hunter2",
}

// tells reports whether a text gives a password, or a user, away.
func tells(text string) bool {
	return strings.Contains(text, "unter2") || strings.Contains(text, "nobodysuser") || strings.Contains(text, "xxxxxxxx")
}

// quiet checks that neither an error, however it is looked at, nor the log of go-redis tells a password.
func quiet(t *testing.T, where string, err error) {
	t.Helper()
	var walk func(error)
	walk = func(e error) {
		for _, text := range []string{e.Error(), fmt.Sprintf("%+v", e), fmt.Sprintf("%#v", e)} {
			if tells(text) {
				t.Errorf("%s: got %q, want no user and no password", where, text)
			}
		}
		switch u := e.(type) {
		case interface{ Unwrap() error }:
			if inner := u.Unwrap(); inner != nil {
				walk(inner)
			}
		case interface{ Unwrap() []error }:
			for _, inner := range u.Unwrap() {
				walk(inner)
			}
		}
	}
	if err != nil {
		walk(err)
	}
	if text := logged.take(); tells(text) {
		t.Errorf("%s: got the log %q, want no user and no password", where, text)
	}
}

var line = strings.NewReplacer("\r", " ", "\n", " ")

// telling are servers that do not know a command, and say so in their ways.
var telling = map[string]func([]string) string{
	// Up to Redis 6, and Sentinel up to 5.0, which does not know AUTH.
	"old": func(args []string) string {
		text := "-ERR unknown command `" + args[0] + "`, with args beginning with: "
		for _, a := range args[1:] {
			text += "`" + line.Replace(a[:min(len(a), max(128-len(text), 0))]) + "`, "
		}
		return text + "\r\n"
	},
	"other": func(args []string) string {
		return "-ERR not supported: " + line.Replace(strings.Join(args, " ")) + "\r\n"
	},
	"wrong": func(args []string) string {
		return "-WRONGPASS " + line.Replace(strings.Join(args, ":")) + "\r\n"
	},
}

// nothingTellsThePassword goes through all that can fail.
func nothingTellsThePassword(t *testing.T, l library) {
	server := redisserver.StartConfig(t, redisserver.Config{Args: []string{"--requirepass", "right"}, Users: []string{"nobodysuser on >right ~* +@all"}})
	secure := tlsServer(t, "--requirepass", "right")
	cluster := redisserver.StartCluster(t, "--requirepass", "right", "--masterauth", "right")
	dead := "127.0.0.1:1"
	places := map[string]string{
		"refused":            "redis://%s@" + dead,
		"refused cluster":    "redis+cluster://%s@" + dead + "?addr=127.0.0.1:2",
		"refused sentinel":   "redis+sentinel://%s@" + dead + "?master=m&sentinel_user=nobodysuser&sentinel_password=PASSWORD",
		"no such host":       "redis://%s@no-such-host.invalid",
		"wrong":              "redis://%s@" + server.Addr(),
		"wrong on a cluster": clusterURL(cluster, "%s@"),
		"no TLS there":       "rediss://%s@" + server.Addr(),
		"TLS there":          "redis://%s@" + secure.Addr(),
		"authority":          "rediss://%s@" + secure.Addr(),
	}
	for name, reply := range telling {
		addr := answering(t, reply)
		places[name+" server"] = "redis://%s@" + addr
		places[name+" server, database"] = "redis://%s@" + addr + "/1"
		places[name+" cluster"] = "redis+cluster://%s@" + addr
		places[name+" sentinel"] = "redis+sentinel://%s@" + addr + "?master=m&sentinel_password=PASSWORD"
		places[name+" sentinel with a user"] = "redis+sentinel://" + addr + "?master=m&sentinel_user=nobodysuser&sentinel_password=PASSWORD"
		// A sentinel that knows its way, to a master that does not.
		good := answering(t, func(args []string) string {
			host, port, _ := net.SplitHostPort(addr)
			switch strings.ToLower(args[0]) {
			case "hello", "auth", "subscribe", "psubscribe":
				return "+OK\r\n"
			case "sentinel":
				if strings.EqualFold(args[1], "get-master-addr-by-name") {
					return fmt.Sprintf("*2\r\n$%d\r\n%s\r\n$%d\r\n%s\r\n", len(host), host, len(port), port)
				}
				return "*0\r\n"
			}
			return "+OK\r\n"
		})
		places[name+" master"] = "redis+sentinel://%s@" + good + "?master=m&sentinel_password=PASSWORD"
	}
	var all sync.WaitGroup
	room := make(chan struct{}, 32)
	try := func(name, form, password, user string) {
		defer func() { <-room }()
		info := url.UserPassword(user, password).String()
		text := strings.ReplaceAll(strings.Replace(form, "%s", info, 1), "PASSWORD", url.QueryEscape(password))
		s, err := backend.Open(t.Context(), by(text, l.name)+"&timeout=2s&dial_timeout=500ms")
		if err != nil {
			t.Errorf("%s: Open: got error %v, want none", name, err)
			return
		}
		defer s.Close()
		for range 2 {
			_, err := one(s, "k")
			quiet(t, name, err)
			if got := class(err); got != quota.ErrUnavailable && got != quota.ErrMisconfigured {
				t.Errorf("%s: got error %v, want ErrUnavailable or ErrMisconfigured", name, err)
			}
		}
	}
	for name, form := range places {
		for i, password := range hostile {
			for _, user := range []string{"nobodysuser", ""}[:2-min(i%5, 1)] {
				room <- struct{}{}
				all.Go(func() { try(name, form, password, user) })
			}
		}
		all.Wait()
		quiet(t, name, nil)
	}
}

// userIsNotNamed: Redis names the user whom it refuses a command; errors do not.
func userIsNotNamed(t *testing.T, l library) {
	for _, text := range []string{
		"-NOPERM User nobodysuser has no permissions to run the 'evalsha' command\r\n",
		"-NOPERM this user has no permissions to run the 'evalsha' command\r\n",
	} {
		addr := fakeRedis(t, func([]string) string { return text })
		_, err := one(l.open(t, "redis://nobodysuser:hunter2@"+addr), "k")
		if !errors.Is(err, quota.ErrMisconfigured) || !strings.Contains(err.Error(), "user has no permissions to run the 'evalsha' command") {
			t.Errorf("%s: got error %v, want ErrMisconfigured with the same text", text, err)
		}
		quiet(t, text, err)
	}
}

// masterNamedSo: a master may have the name that is its password. Errors do not show that name; go-redis logs it.
func masterNamedSo(t *testing.T, l library) {
	ignorant := startSentinel(t, redisserver.Start(t).Port(), "port PORT") // of that name
	for _, addr := range []string{"127.0.0.1:1", ignorant} {
		_, err := one(l.open(t, "redis+sentinel://:hunter2@"+addr+"?master=hunter2"), "k")
		if logged.take(); err == nil {
			t.Errorf("%s: got no error, want one", addr)
		}
		quiet(t, addr, err)
	}
}

// rightPasswords: passwords arrive as they are, on the server too.
func rightPasswords(t *testing.T, l library) {
	server := redisserver.Start(t)
	for _, password := range hostile {
		do(t, server, "ACL", "SETUSER", "u", "reset", "on", ">"+password, "~*", "+@all")
		_, err := one(l.open(t, "redis://"+url.UserPassword("u", password).String()+"@"+server.Addr()), "k")
		is(t, fmt.Sprintf("%q", password), err, nil)
	}
}
