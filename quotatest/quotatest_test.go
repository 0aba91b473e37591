package quotatest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/quotatest"
	"github.com/fleetquota/fleetquota/resilience"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	bg       = context.Background()
	tokens   = quota.Must(algorithm.ParseLimit("tokens: 10 burst 1/s bucket"))
	requests = quota.Must(algorithm.ParseLimit("requests: 5/1m fixed"))
)

func limiter(store quota.Store) *quota.Limiter {
	return quota.Must(quota.NewLimiter(store, tokens, nil))
}

// A store that nothing fails is a store as any other.
func TestConformance(t *testing.T) {
	conformance.Run(t, conformance.Harness{
		Name: "quotatest",
		Open: func(t testing.TB, o conformance.Opening) quota.Store {
			if o.Clock == nil {
				o.Clock = time.Now
			}
			return quotatest.New(t, &quotatest.Options{Clock: o.Clock})
		},
		Lacks: []conformance.Lack{{Feature: conformance.Shared, Reason: "its state is the memory of one store"}},
	})
}

// eachBubble runs a test outside and inside a bubble of testing/synctest.
func eachBubble(t *testing.T, test func(t *testing.T)) {
	t.Run("outside", test)
	t.Run("bubble", func(t *testing.T) { synctest.Test(t, test) })
}

func TestClock(t *testing.T) {
	eachBubble(t, func(t *testing.T) {
		store := quotatest.New(t, nil)
		lim := limiter(store)
		d := quota.Must(lim.Take(bg, "k", 10))
		if !d.Allowed || !d.At.Time().Equal(quotatest.Start) || !store.Now().Equal(quotatest.Start) {
			t.Errorf("first decision: got %v at %v, want it allowed at %v", d, store.Now(), quotatest.Start)
		}
		for range 3 { // the clock stands still
			if d := quota.Must(lim.Take(bg, "k", 1)); d.Allowed || d.RetryAfter != time.Second {
				t.Errorf("decision without a token left: got %v, want it denied for 1s", d)
			}
		}
		store.Advance(2500 * time.Millisecond)
		if d := quota.Must(lim.Take(bg, "k", 2)); !d.Allowed || d.Remaining != 0 {
			t.Errorf("decision after 2.5s: got %v, want it allowed, 0 left", d)
		}
		store.Advance(-500 * time.Millisecond)
		if got, want := store.Now(), quotatest.Start.Add(2*time.Second); !got.Equal(want) {
			t.Errorf("time: got %v, want %v", got, want)
		}
	})
}

// A wait follows the clock, also where the clock moves before the caller sleeps, and takes no time.
func TestWaitFollowsTheClock(t *testing.T) {
	eachBubble(t, func(t *testing.T) {
		for _, rule := range []string{"10 burst 1/s bucket", "10/10s fixed", "10/10s sliding", "10/10s log"} {
			began := time.Now()
			limit := quota.Must(algorithm.ParseLimit("tokens: " + rule))
			for _, sleeps := range []bool{true, false} {
				for way, wait := range map[string]func(lim *quota.Limiter) error{
					"Wait": func(lim *quota.Limiter) error { _, err := lim.Wait(bg, "k", 5); return err },
					"WaitAll": func(lim *quota.Limiter) error {
						_, err := lim.WaitAll(bg, quota.Charge{Key: "k", Cost: 5}, quota.Charge{Limit: requests, Key: "k", Cost: 1})
						return err
					},
				} {
					store := quotatest.New(t, nil)
					lim := quota.Must(quota.NewLimiter(store, limit, nil))
					quota.Must(lim.Take(bg, "k", 10))
					over := make(chan error, 1)
					go func() { over <- wait(lim) }()
					if sleeps {
						store.AwaitSleepers(1)
						store.Advance(time.Second) // it asks, and sleeps again
						store.AwaitSleepers(1)
						select {
						case err := <-over:
							t.Errorf("%s of %s: got it over (%v) after 1s, want it to wait", way, rule, err)
						default:
						}
					}
					store.Advance(20 * time.Second)
					if err := <-over; err != nil {
						t.Errorf("%s of %s: got %v, want a grant", way, rule, err)
					}
					store.WantCharged(limit, "k", 15)
				}
			}
			if took := time.Since(began); took > 5*time.Second {
				t.Errorf("%s: time of the waits: got %v, want next to none", rule, took)
			}
		}
	})
}

// hasty is a store whose clock moves before the first caller that must wait learns of it.
type hasty struct {
	*quotatest.Store
	once sync.Once
}

func (s *hasty) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(ctx, c)
	if d.Delay > 0 || d.RetryAfter > 0 && !c.Limit.Spec().Ahead {
		s.once.Do(func() { s.Advance(10 * time.Second) })
	}
	return d, err
}

