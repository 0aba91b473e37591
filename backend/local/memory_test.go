package local

import (
	"errors"
	"fmt"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

func TestFloodEvictsNoKey(t *testing.T) {
	maxKeys, flood := sized(500, 10_000), sized(10_000, 1_000_000)
	s, _ := withClock(maxKeys)
	r := random(t)
	l := bucket("n", 2, time.Hour)
	exhausted := quota.Charge{Limit: l, Key: "exhausted", Cost: 1}
	take(t, s, exhausted)
	take(t, s, exhausted)
	if d := take(t, s, exhausted); d.Allowed {
		t.Fatalf("take of an exhausted key: got %+v, want it denied", d)
	}
	take(t, s, quota.Charge{Limit: l, Key: "half", Cost: 1})
	refused := 0
	for i := range flood {
		_, err := s.Charge(bg, quota.Charge{Limit: l, Key: fmt.Sprintf("%016x", r.Uint64()), Cost: 1})
		switch {
		case errors.Is(err, quota.ErrOverloaded):
			refused++
		case err != nil:
			t.Fatal(err)
		}
		if i%97 == 0 {
			if d := take(t, s, exhausted); d.Allowed {
				t.Fatalf("take of the exhausted key after %d others: got %+v, want it denied", i, d)
			}
			if s.Len() > maxKeys {
				t.Fatalf("keys: got %d, want %d at most", s.Len(), maxKeys)
			}
		}
	}
	if refused != flood-(maxKeys-2) || s.Len() != maxKeys {
		t.Errorf("got %d refused, %d keys; want %d, %d", refused, s.Len(), flood-(maxKeys-2), maxKeys)
	}
	s.checkAll(t)

	// Known keys go on, unknown ones may be asked about.
	if d := take(t, s, quota.Charge{Limit: l, Key: "half", Cost: 1}); !d.Allowed || d.Remaining != 0 {
		t.Errorf("take of a known key: got %+v, want it allowed, remaining 0", d)
	}
	for _, c := range []quota.Charge{{Op: quota.OpPeek, Cost: 1}, {Cost: 3}, {Cost: 0}, {Op: quota.OpReset}, {Op: quota.OpRefund, Cost: 1}} {
		c.Limit, c.Key = l, "unknown"
		if _, err := s.Charge(bg, c); err != nil {
			t.Errorf("%s of %d on an unknown key: got %v, want nil", c.Op, c.Cost, err)
		}
	}
	_, err := s.Charge(bg, quota.Charge{Limit: l, Key: "unknown", Op: quota.OpDebit, Cost: 1})
	if !errors.Is(err, quota.ErrOverloaded) {
		t.Errorf("debit to an unknown key: got %v, want ErrOverloaded", err)
	}
	// A list with one unknown key is refused whole.
	cs := []quota.Charge{{Limit: l, Key: "half", Op: quota.OpRefund, Cost: 1, MadeAt: 1 << 60}, {Limit: l, Key: "unknown", Cost: 1}}
	if err := s.ChargeAll(bg, cs, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrOverloaded) {
		t.Errorf("list with an unknown key: got %v, want ErrOverloaded", err)
	}
	if d := take(t, s, quota.Charge{Limit: l, Key: "half", Op: quota.OpPeek}); d.Remaining != 0 || s.Len() != maxKeys {
		t.Errorf("after the list: got %+v, %d keys; want remaining 0, %d keys", d, s.Len(), maxKeys)
	}
	// A freed place is taken.
	take(t, s, quota.Charge{Limit: l, Key: "half", Op: quota.OpReset})
	if d := take(t, s, quota.Charge{Limit: l, Key: "unknown", Cost: 1}); !d.Allowed {
		t.Errorf("take of a new key after a reset: got %+v, want it allowed", d)
	}
}

func TestUnknownKeysLeaveNoTrace(t *testing.T) {
	s, _ := withClock(0)
	for _, l := range everyRule(5, time.Second) {
		for i := range 100 {
			for _, c := range []quota.Charge{{Op: quota.OpPeek, Cost: 5}, {Op: quota.OpPeek, Cost: 6}, {Cost: 6}, {Cost: 0}, {Op: quota.OpReset}, {Op: quota.OpRefund, Cost: 2}, {Op: quota.OpDebit}} {
				c.Limit, c.Key = l, fmt.Sprint("k", i)
				take(t, s, c)
			}
			cs := []quota.Charge{{Limit: l, Key: fmt.Sprint("k", i), Cost: 1}, {Limit: l, Key: "other", Cost: 6}}
			if err := s.ChargeAll(bg, cs, make([]quota.Decision, 2)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if s.Len() != 0 {
		t.Errorf("keys: got %d, want 0", s.Len())
	}
	s.checkAll(t)
}

func TestSpaceIsReclaimed(t *testing.T) {
	for _, maxKeys := range []int{10, 100, 3000} {
		s, c := withClock(maxKeys)
		l := bucket("n", 100, 100*time.Second)
		fill := func(name string) {
			t.Helper()
			for i := range maxKeys {
				if d := take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint(name, i), Cost: 1}); !d.Allowed {
					t.Fatalf("take: got %+v, want it allowed", d)
				}
			}
			if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: "more", Cost: 1}); !errors.Is(err, quota.ErrOverloaded) {
				t.Fatalf("take of one key more: got %v, want ErrOverloaded", err)
			}
		}
		fill("a")
		c.add(time.Second - time.Microsecond)
		if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: "more", Cost: 1}); !errors.Is(err, quota.ErrOverloaded) {
			t.Fatalf("take before the keys are whole: got %v, want ErrOverloaded", err)
		}
		c.add(time.Microsecond)
		fill("b") // in the place of all that expired
		c.add(time.Second)
		cs := make([]quota.Charge, 8) // a list needs several places at once
		for i := range cs {
			cs[i] = quota.Charge{Limit: l, Key: fmt.Sprint("list", i), Cost: 1}
		}
		if err := s.ChargeAll(bg, cs, make([]quota.Decision, len(cs))); err != nil {
			t.Errorf("list of %d while all of %d keys have expired: got %v, want nil", len(cs), maxKeys, err)
		}
		s.checkAll(t)
	}
}

