package engine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// warmed is a Client whose nodes must be made ready, as a test wants. It keeps the commands that it sent.
type warmed struct {
	fake
	warm func(ctx context.Context, node string) error
	node atomic.Value // the node that has every slot, of a cluster

	roundTrips []time.Duration // of pings
	pings      int

	mu    sync.Mutex
	warms []string
	sent  []string
}

func (w *warmed) Do(_ context.Context, args []any, keys int) (Reply, error) {
	if r := probeReply(args); r != nil {
		return r, nil
	}
	w.mu.Lock()
	w.sent = append(w.sent, args[0].(string))
	w.mu.Unlock()
	return w.fake(args, keys)
}

func (w *warmed) Warm(ctx context.Context, node, _ string) error {
	w.mu.Lock()
	w.warms = append(w.warms, node)
	w.mu.Unlock()
	return w.warm(ctx, node)
}

func (w *warmed) Ping(context.Context, string, string) error {
	time.Sleep(w.roundTrips[w.pings%len(w.roundTrips)])
	w.pings++
	return nil
}

func (w *warmed) Node(uint16) string            { node, _ := w.node.Load().(string); return node }
func (w *warmed) Refresh(context.Context) error { return nil }

// commands returns the commands that were sent since the last call.
func (w *warmed) commands() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.sent = nil }()
	return fmt.Sprint(w.sent)
}

// attempts returns the nodes that were made ready since the last call.
func (w *warmed) attempts() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer func() { w.warms = nil }()
	return fmt.Sprintf("%q", w.warms)
}

// granted is the reply to charges of one token to a fresh key, alone or in a batch.
func granted(args []any, _ int) (Reply, error) {
	const alone = 7
	if len(args) == alone {
		return singleReply(1, ""), nil
	}
	charges := int64(1)
	if asked := strings.Fields(args[len(args)-1].(string)); len(asked) > 1 {
		charges, _ = strconv.ParseInt(asked[3], 10, 64)
	}
	return elements{int64(1), charges, ""}, nil
}

// testReady runs a test in a bubble whose clock is the test's, with a store over a client.
func testReady(t *testing.T, cluster bool, f func(t *testing.T, w *warmed, s *Store, take func(within time.Duration) error)) {
	synctest.Test(t, func(t *testing.T) {
		w := &warmed{fake: granted, warm: func(context.Context, string) error { return nil }}
		o := Options{}
		if !cluster { // the commands are the test's alone
			o.Batching = BatchAll
		}
		s, err := New(w, cluster, o)
		if err != nil {
			t.Fatal(err)
		}
		limit := limitOf("l", window(1<<40))
		f(t, w, s, func(within time.Duration) error {
			ctx, cancel := context.WithTimeout(bg, within)
			defer cancel()
			_, err := s.Charge(ctx, quota.Charge{Limit: limit, Key: "k", Cost: 1})
			return err
		})
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func is(t *testing.T, call string, err, want error, early bool) {
	t.Helper()
	if driver.Sentinel(err) != want {
		t.Errorf("%s: got error %v, want %v", call, err, want)
	}
	e, is := errors.AsType[driver.GettingReady](err)
	if got := is && e.GettingReady(); got != early {
		t.Errorf("%s: error %v says that the caller left while the store got ready: got %v, want %v", call, err, got, early)
	}
}

func equal(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %s, want %s", what, got, want)
	}
}

func TestReadyOneAttempt(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		w.warm = func(context.Context, string) error { time.Sleep(400 * time.Millisecond); return nil }
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				start := time.Now()
				is(t, "a call that leaves", take(100*time.Millisecond), quota.ErrUnavailable, true)
				if took := time.Since(start); took != 100*time.Millisecond {
					t.Errorf("a call that leaves: took %v, want its own 100ms", took)
				}
			})
			all.Go(func() { is(t, "a call that waits", take(time.Second), nil, false) })
		}
		all.Wait()
		equal(t, "attempts", w.attempts(), `[""]`)
		equal(t, "the next call", fmt.Sprint(take(time.Second)), "<nil>")
	})
}

