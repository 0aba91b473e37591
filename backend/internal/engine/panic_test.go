package engine

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// brittle is an algorithm that panics where it decides a cost of 13, and if noLua is set where it is asked for its Lua.
type brittle struct {
	quota.Algorithm
	noLua bool
}

const unlucky = 13

func (b brittle) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	if r.Cost == unlucky {
		panic("a bug in Decide")
	}
	return b.Algorithm.Decide(s, r, now)
}

func (b brittle) Lua() string {
	if b.noLua {
		panic("a bug in Lua")
	}
	return b.Algorithm.(driver.Scripted).Lua()
}

// unknowing checks the error of a call in which code of others panicked: it says whether a charge may have been made.
func unknowing(t *testing.T, call string, err error, text string, want quota.ChargeState) {
	t.Helper()
	if !errors.Is(err, quota.ErrMisconfigured) || quota.Charged(err) != want || !strings.Contains(err.Error(), text) {
		t.Errorf("%s: got error %v, charged %v; want ErrMisconfigured with %q, charged %v", call, err, quota.Charged(err), text, want)
	}
}

// value returns the value that f panics with.
func value(f func()) (v any) {
	defer func() { v = recover() }()
	f()
	return nil
}

// A client that panics in a batch costs the callers of that batch an answer, and no other caller.
func TestPanicOfClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		bug := false
		g.store.client = fakeOver{g.slow, func() {
			if bug {
				panic("a bug in a hook")
			}
		}}
		bug = true
		_, err := g.store.Charge(bg, quota.Charge{Limit: g.limit, Key: "alone", Cost: 1})
		unknowing(t, "a call alone", err, "a bug in a hook (in github.com/fleetquota/fleetquota/backend/internal/engine.TestPanicOfClient", quota.ChargeUnknown)
		bug = false
		first := g.fill("a", maxInFlight)
		waiting := g.fill("b", 3)
		bug = true
		g.answer(0, nil) // sends the waiting ones
		trips := map[any]bool{}
		for _, r := range waiting {
			if !r.done {
				t.Fatalf("Charge of %s: got no answer, want an error", r.key)
			}
			unknowing(t, "Charge of "+r.key, r.err, "a bug in a hook", quota.ChargeUnknown)
			if shared, is := errors.AsType[driver.RoundTripError](r.err); is {
				trips[shared.RoundTrip()] = true
			}
		}
		if len(trips) != 1 {
			t.Errorf("round trips of the batch's errors: got %d, want 1", len(trips))
		}
		bug = false
		later := g.fill("c", 1) // in the place of the batch
		g.end()
		allowed(t, append(first, later...)...)
		if g.store.all.inFlight != 0 {
			t.Errorf("calls in flight at the end: got %d, want 0", g.store.all.inFlight)
		}
		if err := g.store.Close(); err != nil {
			t.Error(err)
		}
	})
}

// fakeOver is a slow client that calls a function before each command.
type fakeOver struct {
	*slow
	before func()
}

func (f fakeOver) Do(ctx context.Context, args []any, keys int) (Reply, error) {
	f.before()
	return f.slow.Do(ctx, args, keys)
}

// A function that ends its goroutine, such as FailNow in a test's hook, costs no other caller an answer either.
func TestGoexit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &Batcher[int]{Max: 10, Send: func(_ context.Context, items []int, _ any) error {
			if items[0] == 1 {
				t.SkipNow()
			}
			return nil
		}}
		var q Queue[int]
		release := make(chan struct{})
		for range maxInFlight {
			go b.Do(bg, &q, 1, func() error { <-release; return nil }, nil)
			synctest.Wait()
		}
		errs := make([]error, 2)
		for i := range errs {
			go func() { errs[i] = b.Do(bg, &q, 10, nil, func() int { return i + 1 }) }()
			synctest.Wait()
		}
		close(release)
		synctest.Wait()
		unknowing(t, "the item of the goroutine that ended", errs[0], "ended the goroutine", quota.ChargeUnknown)
		if errs[1] != nil || q.inFlight != 0 {
			t.Errorf("the item behind it: got error %v, %d calls in flight; want none, 0", errs[1], q.inFlight)
		}
	})
}

