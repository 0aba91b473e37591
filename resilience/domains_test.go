package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// cluster is a store of several nodes: the part of a key before its first "/" is the key's node, unless moved names
// another. Calls to a node that is down fail.
type cluster struct {
	stub
	mu        sync.Mutex
	moved     map[string]string
	down      map[string]bool
	refreshed int
	onRefresh func(ctx context.Context)
}

func newCluster(down ...string) *cluster {
	s := &cluster{moved: map[string]string{}, down: map[string]bool{}}
	s.prompt = true
	s.take(down...)
	s.answer = func(_ context.Context, c quota.Charge) (quota.Decision, error) {
		node := s.Node(c)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.down[node] {
			return quota.Decision{}, driver.AtNode(as(quota.ErrUnavailable), node)
		}
		return granted, nil
	}
	return s
}

// take takes nodes down.
func (s *cluster) take(down ...string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, node := range down {
		s.down[node] = true
	}
}

func (s *cluster) Node(c quota.Charge) string {
	node, _, _ := strings.Cut(c.Key, "/")
	s.mu.Lock()
	defer s.mu.Unlock()
	if to, ok := s.moved[node]; ok {
		return to
	}
	return node
}

func (s *cluster) Refresh(ctx context.Context) error {
	s.mu.Lock()
	s.refreshed++
	f := s.onRefresh
	s.mu.Unlock()
	if f != nil {
		f(ctx)
	}
	return nil
}

// learn has a function run by each refresh.
func (s *cluster) learn(f func(context.Context)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.onRefresh = f
}

func (s *cluster) refreshes() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.refreshed
}

func on(keys ...string) (cs []quota.Charge) {
	for _, k := range keys {
		cs = append(cs, quota.Charge{Limit: limit, Key: k, Cost: 1})
	}
	return cs
}

func standard(t *testing.T, s quota.Store, fallback resilience.Policy, o *resilience.StandardOptions) quota.Store {
	t.Helper()
	var options resilience.StandardOptions
	if o != nil {
		options = *o
	}
	var breaker resilience.BreakerOptions
	if options.Breaker != nil {
		breaker = *options.Breaker
	}
	breaker.FailingFor = -1 // the third failure in a row opens a breaker, however soon it comes
	options.Breaker = &breaker
	s, err := resilience.Standard(s, fallback, &options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestNodeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newCluster("b")
		notices := make(chan quota.Notice, 10)
		s := standard(t, inner, resilience.FailWithError(), &resilience.StandardOptions{Notice: func(n quota.Notice) { notices <- n }})
		defer s.Close()
		for range 5 {
			time.Sleep(50 * time.Millisecond)
			if _, err := s.Charge(bg, on("a/x")[0]); err != nil {
				t.Errorf("a call to a node that is up: got %v, want no error", err)
			}
			_, err := s.Charge(bg, on("b/x")[0])
			if got := driver.NodeOf(err); got != "b" || !errors.Is(err, quota.ErrUnavailable) {
				t.Errorf("a call to a node that is down: got %v of node %q, want an ErrUnavailable of node b", err, got)
			}
		}
		want := map[string]string{"": "closed", "a": "closed", "b": "open"}
		time.Sleep(200 * time.Millisecond) // a rule that waits for a whole timeout without a success
		s.Charge(bg, on("b/x")[0])
		synctest.Wait()
		if got := resilience.BreakerStates(s); !maps.Equal(got, want) {
			t.Errorf("states: got %v, want %v", got, want)
		}
		if got := resilience.BreakerState(s); got != "open" {
			t.Errorf("the worst state: got %q, want open", got)
		}
		if n := <-notices; !strings.HasPrefix(n.Text, "node b: the circuit breaker opened") {
			t.Errorf("notice: got %v, want one of node b's breaker", n)
		}
		if _, err := s.Charge(bg, on("b/x")[0]); !errors.Is(err, resilience.ErrOpen) || driver.NodeOf(err) != "b" {
			t.Errorf("a call while the breaker is open: got %v, want an ErrOpen of node b", err)
		}
		before := inner.called()
		out := make([]quota.Decision, 2)
		for _, keys := range [][]string{{"a/x", "b/x"}, {"b/x", "a/x"}} {
			if err := s.ChargeAll(bg, on(keys...), out); !errors.Is(err, resilience.ErrOpen) || driver.NodeOf(err) != "b" {
				t.Errorf("a list over %v: got %v, want an ErrOpen of node b", keys, err)
			}
		}
		if got := inner.called(); got != before {
			t.Errorf("calls for lists with an open node: got %d, want none", got-before)
		}
		if err := s.ChargeAll(bg, on("a/x", "c/x"), out); err != nil {
			t.Errorf("a list over nodes that are up: got %v, want no error", err)
		}
	})
}

