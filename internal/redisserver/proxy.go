package redisserver

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"
)

// Action is the way in which a Fault breaks a request.
type Action int

const (
	// DropReply lets the server execute the request, waits for its reply, and closes the connection instead
	// of passing the reply on. Replies to earlier requests are passed on; later ones on the connection may be
	// executed as well.
	DropReply Action = iota
	// DropRequest keeps the request from the server and closes the connection, after the replies to earlier
	// requests.
	DropRequest
	// DelayReply passes the reply on when Fault.Delay has passed since the request came.
	DelayReply
	// DelayRequest passes the request on after Fault.Delay, even if the client has left by then. Later
	// requests on the connection wait behind it.
	DelayRequest
)

// Fault is a rule by which a Proxy breaks connections. The zero value drops the reply to every request.
type Fault struct {
	Action Action
	// Match chooses requests by their arguments, such as Commands("EVALSHA"); nil chooses all, a client's
	// handshake included.
	Match func(args []string) bool
	// Every is how many chosen requests there are to one that meets the fault, which may be any of them; 0 and 1
	// mean that all meet it. Seed makes the choice repeatable.
	Every int
	Seed  uint64
	// Delay belongs to DelayReply and DelayRequest.
	Delay time.Duration
}

// Commands returns a Fault.Match for commands with one of these names, in upper or lower case.
func Commands(names ...string) func(args []string) bool {
	return func(args []string) bool {
		for _, n := range names {
			if len(args) > 0 && strings.EqualFold(args[0], n) {
				return true
			}
		}
		return false
	}
}

// Injection is a Fault at work.
type Injection struct {
	fault Fault
	mu    sync.Mutex
	rng   *rand.Rand
	place int // of the next request among Every
	next  int // the place of the one that meets the fault
	fired int
}

func newInjection(f Fault) *Injection {
	return &Injection{fault: f, rng: rand.New(rand.NewPCG(f.Seed, 0))}
}

// Fired returns how many requests met the fault so far.
func (i *Injection) Fired() int { i.mu.Lock(); defer i.mu.Unlock(); return i.fired }

func (i *Injection) meets(args []string) bool {
	if i.fault.Match != nil && !i.fault.Match(args) {
		return false
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	every := max(i.fault.Every, 1)
	if i.place == 0 {
		i.next = i.rng.IntN(every)
	}
	met := i.place == i.next
	i.place = (i.place + 1) % every
	if met {
		i.fired++
	}
	return met
}

// Proxy stands between clients and one server, speaks RESP2 and RESP3 without TLS, and breaks connections on
// request. It passes everything on, without faults, once a connection subscribes, monitors or turns its
// replies off.
type Proxy struct {
	listener net.Listener
	done     chan struct{}
	wg       sync.WaitGroup

	mu     sync.Mutex
	target string
	faults []*Injection
	links  map[*link]struct{}
	closed bool
}

// StartProxy starts a proxy before the address target and ends it with the test.
func StartProxy(tb testing.TB, target string) *Proxy {
	tb.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(loopback, "0"))
	if err != nil {
		tb.Fatal(err)
	}
	p := &Proxy{target: target, listener: l, done: make(chan struct{}), links: make(map[*link]struct{})}
	p.wg.Go(p.accept)
	tb.Cleanup(p.close)
	return p
}

// Addr returns the proxy's address, for clients.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Inject adds a fault. If there are several, a request meets the first that takes it.
func (p *Proxy) Inject(f Fault) *Injection {
	i := newInjection(f)
	p.inject(i)
	return i
}

func (p *Proxy) inject(i *Injection) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = append(p.faults, i)
}

// Lead has new connections led to another address, as a name that is resolved anew does. Those that there are stay.
func (p *Proxy) Lead(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// Clear removes all faults.
func (p *Proxy) Clear() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.faults = nil
}

// Reset resets every connection (RST). New ones are accepted.
func (p *Proxy) Reset() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for l := range p.links {
		_ = l.client.SetLinger(0)
		l.cut()
	}
}

// close ends the proxy and its connections.
func (p *Proxy) close() {
	p.mu.Lock()
	p.closed = true
	close(p.done)
	p.listener.Close()
	for l := range p.links {
		l.cut()
	}
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Proxy) fault(args []string) *Fault {
	p.mu.Lock()
	faults := p.faults
	p.mu.Unlock()
	for _, i := range faults {
		if i.meets(args) {
			return &i.fault
		}
	}
	return nil
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(client.(*net.TCPConn)) })
	}
}

func (p *Proxy) serve(client *net.TCPConn) {
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	server, err := net.DialTimeout("tcp", target, 5*time.Second)
	if err != nil {
		// The nearest thing to the refusal that the client would have seen without the proxy.
		_ = client.SetLinger(0)
		client.Close()
		return
	}
	l := &link{p: p, client: client, server: server.(*net.TCPConn)}
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		l.cut()
		return
	}
	p.links[l] = struct{}{}
	p.mu.Unlock()
	var wg sync.WaitGroup
	wg.Go(l.requests)
	wg.Go(l.replies)
	wg.Wait()
	l.cut()
	p.mu.Lock()
	delete(p.links, l)
	p.mu.Unlock()
}

