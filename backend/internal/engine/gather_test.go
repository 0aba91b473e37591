package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// slow is a Client whose calls wait to be answered: with fresh states, or an error.
type slow struct {
	mu    sync.Mutex
	calls []*sent
}

type sent struct {
	ctx    context.Context
	args   []any
	keys   int
	answer chan error
	ended  bool
}

func (s *slow) Do(ctx context.Context, args []any, keys int) (Reply, error) {
	c := &sent{ctx: ctx, args: args, keys: keys, answer: make(chan error)}
	s.mu.Lock()
	s.calls = append(s.calls, c)
	s.mu.Unlock()
	if err := <-c.answer; err != nil {
		return nil, err
	}
	return freshReply(args, keys), nil
}

// changes returns how many keys of a batch have a single charge, and how many lists go with them, by its
// arguments.
func changes(args []any) (n int64) {
	number := func(i int) int {
		n, _ := strconv.Atoi(args[i].(string))
		return n
	}
	for i, keys := 2, number(0); keys > 0; {
		run := number(i + 2)
		for _, asked := range args[i+3 : i+3+run] {
			if asked != "" {
				n++
			}
		}
		keys -= run
		i += 3 + run
	}
	return n + int64(number(1))
}

func (*slow) Info(context.Context) ([]string, error) { return nil, nil }
func (*slow) Close() error                           { return nil }

// taken is the outcome of a Take.
type taken struct {
	key  string
	d    quota.Decision
	err  error
	done bool
}

// gathering is a store over a slow client.
type gathering struct {
	*slow
	store *Store
	limit *quota.Limit
	wg    sync.WaitGroup
}

func newGathering(t *testing.T, cluster bool, o Options) *gathering {
	if !cluster && o.Batching == BatchAuto && !o.Strict { // the calls are the test's alone
		o.Batching = BatchAll
	}
	g := &gathering{slow: &slow{}, limit: limitOf("n", window(10))}
	var err error
	if g.store, err = New(g.slow, cluster, o); err != nil {
		t.Fatal(err)
	}
	return g
}

// take begins a Take, which synctest.Wait lets come as far as it can.
func (g *gathering) take(ctx context.Context, key string) *taken {
	r := &taken{key: key}
	g.wg.Go(func() {
		r.d, r.err = g.store.Charge(ctx, quota.Charge{Limit: g.limit, Key: key, Cost: 1})
		r.done = true
	})
	synctest.Wait()
	return r
}

// fill begins so many Takes, of keys with a prefix.
func (g *gathering) fill(prefix string, n int) (all []*taken) {
	for i := range n {
		all = append(all, g.take(bg, fmt.Sprint(prefix, i)))
	}
	return all
}

// answer answers call i and waits for the consequences.
func (g *gathering) answer(i int, err error) {
	g.calls[i].ended = true
	g.calls[i].answer <- err
	synctest.Wait()
}

// end answers all calls and waits for all Takes.
func (g *gathering) end() {
	for i := 0; i < len(g.calls); i++ {
		if !g.calls[i].ended {
			g.answer(i, nil)
		}
	}
	g.wg.Wait()
}

func (g *gathering) keys(t *testing.T, keys ...int) {
	t.Helper()
	var got []int
	for _, c := range g.calls {
		got = append(got, c.keys)
	}
	slices.Sort(got)
	slices.Sort(keys)
	if !slices.Equal(got, keys) {
		t.Errorf("keys of the calls: got %v, want %v", got, keys)
	}
}

func allowed(t *testing.T, all ...*taken) {
	t.Helper()
	for _, r := range all {
		if !r.done || r.err != nil || !r.d.Allowed || r.d.Remaining != 9 {
			t.Errorf("Charge of %s: got done %v, %v, error %v; want an allowed decision with 9 remaining", r.key, r.done, r.d, r.err)
		}
	}
}

// A charge waits only if all calls are in flight; the waiting charges go together when one has ended.
func TestGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		first := g.fill("a", maxInFlight)
		g.keys(t, 1, 1, 1, 1)
		rest := g.fill("b", maxBatch+10)
		g.keys(t, 1, 1, 1, 1)
		g.answer(2, nil)
		g.keys(t, 1, 1, 1, 1, maxBatch)
		allowed(t, first[2])
		g.answer(maxInFlight, nil)
		g.keys(t, 1, 1, 1, 1, maxBatch, 10)
		allowed(t, rest[:maxBatch]...)
		g.answer(maxInFlight+1, nil)
		allowed(t, rest[maxBatch:]...)
		g.fill("c", 2) // one place is free
		g.keys(t, 1, 1, 1, 1, maxBatch, 10, 1)
		g.end()
	})
}

func TestNoBatching(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{Batching: BatchNone})
		all := g.fill("a", 2*maxInFlight)
		if len(g.calls) != 2*maxInFlight {
			t.Errorf("calls: got %d, want %d", len(g.calls), 2*maxInFlight)
		}
		g.end()
		allowed(t, all...)
	})
}

