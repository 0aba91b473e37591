package local

import (
	"errors"
	"fmt"
	"runtime"
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

// checked fails unless the log and the indexes of g agree with each other. It returns the places of the records that have an entry.
func checked(t *testing.T, g *grants) (linked []uint64) {
	t.Helper()
	if 4*g.live > 3*len(g.index) {
		t.Fatalf("index of %d: got %d ids, want three quarters at most", len(g.index), g.live)
	}
	for i, e := range g.old[:min(g.place, len(g.old))] {
		if e != 0 {
			t.Fatalf("old index: got an entry at place %d, before %d, want none", i, g.place)
		}
	}
	entries := map[uint64]int{}
	for _, index := range [][]uint64{g.index, g.old} {
		for _, e := range index {
			if e != 0 {
				entries[e]++
			}
		}
	}
	at := g.head
	for at < g.tail {
		if uint32(g.word(at+2*word)) != 0 {
			if n := entries[g.entry(at)]; n != 1 {
				t.Fatalf("entries of the record at %d: got %d, want 1", at, n)
			}
			linked = append(linked, at)
		}
		at += g.word(at+2*word) >> 32
	}
	if at != g.tail || len(linked) != g.live || len(entries) != g.live {
		t.Fatalf("log: got its end at %d, %d records and %d entries in use; want %d, %d, %d", at, len(linked), len(entries), g.tail, g.live, g.live)
	}
	if size := uint64(len(page{})); uint64(len(g.pages)) != (g.tail+size-1)/size-g.head/size {
		t.Fatalf("pages of %d to %d: got %d, want those between", g.head, g.tail, len(g.pages))
	}
	return linked
}

// TestGrants runs random operations on the ids of one part and on a map: new ids, repeats, ids that are remembered for long, and
// ids that expire or are found expired. Hashes come from a small set, so that ids share tags.
func TestGrants(t *testing.T) {
	withoutRace(t)
	r := random(t)
	l := bucket("n", 1<<30, time.Hour)
	s, _ := withClock(0)
	moved, shrunk, growing := 0, 0, 0
	for range sized(60, 600) {
		var g grants
		var ids room
		ids.most = 1 << 30
		type grant struct {
			d       quota.Decision
			expires quota.Micros
		}
		model := map[string]grant{}
		spread := uint64(1) << r.IntN(12)
		hashes := map[string]uint64{}
		now := quota.Micros(1 << 50)
		for step := range 1500 {
			if step%300 == 0 && r.IntN(2) == 0 {
				now += quota.Micros(r.Int64N(int64(3 * window)))
				for range r.IntN(300) {
					size := len(g.index)
					if g.tidy(4, now, &ids); len(g.index) > 0 && len(g.index) < size {
						shrunk++
					}
				}
			}
			now += quota.Micros(r.Int64N(int64(window / 300)))
			id := fmt.Sprintf("%0*d", 1+r.IntN(2)*r.IntN(120), r.IntN(3000))
			cs := []quota.Charge{{Limit: l, Key: "k", Cost: 1, ID: id}}
			if r.IntN(4) == 0 {
				cs[0].Op, cs[0].Until = quota.OpSpend, now+quota.Micros(r.Int64N(int64(3*window)))
			}
			rq := s.request(nil, cs)
			if h, ok := hashes[id]; ok {
				rq.hash = h
			} else {
				rq.hash = r.Uint64N(spread) << 32
				hashes[id] = rq.hash
			}
			want, known := model[id]
			known = known && want.expires > now
			at, ok := g.find(&rq)
			if ok && g.expires(at) <= now {
				g.forget(at, &ids)
				ok = false
			}
			if ok != known {
				t.Fatalf("step %d: grant of id %q: got one %v, want %v", step, id, ok, known)
			}
			if ok {
				out := make([]quota.Decision, 1)
				if err := g.repeat(at, &rq, cs, out); err == nil {
					if out[0].Remaining != want.d.Remaining || out[0].Until != want.d.Until || out[0].At != want.d.At || g.expires(at) != want.expires {
						t.Fatalf("step %d: repeat of id %q: got %+v, until %d; want %+v, until %d", step, id, out[0], g.expires(at), want.d, want.expires)
					}
				}
			} else {
				ids.take(rq.class)
				d := quota.Decision{Allowed: true, Remaining: r.Int64(), Until: quota.Micros(r.Int64()), At: now}
				before := len(g.index)
				g.remember(&rq, cs, now, []quota.Decision{d})
				if before > 0 && len(g.index) > before {
					growing++
				}
				at, _ := g.find(&rq)
				model[id] = grant{d, g.expires(at)}
			}
			before, head := g.live, g.head
			dropped := 0
			for at := head; at < g.tail && uint32(g.word(at+2*word)) == 0; at += g.word(at+2*word) >> 32 {
				dropped++
			}
			g.tidy(r.IntN(6), now, &ids)
			if g.head > head && before == g.live && dropped == 0 {
				moved++
			}
			if step%25 == 0 {
				checked(t, &g)
			}
			if int64(g.live) != ids.used.Load() {
				t.Fatalf("step %d: ids: got room taken for %d, want %d", step, ids.used.Load(), g.live)
			}
		}
		now += 4 * window
		for range 10_000 {
			if g.tidy(grantsEach, now, &ids); g.tail == 0 {
				break
			}
		}
		if checked(t, &g); g.live != 0 || g.pages != nil || g.index != nil || ids.used.Load() != 0 {
			t.Fatalf("after all ids expired: got %d ids, %d pages, an index of %d; want none", g.live, len(g.pages), len(g.index))
		}
	}
	if moved < 100 || shrunk < 10 || growing < 100 {
		t.Errorf("got %d moves to the tail, %d shrinks, %d growths; want 100, 10, 100 or more", moved, shrunk, growing)
	}
}

// A charge with a new request id allocates no more than the memory that remembers it: less than one object, as charges without do.
func TestIDAllocs(t *testing.T) {
	s, _ := withClock(0)
	l := bucket("n", 1<<40, time.Hour)
	ids := make([]string, 20_000)
	for i := range ids {
		ids[i] = fmt.Sprintf("0190163d-8694-739b-aea5-%012d", i)
	}
	next := 0
	for name, call := range map[string]func(id string){
		"charge": func(id string) {
			s.Charge(bg, quota.Charge{Limit: l, Key: "team/agent", Cost: 1, ID: id})
		},
		"replay": func(string) {
			s.Charge(bg, quota.Charge{Limit: l, Key: "team/agent", Cost: 1, ID: ids[0]})
		},
	} {
		call(ids[0])
		if n := testing.AllocsPerRun(5000, func() { next++; call(ids[next]) }); n != 0 {
			t.Errorf("allocations of a %s with a request id: got %v, want 0", name, n)
		}
	}
}

func TestBytesPerID(t *testing.T) {
	s, _ := withClock(0)
	l := bucket("tokens", 1<<40, time.Hour)
	n := sized(100_000, 1_000_000)
	before := heap()
	for i := range n {
		take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("team-", i%1000, "/agent"), Cost: 1, ID: fmt.Sprintf("0190163d-8694-739b-aea5-%012d", i)})
	}
	each := float64(heap()-before) / float64(n)
	t.Logf("%.1f bytes an id", each)
	if each > 155 {
		t.Errorf("bytes an id: got %.1f, want 155 at most", each)
	}
	runtime.KeepAlive(s)
}