// sleep waits and reports whether the proxy is still open.
func (p *Proxy) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-p.done:
		return false
	}
}

// link is a client's connection and its connection to the server.
type link struct {
	p              *Proxy
	client, server *net.TCPConn

	mu      sync.Mutex
	pending []pending // requests without a reply yet, in order
	ending  *Fault    // a dropped request: the link ends when pending is empty
	raw     bool      // replies cannot be told apart any more
}

type pending struct {
	fault *Fault
	came  time.Time
}

func (l *link) cut() {
	l.client.Close()
	l.server.Close()
}

// requests passes requests on until the client closes its side or a fault ends the link.
func (l *link) requests() {
	r, w := bufio.NewReader(l.client), bufio.NewWriter(l.server)
	for {
		frame, args, err := readCommand(r)
		if err != nil {
			break
		}
		if muteReplies(args) {
			l.mu.Lock()
			l.raw = true
			l.mu.Unlock()
			_, _ = w.Write(frame)
			_ = w.Flush()
			_, _ = io.Copy(l.server, r)
			break
		}
		f, came := l.p.fault(args), time.Now()
		if f != nil && f.Action == DelayRequest {
			if w.Flush() != nil || !l.p.sleep(f.Delay) {
				break
			}
		}
		l.mu.Lock()
		if f != nil && f.Action == DropRequest {
			l.ending = f
			idle := len(l.pending) == 0
			l.mu.Unlock()
			_ = w.Flush()
			if idle {
				l.cut()
			}
			return
		}
		l.pending = append(l.pending, pending{f, came})
		l.mu.Unlock()
		if _, err := w.Write(frame); err != nil {
			break
		}
		if r.Buffered() == 0 && w.Flush() != nil {
			break
		}
	}
	// As in a network, the requests that the client sent before it left still arrive: the server closes when
	// it has read them.
	_ = w.Flush()
	_ = l.server.CloseWrite()
}

// replies passes replies on until the server closes its side or a fault ends the link.
func (l *link) replies() {
	r, w := bufio.NewReader(l.server), bufio.NewWriter(l.client)
	var frame []byte
	for {
		var kind byte
		var err error
		if frame, kind, err = appendFrame(frame[:0], r); err != nil {
			break
		}
		var f *Fault
		var came time.Time
		l.mu.Lock()
		if !l.raw && kind != '>' && len(l.pending) > 0 { // '>' is a push, which answers no request
			f, came = l.pending[0].fault, l.pending[0].came
			l.pending = l.pending[1:]
		}
		ending := l.ending
		if l.raw || len(l.pending) > 0 {
			ending = nil
		}
		l.mu.Unlock()
		if f != nil && f.Action == DropReply {
			_ = w.Flush()
			l.cut()
			return
		}
		if f != nil && f.Action == DelayReply {
			_ = w.Flush()
			if !l.p.sleep(time.Until(came.Add(f.Delay))) {
				break
			}
		}
		// An error means that the client has left. Its requests go on, so their replies must still be read.
		_, _ = w.Write(frame)
		if r.Buffered() == 0 || ending != nil {
			_ = w.Flush()
		}
		if ending != nil {
			l.cut()
			return
		}
	}
	_ = w.Flush()
	l.cut()
}

// muteReplies reports whether a request has no reply, or more than one.
func muteReplies(args []string) bool {
	return Commands("SUBSCRIBE", "PSUBSCRIBE", "SSUBSCRIBE", "MONITOR", "SYNC", "PSYNC")(args) ||
		len(args) > 1 && strings.EqualFold(args[0], "CLIENT") && strings.EqualFold(args[1], "REPLY")
}

// Proxies is a proxy before each of several addresses, for clusters: a client learns the nodes' addresses
// from the nodes, so it must dial through DialContext, which leads each address to its proxy. With go-redis
// that is the option Dialer; with rueidis the option DialCtxFn, func(ctx, addr, _, _) { return
// ps.DialContext(ctx, "tcp", addr) }.
type Proxies struct {
	byTarget map[string]*Proxy
}

// StartProxies starts a proxy before each address and ends them with the test.
func StartProxies(tb testing.TB, targets ...string) *Proxies {
	tb.Helper()
	ps := &Proxies{byTarget: make(map[string]*Proxy)}
	for _, t := range targets {
		ps.byTarget[t] = StartProxy(tb, t)
	}
	return ps
}

// DialContext connects to the proxy before addr. It refuses other addresses: they would pass by the faults
// unnoticed.
func (ps *Proxies) DialContext(ctx context.Context, network, addr string) (net.Conn, error) {
	p := ps.byTarget[addr]
	if p == nil {
		return nil, fmt.Errorf("redisserver: no proxy before %s", addr)
	}
	return new(net.Dialer).DialContext(ctx, network, p.Addr())
}

// Inject adds one fault to all proxies, which share its counts.
func (ps *Proxies) Inject(f Fault) *Injection {
	i := newInjection(f)
	for _, p := range ps.byTarget {
		p.inject(i)
	}
	return i
}

// Clear removes all faults from all proxies.
func (ps *Proxies) Clear() {
	for _, p := range ps.byTarget {
		p.Clear()
	}
}
