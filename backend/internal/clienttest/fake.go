package clienttest

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// serve serves each connection to an address of its own, or to a given one, until the test ends.
func serve(t testing.TB, addr string, each func(net.Conn)) string {
	t.Helper()
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Skip(err) // the address is not of this machine
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
				each(c)
			})
		}
	})
	return l.Addr().String()
}

// answering is a server that answers each command with the bytes that reply makes of it.
func answering(t testing.TB, reply func(args []string) string) string {
	t.Helper()
	return serve(t, "127.0.0.1:0", func(c net.Conn) {
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

// fakeRedis is a server that shakes hands, computes as the scripts need it, and answers every other script with the
// bytes that script makes of it.
func fakeRedis(t testing.TB, script func(args []string) string) string {
	t.Helper()
	return answering(t, func(args []string) string {
		switch strings.ToUpper(args[0]) {
		case "EVALSHA", "EVAL":
			if reply, is := engine.Probe(args); is {
				return array(reply)
			}
			return script(args)
		case "HELLO":
			return "%3\r\n+server\r\n+redis\r\n+version\r\n+7.0.15\r\n+proto\r\n:3\r\n"
		case "PING":
			return "+PONG\r\n"
		}
		return "+OK\r\n"
	})
}

// array returns an array as a server writes it.
func array(elements []any) string {
	var b strings.Builder
	fmt.Fprintf(&b, "*%d\r\n", len(elements))
	for _, e := range elements {
		if text, is := e.(string); is {
			fmt.Fprintf(&b, "$%d\r\n%s\r\n", len(text), text)
		} else {
			fmt.Fprintf(&b, ":%d\r\n", e)
		}
	}
	return b.String()
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

// silent accepts connections, counts them, and answers no command.
func silent(t testing.TB) (addr string, connections *atomic.Int64) {
	t.Helper()
	connections = new(atomic.Int64)
	return serve(t, "127.0.0.1:0", func(c net.Conn) {
		connections.Add(1)
		io.Copy(io.Discard, c)
	}), connections
}

// between stands before a server. Where answer has a reply to a command, the server does not get the command; "" for
// a reply closes the connection. answer may change the command.
func between(t testing.TB, server string, answer func(args []string) (reply string, is bool)) string {
	t.Helper()
	return serve(t, "127.0.0.1:0", func(c net.Conn) {
		up, err := net.Dial("tcp", server)
		if err != nil {
			return
		}
		defer up.Close()
		go func() { io.Copy(c, up); c.Close() }()
		r := bufio.NewReader(c)
		for {
			args, err := readCommand(r)
			if err != nil {
				return
			}
			if reply, is := answer(args); is {
				if reply == "" {
					return
				}
				io.WriteString(c, reply)
				continue
			}
			fmt.Fprintf(up, "*%d\r\n", len(args))
			for _, a := range args {
				fmt.Fprintf(up, "$%d\r\n%s\r\n", len(a), a)
			}
		}
	})
}

// forward serves an address by another one.
func forward(t testing.TB, listen, to string) string {
	t.Helper()
	return serve(t, listen, func(in net.Conn) {
		out, err := net.Dial("tcp", to)
		if err != nil {
			return
		}
		defer out.Close()
		go func() { io.Copy(out, in); out.Close() }()
		io.Copy(in, out)
	})
}
