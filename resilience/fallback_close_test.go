package resilience_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// ledger is a primary whose state outlives Close, and whose faults a test sets.
type ledger struct {
	*local.Store
	mu    sync.Mutex
	fault string // "", "down", "lost": charged, but the reply is lost; "lost once"; "hang"
	calls int
}

func (l *ledger) Close() error { return nil }

func (l *ledger) set(fault string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fault = fault
}

func (l *ledger) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	l.mu.Lock()
	l.calls++
	fault := l.fault
	if fault == "lost once" {
		l.fault = ""
	}
	l.mu.Unlock()
	switch fault {
	case "down":
		return quota.Decision{}, as(quota.ErrUnavailable)
	case "hang":
		<-ctx.Done()
		return quota.Decision{}, as(quota.ErrIndeterminate)
	case "lost", "lost once":
		l.Store.Charge(ctx, c)
		return quota.Decision{}, as(quota.ErrIndeterminate)
	}
	return l.Store.Charge(ctx, c)
}

func (l *ledger) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	l.mu.Lock()
	down := l.fault != ""
	l.mu.Unlock()
	if down {
		return as(quota.ErrUnavailable)
	}
	return l.Store.ChargeAll(ctx, cs, out)
}

var owedLimit = bucket("owed", 1000, 1, time.Hour)

func owedCharge(key string, n int64) quota.Charge {
	return quota.Charge{Limit: owedLimit, Key: key, Cost: n}
}

// charged returns how much the ledger was charged for a key.
func (l *ledger) charged(t *testing.T, key string) int64 {
	t.Helper()
	d, err := l.Store.Charge(bg, quota.Charge{Limit: owedLimit, Key: key, Op: quota.OpPeek})
	if err != nil {
		t.Fatal(err)
	}
	return 1000 - d.Remaining
}

// take takes n tokens, which must be admitted by source.
func (l *ledger) take(t *testing.T, s quota.Store, key string, n int64, by quota.Source) {
	t.Helper()
	if d, err := s.Charge(bg, owedCharge(key, n)); err != nil || !d.Allowed || d.Source != by {
		t.Errorf("a take of %d: got %+v, %v; want a grant by the %v", n, d, err, by)
	}
}

func owing(t *testing.T, o *resilience.FallbackOptions, ps ...resilience.Policy) (*ledger, quota.Store) {
	l := &ledger{Store: local.New()}
	return l, wrap(t, l, append([]resilience.Policy{resilience.Fallback(local.New(), resilience.Instances(1), o)}, ps...)...)
}

// TestOwedInFront: the primary decides no call of a key before all that the key owes was charged to it, also
// what was admitted after a reconciliation of unknown outcome.
func TestOwedInFront(t *testing.T) {
	for _, list := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			l, s := owing(t, nil)
			l.take(t, s, "k", 10, quota.FromStore)
			for round := range int64(3) {
				l.set("down")
				l.take(t, s, "k", 50, quota.FromFallback)
				l.set("lost") // the reconciliation of 50
				l.take(t, s, "k", 1, quota.FromFallback)
				l.set("down")
				l.take(t, s, "k", 200, quota.FromFallback)
				l.set("")
				admitted := 10 + 251*(round+1) + 2*round
				if list {
					out := make([]quota.Decision, 2)
					if err := s.ChargeAll(bg, []quota.Charge{owedCharge("other", 1), owedCharge("k", 1)}, out); err != nil {
						t.Error(err)
					}
				} else {
					l.take(t, s, "k", 1, quota.FromStore)
				}
				if got, want := l.charged(t, "k"), admitted+1; got != want {
					t.Errorf("round %d: the primary was charged %d after the next call, want %d", round, got, want)
				}
				l.take(t, s, "k", 1, quota.FromStore)
				if got, want := l.charged(t, "k"), admitted+2; got != want {
					t.Errorf("round %d: the primary was charged %d after another call, want %d", round, got, want)
				}
			}
			s.Close()
		})
	}
}

// TestCloseCharges: Close charges the primary what all keys owe, exactly once.
func TestCloseCharges(t *testing.T) {
	for _, fault := range []string{"", "lost once"} {
		for _, unknown := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/unknown=%v", fault, unknown), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					var n notices
					l, s := owing(t, &resilience.FallbackOptions{Notice: n.add})
					const keys = 300
					l.set("down")
					for i := range keys {
						l.take(t, s, fmt.Sprint("team/", i), 50, quota.FromFallback)
					}
					if unknown {
						l.set("lost")
						for i := range keys {
							l.take(t, s, fmt.Sprint("team/", i), 7, quota.FromFallback)
						}
					}
					l.set(fault)
					if err := s.Close(); err != nil {
						t.Error(err)
					}
					want := int64(50)
					if unknown {
						want = 57
					}
					for i := range keys {
						if got := l.charged(t, fmt.Sprint("team/", i)); got != want {
							t.Errorf("key %d: the primary was charged %d after Close, want %d", i, got, want)
						}
					}
					synctest.Wait()
					for _, x := range n.take() {
						if strings.Contains(x.Text, "not charged") {
							t.Errorf("notice: got %q, want none of dropped tokens", x.Text)
						}
					}
					calls := l.calls
					if err := s.Close(); err != nil || l.calls != calls {
						t.Errorf("a second Close: got %v and %d calls, want neither", err, l.calls-calls)
					}
				})
			})
		}
	}
}

