package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

const (
	ms   = time.Millisecond
	tick = time.Nanosecond
)

type ctxKey struct{}

// TestDeadline holds the small context against the standard library's, in every order of what may end it.
func TestDeadline(t *testing.T) {
	type ctx interface {
		context.Context
		Release()
	}
	var events = []string{"ask", "expire", "cancel", "release", "err", "child"}
	var orders [][]string
	var permute func(done, left []string)
	permute = func(done, left []string) {
		if len(left) == 0 {
			orders = append(orders, slices.Clone(done))
		}
		for i := range left {
			permute(append(done, left[i]), slices.Delete(slices.Clone(left), i, i+1))
		}
	}
	permute(nil, events)
	for _, order := range orders {
		synctest.Test(t, func(t *testing.T) {
			parent, cancel := context.WithCancel(context.WithValue(bg, ctxKey{}, "v"))
			defer cancel()
			at := time.Now().Add(time.Second)
			var own ctx = resilience.NewDeadline(parent, at)
			std, release := context.WithDeadline(parent, at)
			defer own.Release()
			defer release()
			if d, ok := own.Deadline(); !ok || !d.Equal(at) || own.Value(ctxKey{}) != "v" {
				t.Fatalf("deadline: got %v, %v; want %v", d, ok, at)
			}
			for _, e := range order {
				switch e {
				case "ask":
					own.Done()
				case "expire":
					time.Sleep(time.Second)
				case "cancel":
					cancel()
				case "release":
					own.Release()
					release()
				case "err":
					own.Err()
				case "child":
					c, stop := context.WithCancel(own)
					defer stop()
					defer func() {
						synctest.Wait()
						if c.Err() == nil {
							t.Errorf("%v: the child has not ended, want it to", order)
						}
					}()
				}
				synctest.Wait()
				// Done is asked for in some orders only: it is lazy. It is looked at before Err, which looks by itself.
				if slices.Index(order, "ask") <= slices.Index(order, e) {
					select {
					case <-own.Done():
						if std.Err() == nil {
							t.Fatalf("%v at %s: Done is closed, want it open", order, e)
						}
					default:
						if std.Err() != nil {
							t.Fatalf("%v at %s: Done is open, want it closed", order, e)
						}
					}
				}
				if a, b := own.Err(), std.Err(); !errors.Is(a, b) || (a == nil) != (b == nil) {
					t.Fatalf("%v at %s: Err is %v, want %v", order, e, a, b)
				}
			}
		})
	}
}

// slow is a store that answers after a while, and heeds its context as told.
func slow(after time.Duration, heeds bool, sent bool) *stub {
	return &stub{answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
		done := ctx.Done()
		if !heeds {
			done = nil
		}
		select {
		case <-time.After(after):
			return granted, nil
		case <-done:
			if sent {
				return quota.Decision{}, fmt.Errorf("test: %w: %w", quota.ErrIndeterminate, ctx.Err())
			}
			return quota.Decision{}, ctx.Err()
		}
	}}
}

