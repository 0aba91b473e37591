package redisurl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// pieces is a connection that reads these texts, one a call, and fails then.
type pieces struct {
	net.Conn
	list []string
	sent string
}

func (p *pieces) Read(b []byte) (int, error) {
	if len(p.list) == 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n := copy(b, p.list[0])
	if p.list[0] = p.list[0][n:]; p.list[0] == "" {
		p.list = p.list[1:]
	}
	return n, nil
}

func (p *pieces) Write(b []byte) (int, error) {
	p.sent += string(b)
	return len(b), nil
}

// TestCredentialsAreCrossedOut: in the handshake, and not after it, error replies come without the
// credentials that they quote, wherever the reads cut them.
func TestCredentialsAreCrossedOut(t *testing.T) {
	const secret = "hunter2"
	long := "-ERR " + strings.Repeat("x", 300) + "\r\n"
	for _, test := range []struct {
		sent, want string
		pieces     []string
	}{
		{"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", "+OK\r\n", []string{"+OK\r\n"}},
		{"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", "-WRONGPASS *\r\n", []string{"-WRONGPASS hunter2 is wrong\r\n"}},
		{"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", "-WRONGPASS *\r\n", []string{"-WRONG", "PASS hun", "ter2\r\n"}},
		{"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", "-ERR unknown command `AUTH`*\r\n", []string{"-ERR unknown command `AUTH`, with args beginning with: `hun"}},
		{"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", "+OK\r\n-ERR *\r\n", []string{"+OK\r\n-ERR hunter2", "\r\n"}},
		{"*2\r\n$4\r\nAUTH\r\n$1\r\nx\r\n", long[:256] + "\r\n", []string{long}},
		{"*1\r\n$4\r\nPING\r\n", "-ERR hunter2\r\n", []string{"-ERR hunter2\r\n"}},
	} {
		n := &conn{Conn: &pieces{list: test.pieces}, addr: "h:1", secrets: [][]byte{oneLine(secret)}}
		n.Write([]byte(test.sent))
		var got []byte
		buffer := make([]byte, 256)
		for {
			m, err := n.Read(buffer)
			if got = append(got, buffer[:m]...); err != nil {
				if dial := (*net.OpError)(nil); errors.As(err, &dial) == n.open.Load() {
					t.Errorf("%q: got error %T, want one of connecting in the handshake only", test.pieces, err)
				}
				break
			}
		}
		if want := test.want; !strings.HasPrefix(string(got), strings.TrimSuffix(want, "\r\n")) || strings.Contains(string(got), secret) != n.open.Load() {
			t.Errorf("%q: got %q, want %q", test.pieces, got, want)
		}
	}
}

// TestDialErrors: an error before the first command is one of connecting.
func TestDialErrors(t *testing.T) {
	c := &Config{DialTimeout: DefaultDialTimeout}
	for _, addr := range []string{"127.0.0.1:1", "no-such-host.invalid:1"} {
		_, err := c.Dial(t.Context(), &net.Dialer{}, addr)
		if op := (*net.OpError)(nil); !errors.As(err, &op) || op.Op != "dial" {
			t.Errorf("%s: got error %v, want a *net.OpError of a dial", addr, err)
		}
	}
}

// refusing is an engine.Client that fails with an error.
type refusing struct {
	engine.Client
	err error
}

func (r refusing) Info(context.Context) ([]string, error) { return nil, r.err }

// TestGuard: errors name no user, and say so where the URL does not fit the server.
func TestGuard(t *testing.T) {
	refused := engine.ReplyError(errors.New("NOPERM User somebody has no permissions to run the 'evalsha' command"))
	moved := engine.ReplyError(errors.New("MOVED 1 127.0.0.1:1"))
	for _, test := range []struct {
		c    Config
		err  error
		want string
	}{
		{Config{Username: "somebody"}, refused, "NOPERM the user has no"},
		{Config{SentinelUsername: "somebody"}, refused, "NOPERM the user has no"},
		{Config{Username: "other"}, refused, "NOPERM User somebody has no"},
		{Config{}, moved, "redis+cluster://"},
		{Config{Cluster: true}, moved, "MOVED"},
	} {
		_, err := test.c.Guard(refusing{err: test.err}).Info(t.Context())
		if err == nil || !strings.Contains(err.Error(), test.want) || errors.Is(err, quota.ErrMisconfigured) == test.c.Cluster {
			t.Errorf("%+v: got error %v, want one that says %q", test.c, err, test.want)
		}
	}
}

