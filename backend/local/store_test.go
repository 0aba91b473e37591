package local

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

func TestClose(t *testing.T) {
	s, _ := withClock(0)
	l := bucket("n", 5, time.Hour)
	take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1})
	for range 2 {
		if err := s.Close(); err != nil {
			t.Errorf("Close: got %v, want nil", err)
		}
	}
	for _, id := range []string{"", "id"} {
		c := quota.Charge{Limit: l, Key: "k", Cost: 1, ID: id}
		if d, err := s.Charge(bg, c); !errors.Is(err, quota.ErrClosed) || d != (quota.Decision{}) {
			t.Errorf("Charge after Close: got %+v, %v; want zero, ErrClosed", d, err)
		}
		if err := s.ChargeAll(bg, []quota.Charge{c}, make([]quota.Decision, 1)); !errors.Is(err, quota.ErrClosed) {
			t.Errorf("ChargeAll after Close: got %v, want ErrClosed", err)
		}
	}
}

func TestDoneContextChargesNothing(t *testing.T) {
	s, _ := withClock(0)
	l := bucket("n", 5, time.Hour)
	cancelled, cancel := context.WithCancel(bg)
	cancel()
	late, cancel := context.WithDeadline(bg, time.Unix(0, 0))
	defer cancel()
	for ctx, want := range map[context.Context]error{cancelled: context.Canceled, late: context.DeadlineExceeded} {
		for _, id := range []string{"", "id"} {
			c := quota.Charge{Limit: l, Key: "k", Cost: 1, ID: id}
			if d, err := s.Charge(ctx, c); err != want || d != (quota.Decision{}) {
				t.Errorf("Charge: got %+v, %v; want zero, %v", d, err, want)
			}
			if err := s.ChargeAll(ctx, []quota.Charge{c}, make([]quota.Decision, 1)); err != want {
				t.Errorf("ChargeAll: got %v, want %v", err, want)
			}
		}
	}
	if s.Len() != 0 || s.ids.used.Load() != 0 {
		t.Errorf("got %d keys, %d ids; want none", s.Len(), s.ids.used.Load())
	}
}

func TestNewRefuses(t *testing.T) {
	for name, o := range map[string]Options{"MaxKeys": {MaxKeys: -1}, "MaxIDs": {MaxIDs: -1}} {
		s, err := NewWithOptions(o)
		if s != nil {
			t.Errorf("store of a negative %s: got one, want nil", name)
		}
		testkit.WantInvalid(t, err, name+" is -1")
	}
}

func TestListsDoNotDeadlock(t *testing.T) {
	// Lists over many shards, in both orders and in any, at the same time.
	s, _ := withClock(0)
	l := bucket("n", 1<<30, time.Hour)
	const lists = 8
	var charged atomic.Int64
	var wg sync.WaitGroup
	seed := random(t).Uint64()
	for client := range lists {
		r := rand.New(rand.NewPCG(seed, uint64(client)))
		wg.Go(func() {
			cs := make([]quota.Charge, quota.MaxCharges)
			out := make([]quota.Decision, len(cs))
			for range sized(200, 5000) {
				order := r.Perm(len(cs))
				for i := range cs {
					n := order[i]
					if client < 4 {
						if n = i; client%2 == 0 {
							n = len(cs) - 1 - i
						}
					}
					cs[i] = quota.Charge{Limit: l, Key: fmt.Sprint("k", n), Cost: 1}
				}
				if err := s.ChargeAll(bg, cs, out); err != nil || !quota.Granted(out) {
					t.Errorf("list: got %+v, %v; want it granted", out, err)
				}
				charged.Add(1)
				for i := range out { // one time for all
					if out[i].At != out[0].At {
						t.Errorf("time of decision %d: got %d, want %d", i, out[i].At, out[0].At)
					}
				}
			}
		})
	}
	wg.Wait()
	for i := range quota.MaxCharges {
		if d := take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("k", i), Op: quota.OpPeek}); d.Remaining != 1<<30-charged.Load() {
			t.Fatalf("key %d: remaining: got %d, want %d", i, d.Remaining, 1<<30-charged.Load())
		}
	}
}

func TestTimeNeverStepsBack(t *testing.T) {
	// Decisions on one key never go back in time, and a list's time is that of all its keys.
	s := New()
	l := bucket("n", 1<<30, time.Hour)
	var wg sync.WaitGroup
	for client := range 4 {
		wg.Go(func() {
			last := quota.Micros(0)
			out := make([]quota.Decision, 2)
			for range sized(3000, 100_000) {
				if err := s.ChargeAll(bg, []quota.Charge{{Limit: l, Key: "k", Cost: 1}, {Limit: l, Key: fmt.Sprint(client), Cost: 1}}, out); err != nil {
					t.Error(err)
				}
				if d := take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1}); d.At < out[0].At || out[0].At < last || out[0].At != out[1].At {
					t.Errorf("times: got %d, then a list at %d and %d, then %d; want them in order, the list's equal", last, out[0].At, out[1].At, d.At)
				} else {
					last = d.At
				}
			}
		})
	}
	wg.Wait()
}

