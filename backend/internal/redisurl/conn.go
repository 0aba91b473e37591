package redisurl

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"syscall"
)

// Dial connects to an address and makes the TLS handshake. Its errors, and those of the connection until
// the first command proper, are *net.OpError with Op "dial": no charge was sent.
func (c *Config) Dial(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.DialTimeout)
	defer cancel()
	var raw net.Conn
	var err error
	if c.TLS != nil {
		raw, err = (&tls.Dialer{NetDialer: d, Config: c.TLS}).DialContext(ctx, "tcp", addr)
	} else {
		raw, err = d.DialContext(ctx, "tcp", addr)
	}
	if err != nil {
		return nil, DialError(addr, err)
	}
	n := &conn{Conn: raw, addr: addr}
	for _, s := range [...]string{c.Username, c.Password, c.SentinelUsername, c.SentinelPassword} {
		if s != "" {
			n.secrets = append(n.secrets, oneLine(s))
		}
	}
	if under, ok := raw.(syscall.Conn); ok {
		return tcpConn{n, under}, nil
	}
	return n, nil
}

// DialError returns err as what it is: an error of connecting.
func DialError(addr string, err error) error {
	if op := (*net.OpError)(nil); errors.As(err, &op) && op.Op == "dial" {
		return err
	}
	return &net.OpError{Op: "dial", Net: "tcp", Addr: target(addr), Err: err}
}

// target is the net.Addr of an address that has not been resolved.
type target string

func (target) Network() string  { return "tcp" }
func (t target) String() string { return string(t) }

// conn is a connection that knows when the client's handshake is over: with the first command that is no
// part of one. Until then it sees to two things.
//
// What fails is an error of connecting, so that the call that wanted the connection is known not to have
// charged.
//
// Credentials do not come back. Servers that do not know HELLO or AUTH, old ones and proxies, answer them
// with an error that quotes the arguments, and client libraries pass that on: in their errors, and
// go-redis to the standard error. What an error reply quotes is crossed out.
type conn struct {
	net.Conn
	addr    string
	secrets [][]byte
	open    atomic.Bool // the handshake is over
	long    bool        // the last read ended within an error reply
}

// tcpConn keeps the connection's SyscallConn, by which go-redis sees that an idle one was closed.
type tcpConn struct {
	*conn
	syscall.Conn
}

// oneLine returns what a server makes of a text in an error reply: it cuts long ones, and lines do not
// end within a reply.
func oneLine(s string) []byte {
	const sure = 16
	return []byte(strings.NewReplacer("\r", " ", "\n", " ").Replace(s[:min(len(s), sure)]))
}

func (n *conn) Write(p []byte) (int, error) {
	if n.open.Load() {
		return n.Conn.Write(p)
	}
	if !handshake(p) {
		n.open.Store(true)
		return n.Conn.Write(p)
	}
	sent, err := n.Conn.Write(p)
	return sent, n.failed(err)
}

// handshake reports whether a client that writes p is in its handshake still. What does not begin with a
// command goes on with one that was too long for a write.
func handshake(p []byte) bool {
	if len(p) == 0 || p[0] != '*' {
		return true
	}
	lines := bytes.SplitN(p, []byte("\r\n"), 4)
	if len(lines) < 4 {
		return true
	}
	switch strings.ToLower(string(lines[2])) {
	case "hello", "auth", "select":
		return true
	}
	return false
}

func (n *conn) Read(p []byte) (int, error) {
	if n.open.Load() {
		return n.Conn.Read(p)
	}
	for {
		got, err := n.Conn.Read(p)
		if n.open.Load() { // what began in the handshake may end after it
			return got, err
		}
		// An error reply is looked at whole, so that it cannot quote over the edge of two reads.
		for err == nil && got < len(p) && partial(p[:got]) {
			var more int
			more, err = n.Conn.Read(p[got:])
			got += more
		}
		left := n.crossOut(p[:got])
		if left > 0 || got == 0 || err != nil {
			return left, n.failed(err)
		}
	}
}

// failed returns what an error of the handshake is.
func (n *conn) failed(err error) error {
	if err == nil {
		return nil
	}
	return handshakeError{&net.OpError{Op: "dial", Net: "tcp", Addr: target(n.addr), Err: err}}
}

// handshakeError is a *net.OpError in a wrapping, of which go-redis takes one off.
type handshakeError struct{ *net.OpError }

func (e handshakeError) Unwrap() error { return e.OpError }

// partial reports whether the last line is the beginning of an error reply.
func partial(p []byte) bool {
	last := p[bytes.LastIndexByte(p, '\n')+1:]
	return len(last) > 0 && last[0] == '-'
}

// crossOut takes out of p what error replies quote, and returns how long it is then.
func (n *conn) crossOut(p []byte) int {
	out := p[:0]
	for line := range bytes.Lines(p) {
		text := bytes.TrimRight(line, "\r\n")
		end := line[len(text):]
		switch {
		case n.long: // goes on with an error reply longer than a read
			text = nil
		case line[0] == '-':
			if at := n.quoted(text); at >= 0 {
				text[at] = '*'
				text = text[:at+1]
			}
		}
		n.long = (n.long || line[0] == '-') && !bytes.HasSuffix(line, []byte("\n"))
		out = append(append(out, text...), end...)
	}
	return len(out)
}

// quoted returns where in an error reply credentials may begin, or -1.
func (n *conn) quoted(text []byte) int {
	// Redis says what it does not know, and then quotes the arguments.
	if before, _, found := bytes.Cut(text, []byte(", with args beginning with: ")); found {
		return len(before)
	}
	code, rest, _ := bytes.Cut(text, []byte(" ")) // the kind of error comes first
	first := -1
	for _, s := range n.secrets {
		if i := bytes.Index(rest, s); i >= 0 && (first < 0 || i < first) {
			first = i
		}
	}
	if first < 0 {
		return -1
	}
	return len(code) + 1 + first
}