// A caller waits from the time of the decision that tells it to, and not from the time at which it learns of that.
func TestTheClockMovesBeforeTheCallerSleeps(t *testing.T) {
	for _, rule := range []string{"10 burst 1/s bucket", "10/10s fixed", "10/10s log"} {
		store := &hasty{Store: quotatest.New(t, nil)}
		lim := quota.Must(quota.NewLimiter(store, quota.Must(algorithm.ParseLimit("tokens: "+rule)), nil))
		quota.Must(lim.Take(bg, "k", 10))
		ctx, cancel := context.WithCancel(bg)
		late := time.AfterFunc(5*time.Second, cancel)
		if _, err := lim.Wait(ctx, "k", 10); err != nil {
			t.Errorf("%s: Wait: got %v, want a grant, for the clock has moved far enough", rule, err)
		}
		late.Stop()
		cancel()
	}
}

// Waiting callers are found through policies, and leave no sleeper behind.
func TestCancelledWait(t *testing.T) {
	eachBubble(t, func(t *testing.T) {
		store := quotatest.New(t, nil)
		lim := limiter(quota.Must(resilience.Wrap(store, resilience.Bulkhead(5))))
		quota.Must(lim.Take(bg, "k", 10))
		ctx, cancel := context.WithCancel(bg)
		over := make(chan error)
		go func() { _, err := lim.Wait(ctx, "k", 5); over <- err }()
		store.AwaitSleepers(1)
		cancel()
		if err := <-over; !errors.Is(err, context.Canceled) {
			t.Errorf("Wait: got %v, want context.Canceled", err)
		}
		store.WantCharged(tokens, "k", 10)
		if n := store.Sleepers(); n != 0 {
			t.Errorf("sleepers after the wait: got %d, want 0", n)
		}
	})
}

// In a bubble the store may go by the bubble's time, and be moved further.
func TestTheBubblesClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := quotatest.New(t, &quotatest.Options{Clock: time.Now})
		lim := limiter(store)
		began := time.Now()
		quota.Must(lim.Take(bg, "k", 10))
		quota.Must(lim.Wait(bg, "k", 5))
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("time of a wait for 5 tokens: got %v, want 5s", took)
		}
		time.Sleep(3 * time.Second)
		store.Advance(4 * time.Second)
		if d := quota.Must(lim.Take(bg, "k", 7)); !d.Allowed {
			t.Errorf("7 tokens after 3s and 4s: got %v, want them", d)
		}
		over := make(chan time.Duration)
		began = time.Now()
		go func() { lim.Wait(bg, "k", 10); over <- time.Since(began) }()
		time.Sleep(2500 * time.Millisecond)
		store.Advance(5 * time.Second)
		if took := <-over; took != 5*time.Second {
			t.Errorf("time of a wait for 10 tokens, moved by 5s: got %v, want 5s", took)
		}
	})
}

func TestFailures(t *testing.T) {
	eachBubble(t, func(t *testing.T) {
		store := quotatest.New(t, nil)
		lim := limiter(store)
		ways := map[string]func(ctx context.Context) error{
			"Take": func(ctx context.Context) error { _, err := lim.Take(ctx, "k", 1); return err },
			"ChargeAll": func(ctx context.Context) error {
				_, err := lim.ChargeAll(ctx, quota.Charge{Key: "k", Cost: 1}, quota.Charge{Limit: requests, Key: "k", Cost: 1})
				return err
			},
		}
		for way, take := range ways {
			store.Forget()
			store.Fail(quota.ErrUnavailable)
			for range 2 {
				if err := take(bg); !errors.Is(err, quota.ErrUnavailable) {
					t.Errorf("%s in an outage: got %v, want ErrUnavailable", way, err)
				}
			}
			store.Fail(nil)
			store.FailNext(1, quota.ErrConflict)
			store.LoseNext(1)
			for _, want := range []error{quota.ErrConflict, quota.ErrIndeterminate, nil} {
				if err := take(bg); !errors.Is(err, want) {
					t.Errorf("%s: got %v, want %v", way, err, want)
				}
			}
			store.WantCharged(tokens, "k", 2) // the lost one, and the last
			if n := len(store.Calls()); n != 5 {
				t.Errorf("%s: calls: got %d, want 5", way, n)
			}

			resume := store.Hang()
			ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
			if err := take(ctx); !errors.Is(err, quota.ErrIndeterminate) || !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("%s that hangs: got %v, want ErrIndeterminate and context.DeadlineExceeded", way, err)
			}
			cancel()
			over := make(chan error)
			go func() { over <- take(bg) }()
			resume()
			resume()
			if err := <-over; err != nil {
				t.Errorf("%s that hung for a while: got %v, want nil", way, err)
			}
			store.WantCharged(tokens, "k", 3)
		}
	})
}

// log is a test that notes its failures.
type log struct {
	testing.TB
	text strings.Builder
}

func (l *log) Helper()                           {}
func (l *log) Cleanup(f func())                  { l.TB.Cleanup(f) }
func (l *log) Errorf(format string, args ...any) { fmt.Fprintf(&l.text, format, args...) }

