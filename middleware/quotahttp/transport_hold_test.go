package quotahttp_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

// switched is a body of a protocol to which the server switched.
type switched struct {
	io.Reader
	sent strings.Builder
}

func (s *switched) Write(p []byte) (int, error) { return s.sent.Write(p) }
func (s *switched) Close() error                { return nil }

// TestTransportHolds: a request holds its stream and its tokens from before it is sent until its answer is over, however it ends;
// then the stream is free, once, and the tokens are charged.
func TestTransportHolds(t *testing.T) {
	body := func() *http.Response {
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("data: 1\n\ndata: 2\n\n"))}
	}
	read := func(_ context.CancelFunc, b io.ReadCloser) { _, _ = io.Copy(io.Discard, b) }
	for name, c := range map[string]struct {
		resp *http.Response // nil: the request fails
		end  func(cancel context.CancelFunc, b io.ReadCloser)
	}{
		"closed":            {body(), func(_ context.CancelFunc, b io.ReadCloser) { b.Close() }},
		"closed twice":      {body(), func(_ context.CancelFunc, b io.ReadCloser) { b.Close(); b.Close() }},
		"read to its end":   {body(), read},
		"read and closed":   {body(), func(cancel context.CancelFunc, b io.ReadCloser) { read(cancel, b); b.Close(); cancel() }},
		"cancelled":         {body(), func(cancel context.CancelFunc, _ io.ReadCloser) { cancel(); synctest.Wait() }},
		"cancelled, closed": {body(), func(cancel context.CancelFunc, b io.ReadCloser) { cancel(); b.Close(); synctest.Wait() }},
		"closed from several": {body(), func(_ context.CancelFunc, b io.ReadCloser) {
			var all sync.WaitGroup
			for range 4 {
				all.Go(func() { b.Close() })
			}
			all.Wait()
		}},
		"no body":  {&http.Response{StatusCode: 204, Body: http.NoBody}, nil},
		"nil body": {&http.Response{StatusCode: 200}, nil},
		"failed":   {nil, nil},
		"switched": {&http.Response{StatusCode: 101, Body: &switched{Reader: strings.NewReader("x")}}, func(_ context.CancelFunc, b io.ReadCloser) {
			if n, err := b.(io.ReadWriteCloser).Write([]byte("abc")); n != 3 || err != nil {
				t.Errorf("written to a body of 101: got %d, %v; want 3", n, err)
			}
			b.Close()
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
				limiter := newLimiter(t, s, nil)
				defer limiter.Close()
				next := server(func(*http.Request) (*http.Response, error) {
					wantHeld(t, limiter, 1, 900, "while the request is sent")
					if c.resp == nil {
						return nil, io.ErrUnexpectedEOF
					}
					return c.resp, nil
				})
				tr := transportOn(t, limiter, &quotahttp.TransportOptions{Next: next})
				wantHeld(t, limiter, 2, 1000, "at the beginning")
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				resp, err := tr.RoundTrip(outgoing(ctx, "http://api.example.org/"))
				if (err != nil) != (c.resp == nil) {
					t.Fatalf("got error %v", err)
				}
				if c.end != nil {
					time.Sleep(5 * time.Minute) // of a stream
					wantHeld(t, limiter, 1, 900, "while the answer is read")
					c.end(cancel, resp.Body)
				}
				wantHeld(t, limiter, 2, 900, "at the end")
			})
		})
	}
}

// transportOn returns a transport whose requests hold 100 tokens and a stream.
func transportOn(t testing.TB, limiter *quota.Limiter, o *quotahttp.TransportOptions) http.RoundTripper {
	t.Helper()
	peer := quotahttp.Key(func(*http.Request) (string, error) { return peerKey, nil })
	tr, err := quotahttp.NewTransport(limiter, o, quotahttp.By(peer, streams), quotahttp.By(peer, heldTokens).Cost(func(*http.Request) int64 { return 100 }))
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// A next transport that panics keeps no stream.
func TestTransportHoldsOfAPanic(t *testing.T) {
	s := quotatest.New(t, nil)
	limiter := newLimiter(t, s, nil)
	defer limiter.Close()
	tr := transportOn(t, limiter, &quotahttp.TransportOptions{Next: server(func(*http.Request) (*http.Response, error) { panic("boom") })})
	func() {
		defer func() {
			if v := recover(); v != "boom" {
				t.Errorf("recovered: got %v, want boom", v)
			}
		}()
		_, _ = tr.RoundTrip(outgoing(t.Context(), "http://api.example.org/"))
	}()
	wantHeld(t, limiter, 2, 900, "after a panic")
}

// Requests wait for a stream of others, are never more at once than the limit has, and none waits longer than its context; while
// the server refuses, waiting requests hold no stream.
func TestTransportHoldsWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
		limiter := newLimiter(t, s, nil)
		defer limiter.Close()
		var now, most, refuse atomic.Int64
		next := server(func(*http.Request) (*http.Response, error) {
			if refuse.Load() > 0 {
				return answer(429, "Retry-After: 30"), nil
			}
			most.Store(max(most.Load(), now.Add(1)))
			return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("x"))}, nil
		})
		tr := transportOn(t, limiter, &quotahttp.TransportOptions{Next: next})
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				resp, err := tr.RoundTrip(outgoing(t.Context(), "http://api.example.org/"))
				if err != nil {
					t.Error(err)
					return
				}
				time.Sleep(time.Second)
				now.Add(-1)
				resp.Body.Close()
			})
		}
		time.Sleep(500 * time.Millisecond)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := tr.RoundTrip(outgoing(ctx, "http://api.example.org/")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a request that waits for too long: got %v, want DeadlineExceeded", err)
		}
		all.Wait()
		if most.Load() != 2 {
			t.Errorf("streams at once: got %d, want 2", most.Load())
		}
		wantHeld(t, limiter, 2, 200, "at the end")
		refuse.Store(1)
		_, _ = tr.RoundTrip(outgoing(t.Context(), "http://api.example.org/"))
		refuse.Store(0)
		wantHeld(t, limiter, 2, 100, "after a refusal")
		began := time.Now()
		all.Go(func() {
			resp, err := tr.RoundTrip(outgoing(t.Context(), "http://api.example.org/"))
			if took := time.Since(began); err != nil || took < 29*time.Second {
				t.Errorf("a request to a server that refuses: got %v after %v, want it sent after 30s", err, took)
			} else {
				resp.Body.Close()
			}
		})
		time.Sleep(10 * time.Second)
		wantHeld(t, limiter, 2, 100, "while the server refuses")
		all.Wait()
	})
}
