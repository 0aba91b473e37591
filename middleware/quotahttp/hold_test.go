package quotahttp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/middleware/quotahttp"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quotatest"
)

var (
	streams    = quota.NewLimit("streams", algorithm.Concurrency(2, time.Minute))
	heldTokens = quota.NewLimit("tokens", algorithm.Held(algorithm.FixedWindow(1000, 24*time.Hour), time.Minute))
)

// holding is a handler behind the middleware, whose requests hold 100 tokens and a stream.
func holding(t testing.TB, s *quotatest.Store, o *quotahttp.Options, next http.HandlerFunc) (http.Handler, *quota.Limiter) {
	t.Helper()
	limiter := newLimiter(t, s, nil)
	t.Cleanup(func() { limiter.Close() })
	limits, err := quotahttp.New(limiter, o, byPeer(streams), byPeer(heldTokens).Cost(func(*http.Request) int64 { return 100 }))
	if err != nil {
		t.Fatal(err)
	}
	return limits(next), limiter
}

// wantHeld fails unless so many streams and tokens are left.
func wantHeld(t *testing.T, l *quota.Limiter, freeStreams, leftTokens int64, when string) {
	t.Helper()
	r, err := l.ChargeAll(context.Background(), quota.Charge{Limit: streams, Key: peerKey, Op: quota.OpPeek}, quota.Charge{Limit: heldTokens, Key: peerKey, Op: quota.OpPeek})
	if err != nil {
		t.Fatal(err)
	}
	if got := r.Decisions[0].Remaining; got != freeStreams {
		t.Errorf("free streams %s: got %d, want %d", when, got, freeStreams)
	}
	if got := r.Decisions[1].Remaining; got != leftTokens {
		t.Errorf("tokens left %s: got %d, want %d", when, got, leftTokens)
	}
}