func TestTimesFollowTheOrderOfDecisions(t *testing.T) {
	// The remainders show the order in which charges of many goroutines to one key were decided, alone and in
	// lists.
	s := New()
	l := everyRule(1<<30, time.Hour)[4]
	const clients = 8
	var all [clients][]quota.Decision
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			out := make([]quota.Decision, 2)
			for range sized(20_000, 500_000) {
				if client == 0 {
					if err := s.ChargeAll(bg, []quota.Charge{{Limit: l, Key: "k", Cost: 1}, {Limit: l, Key: "j", Cost: 1}}, out); err != nil {
						t.Error(err)
					}
					all[client] = append(all[client], out[0])
				} else {
					all[client] = append(all[client], take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1}))
				}
			}
		})
	}
	wg.Wait()
	ds := slices.Concat(all[:]...)
	slices.SortFunc(ds, func(a, b quota.Decision) int { return cmp.Compare(b.Remaining, a.Remaining) })
	for i := 1; i < len(ds); i++ {
		if ds[i].At < ds[i-1].At {
			t.Fatalf("time of decision %d: got %d, want %d or later, as the one before it", i, ds[i].At, ds[i-1].At)
		}
	}
}

func TestMonotonicClockFollowsTheBubble(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New()
		c := quota.Charge{Limit: bucket("n", 1, time.Second), Key: "k", Cost: 1}
		if d := take(t, s, c); !d.Allowed || d.At.Time() != time.Now().UTC() {
			t.Errorf("first take: got %+v, want it allowed, at %v", d, time.Now())
		}
		time.Sleep(time.Second - time.Microsecond)
		if d := take(t, s, c); d.Allowed || d.RetryAfter != time.Microsecond {
			t.Errorf("take after 1 s less 1 µs: got %+v, want it denied, retry after 1µs", d)
		}
		time.Sleep(time.Microsecond)
		if d := take(t, s, c); !d.Allowed {
			t.Errorf("take after 1 s: got %+v, want it allowed", d)
		}
	})
}

// TestClockSetBackMintsNothing moves an injected clock back, or to and fro within the second that is waited
// for: no more is admitted than if it had stood still.
func TestClockSetBackMintsNothing(t *testing.T) {
	r := random(t)
	const capacity = 20
	for name, step := range map[string]func(at time.Duration) time.Duration{
		"back":     func(at time.Duration) time.Duration { return at - time.Duration(r.Int64N(int64(20*time.Second))) },
		"far back": func(at time.Duration) time.Duration { return at - time.Duration(r.Int64N(int64(1000*time.Hour))) },
		"flapping": func(time.Duration) time.Duration { return -time.Duration(r.Int64N(int64(time.Second))) },
	} {
		t.Run(name, func(t *testing.T) {
			for _, l := range everyRule(capacity, time.Minute) {
				for range sized(20, 500) {
					s, c := withClock(0)
					start, at := c.micros.Load(), time.Duration(0)
					keys := []string{"a", "b"}
					admitted := map[string]int64{}
					for range 80 {
						for _, key := range keys {
							ch := quota.Charge{Limit: l, Key: key, Cost: 1 + r.Int64N(3)}
							if d := take(t, s, ch); d.Allowed {
								admitted[key] += ch.Cost
							}
							take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint(r.IntN(1000)), Cost: 1}) // sweeps along
						}
						at = step(at)
						c.micros.Store(start + int64(at/time.Microsecond))
					}
					for key, n := range admitted {
						if n > capacity {
							t.Fatalf("%s: admitted to key %s: got %d, want %d at most", l.Name(), key, n, capacity)
						}
					}
				}
			}
		})
	}
}

func TestExpiredStateHasNoRule(t *testing.T) {
	// An expired state counts as no state: the limit may then get another rule, even before the slot is
	// swept.
	s, c := withClock(0)
	rules := everyRule(5, time.Second)
	for i := range 10 {
		l := quota.NewLimit("n", rules[i%len(rules)].Algorithm())
		if d := take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 2}); d.Remaining != 3 {
			t.Fatalf("take %d: got %+v, want remaining 3", i, d)
		}
		other := quota.NewLimit("n", rules[(i+1)%len(rules)].Algorithm())
		if _, err := s.Charge(bg, quota.Charge{Limit: other, Key: "k", Cost: 2}); !errors.Is(err, quota.ErrMisconfigured) {
			t.Fatalf("take under another rule: got %v, want ErrMisconfigured", err)
		}
		c.add(2 * time.Second)
	}
}
