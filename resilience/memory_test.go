package resilience_test

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// far is a store at the end of a line: requests and replies take their time.
type far struct {
	quota.Store
	there, back func() time.Duration
	calls       int
}

func (f *far) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	f.calls++
	time.Sleep(f.there())
	d, err := f.Store.Charge(ctx, c)
	time.Sleep(f.back())
	return d, err
}

func (f *far) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	f.calls++
	time.Sleep(f.there())
	err := f.Store.ChargeAll(ctx, cs, out)
	time.Sleep(f.back())
	return err
}

// TestMemoryNeverWrong drives a memory with random calls, other processes charging beside it, and holds
// each of its answers against the store itself, at that time.
func TestMemoryNeverWrong(t *testing.T) {
	r := random(t)
	per := 20 * time.Millisecond
	rules := []func(n int64) *quota.Limit{
		func(n int64) *quota.Limit { return bucket("tb", n, n, per) },
		func(n int64) *quota.Limit {
			return quota.NewLimit("sw", algorithm.SlidingWindow(n, per))
		},
		func(n int64) *quota.Limit {
			return quota.NewLimit("sl", algorithm.SlidingWindowLog(n, per))
		},
		func(n int64) *quota.Limit {
			return quota.NewLimit("fw", algorithm.FixedWindow(n, per))
		},
	}
	answered, stored := 0, 0
	for _, rule := range rules {
		for range sized(20, 2000) {
			synctest.Test(t, func(t *testing.T) {
				n := 1 + r.Int64N(8)
				limits := []*quota.Limit{rule(n), rule(n)} // one limit, made twice
				truth := local.New()
				lag := func() time.Duration { return time.Duration(r.Int64N(int64(ms / 3))) }
				store := &far{Store: truth, there: lag, back: lag}
				keys := []string{"a", "b", "c"}[:1+r.IntN(3)]
				s := wrap(t, store, resilience.DenialMemory(&resilience.MemoryOptions{MaxKeys: 1 + r.IntN(200)}))
				var receipts []quota.Decision
				var refunds []quota.Charge
				for i := range 300 {
					time.Sleep(time.Duration(r.Int64N(int64(2 * ms))))
					c := quota.Charge{Limit: limits[r.IntN(len(limits))], Key: keys[r.IntN(len(keys))], Cost: 1 + r.Int64N(6)}
					switch r.IntN(12) {
					case 0:
						c.Op = quota.OpPeek
					case 1:
						c.ID = fmt.Sprint("id", i)
					case 2:
						c.Op = quota.OpDebit
						c.Cost = 1
					case 3:
						if len(receipts) > 0 {
							c = refunds[0].Refund(receipts[0], receipts[0].Charged)
							receipts, refunds = receipts[1:], refunds[1:]
						}
					case 4:
						if r.IntN(3) == 0 {
							c.Op = quota.OpReset
						}
					case 5: // another process takes
						truth.Charge(bg, c)
						continue
					case 6:
						cs := []quota.Charge{c, {Limit: limits[0], Key: "other", Cost: 1}}
						out := make([]quota.Decision, 2)
						if err := s.ChargeAll(bg, cs, out); err != nil {
							t.Fatal(err)
						}
						continue
					case 7:
						if c.Limit.Spec().Ahead {
							c.Op, c.Within = quota.OpAhead, time.Duration(r.Int64N(int64(10*ms)))
						}
					}
					ask := c
					ask.Op, ask.ID = quota.OpPeek, ""
					want, err := truth.Charge(bg, ask)
					if err != nil {
						t.Fatal(err)
					}
					now, calls := time.Now(), store.calls
					d, err := s.Charge(bg, c)
					if err != nil {
						t.Fatal(err)
					}
					if d.Source != quota.FromMemory {
						if stored++; store.calls != calls+1 {
							t.Fatalf("calls of the store: got %d, want 1", store.calls-calls)
						}
						if d.Allowed && d.Charged > 0 && c.ID == "" && c.Op == quota.OpTake {
							receipts, refunds = append(receipts, d), append(refunds, c)
						}
						continue
					}
					answered++
					switch {
					case c.Op != quota.OpTake || c.ID != "" || store.calls != calls || time.Since(now) != 0:
						t.Fatalf("%+v was answered from memory, want only takes without an id, without a call of the store", c)
					case want.Allowed || d.Allowed:
						t.Fatalf("denied %s of %d from memory: %+v, the store would say %+v", c.Limit.Name(), c.Cost, d, want)
					case d.RetryAfter <= 0 || d.RetryAfter > want.RetryAfter+time.Microsecond:
						t.Fatalf("%s of %d from memory: retry after %v, the store would say %v", c.Limit.Name(), c.Cost, d.RetryAfter, want.RetryAfter)
					case d.Charged != 0 || d.Capacity != want.Capacity || d.ResetAfter < d.RetryAfter:
						t.Fatalf("%+v, the store would say %+v", d, want)
					}
				}
			})
		}
	}
	if answered*20 < stored {
		t.Errorf("got %d answers from memory and %d from the store, want at least one in twenty from memory", answered, stored)
	}
	t.Logf("%d answers from memory, %d from the store", answered, stored)
}