// TestNodeMoved moves the keys of a node whose breaker is open: they meet another breaker as soon as the store knows.
func TestNodeMoved(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newCluster("b")
		s := standard(t, inner, resilience.FailWithError(), &resilience.StandardOptions{Breaker: &resilience.BreakerOptions{Delay: time.Hour}})
		defer s.Close()
		for range 20 {
			s.Charge(bg, on("b/x")[0])
			time.Sleep(50 * time.Millisecond)
		}
		inner.learn(func(context.Context) {
			inner.mu.Lock()
			defer inner.mu.Unlock()
			inner.moved["b"] = "c"
		})
		s.Charge(bg, on("b/x")[0])
		time.Sleep(300 * time.Millisecond)
		if _, err := s.Charge(bg, on("b/x")[0]); err != nil {
			t.Errorf("a key 300 ms after it moved: got %v, want no error", err)
		}
		if n := inner.refreshes(); n < 4 || n > 7 {
			t.Errorf("refreshes in 1.3 s: got %d, want one in each 250 ms", n)
		}
		time.Sleep(2 * time.Second)
		n := inner.refreshes()
		time.Sleep(2 * time.Second)
		if got := inner.refreshes(); got != n {
			t.Errorf("refreshes while no call fails: got %d, want none", got-n)
		}
	})
}

// TestNodeList sends lists over two nodes of which one fails: the other's breaker stays closed.
func TestNodeList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newCluster("b")
		s := standard(t, inner, resilience.Fallback(local.New(), resilience.Instances(1), nil), nil)
		defer s.Close()
		out := make([]quota.Decision, 2)
		for range 20 {
			if err := s.ChargeAll(bg, on("a/x", "b/x"), out); err != nil {
				t.Errorf("a list under a fallback: got %v, want no error", err)
			}
			for i := range out {
				if got := out[i].Source; got != quota.FromFallback {
					t.Errorf("decision %d of a list over a node that is down: got one by the %v, want one by the fallback", i, got)
				}
			}
			time.Sleep(20 * time.Millisecond)
		}
		if got, want := resilience.BreakerStates(s)["a"], "closed"; got != want {
			t.Errorf("the breaker of the other node: got %q, want %q", got, want)
		}
		if got, want := resilience.BreakerStates(s)["b"], "open"; got != want {
			t.Errorf("the breaker of the node: got %q, want %q", got, want)
		}
	})
}

// TestNodeAlternatives takes the first of two lists, on two nodes, of which that of the second is down: as long as the first fits,
// the other node is not asked, and its breaker refuses nothing.
func TestNodeAlternatives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newCluster("b")
		s := standard(t, inner, resilience.FailWithError(), nil)
		defer s.Close()
		for range 5 {
			s.Charge(bg, on("b/x")[0])
			time.Sleep(50 * time.Millisecond)
		}
		lim := quota.Must(quota.NewLimiter(s, limit, nil))
		before := inner.called()
		r, err := lim.TakeFirst(bg, on("a/x"), on("b/x"))
		if n := inner.called() - before; err != nil || !r.Granted || r.Taken != 0 || !r.Decisions[0].Split || n != 1 {
			t.Errorf("the node of the first list is up: got %+v, %v after %d calls, want it taken in order after 1", r, err, n)
		}
		before = inner.called()
		if _, err := lim.TakeFirst(bg, on("b/x"), on("a/x")); !errors.Is(err, resilience.ErrOpen) || inner.called() != before {
			t.Errorf("the node of the first list is down: got %v after %d calls, want an ErrOpen after none", err, inner.called()-before)
		}
	})
}

// TestNodesForgotten calls many nodes: those without calls are forgotten, and the number is bounded.
func TestNodesForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := standard(t, newCluster(), resilience.FailWithError(), nil)
		defer s.Close()
		for i := range 1500 {
			if _, err := s.Charge(bg, on(fmt.Sprintf("n%d/x", i))[0]); err != nil {
				t.Fatalf("node %d: got %v, want no error", i, err)
			}
		}
		if got, want := len(resilience.BreakerStates(s)), 1024; got != want {
			t.Errorf("nodes: got %d, want %d at most", got, want)
		}
		for range 3 {
			time.Sleep(time.Minute)
			s.Charge(bg, on("kept/x")[0])
		}
		want := map[string]string{"": "closed", "kept": "closed"}
		if got := resilience.BreakerStates(s); !maps.Equal(got, want) {
			t.Errorf("nodes after some minutes: got %v, want %v", got, want)
		}
	})
}

// TestNodesClose closes while a refresh hangs until its context ends.
func TestNodesClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		inner := newCluster("b")
		ended := false
		inner.learn(func(ctx context.Context) { <-ctx.Done(); ended = true })
		s := standard(t, inner, resilience.FailWithError(), nil)
		s.Charge(bg, on("a/x")[0])
		s.Charge(bg, on("b/x")[0])
		synctest.Wait()
		if err := s.Close(); err != nil {
			t.Errorf("Close: got %v, want no error", err)
		}
		if !ended {
			t.Error("the refresh: got one after Close, want its end before")
		}
		if got := inner.closed; got != 1 {
			t.Errorf("closes of the store: got %d, want 1", got)
		}
		if got := len(resilience.BreakerStates(s)); got != 3 {
			t.Errorf("nodes: got %d, want 3", got)
		}
	})
}

// TestNoNodes is a store that names no node: it has the policies that it would have without the interface.
func TestNoNodes(t *testing.T) {
	inner := newCluster()
	inner.moved["team"] = ""
	s := standard(t, inner, resilience.FailWithError(), nil)
	if _, err := s.Charge(bg, charge(1)); err != nil {
		t.Fatal(err)
	}
	if got, want := resilience.BreakerStates(s), (map[string]string{"": "closed"}); !maps.Equal(got, want) {
		t.Errorf("states: got %v, want %v", got, want)
	}
	if got := resilience.BreakerStates(local.New()); got != nil {
		t.Errorf("states of a store without a breaker: got %v, want none", got)
	}
}