// An algorithm that panics costs its own charge a decision, and the charges whose states it leaves unknown. The others
// in its batch are decided.
func TestPanicOfAlgorithm(t *testing.T) {
	limit := limitOf("n", brittle{Algorithm: window(20)})
	charge := func(key string, cost int64) quota.Charge { return quota.Charge{Limit: limit, Key: key, Cost: cost} }
	const now = int64(1_795_427_141_791_724)
	var reply Reply = elements{now, int64(5), nil, nil, nil, nil, nil}
	s := newStore(t, false, func([]any, int) (Reply, error) { return reply, nil })
	calls := [][]quota.Charge{
		{charge("a", 1)}, {charge("b", 2)}, {charge("b", unlucky)}, {charge("b", 3)}, {charge("c", 4)},
		{charge("d", 5), charge("e", 5)}, {charge("d", 5), charge("b", 5)}, {charge("d", 5), charge("e", unlucky)}, {charge("d", 1), charge("c", 1)},
	}
	d, errs := Together(bg, s, calls)
	for i, cs := range calls {
		lost := i == 2 || i == 3 || i >= 6
		switch call := fmt.Sprintf("call %d:%s", i, show(cs)); {
		case lost:
			unknowing(t, call, errs[i], "a bug in Decide", quota.ChargeUnknown)
		case errs[i] != nil || !d[i][0].Allowed:
			t.Errorf("%s: got %v, error %v; want a grant", call, d[i], errs[i])
		}
	}

	// The count of changes tells that those whose states are unknown were not charged.
	reply = elements{now, int64(1), nil, nil}
	_, errs = Together(bg, s, [][]quota.Charge{{charge("a", 1)}, {charge("b", unlucky)}})
	unknowing(t, "a charge that changed nothing", errs[1], "a bug in Decide", quota.NotCharged)

	for held, want := range map[int64]quota.ChargeState{now: quota.ChargeUnknown, -now: quota.NotCharged} {
		reply = singleReply(held, "")
		_, err := s.Charge(bg, charge("a", unlucky))
		unknowing(t, fmt.Sprintf("a charge alone, reply %d", held), err, "a bug in Decide", want)
	}
	reply = elements{now, int64(0), nil, string(appendNumber([]byte(recordHead([]quota.Charge{{Limit: limit, Key: "a", Cost: unlucky, ID: "x"}})), now)) + "\x00\x00\x00\x00\x00\x00\x00"}
	_, err := s.Charge(bg, quota.Charge{Limit: limit, Key: "a", Cost: unlucky, ID: "x"})
	unknowing(t, "a charge whose grant is replayed", err, "a bug in Decide", quota.ChargeUnknown)

	reply = elements{now, nil, nil}
	unscripted := limitOf("m", hidden{brittle{Algorithm: window(21)}})
	err = s.ChargeAll(bg, []quota.Charge{{Limit: unscripted, Key: "a", Cost: 1}, {Limit: unscripted, Key: "b", Cost: unlucky}}, make([]quota.Decision, 2))
	unknowing(t, "charges by compare-and-swap", err, "a bug in Decide", quota.NotCharged)
}

// Before anything is sent, a panic in the caller's own goroutine is the caller's, and the store goes on.
func TestPanicBeforeSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		bug := false
		g := newGathering(t, false, Options{Clock: func() time.Time {
			if bug {
				panic("a bug in Clock")
			}
			return time.Now()
		}})
		noLua := quota.Charge{Limit: limitOf("n", brittle{window(11), true}), Key: "k", Cost: 1}
		for range 2 * maxInFlight {
			if v := value(func() { g.store.Charge(bg, noLua) }); v != "a bug in Lua" {
				t.Fatalf("Charge of a limit whose Lua panics: got panic %v, want the bug", v)
			}
			if v := value(func() { g.store.ChargeAll(bg, []quota.Charge{noLua, noLua}, make([]quota.Decision, 2)) }); v != "a bug in Lua" {
				t.Fatalf("ChargeAll of a limit whose Lua panics: got panic %v, want the bug", v)
			}
			bug = true
			if v := value(func() { g.store.Charge(bg, quota.Charge{Limit: g.limit, Key: "k", Cost: 1}) }); v != "a bug in Clock" {
				t.Fatalf("Charge while the clock panics: got panic %v, want the bug", v)
			}
			bug = false
		}
		first := g.fill("a", maxInFlight)
		waiting := g.fill("b", 2)
		bug = true
		g.answer(0, nil)
		for _, r := range waiting {
			unknowing(t, "Charge in a batch while the clock panics", r.err, "a bug in Clock", quota.NotCharged)
		}
		bug = false
		later := g.fill("c", 1)
		g.end()
		allowed(t, append(first, later...)...)
	})
}