// TestMemory goes through what a memory answers, and what it does not.
func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := bucket("l", 10, 1, time.Second)
		truth := local.New()
		store := &far{Store: truth, there: func() time.Duration { return 100 * ms }, back: func() time.Duration { return 200 * ms }}
		s := wrap(t, store, resilience.DenialMemory(nil))
		take := func(n int64) quota.Charge { return quota.Charge{Limit: l, Key: "k", Cost: n} }
		want := func(c quota.Charge, from quota.Source, when string) quota.Decision {
			t.Helper()
			d, err := s.Charge(bg, c)
			if err != nil || d.Source != from {
				t.Errorf("%s: got %+v, %v; want a decision from %v", when, d, err, from)
			}
			return d
		}
		exhaust := func() {
			t.Helper()
			s.Charge(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpReset})
			truth.Charge(bg, take(10))
			if d := want(take(5), quota.FromStore, "first"); d.RetryAfter != 4900*ms {
				t.Errorf("got %+v, want RetryAfter 4.9s", d)
			}
		}
		exhaust()
		// Sent 300 ms ago, so 4900 - 300 ms are left; then less and less, and from the send nothing is left.
		if d := want(take(5), quota.FromMemory, "again"); d.RetryAfter != 4600*ms || d.ResetAfter != 9600*ms || d.Allowed || d.Capacity != 10 || d.Remaining != 0 || d.At == 0 {
			t.Errorf("got %+v, want a denial of the limit 10 with RetryAfter 4.6s and ResetAfter 9.6s", d)
		}
		time.Sleep(4600*ms - 2*time.Microsecond)
		if d := want(take(7), quota.FromMemory, "until its time"); d.RetryAfter != 2*time.Microsecond {
			t.Errorf("got %+v, want RetryAfter 2µs", d)
		}
		time.Sleep(time.Microsecond)
		want(take(5), quota.FromStore, "in time")

		for what, c := range map[string]quota.Charge{
			"a smaller cost": take(4), "an id": withID(take(5), "i"), "a peek": {Limit: l, Key: "k", Cost: 5, Op: quota.OpPeek},
			"another key": {Limit: l, Key: "k2", Cost: 5}, "another limit": {Limit: bucket("l2", 10, 1, time.Second), Key: "k", Cost: 5},
			"a changed limit": {Limit: bucket("l", 20, 1, time.Second), Key: "k", Cost: 5},
			"a slower limit":  {Limit: bucket("l", 10, 1, 2*time.Second), Key: "k", Cost: 5},
		} {
			exhaust()
			want(c, quota.FromStore, what)
		}
		exhaust()
		want(quota.Charge{Limit: bucket("l", 10, 1, time.Second), Key: "k", Cost: 5}, quota.FromMemory, "the same limit, made again")
		// A floor counts as the cost does: a denial with one denies nothing that needs less.
		for _, c := range []struct {
			cost, floor int64
			source      quota.Source
		}{{1, 4, quota.FromMemory}, {0, 5, quota.FromMemory}, {1, 3, quota.FromStore}, {4, 7, quota.FromStore}, {5, math.MaxInt64, quota.FromStore}} {
			exhaust()
			want(quota.Charge{Limit: l, Key: "k", Cost: c.cost, Floor: c.floor}, c.source, fmt.Sprintf("%d above %d", c.cost, c.floor))
		}
		// So does the least of a take of up to so many.
		for least, source := range map[int64]quota.Source{4: quota.FromStore, 5: quota.FromMemory} {
			exhaust()
			want(quota.Charge{Limit: l, Key: "k", Op: quota.OpUpTo, Cost: 9, Least: least}, source, fmt.Sprintf("up to 9, at least %d", least))
		}
		// A denial is told of a shadow as that of a shadow, and to others as theirs.
		exhaust()
		for _, shadow := range []bool{true, false} {
			c := take(5)
			c.Shadow = shadow
			if d := want(c, quota.FromMemory, "a shadow or not"); d.Shadow != shadow || d.Allowed {
				t.Errorf("a take, shadow %v: got %+v, want a denial that says so", shadow, d)
			}
		}
		// A take ahead may fit where a take does not, and proves nothing about takes, granted or denied.
		for within, allowed := range map[time.Duration]bool{time.Second: false, time.Minute: true} {
			exhaust()
			ahead := quota.Charge{Limit: l, Key: "k", Cost: 5, Op: quota.OpAhead, Within: within}
			if d := want(ahead, quota.FromStore, "ahead"); d.Allowed != allowed {
				t.Errorf("a take ahead within %v: got %+v, want allowed %v", within, d, allowed)
			}
			if d := want(take(5), quota.FromMemory, "after a take ahead"); d.RetryAfter != 4300*ms {
				t.Errorf("after a take ahead within %v: got %+v, want a denial with RetryAfter 4.3s", within, d)
			}
		}
		exhaust()
		out := make([]quota.Decision, 1)
		if err := s.ChargeAll(bg, []quota.Charge{take(5)}, out); err != nil || out[0].Source != quota.FromStore {
			t.Errorf("a list: got %+v, %v; want a decision of the store", out, err)
		}
		for op, n := range map[quota.Op]int{quota.OpRefund: 0, quota.OpReset: 0, quota.OpDebit: 0, quota.OpPeek: 1} {
			for _, list := range []bool{false, true} {
				exhaust()
				c := quota.Charge{Limit: l, Key: "k", Op: op, Cost: 5}
				if list {
					s.ChargeAll(bg, []quota.Charge{c, {Limit: l, Key: "other"}}, make([]quota.Decision, 2))
				} else {
					s.Charge(bg, c)
				}
				if got := resilience.Remembered(s); got != n {
					t.Errorf("denials remembered after a %s (in a list: %v): got %d, want %d", op, list, got, n)
				}
			}
		}
		// What is admitted disproves what is remembered.
		exhaust()
		truth.Charge(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpReset})
		want(withID(take(5), "i2"), quota.FromStore, "an id")
		if d := want(take(5), quota.FromStore, "disproved"); !d.Allowed {
			t.Errorf("got %+v, want a grant", d)
		}
		// What can never fit is not remembered, nor what another policy denied.
		truth.Charge(bg, quota.Charge{Limit: l, Key: "k", Op: quota.OpReset})
		want(quota.Charge{Limit: l, Key: "k3", Cost: 11}, quota.FromStore, "never")
		want(quota.Charge{Limit: l, Key: "k3", Cost: 11}, quota.FromStore, "never")
		ended, cancel := context.WithCancel(bg)
		cancel()
		exhaust()
		if _, err := s.Charge(ended, take(5)); err != context.Canceled {
			t.Error(err)
		}
	})
}

