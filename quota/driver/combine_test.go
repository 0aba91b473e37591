package driver_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// roundTrip is how long a transaction takes in the tests of this file, and a Load and a Swap of slow, on the clock of their
// bubble.
const roundTrip = time.Millisecond

// slow is a KV at a distance.
type slow struct{ *memKV }

func (s slow) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	time.Sleep(roundTrip)
	if ctx.Err() != nil {
		return nil, 0, ctx.Err()
	}
	return s.memKV.Load(ctx, keys)
}

func (s slow) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	time.Sleep(roundTrip)
	if ctx.Err() != nil {
		return false, fmt.Errorf("%w: %w", quota.ErrUnavailable, ctx.Err())
	}
	return s.memKV.Swap(ctx, changes)
}

// gate is a Transactor whose transactions wait until the test lets them go on.
type gate struct {
	*memTx
	begun chan *driver.Access // receives each transaction
	open  chan struct{}       // lets one go on
	ctxs  chan context.Context
}

func newGate() *gate {
	g := &gate{memTx: &memTx{memKV: newKV(testkit.NewClock().Micros)}, begun: make(chan *driver.Access, 100), open: make(chan struct{}), ctxs: make(chan context.Context, 100)}
	return g
}

func (g *gate) Transact(ctx context.Context, a *driver.Access, decide driver.Decide) error {
	g.begun <- a
	g.ctxs <- ctx
	<-g.open
	return g.memTx.Transact(ctx, a, decide)
}

// TestOneTransactionPerKey runs random calls from many goroutines: no key is in two transactions at once, and no call gets an
// error.
func TestOneTransactionPerKey(t *testing.T) {
	r := random(t)
	l, m := testkit.Bucket("n", 100000, time.Hour), testkit.Bucket("m", 100000, time.Hour)
	synctest.Test(t, func(t *testing.T) {
		tx := &memTx{memKV: newKV(testkit.NewClock().Micros)}
		var mu sync.Mutex
		held := map[string]bool{}
		transactions := 0
		tx.around = func(transact func() error, a *driver.Access) error {
			mu.Lock()
			transactions++
			for _, key := range a.Keys {
				if held[key] {
					t.Errorf("key %s: got two transactions at once, want one", key)
				}
				held[key] = true
			}
			mu.Unlock()
			time.Sleep(roundTrip)
			defer func() {
				mu.Lock()
				defer mu.Unlock()
				for _, key := range a.Keys {
					delete(held, key)
				}
			}()
			return transact()
		}
		s := newTx(t, tx, nil)
		const clients, calls = 32, 20 // each call alone would make 640 transactions
		var wg sync.WaitGroup
		for client := range clients {
			r := rand.New(rand.NewPCG(r.Uint64(), uint64(client)))
			wg.Go(func() {
				for i := range calls {
					id := ""
					if r.IntN(4) == 0 {
						id = fmt.Sprint(client, "-", i)
					}
					var cs []quota.Charge
					for _, key := range r.Perm(6)[:1+r.IntN(3)] {
						cs = append(cs, quota.Charge{Limit: []*quota.Limit{l, m}[r.IntN(2)], Key: fmt.Sprint("g/", key), Cost: 1, ID: id})
						if r.IntN(3) == 0 {
							cs[len(cs)-1].Op = quota.OpPeek
						}
					}
					if err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs))); err != nil {
						t.Errorf("ChargeAll of %s: got %v, want nil", testkit.Show(cs), err)
					}
				}
			})
		}
		wg.Wait()
		if most := clients * calls / 4; transactions > most {
			t.Errorf("transactions of %d calls: got %d, want %d at most", clients*calls, transactions, most)
		}
		if got := s.(driver.StatsReporter).Stats(); got != (driver.Stats{Calls: clients * calls, Attempts: int64(transactions)}) {
			t.Errorf("stats: got %+v, want %d calls, %d attempts and none lost", got, clients*calls, transactions)
		}
	})
}

