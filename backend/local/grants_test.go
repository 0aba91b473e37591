package local

import (
	"errors"
	"fmt"
	"strings"
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
				if err := s.ChargeAll(bg, cs, out); err != nil {
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

// Ids have a bound of their own. Beyond it a call with a new id is refused and not charged, and no id is forgotten early.
func TestIDsAreBoundedAndForgotten(t *testing.T) {
	const maxIDs = 100
	c := newClock()
	s := quota.Must(NewWithOptions(Options{MaxKeys: 2 * maxIDs, MaxIDs: maxIDs, Clock: c.time}))
	l := bucket("n", 1000, 10_000*time.Hour)
	charge := func(id int) quota.Charge { // each id in a group of its own
		return quota.Charge{Limit: l, Key: fmt.Sprint("k", id), Cost: 1, ID: fmt.Sprint(id)}
	}
	for id := range maxIDs {
		c.add(time.Second)
		take(t, s, charge(id))
	}
	_, err := s.Charge(bg, charge(maxIDs))
	if !errors.Is(err, quota.ErrOverloaded) || !strings.Contains(err.Error(), "MaxIDs") {
		t.Fatalf("take with an id beyond MaxIDs: got %v, want ErrOverloaded that names MaxIDs", err)
	}
	if d := take(t, s, charge(0)); !d.Replayed {
		t.Fatalf("take with the first id: got %+v, want it replayed", d)
	}
	if d := take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("k", maxIDs), Op: quota.OpPeek}); d.Remaining != 1000 || s.Len() != maxIDs {
		t.Fatalf("after the refusal: got %d remaining, %d keys; want 1000, %d", d.Remaining, s.Len(), maxIDs)
	}
	c.add(quota.IDWindow - (maxIDs-1)*time.Second + time.Microsecond) // the first is out of its window
	for try := 1; ; try++ {                                           // the search for it looks at some places only
		if d, err := s.Charge(bg, charge(maxIDs)); err == nil && !d.Replayed {
			break
		} else if try == 10 {
			t.Fatalf("take with a new id in the place of the first: got %+v, %v after %d tries, want it not replayed", d, err, try)
		}
	}
	if d := take(t, s, charge(1)); !d.Replayed {
		t.Fatalf("take with the second id: got %+v, want it replayed", d)
	}
	s.checkAll(t)
	c.add(2 * quota.IDWindow)
	for range 50_000 {
		take(t, s, charge(7))
	}
	if n := s.ids.used.Load(); n > maxIDs/10 {
		t.Errorf("ids that are remembered: got %d of %d, want a tenth at most", n, maxIDs)
	}
}

func TestForgettingIsSpreadOut(t *testing.T) {
	// After a crowd of ids has expired no single call has to forget all of them, and none of them is
	// replayed.
	crowd := sized(20_000, 200_000)
	s, c := withClock(0)
	l := bucket("n", 1<<30, time.Hour)
	for id := range crowd {
		take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprint(id)})
	}
	c.add(2 * quota.IDWindow)
	last := quota.Charge{Limit: l, Key: "k", Cost: 2, ID: fmt.Sprint(crowd - 1)}
	if d := take(t, s, last); d.Replayed || d.Charged != 2 {
		t.Fatalf("take with an expired id: got %+v, want it charged 2, not replayed", d)
	}
	if n := s.ids.used.Load(); n < int64(crowd-40) {
		t.Errorf("ids that one call forgot: got %d, want 40 at most", int64(crowd)-n)
	}
	for i := range crowd / 2 {
		take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprint("new", i)})
	}
	if n := s.ids.used.Load(); n > int64(crowd*5/8) {
		t.Errorf("remembered ids: got %d, want %d at most", n, crowd*5/8)
	}
	if d := take(t, s, last); !d.Replayed || d.Charged != 2 {
		t.Errorf("take with an id that was granted again: got %+v, want it replayed, charged 2", d)
	}
	s.checkAll(t)
}

// The grant of a charge ahead of refill is repeated with its delay, to charges of the same accepted delay only.
func TestGrantAhead(t *testing.T) {
	s, _ := withClock(0)
	c := quota.Charge{Limit: bucket("n", 10, 10*time.Second), Key: "k", Cost: 10, Op: quota.OpAhead, Within: time.Minute, ID: "1"}
	take(t, s, c)
	c.ID = "2"
	first := take(t, s, c)
	if first.Delay != 10*time.Second {
		t.Errorf("delay: got %v, want 10s", first.Delay)
	}
	again := take(t, s, c)
	if first.Replayed = true; again != first {
		t.Errorf("repeat: got %+v, want %+v", again, first)
	}
	c.Within++
	if _, err := s.Charge(bg, c); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("take with another accepted delay: got %v, want ErrInvalid", err)
	}
}

// A grant is repeated whole, however long the list, the keys and the id are.
func TestLongGrants(t *testing.T) {
	s, _ := withClock(0)
	ls := everyRule(1<<20, time.Hour)
	for n := 1; n <= quota.MaxCharges; n *= 2 {
		id := fmt.Sprintf("%0128d", n)
		cs, first, again := make([]quota.Charge, n), make([]quota.Decision, n), make([]quota.Decision, n)
		for i := range cs {
			cs[i] = quota.Charge{Limit: ls[i%len(ls)], Key: fmt.Sprintf("%0256d/%0255d", n, i), Cost: 7, ID: id}
		}
		if err := s.ChargeAll(bg, cs, first); err != nil || !quota.Granted(first) {
			t.Fatalf("list of %d: got %+v, %v, want it granted", n, first, err)
		}
		if err := s.ChargeAll(bg, cs, again); err != nil {
			t.Fatalf("list of %d again: got %v, want nil", n, err)
		}
		for i := range first {
			if first[i].Replayed = true; again[i] != first[i] {
				t.Errorf("decision %d of %d: got %+v, want %+v", i, n, again[i], first[i])
			}
		}
		cs[n-1].Cost++
		if err := s.ChargeAll(bg, cs, again); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("list of %d with another cost: got %v, want ErrInvalid", n, err)
		}
	}
	s.checkAll(t)
}

func TestFailedCallsLeaveNoID(t *testing.T) {
	s, _ := withClock(1)
	l := bucket("n", 10, time.Hour)
	take(t, s, quota.Charge{Limit: l, Key: "k", Cost: 1})
	for range 2 {
		_, err := s.Charge(bg, quota.Charge{Limit: l, Key: "other", Cost: 1, ID: "i"})
		if !errors.Is(err, quota.ErrOverloaded) || s.ids.used.Load() != 0 {
			t.Errorf("take with an id while the store is full: got %v, %d ids; want ErrOverloaded, none", err, s.ids.used.Load())
		}
	}
}
