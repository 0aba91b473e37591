package quotahttp_test

import (
	"bufio"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quotatest"
)

// loopback is the key of a client on this machine.
const loopback = "127.0.0.1/ip"

// serve starts a real server over loopback, of HTTP/1.1 or HTTP/2, and returns its URL and a client. ended
// gets a value as each request is over, its corrections made.
func serve(t *testing.T, two bool, h http.Handler) (url string, client *http.Client, ended <-chan bool) {
	t.Helper()
	over := make(chan bool, 100)
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { over <- true }()
		h.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = nil
	if s.EnableHTTP2 = two; two {
		s.StartTLS()
	} else {
		s.Start()
	}
	t.Cleanup(func() {
		s.CloseClientConnections()
		s.Close()
	})
	return s.URL, s.Client(), over
}

// eachProtocol runs a test with HTTP/1.1 and HTTP/2.
func eachProtocol(t *testing.T, test func(t *testing.T, two bool)) {
	t.Run("1.1", func(t *testing.T) { test(t, false) })
	t.Run("2", func(t *testing.T) { test(t, true) })
}

func get(t *testing.T, client *http.Client, url string) *http.Response {
	t.Helper()
	resp, err := client.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { resp.Body.Close() })
	return resp
}

func wait(t *testing.T, c <-chan bool) {
	t.Helper()
	select {
	case <-c:
	case <-time.After(10 * time.Second):
		t.Fatal("the request is not over after 10s")
	}
}

// A real server answers as the table says, by both protocols.
func TestServer(t *testing.T) {
	eachProtocol(t, func(t *testing.T, two bool) {
		store := quotatest.New(t, nil)
		url, client, _ := serve(t, two, handler(t, store, nil, ok, byPeer(minute)))
		for range 3 {
			resp := get(t, client, url)
			if wantStatus(t, resp, 200); body(t, resp) != "ok" || (resp.ProtoMajor == 2) != two {
				t.Errorf("answer by %s: got another body or protocol, want ok", resp.Proto)
			}
		}
		resp := get(t, client, url)
		wantStatus(t, resp, 429)
		wantField(t, resp.Header, "RateLimit", `"minute";r=0;t=60`)
		wantField(t, resp.Header, "Retry-After", "60")
		resp, err := client.Head(url)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		wantStatus(t, resp, 429)
	})
}

// A stream reaches its client event by event though its usage is read, and is settled to the last event, by
// the writer's methods and by http.ResponseController.
func TestStream(t *testing.T) {
	flushes := map[string]func(http.ResponseWriter) error{
		"Flusher":            func(w http.ResponseWriter) error { w.(http.Flusher).Flush(); return nil },
		"ResponseController": func(w http.ResponseWriter) error { return http.NewResponseController(w).Flush() },
	}
	eachProtocol(t, func(t *testing.T, two bool) {
		for name, flush := range flushes {
			t.Run(name, func(t *testing.T) {
				store := quotatest.New(t, nil)
				next := make(chan bool)
				url, client, ended := serve(t, two, handler(t, store, settled(new(errorList)), func(w http.ResponseWriter, r *http.Request) {
					if err := http.NewResponseController(w).SetWriteDeadline(time.Now().Add(time.Minute)); err != nil {
						t.Errorf("write deadline: got %v, want none", err)
					}
					w.Header().Set("Content-Type", "text/event-stream")
					for event := range strings.SplitAfterSeq(openAIParts, "\n\n") {
						_, _ = io.WriteString(w, event)
						if err := flush(w); err != nil {
							t.Errorf("flush: got %v, want none", err)
						}
						<-next
					}
				}, byPeer(tokens).Cost(hundred)))
				resp := get(t, client, url)
				lines := bufio.NewReader(resp.Body)
				for event := range strings.SplitAfterSeq(openAIParts, "\n\n") {
					for line := range strings.Lines(event) {
						if got, err := lines.ReadString('\n'); got != line || err != nil {
							t.Fatalf("line: got %q, %v; want %q", got, err, line)
						}
					}
					store.WantCharged(tokens, loopback, 100) // until the end
					next <- true
				}
				wait(t, ended)
				store.WantCharged(tokens, loopback, 12)
			})
		}
	})
}

