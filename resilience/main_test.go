package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

var raceEnabled bool

func TestMain(m *testing.M) {
	if url := os.Getenv(outageURL); url != "" {
		if err := outageMember(url); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// A client that learned its cluster's nodes anew closes the old connections five seconds later.
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/redis/rueidis.(*clusterClient)._refresh.func2"))
}

var bg = context.Background()

// sized returns the size of a test.
var sized = testenv.Sized

// random returns a generator whose seed a failing test prints.
var random = testenv.Random

func bucket(name string, tokens, refill int64, per time.Duration) *quota.Limit {
	return quota.NewLimit(name, algorithm.TokenBucket(tokens, refill, per))
}

var limit = bucket("tokens", 100, 10, time.Second)

func charge(n int64) quota.Charge { return quota.Charge{Limit: limit, Key: "team/agent", Cost: n} }

func withID(c quota.Charge, id string) quota.Charge {
	c.ID = id
	return c
}

func peek(n int64) quota.Charge {
	return quota.Charge{Limit: limit, Key: "team/agent", Cost: n, Op: quota.OpPeek}
}

var granted = quota.Decision{Allowed: true, Capacity: 100, Remaining: 99, Charged: 1, At: 1}

// stub is a store whose answers a test scripts. It is prompt only if it says so.
type stub struct {
	prompt bool
	atomic driver.Atomicity
	// answer decides every charge; nil grants.
	answer func(ctx context.Context, c quota.Charge) (quota.Decision, error)
	// answerAll decides lists; nil decides charge by charge.
	answerAll func(ctx context.Context, cs []quota.Charge, out []quota.Decision) error
	onClose   func() error

	mu     sync.Mutex
	calls  int
	closed int
}

func (s *stub) Prompt() bool                { return s.prompt }
func (s *stub) Atomicity() driver.Atomicity { return s.atomic }

// count counts a call and returns how to answer it.
func (s *stub) count() func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.calls++
	return s.answer
}

// set changes the answers while the store is in use.
func (s *stub) set(answer func(ctx context.Context, c quota.Charge) (quota.Decision, error)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = answer
}

func (s *stub) called() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.calls
}

func (s *stub) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	answer := s.count()
	if answer == nil {
		return granted, nil
	}
	return answer(ctx, c)
}

func (s *stub) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) (err error) {
	answer := s.count()
	if s.answerAll != nil {
		return s.answerAll(ctx, cs, out)
	}
	for i := range cs {
		out[i] = granted
		if answer != nil {
			if out[i], err = answer(ctx, cs[i]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (s *stub) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed++
	if s.onClose != nil {
		return s.onClose()
	}
	return nil
}

// script returns answers that fail with each error in turn, nil being a grant, and then grant.
func script(errs ...error) func(context.Context, quota.Charge) (quota.Decision, error) {
	var mu sync.Mutex
	n := 0
	return func(context.Context, quota.Charge) (quota.Decision, error) {
		mu.Lock()
		defer mu.Unlock()
		n++
		if n <= len(errs) && errs[n-1] != nil {
			return quota.Decision{}, errs[n-1]
		}
		return granted, nil
	}
}

func as(sentinel error) error { return fmt.Errorf("test: %w", sentinel) }

func wrap(t testing.TB, s quota.Store, ps ...resilience.Policy) quota.Store {
	t.Helper()
	w, err := resilience.Wrap(s, ps...)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// notices collects notices.
type notices struct {
	mu  sync.Mutex
	all []quota.Notice
}

func (n *notices) add(x quota.Notice) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.all = append(n.all, x)
}

func (n *notices) take() []quota.Notice {
	n.mu.Lock()
	defer n.mu.Unlock()
	all := n.all
	n.all = nil
	return all
}

func wantErr(t testing.TB, err error, is ...error) {
	t.Helper()
	for _, e := range is {
		if !errors.Is(err, e) {
			t.Fatalf("the error is %v, want one that is %v", err, e)
		}
	}
}

func wantNot(t testing.TB, err error, is ...error) {
	t.Helper()
	for _, e := range is {
		if errors.Is(err, e) {
			t.Fatalf("the error: got %v, want one that is not %v", err, e)
		}
	}
}

// both runs a test with Take and with a ChargeAll of one charge.
func both(t *testing.T, test func(t *testing.T, take func(s quota.Store, ctx context.Context, c quota.Charge) (quota.Decision, error))) {
	t.Run("Take", func(t *testing.T) {
		test(t, func(s quota.Store, ctx context.Context, c quota.Charge) (quota.Decision, error) {
			return s.Charge(ctx, c)
		})
	})
	t.Run("ChargeAll", func(t *testing.T) {
		test(t, func(s quota.Store, ctx context.Context, c quota.Charge) (quota.Decision, error) {
			var out [1]quota.Decision
			err := s.ChargeAll(ctx, []quota.Charge{c}, out[:])
			return out[0], err
		})
	})
}