func TestSpaceIsReclaimedConcurrently(t *testing.T) {
	// Many find the store full of expired keys at the same time: none of them is refused.
	const maxKeys, clients = 512, 8
	l := bucket("n", 100, 100*time.Second)
	for range sized(20, 200) {
		s, c := withClock(maxKeys)
		for i := range maxKeys {
			take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("a", i), Cost: 1})
		}
		c.add(time.Minute)
		var wg sync.WaitGroup
		for client := range clients {
			wg.Go(func() {
				for i := range maxKeys / clients / 2 {
					if _, err := s.Charge(bg, quota.Charge{Limit: l, Key: fmt.Sprint(client, "-", i), Cost: 1}); err != nil {
						t.Errorf("take while all keys have expired: got %v, want nil", err)
					}
				}
			})
		}
		wg.Wait()
		s.checkAll(t)
	}
}

func TestOneExpiredKeyIsFound(t *testing.T) {
	// The search for space looks at some slots only, so it may take a few calls, each of which is refused.
	s, c := withClock(10_000)
	l := bucket("n", 10_000, 10_000*time.Second)
	for i := range 10_000 {
		take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("k", i), Cost: min(int64(i), 1)*1000 + 1})
	}
	c.add(time.Second)
	for tries := 1; ; tries++ {
		_, err := s.Charge(bg, quota.Charge{Limit: l, Key: "more", Cost: 1})
		if err == nil {
			return
		}
		if tries == 5 {
			t.Fatalf("take while one key has expired: got %v after %d tries, want nil", err, tries)
		}
	}
}

// TestMemoryFollowsActiveKeys lets a crowd expire while few keys are charged: ordinary work removes the crowd
// and gives its memory back, wherever it was.
func TestMemoryFollowsActiveKeys(t *testing.T) {
	for name, active := range map[string]int{"one key": 1, "a hundred keys": 100} {
		t.Run(name, func(t *testing.T) {
			crowd := sized(10_000, 300_000)
			s, c := withClock(0)
			l, slow, busy := bucket("n", 100, 100*time.Second), bucket("slow", 10, 1000*time.Hour), bucket("busy", 1<<30, time.Hour)
			before := heap()
			for i := range crowd {
				take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("crowd", i), Cost: 1})
				if i%100 == 0 {
					take(t, s, quota.Charge{Limit: slow, Key: fmt.Sprint("crowd", i), Cost: 1})
				}
			}
			held := heap() - before
			c.add(2 * time.Second)
			for i := range 30 * crowd {
				take(t, s, quota.Charge{Limit: busy, Key: fmt.Sprint("active", i%active), Cost: 1})
			}
			if n, want := s.Len(), crowd/100+active; n > want+crowd/100 {
				t.Errorf("keys left of %d: got %d, want %d at most", crowd, n, want+crowd/100)
			}
			s.checkAll(t)
			const least = 400_000 // the memory of 256 shards that were once in use
			if after := heap() - before; after > held/10+least {
				t.Errorf("bytes left of %d: got %d, want %d at most", held, after, held/10+least)
			}
			for i := 0; i < crowd; i += 100 {
				if d := take(t, s, quota.Charge{Limit: slow, Key: fmt.Sprint("crowd", i), Op: quota.OpPeek}); d.Remaining != 9 {
					t.Fatalf("remaining of a key that has not expired: got %+v, want 9", d)
				}
			}
			runtime.KeepAlive(s)
		})
	}
}