func TestReadyGoesOnWithoutCallers(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		w.warm = func(ctx context.Context, _ string) error {
			select {
			case <-time.After(700 * time.Millisecond):
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		for range 7 { // no call has the time for the whole attempt
			is(t, "a call", take(99*time.Millisecond), quota.ErrUnavailable, true)
		}
		time.Sleep(10 * time.Millisecond)
		is(t, "a call after the attempt", take(time.Millisecond), nil, false)
		equal(t, "attempts", w.attempts(), `[""]`)
	})
}

func TestReadyFails(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		start := time.Now()
		refused := TransportError(&net.OpError{Op: "dial", Err: errors.New("connection refused")})
		w.warm = func(context.Context, string) error { return refused }
		var began []time.Duration
		for time.Since(start) < 900*time.Millisecond {
			err := take(time.Second)
			is(t, "a call", err, quota.ErrUnavailable, false)
			if !errors.Is(err, refused) {
				t.Errorf("a call: got error %v, want that of the attempt", err)
			}
			if w.attempts() != "[]" {
				began = append(began, time.Since(start))
			}
			time.Sleep(10 * time.Millisecond)
		}
		equal(t, "attempts", fmt.Sprint(began), "[0s 50ms 150ms 350ms 600ms 850ms]")
		equal(t, "scripts", w.commands(), "[]")

		w.warm = func(context.Context, string) error { return nil }
		time.Sleep(250 * time.Millisecond)
		is(t, "a call once the server is back", take(time.Second), nil, false)
	})
}

// An attempt may fail in ways that would leave a charge's outcome unknown. No charge was sent.
func TestReadyFailsUnsent(t *testing.T) {
	for name, cause := range map[string]error{
		"a timeout":             TransportError(os.ErrDeadlineExceeded),
		"a connection lost":     TransportError(io.EOF),
		"an unclassified error": context.DeadlineExceeded,
	} {
		testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
			w.warm = func(context.Context, string) error { return cause }
			is(t, name, take(time.Second), quota.ErrUnavailable, false)
		})
	}
}

func TestReadyOldAttempt(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		w.warm = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		start := time.Now()
		for time.Since(start) <= time.Second {
			is(t, "a call in the first second", take(250*time.Millisecond), quota.ErrUnavailable, true)
		}
		for time.Since(start) < 4990*time.Millisecond {
			before := time.Now()
			is(t, "a call after it", take(time.Second), quota.ErrUnavailable, false)
			if took := time.Since(before); took != 0 {
				t.Fatalf("a call after the first second: took %v, want no time", took)
			}
			time.Sleep(100 * time.Millisecond)
		}
		equal(t, "attempts", w.attempts(), `[""]`)
		time.Sleep(200 * time.Millisecond) // the attempt's own time is over
		synctest.Wait()
		w.warm = func(context.Context, string) error { return nil }
		is(t, "a call with another attempt", take(time.Second), nil, false)
	})
}

func TestReadyScripts(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		take(time.Second)
		take(time.Second)
		equal(t, "commands to a new node", w.commands(), "[eval evalsha]")
		known := false
		w.fake = func(args []any, keys int) (Reply, error) {
			if args[0] == eval {
				known = true
			}
			if !known {
				return nil, errors.New("NOSCRIPT No matching script")
			}
			return granted(args, keys)
		}
		take(time.Second)
		take(time.Second)
		equal(t, "commands to a node that lost its scripts", w.commands(), "[evalsha eval evalsha]")
		equal(t, "attempts", w.attempts(), `[""]`)
	})
}

func TestReadyConnectionBreaks(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		take(time.Second)
		w.commands()
		w.attempts()
		w.fake = func([]any, int) (Reply, error) { return nil, TransportError(io.EOF) }
		is(t, "a call whose connection breaks", take(time.Second), quota.ErrIndeterminate, false)
		w.fake = granted
		is(t, "the next call", take(time.Second), nil, false)
		equal(t, "commands", w.commands(), "[evalsha eval]")
		equal(t, "attempts", w.attempts(), `[""]`)
	})
}

// Several calls are on a connection that breaks. The last of them to return must not spoil the next connections.
func TestReadyLateError(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		take(time.Second)
		var late sync.WaitGroup
		w.fake = func([]any, int) (Reply, error) {
			time.Sleep(100 * time.Millisecond)
			return nil, TransportError(io.EOF)
		}
		late.Go(func() { take(time.Second) })
		synctest.Wait()
		w.fake = func([]any, int) (Reply, error) { return nil, TransportError(io.EOF) }
		take(time.Second)
		w.fake = granted
		take(time.Second)
		w.commands()
		w.attempts()
		late.Wait()
		is(t, "a call", take(time.Second), nil, false)
		equal(t, "commands", w.commands(), "[evalsha]")
		equal(t, "attempts", w.attempts(), "[]")
	})
}