// TestHolds: a request holds its charges while its handler runs, however long; they are settled however it ends.
func TestHolds(t *testing.T) {
	usage := func(w http.ResponseWriter, n int) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"usage":{"prompt_tokens":%d,"completion_tokens":0}}`, n)
	}
	settle := &quotahttp.Options{Settle: map[string]func(quotahttp.Usage) int64{"tokens": quotahttp.Usage.Tokens}, Error: func(*http.Request, error) {}}
	for name, c := range map[string]struct {
		o     *quotahttp.Options
		next  http.HandlerFunc
		spent int64
	}{
		"an answer without usage": {nil, ok, 100},
		"an answer with usage":    {settle, func(w http.ResponseWriter, _ *http.Request) { usage(w, 30) }, 30},
		"the handler's word": {nil, func(_ http.ResponseWriter, r *http.Request) {
			_ = quotahttp.From(r.Context()).Settle("tokens", 170)
		}, 170},
		"a refund": {&quotahttp.Options{Refund: func(status int) bool { return status >= 500 }}, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(502) }, 0},
		"a panic":  {nil, func(http.ResponseWriter, *http.Request) { panic("handler") }, 100},
		"a panic that is given back": {&quotahttp.Options{Refund: func(status int) bool { return status >= 500 }},
			func(http.ResponseWriter, *http.Request) { panic("handler") }, 0},
		"a panic after the usage": {settle, func(w http.ResponseWriter, _ *http.Request) { usage(w, 40); panic("handler") }, 40},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
				var limiter *quota.Limiter
				h, limiter := holding(t, s, c.o, func(w http.ResponseWriter, r *http.Request) {
					time.Sleep(10 * time.Minute) // a long stream
					wantHeld(t, limiter, 1, 900, "while the handler runs")
					c.next(w, r)
				})
				func() {
					defer func() { _ = recover() }()
					send(h)
				}()
				wantHeld(t, limiter, 2, 1000-c.spent, "after the handler")
				s.WantCharged(heldTokens, peerKey, c.spent)
			})
		})
	}
}

// TestHoldsOfClientsThatLeave: a client that disconnects, and a server that must repeat the settle, leave nothing held.
func TestHoldsOfClientsThatLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
		var errs []error
		failures := 0
		h, limiter := holding(t, s, &quotahttp.Options{Error: func(_ *http.Request, err error) { errs = append(errs, err) }}, func(_ http.ResponseWriter, r *http.Request) {
			<-r.Context().Done()
			_ = quotahttp.From(r.Context()).Settle("tokens", 20)
			s.FailNext(failures, quota.ErrUnavailable)
		})
		leave := func(r *http.Request) {
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			t.Cleanup(cancel)
			*r = *r.WithContext(ctx)
		}
		send(h, leave)
		wantHeld(t, limiter, 2, 980, "after the client left")
		failures = 3
		send(h, leave)
		time.Sleep(30 * time.Second)
		wantHeld(t, limiter, 2, 960, "after the settle was repeated")
		if len(errs) != 1 || !errors.Is(errs[0], quota.ErrIndeterminate) {
			t.Errorf("errors told: got %v, want one of a settle that is repeated", errs)
		}
	})
}

// mortal is the store of a process, which reaches it no more once it is dead.
type mortal struct {
	quota.Store
	dead atomic.Bool
}

func (m *mortal) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if m.dead.Load() {
		return quota.Decision{}, quota.ErrUnavailable
	}
	return m.Store.Charge(ctx, c)
}

func (m *mortal) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if m.dead.Load() {
		return quota.ErrUnavailable
	}
	return m.Store.ChargeAll(ctx, cs, out)
}

func (*mortal) Close() error { return nil }

// TestHoldsOfADeadProcess: the requests of a process that dies while their handlers run hold nothing for longer than the limits' TTL and
// a sixteenth of it, and no shorter while it lives. Nothing is charged for them.
func TestHoldsOfADeadProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
		_, other := holding(t, s, nil, ok)
		process := &mortal{Store: s}
		dies := newLimiter(t, process, &quota.Options{Notice: func(quota.Notice) {}})
		defer dies.Close()
		limits, err := quotahttp.New(dies, &quotahttp.Options{Error: func(*http.Request, error) {}}, byPeer(streams), byPeer(heldTokens).Cost(func(*http.Request) int64 { return 100 }))
		if err != nil {
			t.Fatal(err)
		}
		end, done := make(chan struct{}), make(chan struct{})
		h := limits(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-end }))
		go func() {
			send(h)
			close(done)
		}()
		time.Sleep(10 * time.Minute)
		wantHeld(t, other, 1, 900, "while the process lives")
		process.dead.Store(true)
		wantHeld(t, other, 1, 900, "when it is dead")
		time.Sleep(time.Minute + time.Minute/16)
		wantHeld(t, other, 2, 1000, "a TTL and a sixteenth later")
		close(end)
		<-done
		wantHeld(t, other, 2, 1000, "at the end")
	})
}

// TestHoldsThatAreLost: a handler learns that its holds are lost, and may not settle once it has returned.
func TestHoldsThatAreLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
		var receipt *quotahttp.Receipt
		h, limiter := holding(t, s, nil, func(w http.ResponseWriter, r *http.Request) {
			receipt = quotahttp.From(r.Context())
			s.Fail(quota.ErrUnavailable)
			<-receipt.Lost()
			s.Fail(nil)
		})
		send(h)
		wantHeld(t, limiter, 2, 900, "after the handler")
		if err := receipt.Settle("tokens", 1); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("settle after the handler: got %v, want ErrInvalid", err)
		}
		if (*quotahttp.Receipt)(nil).Lost() != nil {
			t.Error("Lost without the middleware: got a channel, want nil")
		}
	})
}

// TestHoldHeaders: a limit of how many run at once tells q and r, and a client that it denies may come back long before holds lapse.
func TestHoldHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := quotatest.New(t, &quotatest.Options{Clock: time.Now})
		go1, done := make(chan struct{}), make(chan struct{})
		h, _ := holding(t, s, &quotahttp.Options{Headers: quotahttp.IETF | quotahttp.Draft03}, func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(200)
			<-go1
		})
		for range 2 {
			go func() {
				r := send(h)
				_, _ = io.Copy(io.Discard, r.Body)
				done <- struct{}{}
			}()
		}
		synctest.Wait()
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest("GET", "/", nil))
		for field, want := range map[string]string{
			"Ratelimit-Policy": `"streams";q=2, "tokens";q=1000;w=86400`,
			"Ratelimit":        `"streams";r=0,`,
			"Retry-After":      "4",
			"Ratelimit-Reset":  "4",
		} {
			if got := w.Result().Header.Get(field); !strings.HasPrefix(got, want) {
				t.Errorf("%s: got %q, want %q", field, got, want)
			}
		}
		if w.Code != http.StatusTooManyRequests {
			t.Errorf("status: got %d, want 429", w.Code)
		}
		close(go1)
		<-done
		<-done
	})
}