// A list over several slots whose part panics gives the other parts back.
func TestPanicInPart(t *testing.T) {
	brittle, sound := limitOf("n", hidden{brittle{Algorithm: window(20)}}), limitOf("m", window(30)) // specs of their own
	var refunded atomic.Bool
	s := newStore(t, true, func(args []any, keys int) (Reply, error) {
		if keys == 2 { // with a request id
			refunded.Store(true)
		}
		return freshReply(args, keys), nil
	})
	err := s.ChargeAll(bg, []quota.Charge{{Limit: sound, Key: "a", Cost: 1}, {Limit: brittle, Key: "b", Cost: unlucky}}, make([]quota.Decision, 2))
	if !errors.Is(err, quota.ErrMisconfigured) || !refunded.Load() {
		t.Errorf("ChargeAll: got error %v, the other part given back: %v; want ErrMisconfigured, true", err, refunded.Load())
	}
}

// A panic while a node gets ready ends the attempt, which its callers are told, and the next attempt is made.
func TestPanicWhileConnecting(t *testing.T) {
	testReady(t, false, func(t *testing.T, w *warmed, s *Store, take func(time.Duration) error) {
		w.warm = func(context.Context, string) error { panic("a bug in a dialer") }
		err := take(time.Second)
		is(t, "a call", err, quota.ErrUnavailable, false)
		if err == nil || !strings.Contains(err.Error(), "a bug in a dialer") {
			t.Errorf("a call: got error %v, want one that tells the panic", err)
		}
		w.warm = func(context.Context, string) error { return nil }
		time.Sleep(firstAttemptPause)
		is(t, "a call after the next attempt", take(time.Second), nil, false)
	})
}

// A panic of a receiver of notices fails no call. The logger of slog gets it.
func TestPanicOfReceiver(t *testing.T) {
	var text bytes.Buffer
	defer slog.SetDefault(slog.Default())
	slog.SetDefault(slog.New(slog.NewTextHandler(&text, nil)))
	bug := func(quota.Notice) { panic("a bug in a receiver") }
	var told []string
	for _, s := range []*Store{
		newStoreWith(t, Options{Notice: bug}), newStoreWith(t, Options{}),
	} {
		s.Report(driver.Reports{Notice: bug})
		s.Report(driver.Reports{Notice: func(n quota.Notice) { told = append(told, n.Name) }})
		if _, err := s.Charge(bg, quota.Charge{Limit: batchLimit, Key: "k", Cost: 1}); err != nil {
			t.Errorf("Charge: got error %v, want none", err)
		}
		if _, err := s.Health(bg); err != nil {
			t.Errorf("Health: got error %v, want none", err)
		}
		s.Close()
	}
	if fmt.Sprint(told) != "[batching]" {
		t.Errorf("notices of another receiver: got %v, want one about batching", told)
	}
	if n := strings.Count(text.String(), "the receiver of notices panicked: a bug in a receiver"); n != 2 {
		t.Errorf("log: got %q, want the panic twice", text.String())
	}
}

// newStoreWith returns a store whose server does not tell whether it is the only one.
func newStoreWith(t *testing.T, o Options) *Store {
	t.Helper()
	s, err := New(fake(func(args []any, keys int) (Reply, error) {
		if args[1] == identityText {
			return nil, ReplyError(errors.New("NOPERM this user has no permissions to run the 'info' command"))
		}
		if r := probeReply(args); r != nil {
			return r, nil
		}
		return freshReply(args, keys), nil
	}), false, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Questions, surveys and repairs whose code panics are over, and the next may begin.
func TestPanicInBackground(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		topology := Topology{Ask: func() error {
			if asked++; asked == 1 {
				panic("a bug")
			}
			return nil
		}}
		if err := topology.Refresh(bg); err == nil || !strings.Contains(err.Error(), "a bug") {
			t.Errorf("Refresh: got error %v, want the panic", err)
		}
		if err := topology.Refresh(bg); err != nil {
			t.Errorf("the next Refresh: got error %v, want none", err)
		}

		var survey Survey[int]
		ask := func(node string) (int, error) { panic("a bug at " + node) }
		for range 2 {
			if _, err := survey.Ask([]string{"a"}, ask); err == nil || !strings.Contains(err.Error(), "a bug at a") {
				t.Errorf("Ask: got error %v, want the panic", err)
			}
		}

		repairs := 0
		repair := Repair{Do: func() { repairs++; panic("a bug") }}
		for range 2 {
			repair.Soon()
			synctest.Wait()
			time.Sleep(maxRepairPause)
		}
		if repairs != 2 {
			t.Errorf("repairs: got %d, want 2", repairs)
		}
		if errs := Each(3, func(i int) error { panic(i) }); len(errs) != 3 || errs[0] == nil || errs[1] == nil || errs[2] == nil {
			t.Errorf("Each: got errors %v, want three", errs)
		}
	})
}