// TestHotKey has many callers charge one key of a KV at a distance: they wait two round trips for each other, and no swap is lost.
func TestHotKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clients, calls = 64, 10
		kv := newKV(testkit.NewClock().Micros)
		s := newCAS(t, slow{kv}, nil)
		l := testkit.Bucket("n", 10000, time.Hour)
		start := time.Now()
		var wg sync.WaitGroup
		for range clients {
			wg.Go(func() {
				for range calls {
					if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: "hot", Cost: 1}); err != nil {
						t.Errorf("Charge: got %v, want nil", err)
					}
				}
			})
		}
		wg.Wait()
		if took, most := time.Since(start), (2*calls+2)*2*roundTrip; took > most {
			t.Errorf("time of %d calls each: got %v, want %v at most", calls, took, most)
		}
		if got := s.(driver.StatsReporter).Stats(); got.Calls != clients*calls || got.Lost != 0 {
			t.Errorf("stats: got %+v, want %d calls and no swap lost", got, clients*calls)
		}
		if d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "hot", Op: quota.OpPeek})); d.Remaining != 10000-clients*calls {
			t.Errorf("remaining: got %d, want %d", d.Remaining, 10000-clients*calls)
		}
	})
}

// TestWaitingCallsKeepTheirOrder checks that calls which wait for a key, lists and peeks and ids among them, are decided in their
// order in one transaction.
func TestWaitingCallsKeepTheirOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		s := newTx(t, g, nil)
		l := testkit.Bucket("n", 10, time.Hour)
		lists := [][]quota.Charge{
			{{Limit: l, Key: "g/k", Cost: 1}}, // goes alone
			{{Limit: l, Key: "g/k", Cost: 2}},
			{{Limit: l, Key: "g/k", Op: quota.OpPeek}},
			{{Limit: l, Key: "g/k", Cost: 3, ID: "i"}},
			{{Limit: l, Key: "g/other", Cost: 1}, {Limit: l, Key: "g/k", Cost: 3}},
			{{Limit: l, Key: "g/k", Cost: 2}},          // denied
			{{Limit: l, Key: "g/k", Cost: 3, ID: "i"}}, // repeats
			{{Limit: l, Key: "g/k", Cost: 4, ID: "i"}}, // another charge with its id
			{{Limit: l, Key: "g/k", Cost: 5, Op: quota.OpRefund, MadeAt: testkit.Epoch}},
		}
		want := []string{"true 9", "true 7", "true 7", "true 4", "true 1", "false 1", "true 4", "invalid", "true 6"}
		got := make([]string, len(lists))
		var wg sync.WaitGroup
		for i, cs := range lists {
			wg.Go(func() {
				out := make([]quota.Decision, len(cs))
				err := s.ChargeAll(bg, cs, out)
				d := out[len(out)-1]
				if got[i] = fmt.Sprint(d.Allowed, d.Remaining); errors.Is(err, quota.ErrInvalid) {
					got[i] = "invalid"
				} else if err != nil {
					got[i] = err.Error()
				}
			})
			synctest.Wait()
		}
		close(g.open)
		wg.Wait()
		for i := range want {
			if got[i] = strings.ReplaceAll(got[i], "true", "true "); strings.ReplaceAll(got[i], " ", "") != strings.ReplaceAll(want[i], " ", "") {
				t.Errorf("call %d, %s: got %s, want %s", i, testkit.Show(lists[i]), got[i], want[i])
			}
		}
		if len(g.begun) != 2 {
			t.Errorf("transactions: got %d, want 2", len(g.begun))
		}
		<-g.begun
		if a := <-g.begun; a.Peek || !slices.Equal(a.Keys, []string{"{g}#i", "{g}/k:n", "{g}/other:n"}) {
			t.Errorf("second transaction: got keys %v, peek %v, want the id, g/k and g/other, and no peek", a.Keys, a.Peek)
		}
	})
}

// TestOtherKeysDoNotWait checks that a call waits for none but those of its keys.
func TestOtherKeysDoNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		s := newTx(t, g, nil)
		l := testkit.Bucket("n", 10, time.Hour)
		for _, keys := range [][]string{{"a"}, {"a", "b"}, {"b", "c"}, {"d"}, {"e", "f"}, {"f", "c"}} {
			cs := make([]quota.Charge, len(keys))
			for i, key := range keys {
				cs[i] = quota.Charge{Limit: l, Key: key, Cost: 1}
			}
			go s.ChargeAll(bg, cs, make([]quota.Decision, len(cs)))
			synctest.Wait()
		}
		if len(g.begun) != 3 {
			t.Errorf("transactions at once: got %d, want those of a, d, and e with f", len(g.begun))
		}
		close(g.open)
		synctest.Wait()
		if d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "c", Op: quota.OpPeek})); d.Remaining != 8 {
			t.Errorf("remaining of c: got %d, want 8", d.Remaining)
		}
	})
}

