package redisurl

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"syscall"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// Dial connects to an address and makes the TLS handshake. Its errors are *net.OpError with Op "dial", and so
// are the errors of the connection until the client's handshake is over: no charge was sent.
func (c *Config) Dial(ctx context.Context, d *net.Dialer, addr string) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, c.DialTimeout)
	defer cancel()
	raw, err := d.DialContext(ctx, c.network(), addr)
	if err == nil && c.TLS != nil {
		raw, err = c.secure(ctx, raw, addr)
	}
	if err != nil {
		return nil, DialError(addr, err)
	}
	n := &conn{Conn: raw, addr: addr, network: c.network(), secured: c.TLS != nil, resp2: c.RESP2, lost: c.Lost}
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

// secure makes the TLS handshake on a connection, which it closes if it fails. Its time is a little shorter than
// DialTimeout, so that its error comes before the patience of the callers ends: a plain port takes the beginning of a
// handshake for a command that is not complete, and waits.
func (c *Config) secure(ctx context.Context, raw net.Conn, addr string) (net.Conn, error) {
	most := c.DialTimeout - c.DialTimeout/8
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	config := c.TLS.Clone()
	if config.ServerName == "" {
		config.ServerName, _, _ = net.SplitHostPort(addr)
	}
	secure := tls.Client(raw, config)
	if err := secure.HandshakeContext(ctx); err != nil {
		raw.Close()
		if errors.Is(err, context.DeadlineExceeded) {
			err = fmt.Errorf("%w: no answer to the TLS handshake within %v; if the port does not speak TLS, accepted for it: a URL without TLS", err, most)
		}
		return nil, err
	}
	return secure, nil
}

func (c *Config) network() string {
	if c.Socket {
		return "unix"
	}
	return "tcp"
}

// DialError returns err as a *net.OpError with Op "dial".
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

// conn is a connection that knows when the client's handshake is over: at the first command that belongs to
// no handshake. Until then it makes two promises.
//
// Every failure is an error of connecting: the call that needed the connection was not charged.
//
// Credentials do not come back. A server that does not know HELLO or AUTH, such as an old one or a proxy,
// answers with an error that quotes the arguments. Client libraries pass the text on: in their errors, and
// go-redis to the standard error. So conn crosses out the quotes of error replies.
type conn struct {
	net.Conn
	addr    string
	lost    func(addr string)
	network string
	secured bool
	secrets [][]byte
	open    atomic.Bool // the handshake is over
	long    bool        // the last read ended within an error reply
	met     bool        // the server has answered

	resp2 bool // send no HELLO
	hello hello
}

// tcpConn has the connection's SyscallConn, with which go-redis finds out that an idle connection was closed.
type tcpConn struct {
	*conn
	syscall.Conn
}

// oneLine returns the beginning of a text as a server quotes it in an error reply: on one line. A server cuts
// long texts, so the beginning must do.
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
	send := p
	if n.resp2 {
		if send = n.hello.cut(p); len(send) == 0 {
			return len(p), nil
		}
	}
	if _, err := n.Conn.Write(send); err != nil {
		return 0, n.failed(err)
	}
	return len(p), nil
}

// handshake reports whether a client that writes p is still in its handshake. If p does not begin with a
// command, it is the rest of one that was too long for a single write.
func handshake(p []byte) bool {
	switch name(p) {
	case "", "hello", "auth", "select":
		return true
	}
	return false
}

// name returns the name of the command with which p begins, in lower case, or "" where there is none.
func name(p []byte) string {
	if len(p) == 0 || p[0] != '*' {
		return ""
	}
	lines := bytes.SplitN(p, []byte("\r\n"), 4)
	if len(lines) < 4 {
		return ""
	}
	return strings.ToLower(string(lines[2]))
}