// On a cluster only charges of the same slot wait for each other.
func TestGatherBySlot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, true, Options{})
		g.fill("team/a", maxInFlight+2)
		g.fill("other", 1)
		g.keys(t, 1, 1, 1, 1, 1)
		g.answer(0, nil)
		g.keys(t, 1, 1, 1, 1, 1, 2)
		g.end()
	})
}

// A caller that leaves before its batch is sent is not charged, and the others are.
func TestWithdraw(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		g.fill("a", maxInFlight)
		ctx, cancel := context.WithCancel(bg)
		left := g.take(ctx, "left")
		stays := g.take(bg, "stays")
		cancel()
		synctest.Wait()
		if !left.done || !errors.Is(left.err, context.Canceled) || errors.Is(left.err, quota.ErrIndeterminate) {
			t.Errorf("the caller that left: got done %v, error %v; want Canceled and not ErrIndeterminate", left.done, left.err)
		}
		g.answer(0, nil)
		g.keys(t, 1, 1, 1, 1, 1)
		if got, want := g.calls[maxInFlight].args[3], "quota:{stays}:n"; got != want {
			t.Errorf("key of the batch: got %v, want %v", got, want)
		}
		g.answer(maxInFlight, nil)
		allowed(t, stays)

		g.fill("c", 1) // all callers of the next batch leave: it is not sent
		ctx, cancel = context.WithCancel(bg)
		g.take(ctx, "left")
		cancel()
		synctest.Wait()
		g.answer(1, nil)
		g.keys(t, 1, 1, 1, 1, 1, 1)
		g.fill("d", 1)
		g.keys(t, 1, 1, 1, 1, 1, 1, 1)
		g.end()
	})
}

// For a caller that leaves after its batch is sent the outcome is unknown, and the others are decided.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		g.fill("a", maxInFlight)
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		leaves, stays := g.take(ctx, "leaves"), g.take(bg, "stays")
		g.answer(0, nil)
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if !errors.Is(leaves.err, quota.ErrIndeterminate) || !errors.Is(leaves.err, context.DeadlineExceeded) {
			t.Errorf("the caller that left: got error %v, want ErrIndeterminate around DeadlineExceeded", leaves.err)
		}
		if end, set := g.calls[maxInFlight].ctx.Deadline(); set {
			t.Errorf("deadline of the batch: got %v, want none, as one caller has", end)
		}
		g.answer(maxInFlight, nil)
		allowed(t, stays)
		g.end()
	})
}

// A batch has the latest deadline of the callers that wait for it.
func TestBatchDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		g.fill("a", maxInFlight)
		late := time.Now().Add(3 * time.Second)
		for i, end := range []time.Time{late.Add(-time.Second), late, late.Add(-2 * time.Second)} {
			ctx, cancel := context.WithDeadline(bg, end)
			defer cancel()
			g.take(ctx, fmt.Sprint("b", i))
		}
		g.answer(0, nil)
		if end, set := g.calls[maxInFlight].ctx.Deadline(); !set || !end.Equal(late) {
			t.Errorf("deadline of the batch: got %v (set: %v), want %v", end, set, late)
		}
		g.end()
	})
}

// The error of a batch is one for all of it, and says so; an error of a call alone is its own.
func TestBatchError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		alone := g.fill("a", maxInFlight)
		rest := g.fill("b", 3)
		lost := fmt.Errorf("%w: lost", quota.ErrIndeterminate)
		g.answer(0, lost)
		g.answer(1, nil)
		g.answer(maxInFlight, lost)
		trips := map[any]bool{}
		for _, r := range rest {
			var shared interface{ RoundTrip() any }
			if !errors.Is(r.err, quota.ErrIndeterminate) || !errors.As(r.err, &shared) {
				t.Fatalf("Charge of %s: got error %v, want a shared ErrIndeterminate", r.key, r.err)
			}
			trips[shared.RoundTrip()] = true
		}
		if len(trips) != 1 {
			t.Errorf("round trips of the batch's errors: got %d, want 1", len(trips))
		}
		if alone[0].err != lost {
			t.Errorf("error of a call alone: got %v, want %v itself", alone[0].err, lost)
		}
		g.end()
	})
}

// If a call ended by a timeout of the client's, the waiting callers are refused rather than timed out next.
func TestTimedOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		g.fill("a", maxInFlight)
		frozen := fmt.Errorf("%w: %w", quota.ErrIndeterminate, os.ErrDeadlineExceeded)
		for i, err := range []error{frozen, quota.ErrUnavailable, frozen} { // alone, and as a batch
			waits := g.fill("b", 3)
			g.answer([]int{0, 1, maxInFlight}[i], err)
			for _, r := range waits {
				refused := errors.Is(r.err, quota.ErrUnavailable) && !errors.Is(r.err, quota.ErrIndeterminate)
				if want := i != 1; r.done != want || want && !refused {
					t.Errorf("a caller behind %v: got done %v, error %v; want done %v, with ErrUnavailable if so", err, r.done, r.err, want)
				}
			}
			if i == 0 {
				g.fill("c", 1) // in the call that is free
			}
		}
		g.keys(t, 1, 1, 1, 1, 1, 3)
		g.end()
	})
}