// TestCloseBounded: Close takes a bounded time however the primary fares, and tells what it dropped.
func TestCloseBounded(t *testing.T) {
	for _, c := range []struct {
		name     string
		o        resilience.FallbackOptions
		policies []resilience.Policy
		fault    string
		back     time.Duration // after so long the primary is well; 0 is never
		within   time.Duration
		charged  bool
	}{
		{"down", resilience.FallbackOptions{}, nil, "down", 0, 0, false},
		{"hangs", resilience.FallbackOptions{}, nil, "hang", 0, resilience.DefaultCloseWithin, false},
		{"hangs, a bound of its own", resilience.FallbackOptions{CloseWithin: 300 * ms}, nil, "hang", 0, 300 * ms, false},
		{"hangs under a timeout", resilience.FallbackOptions{}, []resilience.Policy{resilience.Timeout(50*ms, nil)}, "hang", 0, 150 * ms, false},
		{"hangs for a moment", resilience.FallbackOptions{}, []resilience.Policy{resilience.Timeout(100*ms, nil)}, "hang", 150 * ms, 200 * ms, true},
		{"the breaker is open", resilience.FallbackOptions{}, []resilience.Policy{resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1})}, "down", 1, 250 * ms, true},
		{"the breaker is open for long", resilience.FallbackOptions{}, []resilience.Policy{resilience.Breaker(&resilience.BreakerOptions{FailingFor: -1, FirstDelay: time.Minute})}, "down", 1, 0, false},
		{"not asked for", resilience.FallbackOptions{CloseWithin: -1}, nil, "down", 1, 0, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var n notices
				c.o.Notice = n.add
				l, s := owing(t, &c.o, c.policies...)
				l.set("down")
				for range 4 {
					l.take(t, s, "k", 10, quota.FromFallback)
				}
				l.set(c.fault)
				if c.back > 0 {
					time.AfterFunc(c.back, func() { l.set("") })
					time.Sleep(c.back / 2)
				}
				begin := time.Now()
				if c.back == 1 {
					time.Sleep(time.Nanosecond) // the primary is well when Close begins
					begin = time.Now()
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				if took := time.Since(begin); took > c.within {
					t.Errorf("Close took %v, want at most %v", took, c.within)
				}
				want := map[bool]int64{true: 40}[c.charged]
				if got := l.charged(t, "k"); got != want {
					t.Errorf("the primary was charged %d, want %d", got, want)
				}
				synctest.Wait()
				told := 0
				for _, x := range n.take() {
					if strings.Contains(x.Text, "40 tokens of 1 keys") {
						told++
					}
				}
				if want := map[bool]int{false: 1}[c.charged]; told != want {
					t.Errorf("notices of 40 dropped tokens: got %d, want %d", told, want)
				}
				l.set("down")
				_, err := s.Charge(bg, owedCharge("k", 1))
				wantErr(t, err, quota.ErrClosed)
			})
		})
	}
}

// TestCloseWhileOthersTake: calls that go on while Close charges the debts are not charged twice.
func TestCloseWhileOthersTake(t *testing.T) {
	l, s := owing(t, nil)
	var mu sync.Mutex
	admitted := int64(0)
	l.set("down")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 60 {
				if d, err := s.Charge(bg, owedCharge("k", 1)); err == nil && d.Allowed {
					mu.Lock()
					admitted++
					mu.Unlock()
				}
				if i == 30 {
					l.set("")
				}
			}
		})
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	if got := l.charged(t, "k"); got > admitted {
		t.Errorf("the primary was charged %d, want at most the %d that were admitted", got, admitted)
	}
}

// A call of unknown outcome that is not decided here either, because the fallback is closed meanwhile or because there is no
// share any more, is not told as one that charged nothing.
func TestFallbackKeepsUnknown(t *testing.T) {
	slow := quota.NewLimit("slow", algorithm.TokenBucket(50, 53, 87600*time.Hour)) // one of four has no share
	for name, during := range map[string]func(s quota.Store, n *atomic.Int64){
		"closed":   func(s quota.Store, _ *atomic.Int64) { s.Close() },
		"no share": func(_ quota.Store, n *atomic.Int64) { n.Store(4) },
	} {
		t.Run(name, func(t *testing.T) {
			both(t, func(t *testing.T, take func(s quota.Store, ctx context.Context, c quota.Charge) (quota.Decision, error)) {
				for _, cause := range []error{quota.ErrIndeterminate, quota.ErrUnavailable} {
					var n atomic.Int64
					n.Store(1)
					var s quota.Store
					s = wrap(t, &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
						during(s, &n)
						return quota.Decision{}, as(cause)
					}}, resilience.Fallback(local.New(), n.Load, nil))
					defer s.Close()
					_, err := take(s, bg, quota.Charge{Limit: slow, Key: "k", Cost: 1})
					want := map[error]quota.ChargeState{quota.ErrIndeterminate: quota.ChargeUnknown, quota.ErrUnavailable: quota.NotCharged}[cause]
					if got := quota.Charged(err); got != want {
						t.Errorf("charged, where the store said %v: got %q, by the error %v, want %q", cause, got, err, want)
					}
				}
			})
		})
	}
}

// A second Close returns no sooner than the first: until then calls reach the store inside.
func TestSecondCloseWaits(t *testing.T) {
	for name, p := range map[string]resilience.Policy{
		"Fallback": resilience.Fallback(local.New(), resilience.Instances(1), nil), "Breaker": resilience.Breaker(nil), "Bulkhead": resilience.Bulkhead(1),
	} {
		closing, end, returned := make(chan struct{}), make(chan struct{}), make(chan struct{}, 2)
		s := wrap(t, &stub{onClose: func() error { close(closing); <-end; return nil }}, p)
		for range 2 {
			go func() {
				s.Close()
				returned <- struct{}{}
			}()
		}
		<-closing
		select {
		case <-returned:
			t.Errorf("%s: got a Close that returned before the store inside was closed, want none", name)
			returned <- struct{}{}
		case <-time.After(20 * time.Millisecond):
		}
		close(end)
		<-returned
		<-returned
	}
}