// TestMemoryLateReply: a denial that was asked for before this process gave back, and whose reply comes
// after, is not remembered.
func TestMemoryLateReply(t *testing.T) {
	for _, op := range []quota.Op{quota.OpRefund, quota.OpReset, quota.OpDebit} {
		for _, list := range []bool{false, true} {
			synctest.Test(t, func(t *testing.T) {
				l := bucket("l", 10, 1, time.Second)
				store := &stub{answer: func(_ context.Context, c quota.Charge) (quota.Decision, error) {
					if c.Op != quota.OpTake {
						return quota.Decision{Allowed: true}, nil
					}
					time.Sleep(100 * ms)
					return quota.Decision{Capacity: 10, RetryAfter: time.Minute}, nil
				}}
				s := wrap(t, store, resilience.DenialMemory(nil))
				var wg sync.WaitGroup
				wg.Go(func() {
					c := quota.Charge{Limit: l, Key: "k", Cost: 5}
					if list {
						s.ChargeAll(bg, []quota.Charge{c}, make([]quota.Decision, 1))
					} else {
						s.Charge(bg, c)
					}
				})
				time.Sleep(50 * ms)
				s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 5, Op: op})
				wg.Wait()
				if n := resilience.Remembered(s); n != 0 {
					t.Errorf("denials remembered after a %s: got %d, want none", op, n)
				}
				// Asked for afterwards it is, and a give-back that fails may have been made all the same.
				s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 5})
				if n := resilience.Remembered(s); n != 1 {
					t.Errorf("denials remembered: got %d, want 1", n)
				}
				store.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
					return granted, as(quota.ErrIndeterminate)
				}
				s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 5, Op: op})
				if n := resilience.Remembered(s); n != 0 {
					t.Errorf("denials remembered after a %s of unknown outcome: got %d, want none", op, n)
				}
				// A denial that was asked for and learnt while the give-back was on its way.
				store.answer = func(_ context.Context, c quota.Charge) (quota.Decision, error) {
					if c.Op == op {
						time.Sleep(100 * ms)
						return quota.Decision{Allowed: true}, nil
					}
					return quota.Decision{Capacity: 10, RetryAfter: time.Minute}, nil
				}
				wg.Go(func() {
					c := quota.Charge{Limit: l, Key: "k", Cost: 5, Op: op}
					if list {
						s.ChargeAll(bg, []quota.Charge{c}, make([]quota.Decision, 1))
					} else {
						s.Charge(bg, c)
					}
				})
				time.Sleep(50 * ms)
				s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 5})
				wg.Wait()
				if n := resilience.Remembered(s); n != 0 {
					t.Errorf("denials remembered of the time before a %s: got %d, want none", op, n)
				}
			})
		}
	}
}