func (n *conn) Read(p []byte) (int, error) {
	if n.open.Load() {
		got, err := n.Conn.Read(p)
		return got, n.ended(err)
	}
	for {
		if m := n.hello.take(p); m > 0 {
			return m, nil
		}
		got, err := n.Conn.Read(p)
		if n.open.Load() { // a read that began in the handshake may end after it
			return got, n.ended(err)
		}
		// Read the whole error reply, so that no quote is cut by the end of a read.
		for err == nil && got < len(p) && partial(p[:got]) {
			var more int
			more, err = n.Conn.Read(p[got:])
			got += more
		}
		if n.secure(p[:got]) {
			return 0, n.failed(errors.New("the server's port speaks TLS; " + secureCure))
		}
		n.met = n.met || got > 0
		left := n.mark(p, n.crossOut(p[:got]))
		if n.resp2 {
			n.hello.put(p[:left])
			left = n.hello.take(p)
		}
		if left > 0 || got == 0 || err != nil {
			return left, n.failed(err)
		}
	}
}

// ended tells of the end of the connection, unless the client made it, and returns the error.
func (n *conn) ended(err error) error {
	if err != nil && n.lost != nil && !errors.Is(err, net.ErrClosed) && !errors.Is(err, os.ErrDeadlineExceeded) {
		n.lost(n.addr)
	}
	return err
}

const secureCure = "accepted for it: rediss://, or the parameter tls=true"

// hungUp adds the cures to the error of a connection that the server closed without an answer.
func (n *conn) hungUp(err error) error {
	alert, _ := errors.AsType[*net.OpError](err)
	refused := alert != nil && alert.Op == "remote error"
	if n.met || !refused && !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return err
	}
	text := "the server closed the connection and gave no answer"
	if n.secured {
		text += "; if it demands a client certificate, accepted for it: the parameters cert and key, with a certificate that it knows"
	} else {
		text += "; if its port speaks TLS, " + secureCure
	}
	if !n.resp2 && !refused {
		text += "; if it is a proxy that does not know HELLO, accepted for it: the parameter protocol=2"
	}
	return fmt.Errorf("%w: %s", err, text)
}

// failed returns an error of the handshake as an error of connecting.
func (n *conn) failed(err error) error {
	if err == nil {
		return nil
	}
	return handshakeError{&net.OpError{Op: "dial", Net: n.network, Addr: target(n.addr), Err: n.hungUp(err)}}
}

// handshakeError wraps a *net.OpError once more, for go-redis unwraps an error once.
type handshakeError struct{ *net.OpError }

func (e handshakeError) Unwrap() error { return e.OpError }

// secure reports whether the server answered the first bytes in TLS: with an alert.
func (n *conn) secure(p []byte) bool {
	const alert, version = 21, 3
	return len(p) > 1 && p[0] == alert && p[1] == version
}

// mark ends the error replies in the first bytes of p with engine.WhileConnecting, as far as p has room, and
// returns the new length: a reply whose words say nothing else tells by it that no charge was sent. It also
// translates a refusal of HELLO into Redis' words, without which not every client falls back to RESP2.
func (n *conn) mark(p []byte, length int) int {
	if length == 0 || !bytes.Contains(p[:length], []byte("-")) {
		return length
	}
	var out []byte
	for line := range bytes.Lines(p[:length]) {
		text, whole := bytes.CutSuffix(line, []byte("\r\n"))
		if out = append(out, text...); whole {
			if line[0] == '-' {
				if refusesHello(text) {
					out = append(out[:len(out)-len(text)], strings.TrimSpace(unknownHello)...)
				}
				out = append(out, engine.WhileConnecting...)
			}
			out = append(out, "\r\n"...)
		}
	}
	if len(out) > len(p) {
		return length
	}
	return copy(p, out)
}

// refusesHello reports whether an error reply says that the server does not know HELLO, or the protocol that
// HELLO asks for.
func refusesHello(text []byte) bool {
	said := strings.ToLower(string(text))
	return strings.HasPrefix(said, "-noproto") ||
		(strings.Contains(said, "unknown command") || strings.Contains(said, "unsupported command")) && strings.Contains(said, "hello")
}

// partial reports whether the last line is the beginning of an error reply.
func partial(p []byte) bool {
	last := p[bytes.LastIndexByte(p, '\n')+1:]
	return len(last) > 0 && last[0] == '-'
}

// crossOut removes the quotes of error replies from p, in place, and returns the new length.
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
	// Redis names the command that it does not know, and then quotes the arguments.
	if before, _, found := bytes.Cut(text, []byte(", with args beginning with: ")); found {
		return len(before)
	}
	code, rest, _ := bytes.Cut(text, []byte(" ")) // the code of the error is no quote
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