func TestWantCharged(t *testing.T) {
	l := &log{TB: t}
	store := quotatest.New(l, nil)
	lim := limiter(store)
	d := quota.Must(lim.Take(bg, "k", 7))
	quota.Must(lim.Settle(bg, "k", d, 4))
	quota.Must(lim.Take(bg, "k", 8))
	quota.Must(lim.ChargeAll(bg, quota.Charge{Key: "k", Cost: 1}, quota.Charge{Key: "other", Cost: 11}))
	quota.Must(lim.Debit(bg, "k", 3))
	store.WantCharged(tokens, "k", 7)
	store.WantCharged(tokens, "other", 0)
	store.WantCharged(requests, "k", 0)
	if l.text.Len() > 0 {
		t.Errorf("failures: got %s, want none", &l.text)
	}
	store.WantCharged(tokens, "k", 8)
	for _, part := range []string{`"k" of limit "tokens": got 7, want 8`, "take 7 of tokens", "refund 3 of tokens", "debit 3", "denied", "not made"} {
		if !strings.Contains(l.text.String(), part) {
			t.Errorf("failure: got %s, want %q in it", &l.text, part)
		}
	}
	l.text.Reset()
	store.WantCharged(requests, "k", 1)
	if !strings.Contains(l.text.String(), "its calls: none") {
		t.Errorf("failure: got %s, want that there was no call", &l.text)
	}
}

// A limit that is not valid was charged nothing, which must not pass for what the test wants.
func TestChargedToALimitThatIsNotValid(t *testing.T) {
	l := &log{TB: t}
	store := quotatest.New(l, nil)
	for reason, limit := range map[string]*quota.Limit{
		"capacity is -1": quota.NewLimit("n", algorithm.TokenBucket(-1, 1, time.Second)),
		`limit is "nil"`: nil,
		"the zero Limit": {},
	} {
		for _, n := range []int64{0, 1} {
			l.text.Reset()
			store.WantCharged(limit, "k", n)
			if got := l.text.String(); strings.Count(got, reason) != 1 || !strings.Contains(got, "accepted") {
				t.Errorf("WantCharged %d of a limit of which %s: got failure %q, want one that says so", n, reason, got)
			}
		}
	}
}

// A listing meets the failures that the test causes, as any call does.
func TestListingThatFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store := quotatest.New(t, nil)
		lim := limiter(store)
		quota.Must(lim.Take(bg, "k", 1))
		list := func(ctx context.Context) (int, error) {
			page, err := store.List(ctx, driver.Listing{Size: 10})
			return len(page.Keys), err
		}
		want := func(when string, keys int, wanted error) {
			t.Helper()
			if n, err := list(bg); n != keys || !errors.Is(err, wanted) {
				t.Errorf("a listing %s: got %d keys, error %v, want %d, %v", when, n, err, keys, wanted)
			}
		}
		want("of a store that works", 1, nil)
		store.Fail(quota.ErrUnavailable)
		want("in an outage", 0, quota.ErrUnavailable)
		if _, _, err := backend.List(bg, lim.Store(), backend.Listing{Limits: []*quota.Limit{tokens}}); !errors.Is(err, quota.ErrUnavailable) {
			t.Errorf("backend.List in an outage: got %v, want %v", err, quota.ErrUnavailable)
		}
		store.Fail(nil)
		store.LoseNext(1)
		store.FailNext(1, quota.ErrMisconfigured)
		want("that is the next call to fail", 0, quota.ErrMisconfigured)
		want("after that", 1, nil)
		if _, err := lim.Take(bg, "k", 1); !errors.Is(err, quota.ErrIndeterminate) {
			t.Errorf("the next take: got %v, want its answer lost", err)
		}
		resume := store.Hang()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if _, err := list(ctx); !errors.Is(err, context.DeadlineExceeded) || quota.Charged(err) != quota.NotCharged {
			t.Errorf("a listing whose context ends while the store hangs: got %v, want the context's error, and nothing charged", err)
		}
		ended := make(chan error)
		go func() {
			_, err := list(bg)
			ended <- err
		}()
		synctest.Wait()
		resume()
		if err := <-ended; err != nil {
			t.Errorf("a listing that waited for the store: got %v, want nil", err)
		}
		if n := len(store.Calls()); n != 2 {
			t.Errorf("calls: got %d, want the 2 takes", n)
		}
	})
}

// A store is what a program's policies wrap: an outage goes through a fallback, and is charged afterwards.
func TestUnderAFallback(t *testing.T) {
	store := quotatest.New(t, nil)
	fallback := resilience.Fallback(quota.Must(local.NewWithOptions(local.Options{Clock: store.Now})), resilience.Instances(2), nil)
	lim := limiter(quota.Must(resilience.Wrap(store, fallback)))
	quota.Must(lim.Take(bg, "k", 1))
	store.Fail(quota.ErrUnavailable)
	if d := quota.Must(lim.Take(bg, "k", 2)); !d.Allowed || d.Source != quota.FromFallback {
		t.Errorf("take in an outage: got %v, want it allowed by the fallback", d)
	}
	store.Fail(nil)
	quota.Must(lim.Take(bg, "k", 1))
	store.WantCharged(tokens, "k", 4)
}