func TestReadyTimeout(t *testing.T) {
	for name, cause := range map[string]error{"deadline": context.DeadlineExceeded, "canceled": context.Canceled, "read": os.ErrDeadlineExceeded} {
		testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
			take(time.Second)
			w.commands()
			w.attempts()
			fails := make(chan error)
			w.warm = func(context.Context, string) error { return <-fails }
			w.fake = func([]any, int) (Reply, error) { return nil, TransportError(cause) }
			is(t, name, take(time.Second), quota.ErrIndeterminate, false)
			w.fake = granted
			is(t, "the next call", take(time.Millisecond), nil, false)
			synctest.Wait()
			equal(t, "commands after a timeout, "+name, w.commands(), "[evalsha evalsha]")
			synctest.Wait() // the attempt may not have begun
			equal(t, "attempts", w.attempts(), `[""]`)
			fails <- TransportError(os.ErrDeadlineExceeded)
			synctest.Wait()
			is(t, "a call after the attempt failed", take(time.Second), quota.ErrUnavailable, false)
			w.warm = func(context.Context, string) error { return nil }
			time.Sleep(firstAttemptPause)
			is(t, "a call after the next", take(time.Second), nil, false)
		})
	}
}

func TestReadyNodes(t *testing.T) {
	testReady(t, true, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		w.warm = func(_ context.Context, node string) error {
			if node == "" {
				w.node.Store("a")
			}
			return nil
		}
		is(t, "a call", take(time.Second), nil, false)
		equal(t, "attempts", w.attempts(), `["" "a"]`)
		w.node.Store("b")
		w.warm = func(context.Context, string) error { return TransportError(&net.OpError{Op: "dial", Err: io.EOF}) }
		is(t, "a call to a node that is down", take(time.Second), quota.ErrUnavailable, false)
		w.node.Store("a")
		is(t, "a call to another node", take(time.Second), nil, false)
		equal(t, "attempts", w.attempts(), `["b"]`)
		equal(t, "commands", w.commands(), "[eval evalsha]")
		for i := range 2 * maxReadiness {
			w.node.Store(fmt.Sprint(i))
			take(time.Second)
		}
		if n := len(*s.named.Load()); n > maxReadiness {
			t.Errorf("nodes kept: got %d, want at most %d", n, maxReadiness)
		}
	})
}

func TestReadyReports(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		w.roundTrips = []time.Duration{90 * time.Millisecond, 30 * time.Millisecond, 31 * time.Millisecond}
		var reports []string
		s.Report(driver.Reports{})
		s.Report(driver.Reports{RoundTrip: func(node string, d time.Duration) { reports = append(reports, fmt.Sprintf("%q %v", node, d)) }})
		s.Report(driver.Reports{Notice: func(n quota.Notice) { reports = append(reports, n.Name) }})
		is(t, "a call while a round trip is measured", take(time.Millisecond), nil, false)
		time.Sleep(time.Second)
		synctest.Wait()
		equal(t, "reports", fmt.Sprint(reports), `["" 30ms]`)
		s.notice("eviction", "text")
		equal(t, "reports", fmt.Sprint(reports), `["" 30ms eviction]`)
		s.o.Notice = func(quota.Notice) {}
		s.notice("eviction", "text")
		equal(t, "reports of a store with a receiver", fmt.Sprint(reports), `["" 30ms eviction]`)
	})
}

func TestReadyClose(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		ended := false
		w.warm = func(ctx context.Context, _ string) error {
			<-ctx.Done()
			time.Sleep(10 * time.Millisecond)
			ended = true
			return ctx.Err()
		}
		var call sync.WaitGroup
		call.Go(func() { is(t, "a call when the store closes", take(time.Second), quota.ErrClosed, false) })
		time.Sleep(20 * time.Millisecond)
		if err := s.Close(); err != nil || !ended {
			t.Errorf("Close: got error %v, and the attempt has ended: %v; want no error, and true", err, ended)
		}
		call.Wait()
		is(t, "a call after Close", take(time.Second), quota.ErrClosed, false)
	})
}
