package conformance

import (
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// A Proxy stands between a store's client and its server, on TCP, and breaks the connections: its Set is the function that
// [Harness].Fault returns. It knows no protocol. Methods may be called concurrently.
//
// Under Refused a connection ends when the client sends on it, and the server does not get what was sent. Under LostReply
// the server gets everything, and a connection ends when the server has sent a reply that the function given to NewProxy
// chooses. Under Frozen nothing passes until the fault ends.
type Proxy struct {
	connection
	listener net.Listener
	target   string
	lose     func(request, reply []byte) bool
	wg       sync.WaitGroup
	open     map[net.Conn]struct{} // nil when the proxy is closed
}

// NewProxy starts a proxy on a free port of the loopback interface, before the address target. Under LostReply it calls
// lose, possibly on several goroutines, for each part of a reply: with the bytes that the client sent since the last reply,
// and the bytes that the server has sent since then. Both are cut to their last 64 kB, and must not be kept. A true result
// keeps the part from the client and ends the connection. To a store that charges in one request any reply may be lost, by
// a lose that is nil; of a store of several round trips it must be the reply to the last, such as one that contains
// "COMMIT\x00" where the server is PostgreSQL, since a call that fails before charges nothing.
func NewProxy(target string, lose func(request, reply []byte) bool) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("conformance: a proxy before %s: %w", target, err)
	}
	if lose == nil {
		lose = func([]byte, []byte) bool { return true }
	}
	p := &Proxy{listener: l, target: target, lose: lose, open: map[net.Conn]struct{}{}}
	p.wg.Go(p.accept)
	return p, nil
}

// Addr returns the proxy's address, for clients.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Set sets the fault that all connections meet from now on.
func (p *Proxy) Set(f Fault) { p.set(f) }

// Close ends the proxy and its connections. It may be called twice.
func (p *Proxy) Close() error {
	err := p.listener.Close()
	p.mu.Lock()
	for c := range p.open {
		c.Close()
	}
	p.open = nil
	p.mu.Unlock()
	p.set(NoFault)
	p.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// keep notes connections, which Close closes, and reports whether the proxy is open.
func (p *Proxy) keep(cs ...net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range cs {
		if p.open == nil {
			c.Close()
		} else {
			p.open[c] = struct{}{}
		}
	}
	return p.open != nil
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(client) })
	}
}

// link is a client's connection, and its connection to the server.
type link struct {
	p              *Proxy
	client, server net.Conn

	mu             sync.Mutex
	request, reply []byte // since the last reply
}

func (p *Proxy) serve(client net.Conn) {
	if !p.keep(client) {
		return
	}
	l := &link{p: p, client: client}
	var err error
	if l.server, err = net.DialTimeout("tcp", p.target, 10*time.Second); err == nil && p.keep(l.server) {
		var wg sync.WaitGroup
		wg.Go(func() { l.pass(client, l.server, l.sent) })
		wg.Go(func() { l.pass(l.server, client, l.received) })
		wg.Wait()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range []net.Conn{client, l.server} {
		if c != nil {
			c.Close()
			delete(p.open, c)
		}
	}
}

// pass copies bytes until one side ends the connection, or the fault does.
func (l *link) pass(from, to net.Conn, may func(f Fault, b []byte) bool) {
	defer func() { from.Close(); to.Close() }()
	b := make([]byte, 1<<15)
	for {
		n, err := from.Read(b)
		if n > 0 {
			f, thaw := l.p.now()
			if f == Frozen {
				<-thaw
				f, _ = l.p.now()
			}
			if !may(f, b[:n]) {
				return
			}
			if _, err := to.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// sent reports whether bytes of the client go to the server.
func (l *link) sent(f Fault, b []byte) bool {
	if f == Refused {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.reply) > 0 { // another exchange begins
		l.request, l.reply = l.request[:0], l.reply[:0]
	}
	l.request = tailOf(append(l.request, b...))
	return true
}

// received reports whether bytes of the server go to the client.
func (l *link) received(f Fault, b []byte) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.reply = tailOf(append(l.reply, b...))
	return f != LostReply || !l.p.lose(l.request, l.reply)
}

// tailOf returns the last 64 kB of b.
func tailOf(b []byte) []byte {
	const most = 1 << 16
	if len(b) > most {
		return append(b[:0], b[len(b)-most:]...)
	}
	return b
}
