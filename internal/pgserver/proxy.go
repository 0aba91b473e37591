package pgserver

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Mode says how a Proxy treats requests, each of which ends with a Sync or is a simple query.
type Mode uint8

const (
	// Pass: requests and replies go through.
	Pass Mode = iota
	// Refuse: the server does not get the request, and the connection is closed.
	Refuse
	// LoseReply: the server executes the request to its end, and the connection is closed instead of the reply.
	LoseReply
	// Freeze: requests and replies wait until the mode changes.
	Freeze
)

// Proxy stands between clients and a server that speak without TLS.
type Proxy struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu     sync.Mutex
	mode   Mode
	match  func(sql string) bool // the requests that LoseReply takes
	thaw   chan struct{}         // closed unless the mode is Freeze
	conns  map[net.Conn]bool
	closed bool
	lost   int
	dialed int
	seen   func(sql string) // is told each statement of each request
}

// StartProxy starts a proxy before a server and ends it with the test.
func StartProxy(tb testing.TB, target string) *Proxy {
	tb.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{listener: l, target: target, conns: map[net.Conn]bool{}, thaw: make(chan struct{})}
	close(p.thaw)
	p.wg.Go(p.accept)
	tb.Cleanup(p.close)
	return p
}

// Addr returns the proxy's address, for clients.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Set has the proxy treat requests in a mode from now on. LoseReply takes the requests with a statement that match
// accepts; a nil match accepts any.
func (p *Proxy) Set(m Mode, match func(sql string) bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.mode == Freeze {
		close(p.thaw)
	}
	if m == Freeze {
		p.thaw = make(chan struct{})
	}
	p.mode, p.match = m, match
}

// Lost returns how many replies were lost.
func (p *Proxy) Lost() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

// Dialed returns how many connections clients made.
func (p *Proxy) Dialed() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dialed
}

// Watch has the proxy tell the statements of each request, in order, before the server gets them. Each statement begins
// with the mark of its protocol: "prepare name: ", "execute name: " or "query: ".
func (p *Proxy) Watch(seen func(statement string)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seen = seen
}

// Cut closes all connections.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
}

func (p *Proxy) close() {
	p.Set(Pass, nil)
	p.listener.Close()
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.Cut()
	p.wg.Wait()
}

func (p *Proxy) accept() {
	for {
		c, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(c) })
	}
}

// keep has a connection closed with the proxy, and reports whether that is still open.
func (p *Proxy) keep(conns ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range conns {
		if p.closed {
			c.Close()
		} else {
			p.conns[c] = true
		}
	}
	return !p.closed
}

// now returns the mode, and waits while it is Freeze.
func (p *Proxy) now() (Mode, func(string) bool) {
	for {
		p.mu.Lock()
		mode, match, thaw := p.mode, p.match, p.thaw
		p.mu.Unlock()
		if mode != Freeze {
			return mode, match
		}
		<-thaw
	}
}

func (p *Proxy) serve(client net.Conn) {
	p.mu.Lock()
	p.dialed++
	p.mu.Unlock()
	if mode, _ := p.now(); mode == Refuse {
		client.Close()
		return
	}
	server, err := net.DialTimeout("tcp", p.target, 5*time.Second)
	if err != nil {
		client.Close()
		return
	}
	if !p.keep(client, server) {
		server.Close()
		return
	}
	l := &link{p: p, client: client, server: server, statements: map[string]string{}, requests: make(chan bool, 1024)}
	l.requests <- false // the reply to the greeting
	p.wg.Go(func() { l.ask(); l.cut() })
	l.answer()
	l.cut()
	p.mu.Lock()
	delete(p.conns, client)
	delete(p.conns, server)
	p.mu.Unlock()
}

// link is a client's connection and its connection to the server.
type link struct {
	p              *Proxy
	client, server net.Conn
	statements     map[string]string // prepared ones, by name
	requests       chan bool         // without a reply yet, in order: whether the reply is lost
}

func (l *link) cut() {
	l.client.Close()
	l.server.Close()
}

// ask passes requests on.
func (l *link) ask() {
	r := bufio.NewReader(l.client)
	greeting, err := appendFrame(nil, r, false)
	if err != nil {
		return
	}
	if _, err := l.server.Write(greeting); err != nil {
		return
	}
	var request []byte
	var executed []string
	for {
		begin := len(request)
		if request, err = appendFrame(request, r, true); err != nil {
			return
		}
		body := request[begin+5:]
		whole := false
		switch request[begin] {
		case 'P':
			name, rest, _ := bytes.Cut(body, []byte{0})
			sql, _, _ := bytes.Cut(rest, []byte{0})
			l.statements[string(name)] = string(sql)
			l.tell("prepare " + string(name) + ": " + string(sql))
		case 'B':
			_, rest, _ := bytes.Cut(body, []byte{0})
			name, _, _ := bytes.Cut(rest, []byte{0})
			executed = append(executed, l.statements[string(name)])
			l.tell("execute " + string(name) + ": " + l.statements[string(name)])
		case 'Q':
			sql, _, _ := bytes.Cut(body, []byte{0})
			executed = append(executed, string(sql))
			l.tell("query: " + string(sql))
			whole = true
		case 'S':
			whole = true
		case 'p', 'X': // a password, which belongs to the greeting, or the end
			if _, err := l.server.Write(request); err != nil {
				return
			}
			request = request[:0]
		}
		if !whole {
			continue
		}
		mode, match := l.p.now()
		if mode == Refuse {
			return
		}
		lose := false
		for _, sql := range executed {
			lose = lose || mode == LoseReply && (match == nil || match(sql))
		}
		l.requests <- lose
		if _, err := l.server.Write(request); err != nil {
			return
		}
		request, executed = request[:0], nil
	}
}

func (l *link) tell(statement string) {
	l.p.mu.Lock()
	seen := l.p.seen
	l.p.mu.Unlock()
	if seen != nil {
		seen(statement)
	}
}

// answer passes replies on.
func (l *link) answer() {
	r := bufio.NewReader(l.server)
	var reply []byte
	lose, asked := false, false
	for {
		begin := len(reply)
		var err error
		if reply, err = appendFrame(reply, r, true); err != nil {
			return
		}
		if !asked {
			select {
			case lose = <-l.requests:
				asked = true
			default: // the last words of a server that closes the connection
			}
		}
		end := reply[begin] == 'Z'
		switch {
		case end && lose:
			l.p.mu.Lock()
			l.p.lost++
			l.p.mu.Unlock()
			return
		case !lose && (end || r.Buffered() == 0):
			l.p.now()
			if _, err := l.client.Write(reply); err != nil {
				return
			}
			reply = reply[:0]
		}
		if end {
			asked = false
		}
	}
}

// appendFrame reads a message: its type, unless it is the first of a client, its length, and its body.
func appendFrame(dst []byte, r *bufio.Reader, typed bool) ([]byte, error) {
	head := 4
	if typed {
		head = 5
	}
	begin := len(dst)
	dst = append(dst, make([]byte, head)...)
	if _, err := io.ReadFull(r, dst[begin:]); err != nil {
		return dst[:begin], err
	}
	n := int(binary.BigEndian.Uint32(dst[begin+head-4:])) - 4
	if n < 0 || n > 1<<26 {
		return dst[:begin], io.ErrUnexpectedEOF
	}
	dst = append(dst, make([]byte, n)...)
	if _, err := io.ReadFull(r, dst[begin+head:]); err != nil {
		return dst[:begin], err
	}
	return dst, nil
}