// TestCallerLeaves ends the context of a caller that waits: before its charge is decided it is not charged, and after
// that its outcome is unknown. The other callers get their answers.
func TestCallerLeaves(t *testing.T) {
	l := testkit.Bucket("n", 10, time.Hour)
	take := quota.Charge{Limit: l, Key: "k", Cost: 1}
	for _, sent := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			s := newTx(t, g, nil)
			ctx, cancel := context.WithCancel(bg)
			defer cancel()
			errs := make([]error, 3)
			var wg sync.WaitGroup
			for i, ctx := range []context.Context{bg, ctx, bg} {
				wg.Go(func() { _, errs[i] = s.Charge(ctx, take) })
				synctest.Wait()
			}
			if sent {
				hold := make(chan struct{})
				g.open <- struct{}{}
				synctest.Wait()
				g.beforeSwap = func() { <-hold }
				g.open <- struct{}{}
				synctest.Wait()
				cancel()
				synctest.Wait()
				close(hold)
			} else {
				cancel()
				synctest.Wait()
				close(g.open)
			}
			wg.Wait()
			if errs[0] != nil || errs[2] != nil {
				t.Errorf("callers that stayed: got %v and %v, want decisions", errs[0], errs[2])
			}
			want, left := quota.NotCharged, int64(8)
			if sent {
				want, left = quota.ChargeUnknown, 7
			}
			if !errors.Is(errs[1], context.Canceled) || quota.Charged(errs[1]) != want {
				t.Errorf("caller that left, sent %v: got %v, want context.Canceled, charged %v", sent, errs[1], want)
			}
			g.beforeSwap = nil
			if sent {
				close(g.open)
			}
			if d := must[quota.Decision](t)(s.Charge(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpPeek})); d.Remaining != left {
				t.Errorf("remaining, sent %v: got %d, want %d", sent, d.Remaining, left)
			}
		})
	}
}

// TestAllCallersLeave checks that a transaction for which no caller waits is not made.
func TestAllCallersLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		s := newTx(t, g, nil)
		take := quota.Charge{Limit: testkit.Bucket("n", 10, time.Hour), Key: "k", Cost: 1}
		go s.Charge(bg, take)
		synctest.Wait()
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		if _, err := s.Charge(ctx, take); quota.Charged(err) != quota.NotCharged || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("Charge that waits for too long: got %v, want context.DeadlineExceeded", err)
		}
		close(g.open)
		synctest.Wait()
		if len(g.begun) != 1 {
			t.Errorf("transactions: got %d, want 1", len(g.begun))
		}
	})
}

// TestBatchDeadline checks the context of a transaction of calls that waited: the latest deadline, or none.
func TestBatchDeadline(t *testing.T) {
	take := quota.Charge{Limit: testkit.Bucket("n", 10, time.Hour), Key: "k", Cost: 1}
	for name, c := range map[string]struct {
		deadlines []time.Duration // 0: none
		want      time.Duration
	}{
		"two deadlines":        {[]time.Duration{2 * time.Second, time.Second}, 2 * time.Second},
		"one without deadline": {[]time.Duration{2 * time.Second, 0}, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			s := newTx(t, g, nil)
			start := time.Now()
			go s.Charge(bg, take)
			for _, d := range c.deadlines {
				synctest.Wait()
				ctx, cancel := bg, context.CancelFunc(func() {})
				if d > 0 {
					ctx, cancel = context.WithTimeout(bg, d)
				}
				defer cancel()
				go s.Charge(ctx, take)
			}
			synctest.Wait()
			close(g.open)
			synctest.Wait()
			<-g.ctxs
			end, set := (<-g.ctxs).Deadline()
			if set != (c.want > 0) || set && end != start.Add(c.want) {
				t.Errorf("%s: got a deadline after %v, %v, want %v", name, end.Sub(start), set, c.want)
			}
		})
	}
}

