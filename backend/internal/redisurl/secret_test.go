package redisurl_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// hostile are passwords that parsers and messages stumble over. Each holds "unter2".
var hostile = []string{
	"hunter2", "p@hunter2", "hunter2@127.0.0.1:1/0", "a:hunter2", "/hunter2", "?hunter2=1", "#hunter2", "%68unter2", "hunter2\r\n-ERR", "hunter2 `'\"",
	"127.0.0.1:hunter2", "+hunter2&client=goredis", "hunter2é", strings.Repeat("hunter2-", 100), strings.Repeat("x", 5000) + "hunter2",
}

// tells reports what of a text gives a password away.
func tells(text string) bool {
	return strings.Contains(text, "unter2") || strings.Contains(text, "nobodysuser") || strings.Contains(text, "xxxxxxxx")
}

// quiet checks that neither an error, however it is looked at, nor what go-redis logged tells a password.
func quiet(t *testing.T, where string, err error) {
	t.Helper()
	var walk func(error)
	walk = func(e error) {
		for _, text := range []string{e.Error(), fmt.Sprintf("%+v", e), fmt.Sprintf("%#v", e)} {
			if tells(text) {
				t.Errorf("%s: %s", where, text)
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
		t.Errorf("%s: go-redis logged: %s", where, text)
	}
}

// answering is a server that answers each command with what reply makes of it.
func answering(t *testing.T, reply func(args []string) string) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	t.Cleanup(func() { l.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				r := bufio.NewReader(c)
				for {
					args, err := readCommand(r)
					if err != nil {
						return
					}
					if _, err := io.WriteString(c, reply(args)); err != nil {
						return
					}
				}
			})
		}
	})
	return l.Addr().String()
}

func readCommand(r *bufio.Reader) ([]string, error) {
	number := func() (int, error) {
		line, err := r.ReadString('\n')
		if err != nil {
			return 0, err
		}
		return strconv.Atoi(strings.TrimSpace(line[1:]))
	}
	n, err := number()
	if err != nil {
		return nil, err
	}
	args := make([]string, n)
	for i := range args {
		size, err := number()
		if err != nil {
			return nil, err
		}
		b := make([]byte, size+2)
		if _, err := io.ReadFull(r, b); err != nil {
			return nil, err
		}
		args[i] = string(b[:size])
	}
	return args, nil
}

var line = strings.NewReplacer("\r", " ", "\n", " ")

// Servers that do not know a command, and say so in their ways.
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

// TestNothingTellsThePassword goes through everything that can fail.
func TestNothingTellsThePassword(t *testing.T) {
	server := redisserver.StartConfig(t, redisserver.Config{Args: []string{"--requirepass", "right"}, Users: []string{"nobodysuser on >right ~* +@all"}})
	tlsAddr, _ := tlsServer(t, "--requirepass", "right")
	cluster := redisserver.StartCluster(t, "--requirepass", "right", "--masterauth", "right")
	dead := "127.0.0.1:1"
	places := map[string]string{
		"refused":            "redis://%s@" + dead,
		"refused cluster":    "redis+cluster://%s@" + dead + "?addr=127.0.0.1:2",
		"refused sentinel":   "redis+sentinel://%s@" + dead + "?master=m&sentinel_user=nobodysuser&sentinel_password=PASSWORD",
		"no such host":       "redis://%s@no-such-host.invalid",
		"wrong":              "redis://%s@" + server.Addr(),
		"wrong on a cluster": clusterURL(cluster, "%s@", ""),
		"no TLS there":       "rediss://%s@" + server.Addr(),
		"TLS there":          "redis://%s@" + tlsAddr.Addr(),
		"authority":          "rediss://%s@" + tlsAddr.Addr(),
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
	try := func(client, name, form, password, user string) {
		defer func() { <-room }()
		where := client + ", " + name
		info := url.UserPassword(user, password).String()
		text := strings.ReplaceAll(strings.Replace(form, "%s", info, 1), "PASSWORD", url.QueryEscape(password))
		s, err := backend.Open(t.Context(), by(text, client)+"&timeout=2s&dial_timeout=500ms")
		if err != nil {
			t.Errorf("%s: Open: %v", where, err)
			return
		}
		defer s.Close()
		for range 2 {
			_, err := take(s, "k")
			quiet(t, where, err)
			if !errors.Is(err, quota.ErrUnavailable) && !errors.Is(err, quota.ErrMisconfigured) {
				t.Errorf("%s: %v", where, err)
			}
		}
	}
	for name, form := range places {
		for _, client := range clients {
			for i, password := range hostile {
				for _, user := range []string{"nobodysuser", ""}[:2-min(i%5, 1)] {
					room <- struct{}{}
					all.Go(func() { try(client, name, form, password, user) })
				}
			}
		}
		start := time.Now()
		all.Wait()
		quiet(t, name, nil)
		if took := time.Since(start); took > time.Second {
			t.Logf("%s took %v", name, took)
		}
	}
}

// TestUserIsNotNamed: Redis names the user whom it refuses a command.
func TestUserIsNotNamed(t *testing.T) {
	for _, text := range []string{
		"-NOPERM User nobodysuser has no permissions to run the 'evalsha' command\r\n",
		"-NOPERM this user has no permissions to run the 'evalsha' command\r\n",
	} {
		addr := answering(t, func(args []string) string {
			switch strings.ToLower(args[0]) {
			case "hello":
				return "*6\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$5\r\n7.4.0\r\n$5\r\nproto\r\n:3\r\n"
			case "evalsha", "eval", "info":
				return text
			}
			return "+OK\r\n"
		})
		with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
			_, err := take(open(t, "redis://nobodysuser:hunter2@"+addr), "k")
			if !errors.Is(err, quota.ErrMisconfigured) || !strings.Contains(err.Error(), "user has no permissions to run the 'evalsha' command") {
				t.Error(err)
			}
			quiet(t, text, err)
		})
	}
}

// TestRightPasswords: passwords arrive as they are, on the server too.
func TestRightPasswords(t *testing.T) {
	server := redisserver.Start(t)
	for _, password := range hostile {
		if _, err := server.Do("ACL", "SETUSER", "u", "reset", "on", ">"+password, "~*", "+@all"); err != nil {
			t.Errorf("%q: %v", password, err)
			continue
		}
		with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
			if _, err := take(open(t, "redis://"+url.UserPassword("u", password).String()+"@"+server.Addr()), "k"); err != nil {
				t.Errorf("%q: %v", password, err)
			}
		})
	}
}
