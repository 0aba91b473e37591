package redisserver

import (
	"context"
	"fmt"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// Distance stands between clients and servers, and makes each round trip take a time: a dial, and each request with its
// reply. It passes bytes on as they are, TLS or not.
type Distance struct {
	roundTrip time.Duration
	listeners []net.Listener
	addrs     map[string]string // of the listeners, by target

	mu     sync.Mutex
	closed bool
	conns  map[net.Conn]bool
	all    sync.WaitGroup
}

// StartDistance starts a Distance before each address and ends it with the test.
func StartDistance(tb testing.TB, roundTrip time.Duration, targets ...string) *Distance {
	tb.Helper()
	d := &Distance{roundTrip: roundTrip, addrs: map[string]string{}, conns: map[net.Conn]bool{}}
	for _, target := range targets {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		d.addrs[target] = l.Addr().String()
		d.all.Go(func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				d.all.Go(func() { d.pass(c, target) })
			}
		})
		d.listeners = append(d.listeners, l)
	}
	tb.Cleanup(d.close)
	return d
}

// Addr returns the address that leads to a target.
func (d *Distance) Addr(target string) string { return d.addrs[target] }

// DialContext connects to a target through the Distance, see Proxies.DialContext.
func (d *Distance) DialContext(ctx context.Context, network, target string) (net.Conn, error) {
	addr, ok := d.addrs[target]
	if !ok {
		return nil, fmt.Errorf("redisserver: no distance leads to %s", target)
	}
	return (&net.Dialer{}).DialContext(ctx, network, addr)
}

func (d *Distance) close() {
	for _, l := range d.listeners {
		l.Close()
	}
	d.mu.Lock()
	d.closed = true
	for c := range d.conns {
		c.Close()
	}
	d.mu.Unlock()
	d.all.Wait()
}

// keep has a connection closed with the Distance, and reports whether that is still open.
func (d *Distance) keep(c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		c.Close()
		return false
	}
	d.conns[c] = true
	return true
}

func (d *Distance) drop(c net.Conn) {
	c.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, c)
}

// pass copies the bytes of one connection both ways. The kernel has accepted it already, so the time of the dial delays its
// first bytes.
func (d *Distance) pass(client net.Conn, target string) {
	if !d.keep(client) {
		return
	}
	defer d.drop(client)
	time.Sleep(d.roundTrip)
	server, err := net.Dial("tcp", target)
	if err != nil || !d.keep(server) {
		return
	}
	defer d.drop(server)
	var both sync.WaitGroup
	both.Go(func() { d.oneWay(server, client) })
	both.Go(func() { d.oneWay(client, server) })
	both.Wait()
}

// oneWay passes bytes on, each piece half a round trip after it came, and then the end.
func (d *Distance) oneWay(to, from net.Conn) {
	type piece struct {
		due   time.Time
		bytes []byte
	}
	pieces := make(chan piece, 1024)
	var writer sync.WaitGroup
	writer.Go(func() {
		defer to.Close()
		for p := range pieces {
			time.Sleep(time.Until(p.due))
			if _, err := to.Write(p.bytes); err != nil {
				from.Close()
			}
		}
	})
	for buf := make([]byte, 64<<10); ; {
		n, err := from.Read(buf)
		if n > 0 {
			pieces <- piece{time.Now().Add(d.roundTrip / 2), append([]byte(nil), buf[:n]...)}
		}
		if err != nil {
			if err == io.EOF {
				time.Sleep(d.roundTrip / 2)
			}
			break
		}
	}
	close(pieces)
	writer.Wait()
}