func TestTimeoutPrompt(t *testing.T) {
	both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
		synctest.Test(t, func(t *testing.T) {
			run := func(store *stub, ctx context.Context) (quota.Decision, time.Duration, error) {
				store.prompt = true
				start := time.Now()
				d, err := take(wrap(t, store, resilience.Timeout(50*ms, nil)), ctx, charge(1))
				return d, time.Since(start), err
			}
			if d, took, err := run(slow(49*ms, true, true), bg); err != nil || took != 49*ms || d != granted {
				t.Errorf("a fast store: got %+v, %v after %v; want %+v after 49ms", d, err, took, granted)
			}
			_, took, err := run(slow(time.Hour, true, true), bg)
			wantErr(t, err, quota.ErrIndeterminate)
			if took != 50*ms || !strings.Contains(err.Error(), "timeout of 50ms") {
				t.Errorf("a slow store: got %v after %v, want an error with the timeout after 50ms", err, took)
			}
			_, took, err = run(slow(time.Hour, true, false), bg) // certainly not sent
			wantErr(t, err, quota.ErrUnavailable, context.DeadlineExceeded)
			wantNot(t, err, quota.ErrIndeterminate)
			if took != 50*ms || !strings.Contains(err.Error(), "timeout of 50ms") {
				t.Errorf("a call not sent: got %v after %v, want an error with the timeout after 50ms", err, took)
			}
			// The caller's own context comes first: its error is the store's.
			ctx, cancel := context.WithTimeout(bg, 20*ms)
			defer cancel()
			if _, took, err = run(slow(time.Hour, true, false), ctx); err != context.DeadlineExceeded || took != 20*ms {
				t.Errorf("the caller's deadline: got %v after %v, want %v after 20ms", err, took, context.DeadlineExceeded)
			}
			ctx, cancel = context.WithCancel(bg)
			time.AfterFunc(10*ms, cancel)
			_, took, err = run(slow(time.Hour, true, true), ctx)
			wantErr(t, err, quota.ErrIndeterminate, context.Canceled)
			if took != 10*ms || strings.Contains(err.Error(), "timeout") {
				t.Errorf("the caller left: got %v after %v, want an error without the timeout after 10ms", err, took)
			}
			// The store is called on the caller's goroutine.
			defer func() {
				if v := recover(); v != "as it is" {
					t.Errorf("recovered: got %v, want the store's value", v)
				}
			}()
			run(&stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { panic("as it is") }}, bg)
		})
	})
}

func TestTimeoutHandOff(t *testing.T) {
	both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
		synctest.Test(t, func(t *testing.T) {
			const T = 50 * ms
			ends := func(after time.Duration) func() context.Context {
				return func() context.Context {
					ctx, cancel := context.WithCancel(bg)
					time.AfterFunc(after, cancel)
					return ctx
				}
			}
			within := func(after time.Duration) func() context.Context {
				return func() context.Context {
					ctx, cancel := context.WithTimeout(bg, after)
					time.AfterFunc(time.Hour, cancel)
					return ctx
				}
			}
			ended, cancel := context.WithCancel(bg)
			cancel()
			for name, c := range map[string]struct {
				store *stub
				ctx   func() context.Context
				took  time.Duration
				is    []error
			}{
				"at once":                      {&stub{}, nil, 0, nil},
				"just in time":                 {slow(T-1, false, true), nil, T - 1, nil},
				"too late":                     {slow(T+1, false, true), nil, T, []error{quota.ErrIndeterminate}},
				"never, heeds":                 {slow(time.Hour, true, true), nil, T - T/20, []error{quota.ErrIndeterminate}},
				"never":                        {slow(time.Hour, false, true), nil, T, []error{quota.ErrIndeterminate}},
				"caller left":                  {slow(time.Hour, false, true), ends(20 * ms), 20 * ms, []error{quota.ErrIndeterminate, context.Canceled}},
				"caller's deadline":            {slow(time.Hour, false, true), within(20 * ms), 20 * ms, []error{quota.ErrIndeterminate, context.DeadlineExceeded}},
				"caller's deadline comes late": {slow(time.Hour, false, true), within(80 * ms), T, []error{quota.ErrIndeterminate}},
				"caller had left":              {&stub{}, func() context.Context { return ended }, 0, []error{context.Canceled}},
				"the store's own error":        {&stub{answer: script(as(quota.ErrMisconfigured))}, nil, 0, []error{quota.ErrMisconfigured}},
			} {
				s := wrap(t, c.store, resilience.Timeout(T, nil))
				ctx := bg
				if c.ctx != nil {
					ctx = c.ctx()
				}
				start := time.Now()
				d, err := take(s, ctx, charge(1))
				took := time.Since(start)
				if took != c.took || (err == nil) != (c.is == nil) || err == nil && d != granted {
					t.Errorf("%s: got %+v, %v after %v; want %v after %v", name, d, err, took, c.is, c.took)
				}
				for _, is := range c.is {
					if !errors.Is(err, is) {
						t.Errorf("%s: got %v, want an error that is %v", name, err, is)
					}
				}
				if name == "caller had left" && (err != context.Canceled || c.store.called() != 0) {
					t.Errorf("%s: got %v after %d calls, want %v after none", name, err, c.store.called(), context.Canceled)
				}
				if took >= T-T/20 && c.is != nil && !strings.Contains(err.Error(), "timeout of 50ms") {
					t.Errorf("%s: got %v, want an error with the timeout", name, err)
				}
			}
			time.Sleep(2 * time.Hour)
			synctest.Wait() // and synctest fails if a goroutine is left
		})
	})
}