// Every call pays for sweeping, whatever its answer: a crowd that is whole again goes although no charge is granted any more.
func TestEveryCallSweeps(t *testing.T) {
	withoutRace(t)
	for name, call := range map[string]func(s *Store, i int){
		"denials": func(s *Store, i int) {
			s.Charge(bg, quota.Charge{Limit: bucket("n", 1, time.Hour), Key: fmt.Sprint("active", i%100), Cost: 2})
		},
		"peeks": func(s *Store, i int) {
			s.Charge(bg, quota.Charge{Limit: bucket("n", 1, time.Hour), Key: fmt.Sprint("active", i%100), Op: quota.OpPeek})
		},
		"misfits": func(s *Store, i int) {
			s.Charge(bg, quota.Charge{Limit: everyRule(9, time.Hour)[1+i%4], Key: "rule", Cost: 1})
		},
		"replays": func(s *Store, i int) {
			s.Charge(bg, quota.Charge{Limit: bucket("n", 1, time.Hour), Key: fmt.Sprint("active", i%100), Cost: 1, ID: "id"})
		},
		"denied lists": func(s *Store, i int) {
			cs := []quota.Charge{{Limit: bucket("n", 1, time.Hour), Key: fmt.Sprint("active", i%100), Cost: 2}, {Limit: bucket("n", 1, time.Hour), Key: "k", Cost: 1}}
			s.ChargeAll(bg, cs, make([]quota.Decision, 2))
		},
	} {
		t.Run(name, func(t *testing.T) {
			const crowd = 3000
			s, c := withClock(0)
			l := bucket("n", 100, 100*time.Second)
			for i := range crowd {
				take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("crowd", i), Cost: 1})
				take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("crowd", i), Op: quota.OpDebit, ID: "id"})
			}
			c.add(quota.IDWindow + time.Second)
			for i := range 40 * crowd {
				call(s, i)
			}
			if keys, ids := s.Len(), s.ids.used.Load(); keys > 200+crowd/20 || ids > 200+crowd/20 {
				t.Errorf("left of %d: got %d keys and %d ids, want %d at most", crowd, keys, ids, 200+crowd/20)
			}
			s.checkAll(t)
		})
	}
}

// While no key can be whole, sweeping rests; it goes on in time.
func TestSweepingRests(t *testing.T) {
	withoutRace(t)
	s, c := withClock(0)
	l := bucket("n", 100, 100*time.Second)
	const keys = 3000
	round := func() (swept int) {
		hands := [shardCount]int{}
		for i := range s.shards {
			hands[i] = s.shards[i].hand
		}
		for i := range 100 * keys {
			take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("k", i%keys), Op: quota.OpPeek})
		}
		for i := range s.shards {
			if s.shards[i].hand != hands[i] {
				swept++
			}
		}
		return swept
	}
	for i := range keys {
		take(t, s, quota.Charge{Limit: l, Key: fmt.Sprint("k", i), Cost: 1})
	}
	round() // which looks at every place of a shard twice
	if swept := round(); s.Len() != keys || swept != 0 {
		t.Errorf("while no key is whole: got %d keys, and %d shards swept; want %d, 0", s.Len(), swept, keys)
	}
	s.checkAll(t)
	c.add(100 * time.Second)
	if swept := round(); swept == 0 || s.Len() > keys/20 {
		t.Errorf("when all keys are whole: got %d keys, and %d shards swept; want %d at most, some", s.Len(), swept, keys/20)
	}
	s.checkAll(t)
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func TestBytesPerKey(t *testing.T) {
	l := bucket("tokens", 1000, time.Hour)
	whole := sized(100_000, 1_000_000)
	for _, n := range []int{whole / 2, whole * 3 / 4, whole} { // the index has another load in each
		keys := make([]string, n)
		total := 0
		for i := range keys {
			keys[i] = fmt.Sprintf("team-%03d/agent-%08d", i%1000, i)
			total += len(keys[i])
		}
		before := heap()
		s := New()
		for _, k := range keys {
			take(t, s, quota.Charge{Limit: l, Key: k, Cost: 1})
		}
		each := float64(heap()-before-int64(total)) / float64(n)
		t.Logf("%d keys: %.1f bytes a key beside its text", n, each)
		if each > 105 {
			t.Errorf("bytes a key of %d beside its text: got %.1f, want 105 at most", n, each)
		}
		runtime.KeepAlive(keys)
		runtime.KeepAlive(s)
	}
}

func TestKeysDoNotPinTheirSource(t *testing.T) {
	// A key cut from a large text, a request body for example, does not keep the text in memory.
	l := bucket("n", 10, time.Hour)
	s, _ := withClock(0)
	before := heap()
	for i := range 100 {
		body := fmt.Sprintf("%0100000d", i)
		take(t, s, quota.Charge{Limit: l, Key: body[len(body)-10:], Cost: 1})
		take(t, s, quota.Charge{Limit: l, Key: "k", Op: quota.OpDebit, Cost: 1, ID: body[len(body)-12:]})
		take(t, s, quota.Charge{Limit: l, Key: body[len(body)-20:], Op: quota.OpDebit, Cost: 1, ID: "id"})
	}
	if grown := heap() - before; grown > 2_000_000 {
		t.Errorf("bytes of 100 keys: got %d, want 2000000 at most", grown)
	}
	runtime.KeepAlive(s)
}