// A client that vanishes in the middle of a stream is settled by its handler's word, though the context has
// ended, and else keeps the estimate charged.
func TestStreamClientVanishes(t *testing.T) {
	eachProtocol(t, func(t *testing.T, two bool) {
		for _, says := range []bool{true, false} {
			store := quotatest.New(t, nil)
			var errs errorList
			url, client, ended := serve(t, two, handler(t, store, settled(&errs), func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "text/event-stream")
				_, _ = io.WriteString(w, anthroStart)
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				if says {
					if err := quotahttp.From(r.Context()).Settle("tokens", 30); err != nil {
						t.Error(err)
					}
				}
			}, byPeer(tokens).Cost(hundred)))
			ctx, cancel := context.WithCancel(t.Context())
			r, err := http.NewRequestWithContext(ctx, "GET", url, nil)
			if err != nil {
				t.Fatal(err)
			}
			resp, err := client.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := resp.Body.Read(make([]byte, 10)); err != nil {
				t.Error(err)
			}
			cancel()
			resp.Body.Close()
			wait(t, ended)
			want := int64(100)
			if says {
				want = 30
			}
			store.WantCharged(tokens, loopback, want)
			if got := errs.take(); len(got) != 0 {
				t.Errorf("errors told: got %v, want none", got)
			}
		}
	})
}

// A handler that panics closes its connection, as without the middleware, and gives back its charge.
func TestServerPanic(t *testing.T) {
	eachProtocol(t, func(t *testing.T, two bool) {
		store := quotatest.New(t, nil)
		url, client, ended := serve(t, two, handler(t, store, settled(new(errorList)), func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, byPeer(tokens).Cost(hundred)))
		if resp, err := client.Post(url, "", nil); err == nil {
			resp.Body.Close()
			t.Errorf("answer of a handler that panics: got status %d, want an error", resp.StatusCode)
		}
		wait(t, ended)
		store.WantCharged(tokens, loopback, 0)
	})
}

// A client that sends its body a byte at a time is charged once, and before the body is read.
func TestSlowClient(t *testing.T) {
	store := quotatest.New(t, nil)
	read := make(chan string, 1)
	url, _, ended := serve(t, false, handler(t, store, nil, func(w http.ResponseWriter, r *http.Request) {
		store.WantCharged(minute, loopback, 1)
		b, _ := io.ReadAll(r.Body)
		read <- string(b)
	}, byPeer(minute)))
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, c := range "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello" {
		fmt.Fprintf(conn, "%c", c)
	}
	wait(t, ended)
	if got := <-read; got != "hello" {
		t.Errorf("body: got %q, want hello", got)
	}
	store.WantCharged(minute, loopback, 1)
}