// TestTimeoutInnerContext holds that the call gets a context which ends with its caller and just before T, so
// that the store's own error is heard.
func TestTimeoutInnerContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const heed = 50*ms - 50*ms/20
		start := time.Now()
		var after time.Duration
		var value any
		store := &stub{answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
			if d, ok := ctx.Deadline(); !ok || d.Sub(start) != heed {
				t.Errorf("the store's deadline: got %v, want %v", d.Sub(start), heed)
			}
			<-ctx.Done()
			after, value = time.Since(start), ctx.Value(ctxKey{})
			return quota.Decision{}, lostReply{"batch 7"}
		}}
		s := wrap(t, store, resilience.Timeout(50*ms, nil))
		_, err := s.Charge(context.WithValue(bg, ctxKey{}, "v"), charge(1))
		if shared, ok := errors.AsType[driver.RoundTripError](err); !ok || shared.RoundTrip() != "batch 7" {
			t.Errorf("got %v, want an error of the round trip \"batch 7\"", err)
		}
		synctest.Wait()
		if after != heed || value != "v" {
			t.Errorf("got a context that ended after %v with the value %v, want %v and v", after, value, heed)
		}
		start = time.Now()
		ctx, cancel := context.WithCancel(bg)
		time.AfterFunc(5*ms, cancel)
		s.Charge(ctx, charge(1))
		synctest.Wait()
		if after != 5*ms {
			t.Errorf("got a context that ended after %v, want 5ms", after)
		}
	})
}

// TestTimeoutPrivate runs a store that reads the charges and writes the decisions late, while the caller
// uses its own slices again: the race detector sees a sharing of any.
func TestTimeoutPrivate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		seen := make(chan string, 1)
		store := &stub{answerAll: func(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			time.Sleep(100 * ms)
			for i := range out {
				out[i] = quota.Decision{Remaining: 4711}
			}
			seen <- cs[0].Key + cs[1].Key
			return nil
		}}
		s := wrap(t, store, resilience.Timeout(50*ms, nil))
		cs := []quota.Charge{{Limit: limit, Key: "a"}, {Limit: limit, Key: "b"}}
		out := make([]quota.Decision, 2)
		if err := s.ChargeAll(bg, cs, out); !errors.Is(err, quota.ErrIndeterminate) {
			t.Fatal(err)
		}
		cs[0].Key, cs[1].Key = "c", "d"
		out[0], out[1] = granted, granted
		if keys := <-seen; keys != "ab" {
			t.Errorf("keys that the store saw: got %q, want \"ab\"", keys)
		}
		synctest.Wait()
		if out[0] != granted || out[1] != granted {
			t.Errorf("the caller's decisions: got %+v, want them unchanged", out)
		}
		// In time, the decisions are the caller's.
		store.answerAll = nil
		if err := s.ChargeAll(bg, cs, out); err != nil || out[1] != granted {
			t.Errorf("in time: got %+v, %v; want %+v", out, err, granted)
		}
	})
}

func TestTimeoutBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := slow(time.Hour, false, true)
		s := wrap(t, store, resilience.Timeout(50*ms, &resilience.TimeoutOptions{MaxCalls: 4}))
		var wg sync.WaitGroup
		for range 4 {
			wg.Go(func() { s.Charge(bg, charge(1)) })
		}
		synctest.Wait()
		// All are waited for: the load is this process's.
		_, err := s.Charge(bg, charge(1))
		wantErr(t, err, quota.ErrOverloaded, resilience.ErrRejected)
		wg.Wait()
		// All are abandoned: the store is what is slow.
		start := time.Now()
		for range 100 {
			_, err := s.Charge(bg, charge(1))
			wantErr(t, err, quota.ErrOverloaded)
			wantNot(t, err, resilience.ErrRejected)
		}
		if time.Since(start) != 0 || store.called() != 4 || resilience.Calls(s) != 4 {
			t.Errorf("got %d calls, %d not ended, after %v; want 4 and 4 at once", store.called(), resilience.Calls(s), time.Since(start))
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if n := resilience.Calls(s); n != 0 {
			t.Errorf("calls that have not ended: got %d, want none", n)
		}
		store.answer = nil
		if _, err := s.Charge(bg, charge(1)); err != nil {
			t.Error(err)
		}
	})
}

