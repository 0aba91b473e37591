package local

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

func TestOneIDFromManyGoroutines(t *testing.T) {
	l, m := bucket("n", 1000, time.Hour), bucket("m", 1000, time.Hour)
	for round := range sized(50, 1000) {
		s, _ := withClock(0)
		cs := []quota.Charge{{Limit: l, Key: "g/a", Cost: 7, ID: "i"}, {Limit: m, Key: "g/b", Cost: 5, ID: "i"}}
		if round%2 == 0 {
			cs = cs[:1]
		}
		var first atomic.Int64
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				out := make([]quota.Decision, len(cs))
				if err := s.TakeAll(bg, cs, out); err != nil {
					t.Error(err)
				}
				if !out[0].Replayed {
					first.Add(1)
				}
				if !quota.Granted(out) || out[0].Charged != 7 || out[0].Remaining != 993 {
					t.Errorf("decisions: got %+v, want them granted, charged 7, remaining 993 first", out)
				}
			})
		}
		wg.Wait()
		if d := take(t, s, quota.Charge{Limit: l, Key: "g/a", Op: quota.OpPeek}); first.Load() != 1 || d.Remaining != 993 {
			t.Fatalf("got %d calls that were not replayed, %d remaining; want 1, 993", first.Load(), d.Remaining)
		}
	}
}

func TestManyIDsFromManyGoroutines(t *testing.T) {
	// Each of a set of ids comes from several goroutines, among calls without: each is charged once.
	const ids, clients = 50, 8
	s, _ := withClock(0)
	l := bucket("n", 10_000, 1000*time.Hour)
	var wg sync.WaitGroup
	for client := range clients {
		wg.Go(func() {
			for i := range ids {
				take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 10, ID: fmt.Sprint((i + client) % ids)})
				take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1})
			}
		})
	}
	wg.Wait()
	if d := take(t, s, quota.Charge{Limit: l, Key: "k", Op: quota.OpPeek}); d.Remaining != 10_000-ids*10-clients*ids {
		t.Errorf("remaining: got %d, want %d", d.Remaining, 10_000-ids*10-clients*ids)
	}
}

func TestIDsAreBoundedAndForgotten(t *testing.T) {
	const maxKeys = 100
	s, c := withClock(maxKeys)
	l := bucket("n", 1000, 10_000*time.Hour)
	charge := func(id int) quota.Charge {
		return quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprint(id)}
	}
	for id := range maxKeys {
		c.add(time.Second)
		take(t, s, charge(id))
	}
	_, err := s.Take(bg, charge(maxKeys))
	if !errors.Is(err, quota.ErrOverloaded) {
		t.Fatalf("take with an id beyond MaxKeys: got %v, want ErrOverloaded", err)
	}
	if d := take(t, s, charge(0)); !d.Replayed {
		t.Fatalf("take with the first id: got %+v, want it replayed", d)
	}
	if d := take(t, s, quota.Charge{Limit: l, Key: "k", Op: quota.OpPeek}); d.Remaining != 1000-maxKeys {
		t.Fatalf("remaining: got %d, want %d", d.Remaining, 1000-maxKeys)
	}
	c.add(quota.IDWindow - (maxKeys-1)*time.Second + time.Microsecond) // the first is out of its window
	if d := take(t, s, charge(maxKeys)); d.Replayed {
		t.Fatalf("take with a new id in the place of the first: got %+v, want it not replayed", d)
	}
	if d := take(t, s, charge(1)); !d.Replayed {
		t.Fatalf("take with the second id: got %+v, want it replayed", d)
	}
	c.add(2 * quota.IDWindow)
	for range 10 {
		take(t, s, charge(7))
	}
	if len(s.grants.byID) != 1 || len(s.grants.queue) != 1 || cap(s.grants.queue) > 64 {
		t.Errorf("remembered: got %d ids and %d grants (room for %d), want 1 and 1 (room for 64 at most)",
			len(s.grants.byID), len(s.grants.queue), cap(s.grants.queue))
	}
}

func TestForgettingIsSpreadOut(t *testing.T) {
	// After a crowd of ids has expired no single call has to forget all of them, and none of them is
	// replayed.
	crowd := sized(20_000, 200_000)
	s, c := withClock(crowd)
	l := bucket("n", 1<<30, time.Hour)
	for id := range crowd {
		take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprint(id)})
	}
	c.add(2 * quota.IDWindow)
	last := quota.Charge{Limit: l, Key: "k", Cost: 2, ID: fmt.Sprint(crowd - 1)}
	if d := take(t, s, last); d.Replayed || d.Charged != 2 {
		t.Fatalf("take with an expired id: got %+v, want it charged 2, not replayed", d)
	}
	if n := len(s.grants.byID); n < crowd/2 {
		t.Errorf("ids that one call forgot: got %d, want half of %d at most", crowd-n, crowd)
	}
	for i := range crowd / 8 {
		take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprint("new", i)})
	}
	if n := len(s.grants.byID); n != crowd/8+1 {
		t.Errorf("remembered ids: got %d, want %d", n, crowd/8+1)
	}
	if d := take(t, s, last); !d.Replayed || d.Charged != 2 {
		t.Errorf("take with an id that was granted again: got %+v, want it replayed, charged 2", d)
	}
}

func TestFailedCallsLeaveNoID(t *testing.T) {
	s, _ := withClock(1)
	l := bucket("n", 10, time.Hour)
	take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1})
	for range 2 {
		_, err := s.Take(bg, quota.Charge{Limit: l, Key: "other", Cost: 1, ID: "i"})
		if !errors.Is(err, quota.ErrOverloaded) || len(s.grants.byID) != 0 {
			t.Errorf("take with an id while the store is full: got %v, %d ids; want ErrOverloaded, none", err, len(s.grants.byID))
		}
	}
}