// moody is an algorithm that panics on a cost of 13.
type moody struct{ quota.Algorithm }

func (m moody) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	if r.Cost == 13 {
		panic("unlucky")
	}
	return m.Algorithm.Decide(s, r, now)
}

// TestPanics has code of others panic, or end its goroutine, in a call alone and in a batch: no key stays held, calls that did
// not panic are decided, and the store works on. TestMain sees goroutines that stay.
func TestPanics(t *testing.T) {
	l := quota.NewLimit("n", moody{testkit.Bucket("n", 100, time.Hour).Algorithm()})
	take := func(cost int64) quota.Charge { return quota.Charge{Limit: l, Key: "k", Cost: cost} }
	synctest.Test(t, func(t *testing.T) { // the algorithm
		g := newGate()
		s := newTx(t, g, nil)
		errs := make([]error, 4)
		var wg sync.WaitGroup
		for i, cost := range []int64{13, 1, 13, 2} {
			wg.Go(func() { _, errs[i] = s.Charge(bg, take(cost)) })
			synctest.Wait()
		}
		close(g.open)
		wg.Wait()
		for i, err := range errs {
			if panics := i%2 == 0; panics != errors.Is(err, quota.ErrMisconfigured) || panics && (quota.Charged(err) != quota.NotCharged || !strings.Contains(err.Error(), "unlucky")) {
				t.Errorf("call %d: got %v, want ErrMisconfigured with the panic %v", i, err, panics)
			}
		}
		if d := must[quota.Decision](t)(s.Charge(bg, take(0))); d.Remaining != 97 {
			t.Errorf("remaining: got %d, want 97", d.Remaining)
		}
	})
	for _, how := range []string{"panic", "exit"} {
		for _, before := range []bool{true, false} { // decide
			synctest.Test(t, func(t *testing.T) { // the database
				g := newGate()
				s := newTx(t, g, nil)
				bad := true
				fail := func() {
					if !bad {
						return
					}
					if how == "panic" {
						panic("broken")
					}
					runtime.Goexit()
				}
				g.around = func(transact func() error, _ *driver.Access) error {
					if before {
						fail()
					}
					err := transact()
					fail()
					return err
				}
				errs := [3]error{}
				var wg sync.WaitGroup
				for i := range errs {
					wg.Go(func() { _, errs[i] = s.Charge(bg, take(1)) })
					synctest.Wait()
				}
				close(g.open)
				wg.Wait()
				for i, err := range errs {
					if i == 0 && how == "exit" { // ended in the call
						continue
					}
					unknown := !before || how == "exit"
					if !errors.Is(err, quota.ErrMisconfigured) || unknown != errors.Is(err, quota.ErrIndeterminate) {
						t.Errorf("%s, before decide %v, call %d: got %v, want ErrMisconfigured, outcome unknown %v", how, before, i, err, unknown)
					}
				}
				bad = false
				if _, err := s.Charge(bg, take(1)); err != nil {
					t.Errorf("%s, call after it: got %v, want nil", how, err)
				}
			})
		}
	}
}

// TestCloseRefusesWaiting closes a store while calls wait and one is in flight.
func TestCloseRefusesWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate()
		s := newTx(t, g, nil)
		take := quota.Charge{Limit: testkit.Bucket("n", 10, time.Hour), Key: "k", Cost: 1}
		var errs [4]error
		var wg sync.WaitGroup
		for i := range errs {
			wg.Go(func() { _, errs[i] = s.Charge(bg, take) })
			synctest.Wait()
			if i == 1 {
				g.open <- struct{}{} // the second is in flight, in a goroutine of the store
				synctest.Wait()
			}
		}
		closed := make(chan error)
		go func() { closed <- s.Close() }()
		synctest.Wait()
		for _, err := range errs[2:] {
			if !errors.Is(err, quota.ErrClosed) {
				t.Errorf("call that waits when the store closes: got %v, want ErrClosed", err)
			}
		}
		select {
		case <-closed:
			t.Error("Close: returned while a goroutine of the store was left")
		default:
		}
		g.open <- struct{}{}
		if err := <-closed; err != nil {
			t.Errorf("Close: got %v, want nil", err)
		}
		wg.Wait()
		if errs[0] != nil || errs[1] != nil {
			t.Errorf("calls in flight when the store closes: got %v and %v, want nil", errs[0], errs[1])
		}
	})
}