func TestTimeoutPanics(t *testing.T) {
	cause := errors.New("broken store")
	after := time.Duration(0)
	store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
		time.Sleep(after)
		panic(cause)
	}}
	both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
		synctest.Test(t, func(t *testing.T) {
			var n notices
			s := wrap(t, store, resilience.Timeout(50*ms, &resilience.TimeoutOptions{MaxCalls: 1, Notice: n.add}))
			after = 0
			for range 3 { // a slot lost would refuse the second
				func() {
					defer func() {
						p, ok := recover().(*resilience.Panic)
						if !ok || p.Value != cause || !errors.Is(p, cause) || !strings.Contains(p.Error(), "TestTimeoutPanics") {
							t.Errorf("recovered: got %v, want a *Panic of %v with the stack", p, cause)
						}
					}()
					take(s, bg, charge(1))
				}()
			}
			if all := n.take(); len(all) > 0 {
				t.Errorf("notices: got %v, want none", all)
			}
			after = 60 * ms
			_, err := take(s, bg, charge(1))
			wantErr(t, err, quota.ErrIndeterminate)
			time.Sleep(20 * ms)
			synctest.Wait()
			if all := n.take(); len(all) != 1 || all[0].Name != "panic" || !errors.Is(all[0].Err, cause) {
				t.Errorf("notices: got %v, want one \"panic\" of %v", all, cause)
			}
			if resilience.Calls(s) != 0 {
				t.Errorf("slots in use: got %d, want none", resilience.Calls(s))
			}
		})
	})
}

func TestTimeoutGoexit(t *testing.T) {
	store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
		runtime.Goexit()
		return granted, nil
	}}
	s := wrap(t, store, resilience.Timeout(time.Minute, &resilience.TimeoutOptions{MaxCalls: 1}))
	for range 3 {
		returned := true
		done := make(chan struct{})
		go func() {
			defer close(done)
			returned = false
			_, err := s.Charge(bg, charge(1))
			returned = err == nil || true
		}()
		<-done
		if returned {
			t.Fatal("the caller went on, want its Goexit")
		}
	}
}

// TestTimeoutWithdrawn holds that a caller who gets its context's error alone was not charged, however
// narrowly it left.
func TestTimeoutWithdrawn(t *testing.T) {
	var sent sync.Map
	store := &stub{answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
		sent.Store(c.Key, true)
		return granted, nil
	}}
	s := wrap(t, store, resilience.Timeout(time.Minute, &resilience.TimeoutOptions{MaxCalls: 1 << 20}))
	var withdrawn sync.Map
	n := 0
	var wg sync.WaitGroup
	for i := range sized(2000, 100_000) {
		ctx, cancel := context.WithCancel(bg)
		c := charge(1)
		c.Key = fmt.Sprint(i)
		wg.Go(func() {
			_, err := s.Charge(ctx, c)
			if err == context.Canceled {
				withdrawn.Store(c.Key, true)
			} else if err != nil && !errors.Is(err, quota.ErrIndeterminate) {
				t.Error(err)
			}
		})
		wg.Go(cancel)
	}
	wg.Wait()
	if err := s.Close(); err != nil { // all calls have ended
		t.Fatal(err)
	}
	for key := range withdrawn.Range {
		n++
		if _, ok := sent.Load(key); ok {
			t.Errorf("call %v was withdrawn and reached the store, want one of the two", key)
		}
	}
	t.Logf("%d calls were withdrawn", n)
}

func TestTimeoutClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		closed := make(chan struct{})
		store := &stub{onClose: func() error { close(closed); return nil }}
		store.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
			<-closed
			time.Sleep(20 * ms)
			return quota.Decision{}, as(quota.ErrClosed)
		}
		s := wrap(t, store, resilience.Timeout(50*ms, nil))
		for range 3 {
			s.Charge(bg, charge(1))
		}
		start := time.Now()
		if err := s.Close(); err != nil || time.Since(start) != 20*ms || resilience.Calls(s) != resilience.DefaultMaxCalls {
			t.Errorf("Close: got %v after %v, want no error after 20ms", err, time.Since(start))
		}
		_, err := s.Charge(bg, charge(1))
		wantErr(t, err, quota.ErrClosed)

		// A store that does not even end when it is closed is reported.
		broken := errors.New("close failed")
		store = slow(time.Hour, false, true)
		store.onClose = func() error { return broken }
		s = wrap(t, store, resilience.Timeout(50*ms, nil))
		for range 3 {
			s.Charge(bg, charge(1))
		}
		start = time.Now()
		err = s.Close()
		wantErr(t, err, broken)
		if !strings.Contains(err.Error(), "3 calls") || time.Since(start) != 50*ms {
			t.Errorf("Close: got %v after %v, want an error of 3 calls after 50ms", err, time.Since(start))
		}
		time.Sleep(time.Hour)
	})
}

// reporting is a store that reports.
type reporting struct {
	quota.Store
	to []driver.Reports
}

func (s *reporting) Report(r driver.Reports) { s.to = append(s.to, r) }

// placedReporting names its nodes too.
type placedReporting struct{ *reporting }

func (placedReporting) Node(c quota.Charge) string    { return c.Key }
func (placedReporting) Refresh(context.Context) error { return nil }

// TestTimeoutNotice: a timeout below two round trips, once one is measured, gives one notice for each node.
func TestTimeoutNotice(t *testing.T) {
	for name, wrap := range map[string]func(r *reporting, tell func(quota.Notice)) (quota.Store, error){
		"Timeout": func(r *reporting, tell func(quota.Notice)) (quota.Store, error) {
			return resilience.Wrap(r, resilience.Timeout(100*time.Millisecond, &resilience.TimeoutOptions{Notice: tell}))
		},
		"Standard": func(r *reporting, tell func(quota.Notice)) (quota.Store, error) {
			return resilience.Standard(r, resilience.FailWithError(), &resilience.StandardOptions{Timeout: 100 * time.Millisecond, Notice: tell})
		},
		"Standard by node": func(r *reporting, tell func(quota.Notice)) (quota.Store, error) {
			return resilience.Standard(placedReporting{r}, resilience.FailWithError(), &resilience.StandardOptions{Timeout: 100 * time.Millisecond, Notice: tell})
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := &reporting{Store: &stub{}}
			var got []quota.Notice
			s, err := wrap(r, func(n quota.Notice) { got = append(got, n) })
			if err != nil {
				t.Fatal(err)
			}
			defer s.Close()
			for _, key := range []string{"a", "b"} { // nodes get policies of their own
				if _, err := s.Charge(bg, quota.Charge{Limit: limit, Key: key, Cost: 1}); err != nil {
					t.Fatal(err)
				}
			}
			if len(r.to) != 1 {
				t.Fatalf("listeners: got %d, want 1", len(r.to))
			}
			r.to[0].RoundTrip("a", 50*time.Millisecond)
			if len(got) != 0 {
				t.Errorf("two round trips in the timeout: got %+v, want no notice", got)
			}
			for _, node := range []string{"a", "a", "b"} {
				r.to[0].RoundTrip(node, 51*time.Millisecond)
			}
			if len(got) != 2 || got[0].Name != "timeout" {
				t.Fatalf("notices: got %+v, want two of the name timeout", got)
			}
			for i, node := range []string{"a", "b"} {
				for _, figure := range []string{"node " + node, "100ms", "51ms"} {
					if !strings.Contains(got[i].Text, figure) {
						t.Errorf("notice: got %q, want it to name %s", got[i].Text, figure)
					}
				}
			}
			r.to[0].Notice(quota.Notice{Name: "eviction"})
			if len(got) != 3 || got[2].Name != "eviction" {
				t.Errorf("notices: got %+v, want the store's eviction too", got)
			}
		})
	}
}
