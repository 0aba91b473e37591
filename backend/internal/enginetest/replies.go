package enginetest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// Replies: whatever a server, or what stands before it, answers to a script, the client's side of the
// engine makes an error of the right class of it and never panics.
func Replies(t *testing.T, connect Connect) {
	const now = ":1795427141791724\r\n"
	addr, answer := pretend(t)
	open := opener(t, connect(t, false, addr))
	store := open(engine.Options{})
	scripted := yearly("a", 10)
	unscripted := limitOf("b", hidden{scripted.Algorithm()})
	for i, reply := range []string{
		":5\r\n", "+OK\r\n", "$2\r\nOK\r\n", "$-1\r\n", "_\r\n", "*-1\r\n", "*0\r\n", "*1\r\n" + now, "*2\r\n" + now + now, "*2\r\n$1\r\nx\r\n$-1\r\n",
		"*2\r\n" + now + "*1\r\n$1\r\nx\r\n", "*2\r\n*2\r\n" + now + "$-1\r\n$-1\r\n", "*2\r\n" + now + "$5\r\nhello\r\n", "*3\r\n" + now + "$5\r\nhello\r\n$-1\r\n",
		"*5\r\n" + now + "$-1\r\n$-1\r\n$-1\r\n$-1\r\n", "*2\r\n:0\r\n$-1\r\n", "*3\r\n:0\r\n$-1\r\n$-1\r\n", "*2\r\n:9223372036854775807\r\n$-1\r\n",
		"*2\r\n:-9223372036854775808\r\n$-1\r\n", "*3\r\n:-9223372036854775808\r\n$-1\r\n$-1\r\n", "*2\r\n,1.5\r\n$-1\r\n", "*2\r\n#t\r\n_\r\n", "*2\r\n" + now + "#t\r\n",
		"*2\r\n(3492890328409238509324850943850943825024385\r\n_\r\n", "*2\r\n-ERR inside\r\n" + now, "*2\r\n" + now + "-ERR inside\r\n", "%1\r\n" + now + now, "#f\r\n", ",1.5\r\n",
		"*2\r\n" + now + "%1\r\n+a\r\n+b\r\n", "-ERR user_script:1: boom\r\n", "-NOPERM no\r\n", "-WRONGTYPE no\r\n", "-FLEETQUOTA no\r\n", "-\r\n",
	} {
		answer.Store(reply)
		for _, cs := range [][]quota.Charge{
			{{Limit: scripted, Key: "k", Cost: 1}}, {{Limit: scripted, Key: "k", Cost: 1}, {Limit: scripted, Key: "l", Cost: 1}},
			{{Limit: scripted, Key: "k", Cost: 1, ID: "r"}}, {{Limit: unscripted, Key: "k", Cost: 1}},
		} {
			out := make([]quota.Decision, len(cs))
			if err := store.TakeAll(bg, cs, out); !errors.Is(err, quota.ErrMisconfigured) && !(cs[0].ID != "" && errors.Is(err, quota.ErrInvalid)) || errors.Is(err, quota.ErrIndeterminate) {
				t.Errorf("reply %d, %.40q, to %s: %+v, %v", i, reply, show(cs), out, err)
			}
		}
	}
	for reply, want := range map[string]error{"-OOM full\r\n": quota.ErrUnavailable, "-LOADING wait\r\n": quota.ErrUnavailable, "-NOSCRIPT again\r\n": quota.ErrMisconfigured} {
		answer.Store(reply)
		if d, err := store.Take(bg, quota.Charge{Limit: scripted, Key: "k", Cost: 1}); !errors.Is(err, want) {
			t.Errorf("reply %q: %+v, %v", reply, d, err)
		}
	}
	// What a script does answer is a decision here too, or the test would prove nothing.
	answer.Store("*2\r\n" + now + "$-1\r\n")
	if d, err := store.Take(bg, quota.Charge{Limit: scripted, Key: "k", Cost: 1}); err != nil || d.Remaining != 9 {
		t.Errorf("%+v, %v", d, err)
	}
}

// pretend listens as a server that shakes hands and answers every script with the same bytes.
func pretend(t *testing.T) (addr string, answer *atomic.Value) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	answer = &atomic.Value{}
	answer.Store("+OK\r\n")
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				for r := bufio.NewReader(conn); ; {
					name, err := command(r)
					if err != nil {
						return
					}
					reply := "+OK\r\n"
					switch name {
					case "EVALSHA", "EVAL":
						reply = answer.Load().(string)
					case "HELLO":
						reply = "%3\r\n+server\r\n+redis\r\n+version\r\n+7.0.15\r\n+proto\r\n:3\r\n"
					case "PING":
						reply = "+PONG\r\n"
					}
					if _, err := io.WriteString(conn, reply); err != nil {
						return
					}
				}
			}()
		}
	}()
	return listener.Addr().String(), answer
}

// command reads a command and returns its name.
func command(r *bufio.Reader) (name string, err error) {
	number := func(kind byte) (int, error) {
		line, err := r.ReadString('\n')
		if err != nil || line[0] != kind {
			return 0, fmt.Errorf("%q, %w", line, err)
		}
		return strconv.Atoi(strings.TrimSpace(line[1:]))
	}
	n, err := number('*')
	for i := 0; i < n && err == nil; i++ {
		var size int
		if size, err = number('$'); err != nil {
			break
		}
		arg := make([]byte, size+2)
		if _, err = io.ReadFull(r, arg); i == 0 {
			name = strings.ToUpper(string(arg[:size]))
		}
	}
	return name, err
}