func TestMemoryLearnsFromTheStoreAlone(t *testing.T) {
	deny := quota.Decision{Capacity: 100, RetryAfter: time.Minute}
	split, open, replayed := deny, deny, deny
	split.Split, open.Source, replayed.Replayed = true, quota.FromFallback, true
	for i, d := range []quota.Decision{split, open, replayed, {Capacity: 100}, {Capacity: 100, RetryAfter: quota.Never}} {
		store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return d, nil }}
		s := wrap(t, store, resilience.DenialMemory(nil))
		s.ChargeAll(bg, []quota.Charge{charge(1)}, make([]quota.Decision, 1))
		if !d.Split {
			s.Charge(bg, charge(1))
		}
		if n := resilience.Remembered(s); n != 0 {
			t.Errorf("denials remembered after decision %d: got %d, want none", i, n)
		}
	}
	// A list that was decided in steps gave back what it held.
	store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return deny, nil }}
	s := wrap(t, store, resilience.DenialMemory(nil))
	s.Charge(bg, charge(1))
	if resilience.Remembered(s) != 1 {
		t.Error("denials remembered: got none, want 1")
	}
	store.answer = func(context.Context, quota.Charge) (quota.Decision, error) { return split, nil }
	s.ChargeAll(bg, []quota.Charge{charge(1)}, make([]quota.Decision, 1))
	if resilience.Remembered(s) != 0 {
		t.Error("denials remembered after a list gave back: got 1, want none")
	}
}

func TestMemoryBounded(t *testing.T) {
	store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
		return quota.Decision{Capacity: 100, RetryAfter: time.Hour}, nil
	}}
	s := wrap(t, store, resilience.DenialMemory(&resilience.MemoryOptions{MaxKeys: 640}))
	var keys []string
	for i := range 20_000 {
		c := charge(1)
		c.Key = fmt.Sprint("key", i)
		keys = append(keys, c.Key)
		s.Charge(bg, c)
		if n := resilience.Remembered(s); n > 640 {
			t.Fatalf("denials remembered: got %d, want up to 640", n)
		}
	}
	if n := resilience.Remembered(s); n != 640 {
		t.Errorf("denials remembered: got %d, want 640", n)
	}
	hits := 0
	for _, k := range slices.Backward(keys) {
		c := charge(1)
		c.Key = k
		if before := store.called(); true {
			if s.Charge(bg, c); store.called() == before {
				hits++
			}
		}
		if hits > 0 {
			break
		}
	}
	if hits == 0 {
		t.Error("answers from memory: got none, want some")
	}
}