// TestBatchBounds has more calls wait than go in one transaction: for their work, and for their keys.
func TestBatchBounds(t *testing.T) {
	l := testkit.Bucket("n", 1<<20, time.Hour)
	logs := testkit.LimitOf("log", "sl1", 1<<12, time.Hour)
	for _, c := range []struct {
		name        string
		l           *quota.Limit
		ids         bool
		n, min, max int // calls, transactions
	}{
		{"plain", l, false, 5000, 5, 6},
		{"long lists", logs, false, 1000, 8, 30},
		{"ids", l, true, 1000, 16, 16},
	} {
		synctest.Test(t, func(t *testing.T) {
			g := newGate()
			s := newTx(t, g, nil)
			go s.Charge(bg, quota.Charge{Limit: c.l, Key: "k", Cost: 1})
			synctest.Wait()
			<-g.begun
			var wg sync.WaitGroup
			for i := range c.n {
				k := quota.Charge{Limit: c.l, Key: "k", Cost: 1}
				if c.ids {
					k.ID = fmt.Sprint(i)
				}
				wg.Go(func() {
					if _, err := s.Charge(bg, k); err != nil {
						t.Errorf("%s: got %v, want nil", c.name, err)
					}
				})
			}
			synctest.Wait()
			close(g.open)
			wg.Wait()
			if n := len(g.begun); n < c.min || n > c.max {
				t.Errorf("%s: got %d transactions for %d calls, want %d to %d", c.name, n, c.n, c.min, c.max)
			}
			for len(g.begun) > 0 {
				if n := len((<-g.begun).Keys); n > driver.MaxEntries {
					t.Errorf("%s: got %d keys in a transaction, want %d at most", c.name, n, driver.MaxEntries)
				}
			}
		})
	}
}

// TestContentionIsNoOutage has several processes charge one key of a slow KV under resilience.Standard: calls end in
// decisions or in ErrConflict, the breaker stays closed, and each call of a key of its own succeeds.
func TestContentionIsNoOutage(t *testing.T) {
	l := testkit.Bucket("n", 1<<30, time.Hour)
	for _, processes := range []int{1, 8} {
		synctest.Test(t, func(t *testing.T) {
			kv := newKV(testkit.NewClock().Micros)
			var conflicts, made int64
			var mu sync.Mutex
			var wg sync.WaitGroup
			for process := range processes {
				inner := newCAS(t, far{kv}, nil)
				s := must[quota.Store](t)(resilience.Standard(inner, resilience.FailWithError(), &resilience.StandardOptions{
					Notice: func(n quota.Notice) { t.Errorf("notice: got %v, want none", n) },
				}))
				end := time.Now().Add(20 * time.Second)
				for client := range 64 {
					wg.Go(func() {
						for time.Now().Before(end) {
							_, err := s.Charge(bg, quota.Charge{Limit: l, Key: "hot", Cost: 1})
							mu.Lock()
							made++
							if errors.Is(err, quota.ErrConflict) {
								conflicts++
							} else if err != nil {
								t.Errorf("hot key: got %v, want nil or ErrConflict", err)
							}
							mu.Unlock()
							if client > 0 {
								continue
							}
							if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: fmt.Sprint("cold", process), Cost: 1}); err != nil {
								t.Errorf("cold key: got %v, want nil", err)
							}
						}
					})
				}
				defer s.Close()
			}
			wg.Wait()
			if processes == 1 && conflicts > 0 {
				t.Errorf("one process: got %d conflicts in %d calls, want none", conflicts, made)
			}
		})
	}
}

// far is a KV whose Load and Swap take 40 to 60 ms each.
type far struct{ *memKV }

func (f far) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	time.Sleep(20*time.Millisecond + rand.N(10*time.Millisecond))
	defer time.Sleep(20*time.Millisecond + rand.N(10*time.Millisecond))
	return f.memKV.Load(ctx, keys)
}

func (f far) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	time.Sleep(20*time.Millisecond + rand.N(10*time.Millisecond))
	defer time.Sleep(20*time.Millisecond + rand.N(10*time.Millisecond))
	return f.memKV.Swap(ctx, changes)
}