// commands returns commands as a client writes them.
func commands(list ...string) string {
	var b strings.Builder
	for _, c := range list {
		words := strings.Fields(c)
		fmt.Fprintf(&b, "*%d\r\n", len(words))
		for _, w := range words {
			fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(w), w)
		}
	}
	return b.String()
}

// TestNoHello: with protocol 2 no HELLO goes to the server, and the client gets a refusal in its turn.
func TestNoHello(t *testing.T) {
	for _, test := range []struct {
		writes   [][]string // each is written at once
		replies  []string   // of the server
		sent     []string
		received string
		short    bool // the client reads few bytes at a time
	}{
		{writes: [][]string{{"HELLO 2"}}, received: unknownHello},
		{writes: [][]string{{"hello 2 AUTH u p"}, {"AUTH u p"}}, replies: []string{"+OK\r\n"}, sent: []string{"AUTH u p"}, received: unknownHello + "+OK\r\n"},
		{writes: [][]string{{"AUTH u p", "HELLO 2", "SELECT 3"}}, replies: []string{"+OK\r\n+OK\r\n"}, sent: []string{"AUTH u p", "SELECT 3"}, received: "+OK\r\n" + unknownHello + "+OK\r\n"},
		{writes: [][]string{{"AUTH u p", "HELLO 2", "SELECT 3"}}, replies: []string{"+O", "K\r\n+OK", "\r\n"}, sent: []string{"AUTH u p", "SELECT 3"}, received: "+OK\r\n" + unknownHello + "+OK\r\n", short: true},
		{writes: [][]string{{"AUTH u p", "HELLO 2"}}, replies: []string{"-WRONGPASS no\r\n"}, sent: []string{"AUTH u p"}, received: "-WRONGPASS no" + engine.WhileConnecting + "\r\n" + unknownHello},
	} {
		server := &pieces{list: test.replies}
		n := &conn{Conn: server, addr: "h:1", network: "tcp", resp2: true}
		for _, w := range test.writes {
			if m, err := n.Write([]byte(commands(w...))); err != nil || m != len(commands(w...)) {
				t.Errorf("%q: got %d, error %v; want all written", w, m, err)
			}
		}
		if want := commands(test.sent...); server.sent != want {
			t.Errorf("%q: sent %q, want %q", test.writes, server.sent, want)
		}
		buffer := make([]byte, 4096)
		if test.short {
			buffer = buffer[:3]
		}
		var got string
		for len(got) < len(test.received) {
			m, err := n.Read(buffer)
			if got += string(buffer[:m]); err != nil {
				break
			}
		}
		if got != test.received {
			t.Errorf("%q: received %q, want %q", test.writes, got, test.received)
		}
	}
}

// TestHelloRefused: a refusal of HELLO in other words than those of Redis is one in Redis' words.
func TestHelloRefused(t *testing.T) {
	redis := strings.TrimSuffix(unknownHello, "\r\n") + engine.WhileConnecting + "\r\n"
	for said, want := range map[string]string{
		"-NOPROTO unsupported protocol version\r\n":                                           redis,
		"-ERR unsupported command 'hello'\r\n":                                                redis,
		"-ERR unknown command `HELLO`, with args beginning with: `3`, `AUTH`, `u`, `p`, \r\n": redis,
		"-WRONGPASS hello\r\n":                                                                "-WRONGPASS hello" + engine.WhileConnecting + "\r\n",
	} {
		n := &conn{Conn: &pieces{list: []string{said}}, addr: "h:1", network: "tcp"}
		if _, err := n.Write([]byte(commands("HELLO 3"))); err != nil {
			t.Fatal(err)
		}
		buffer := make([]byte, 4096)
		if m, err := n.Read(buffer); err != nil || string(buffer[:m]) != want {
			t.Errorf("%q: got %q, error %v; want %q", said, buffer[:m], err, want)
		}
	}
}