// Where more callers come at once than calls may be in flight, those that can run when one is about to send go with it. Fewer
// callers send at once, and so do those that a crowd has left behind, after some yields.
func TestFilling(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		// come has callers come at once and answers them. It returns how many keys their scripts had.
		come := func(callers int) (keys []int) {
			first := len(g.calls)
			for i := range callers {
				g.wg.Go(func() {
					if _, err := g.store.Charge(bg, quota.Charge{Limit: g.limit, Key: fmt.Sprint("a", i), Cost: 1}); err != nil {
						t.Error(err)
					}
				})
			}
			synctest.Wait()
			for i := first; i < len(g.calls); i++ {
				keys = append(keys, g.calls[i].keys)
			}
			g.end()
			return keys
		}
		if got, want := come(maxInFlight), []int{1, 1, 1, 1}; !slices.Equal(got, want) {
			t.Errorf("a few callers: got scripts of %d keys, want %d", got, want)
		}
		come(20)
		if got := come(20); len(got) == maxInFlight {
			t.Errorf("20 callers: got scripts of %d keys, want fewer scripts than may be in flight", got)
		}
		for range crowdYields {
			come(maxInFlight)
		}
		if got, want := come(maxInFlight), []int{1, 1, 1, 1}; !slices.Equal(got, want) {
			t.Errorf("a few callers after a crowd: got scripts of %d keys, want %d", got, want)
		}
	})
}

// A frozen server costs a breaker one failure for each script, however many callers waited for it.
func TestBatchBreaker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		const trips = maxInFlight + 1
		for _, failures := range []int{trips + 1, trips} {
			store := quota.Must(resilience.Wrap(g.store, resilience.Breaker(&resilience.BreakerOptions{Failures: failures, FailingFor: -1, FirstDelay: time.Minute}), resilience.Timeout(time.Second, nil)))
			for i := range maxInFlight + 20 {
				g.wg.Go(func() {
					if _, err := store.Charge(bg, quota.Charge{Limit: g.limit, Key: fmt.Sprint(failures, i), Cost: 1}); err == nil {
						t.Error("Charge at a frozen server: got a decision, want an error")
					}
				})
				synctest.Wait()
			}
			time.Sleep(2 * time.Second)
			synctest.Wait()
			if got, want := resilience.BreakerState(store), map[bool]string{true: "open", false: "closed"}[failures == trips]; got != want {
				t.Errorf("breaker of %d failures after %d failed round trips: got %s, want %s", failures, trips, got, want)
			}
			for i, c := range g.calls {
				if !c.ended {
					g.answer(i, nil)
				}
			}
		}
		g.end()
	})
}

// A batch that is refused because of some of its keys is sent again key by key, and list by list.
func TestBatchOfSomeKeys(t *testing.T) {
	for _, refusal := range []string{"TRYAGAIN Multiple keys request during rehashing of slot", "NOPERM this user has no permissions"} {
		synctest.Test(t, func(t *testing.T) {
			g := newGathering(t, true, Options{})
			g.fill("team/a", maxInFlight)
			rest := g.fill("team/b", 3)
			for i := range 2 {
				cs := []quota.Charge{{Limit: g.limit, Key: fmt.Sprint("team/c", i), Cost: 1}, {Limit: g.limit, Key: fmt.Sprint("team/d", i), Cost: 1}}
				list := &taken{key: cs[0].Key}
				g.wg.Go(func() {
					var out [2]quota.Decision
					list.err = g.store.ChargeAll(bg, cs, out[:])
					list.d, list.done = out[1], true
				})
				synctest.Wait()
				rest = append(rest, list)
			}
			g.answer(0, nil)
			g.keys(t, 1, 1, 1, 1, 7)
			g.answer(maxInFlight, ReplyError(errors.New(refusal)))
			g.keys(t, 1, 1, 1, 1, 7, 1, 1, 1, 2, 2)
			g.end()
			allowed(t, rest...)
		})
	}
}

// Close refuses the waiting callers, and returns when the batches in flight have ended.
func TestCloseGathering(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, false, Options{})
		g.fill("a", maxInFlight)
		sent := g.fill("b", 2)
		g.answer(0, nil)
		waiting := g.fill("c", 2)
		closed := false
		g.wg.Go(func() {
			if err := g.store.Close(); err != nil {
				t.Error(err)
			}
			closed = true
		})
		synctest.Wait()
		for _, r := range waiting {
			if !errors.Is(r.err, quota.ErrClosed) {
				t.Errorf("Charge of %s, which waited: got error %v, want ErrClosed", r.key, r.err)
			}
		}
		if closed {
			t.Error("Close: returned before the batch had its answer, want after it")
		}
		g.answer(maxInFlight, nil)
		allowed(t, sent...)
		if !closed {
			t.Error("Close: did not return after the batch had its answer")
		}
		g.end()
	})
}