// A WebSocket takes over its connection through the wrapper, by the writer's method and by
// http.ResponseController; messages pass both ways, and the handler settles at the end.
func TestWebSocket(t *testing.T) {
	hijacks := map[string]func(http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error){
		"Hijacker": func(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) { return w.(http.Hijacker).Hijack() },
		"ResponseController": func(w http.ResponseWriter) (net.Conn, *bufio.ReadWriter, error) {
			return http.NewResponseController(w).Hijack()
		},
	}
	for name, hijack := range hijacks {
		t.Run(name, func(t *testing.T) {
			store := quotatest.New(t, nil)
			var errs errorList
			o := settled(&errs)
			o.Settle = nil
			o.Refund = func(status int) bool { return status != http.StatusSwitchingProtocols }
			url, _, ended := serve(t, false, handler(t, store, o, func(w http.ResponseWriter, r *http.Request) {
				sum := sha1.Sum([]byte(r.Header.Get("Sec-Websocket-Key") + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
				conn, buffer, err := hijack(w)
				if err != nil {
					t.Errorf("hijack: got %v, want none", err)
					return
				}
				defer conn.Close()
				fmt.Fprintf(buffer, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", base64.StdEncoding.EncodeToString(sum[:]))
				_ = buffer.Flush()
				frame := make([]byte, 2+4+5) // of a client: masked
				if _, err := io.ReadFull(buffer, frame); err != nil {
					t.Error(err)
				}
				for i := range 5 {
					frame[6+i] ^= frame[2+i%4]
				}
				_, _ = conn.Write(append([]byte{0x81, 5}, frame[6:]...))
			}, byPeer(tokens).Cost(hundred)))
			conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
			in := bufio.NewReader(conn)
			resp, err := http.ReadResponse(in, nil)
			if err != nil {
				t.Fatal(err)
			}
			wantStatus(t, resp, 101)
			wantField(t, resp.Header, "Sec-WebSocket-Accept", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
			frame := []byte{0x81, 0x80 | 5, 1, 2, 3, 4}
			for i, c := range []byte("hello") {
				frame = append(frame, c^frame[2+i%4])
			}
			if _, err := conn.Write(frame); err != nil {
				t.Fatal(err)
			}
			got := make([]byte, 7)
			if _, err := io.ReadFull(in, got); err != nil || string(got) != "\x81\x05hello" {
				t.Errorf("message: got %q, %v; want hello", got, err)
			}
			wait(t, ended)
			store.WantCharged(tokens, loopback, 100)
		})
	}
}

// A file is sent by the ReaderFrom of the server, and one whose usage is read is not lost on the way.
func TestReadFrom(t *testing.T) {
	file := filepath.Join(t.TempDir(), "answer.json")
	text := `{"x":"` + strings.Repeat("x", 1<<20) + `","usage":{"total_tokens":7}}`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, o := range map[string]*quotahttp.Options{"no wrapper": nil, "status": {Refund: serverErrors}, "usage": settled(new(errorList))} {
		t.Run(name, func(t *testing.T) {
			store := quotatest.New(t, nil)
			reads := false
			url, client, ended := serve(t, false, handler(t, store, o, func(w http.ResponseWriter, r *http.Request) {
				_, reads = w.(io.ReaderFrom)
				http.ServeFile(w, r, file)
			}, byPeer(tokens).Cost(hundred)))
			if got := body(t, get(t, client, url)); got != text {
				t.Errorf("body: got %d bytes, want %d", len(got), len(text))
			}
			wait(t, ended)
			want := int64(100)
			if name == "usage" {
				want = 7
			}
			store.WantCharged(tokens, loopback, want)
			if !reads {
				t.Errorf("io.ReaderFrom: got none, want that of the server")
			}
		})
	}
}

// The wrapper has those optional interfaces that the writer inside has, and no others.
func TestWrapper(t *testing.T) {
	type (
		plain   struct{ http.ResponseWriter }
		flush   struct{ http.Flusher }
		hijack  struct{ http.Hijacker }
		from    struct{ io.ReaderFrom }
		push    struct{ http.Pusher }
		wrapped interface{ Unwrap() http.ResponseWriter }
	)
	inside := plain{httptest.NewRecorder()}
	for _, w := range []http.ResponseWriter{
		inside,
		struct {
			plain
			flush
		}{plain: inside, flush: flush{httptest.NewRecorder()}},
		struct {
			plain
			hijack
		}{plain: inside},
		struct {
			plain
			from
		}{plain: inside},
		struct {
			plain
			flush
			hijack
		}{plain: inside},
		struct {
			plain
			flush
			from
		}{plain: inside},
		struct {
			plain
			hijack
			from
		}{plain: inside},
		struct {
			plain
			flush
			hijack
			from
		}{plain: inside},
		struct {
			plain
			flush
			push
		}{plain: inside},
	} {
		kinds := func(w http.ResponseWriter) string {
			_, f := w.(http.Flusher)
			_, h := w.(http.Hijacker)
			_, r := w.(io.ReaderFrom)
			_, p := w.(http.Pusher)
			return fmt.Sprintf("flusher %v, hijacker %v, reader %v, pusher %v", f, h, r, p)
		}
		h := handler(t, quotatest.New(t, nil), &quotahttp.Options{Refund: serverErrors}, func(got http.ResponseWriter, _ *http.Request) {
			if kinds(got) != kinds(w) {
				t.Errorf("the wrapper's interfaces: got %s, want %s", kinds(got), kinds(w))
			}
			if u, ok := got.(wrapped); !ok || u.Unwrap() != w {
				t.Errorf("Unwrap: got another writer, want the one inside")
			}
			if err := http.NewResponseController(got).EnableFullDuplex(); !errors.Is(err, http.ErrNotSupported) {
				t.Errorf("an operation that the writer lacks: got %v, want ErrNotSupported", err)
			}
		}, byPeer(minute))
		h.ServeHTTP(w, requestOf(t))
	}
}
