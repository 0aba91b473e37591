package local

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// check fails unless indexes, slots, free lists, kinds and tails of a shard agree with each other.
func (sh *shard) check(t *testing.T) {
	t.Helper()
	if 4*sh.live > 3*len(sh.index) {
		t.Fatalf("index of %d: got %d keys, want three quarters at most", len(sh.index), sh.live)
	}
	live := 0
	switch old := sh.old; {
	case old == nil:
		live = checkTable(t, &sh.table, sh.index)
	case old.table == nil:
		live = checkTable(t, &sh.table, sh.index, old.index)
	default:
		live = checkTable(t, &sh.table, sh.index)
		for _, e := range old.index {
			if e != 0 {
				live++
			}
		}
	}
	if live != sh.live {
		t.Fatalf("live: got %d, want the %d linked slots", sh.live, live)
	}
	for _, sl := range sh.each {
		if sl.expires < sh.soonest {
			t.Fatalf("time of the first slot to be whole: got %d, want at most %d", sh.soonest, sl.expires)
		}
	}
	if old := sh.old; old != nil {
		for i, e := range old.index[:old.place] {
			if e != 0 {
				t.Fatalf("old index: got an entry at place %d, before %d, want none", i, old.place)
			}
		}
	}
}

// checkTable fails unless the indexes together name each slot in use once, and the rest of the table fits. It returns the number
// of slots in use.
func checkTable(t *testing.T, tb *table, indexes ...[]uint64) int {
	t.Helper()
	linked := map[uint32]bool{}
	pieces := map[uint32]bool{}
	slots := map[uint32]int{} // of each kind
	for i, e := range slices.Concat(indexes...) {
		if e == 0 {
			continue
		}
		n := uint32(e) - 1
		if int(n) >= tb.slots.used || linked[n] || tb.slots.at(n).size == 0 {
			t.Fatalf("entry %d: got slot %d of %d, which is free or linked twice; want one in use", i, n, tb.slots.used)
		}
		linked[n] = true
		sl := tb.slots.at(n)
		slots[sl.kind]++
		size, want := len(sl.text), int(sl.size)
		for at := sl.next; at != 0; at = tb.pieces.at(at - 1).next {
			if pieces[at-1] {
				t.Fatalf("piece %d is linked twice", at-1)
			}
			pieces[at-1] = true
			size += len(piece{}.text)
		}
		if over := size - want; over < 0 || over >= len(piece{}.text) {
			t.Fatalf("slot %d: got room for %d bytes, want it for %d and less than a piece more", n, size, want)
		}
	}
	checkSlab(t, "slot", &tb.slots, linked)
	checkSlab(t, "piece", &tb.pieces, pieces)
	for _, n := range tb.slots.free {
		if *tb.slots.at(n) != (slot{}) {
			t.Fatalf("free slot %d: got %+v, want zero", n, *tb.slots.at(n))
		}
	}
	for id, k := range tb.kinds.list {
		if k.slots != slots[uint32(id)] || (k.slots == 0) != (k.kind == kind{}) {
			t.Fatalf("slots of kind %d, %v: got %d, want %d", id, k.kind, k.slots, slots[uint32(id)])
		}
		if k.slots > 0 && tb.kinds.numbers.of[k.kind] != uint32(id) {
			t.Fatalf("number of kind %v: got %d, want %d", k.kind, tb.kinds.numbers.of[k.kind], id)
		}
	}
	if ns := tb.kinds.numbers; ns != nil && len(ns.of)+len(ns.free) != len(tb.kinds.list) {
		t.Fatalf("numbers of kinds: got %d in use and %d free, want %d together", len(ns.of), len(ns.free), len(tb.kinds.list))
	}
	for n := range tb.tails {
		if !linked[n] {
			t.Fatalf("free slot %d has a tail", n)
		}
	}
	return len(linked)
}

// TestSoonest makes and removes keys between sweeps: check sees that none of them may be whole earlier than sweep knows.
func TestSoonest(t *testing.T) {
	r := random(t)
	s, l := New(), bucket("n", 1, time.Second)
	for range sized(20, 300) {
		var sh shard
		for range 1000 {
			h := r.Uint64N(40) << 38 // all of one home, so that removals move other entries
			key := fmt.Sprint(h)
			switch n := sh.find(h, l.Handle(), key); {
			case n < 0:
				n = sh.insert(h, key, kind{limit: l.Handle()})
				sh.expire(sh.table.slots.at(uint32(n)), quota.Micros(1+r.IntN(1000)))
			case r.IntN(4) == 0:
				sh.remove(tag(h), uint32(n), s)
			}
			if r.IntN(50) == 0 {
				sh.soonest = 0 // so that sweep goes on
			}
			sh.sweep(r.IntN(6), 0, s)
			sh.check(t)
		}
	}
}

// each yields the slots in use.
func (sh *shard) each(yield func(*table, *slot) bool) {
	walk := func(tb *table, index []uint64) bool {
		for _, e := range index {
			if e != 0 && !yield(tb, tb.slots.at(uint32(e)-1)) {
				return false
			}
		}
		return true
	}
	if !walk(&sh.table, sh.index) || sh.old == nil {
		return
	}
	if tb := sh.old.table; tb != nil {
		walk(tb, sh.old.index)
	} else {
		walk(&sh.table, sh.old.index)
	}
}

// checkSlab fails unless each allocated value is in use or free, and not both.
func checkSlab[T any](t *testing.T, name string, s *slab[T], used map[uint32]bool) {
	t.Helper()
	free := map[uint32]bool{}
	for _, n := range s.free {
		if free[n] || used[n] {
			t.Fatalf("%s %d is free, and in use or free twice", name, n)
		}
		free[n] = true
	}
	if len(free)+len(used) != s.used || len(s.pages)*pageSize < s.used {
		t.Fatalf("allocated %ss: got %d, want %d free and %d live", name, s.used, len(free), len(used))
	}
}

// item returns the item of slot n.
func (sh *shard) item(n int) (it driver.Item) {
	sh.table.load(n, 0, &it)
	return it
}

// someKey returns one of many keys: of any length, many of them alike but for a byte near the end, where
// pieces meet, or at it.
func someKey(i int) string {
	size := []int{1, 21, 22, 23, 49, 50, 51, 78, 79, 512}[i%10]
	key := []byte(strings.Repeat("k", size))
	key[size-1-(i/10%2)*(size-1)/2] = byte('a' + i/20)
	return string(key)
}

// TestIndex runs random operations on a shard and on a map. Hashes come from a small set, so that keys share
// tags and runs grow long and go around the end.
func TestIndex(t *testing.T) {
	r := random(t)
	limits := []*quota.Limit{bucket("a", 1, time.Second), bucket("b", 1, time.Second)}
	type held struct {
		hash    uint64
		unit, a int64
		tail    []int64
	}
	type name struct{ key, limit string }
	shrinks, busy := 0, 0
	s := New()
	for range sized(60, 1500) {
		spread := uint64(1) << r.IntN(12)
		near := r.Uint64() // the tags' common part: where in the index the runs are
		var sh shard
		model := map[name]held{}
		hashes := map[name]uint64{}
		growing := true
		for step := range 1500 {
			shrinking := sh.old != nil && sh.old.table != nil
			if step%300 == 0 {
				growing = r.IntN(2) == 0
			}
			limit := limits[r.IntN(2)]
			nm := name{someKey(r.IntN(60)), limit.Name()}
			c := quota.Charge{Limit: limit, Key: nm.key}
			h, ok := hashes[nm]
			if !ok {
				h = (near + r.Uint64N(spread)) << 32
				hashes[nm] = h
			}
			n := sh.find(h, c.Limit.Handle(), c.Key)
			want, known := model[nm]
			if known != (n >= 0) {
				t.Fatalf("step %d: slot of %v: got %d, want one %v", step, nm, n, known)
			}
			if known {
				if it := sh.item(n); it.State.Unit != want.unit || it.State.A != want.a || !slices.Equal(it.State.Tail, want.tail) {
					t.Fatalf("step %d: state of %v: got %+v, want %+v", step, nm, it.State, want)
				}
			}
			switch grow := r.IntN(5) > 0; {
			case r.IntN(20) == 0 && 6*sh.live < len(sh.index) && len(sh.index) > 16 && sh.old == nil:
				sh.shrink()
			case r.IntN(6) == 0:
				sh.sweep(r.IntN(8), 0, s) // nothing is whole by then, but moves go on
			case known && grow != growing:
				sh.remove(tag(h), uint32(n), s)
				delete(model, nm)
			case known || grow == growing:
				if !known {
					n = sh.insert(h, nm.key, kind{limit: limit.Handle()})
				}
				it := driver.Item{Rule: quota.Rule{'x'}, State: quota.State{Unit: 1 + r.Int64N(50), A: r.Int64()}}
				if r.IntN(3) == 0 {
					it.State.Tail = []int64{r.Int64(), r.Int64()}
				}
				sh.save(n, &it, 1)
				model[nm] = held{h, it.State.Unit, it.State.A, it.State.Tail}
			}
			if step%25 == 0 {
				sh.check(t)
			}
			if sh.old != nil {
				busy++
			}
			if !shrinking && sh.old != nil && sh.old.table != nil {
				shrinks++
			}
		}
		sh.check(t)
		if sh.live != len(model) {
			t.Fatalf("live: got %d, want %d", sh.live, len(model))
		}
		for nm, want := range model {
			n := sh.find(want.hash, limits[nm.limit[0]-'a'].Handle(), nm.key)
			if n < 0 {
				t.Fatalf("slot of %v: got none, want one", nm)
			}
			if it := sh.item(n); it.State.Unit != want.unit || it.State.A != want.a || !slices.Equal(it.State.Tail, want.tail) {
				t.Fatalf("state of %v: got %+v, want %+v", nm, it.State, want)
			}
		}
	}
	if shrinks < 8 || busy < 1000 {
		t.Errorf("got %d shrinks, and a change of size under way in %d steps; want 8 or more, 1000 or more", shrinks, busy)
	}
}

// model is the plainest store: a map of items.
type model map[string]driver.Item

func (m model) apply(t *testing.T, cs []quota.Charge, now quota.Micros) []quota.Decision {
	t.Helper()
	items := make([]driver.Item, len(cs))
	out := make([]quota.Decision, len(cs))
	for i, c := range cs {
		items[i] = m[c.Limit.Name()+" "+c.Key]
	}
	if err := driver.Apply(cs, items, now, out); err != nil {
		t.Fatal(err)
	}
	for i, c := range cs {
		if items[i].Write {
			items[i].Write = false
			m[c.Limit.Name()+" "+c.Key] = items[i]
		}
	}
	return out
}

// checkAll checks every shard, and that the store counts its keys and ids right.
func (s *Store) checkAll(t *testing.T) {
	t.Helper()
	used := map[*room]int64{}
	classes := map[*room]map[uint64]int32{&s.keys: {}, &s.ids: {}}
	for i := range s.shards {
		sh := &s.shards[i]
		sh.check(t)
		for tb, sl := range sh.each {
			used[&s.keys]++
			classes[&s.keys][s.classOf(string(tb.read(nil, sl, int(sl.size))))]++
		}
		for _, at := range checked(t, &s.grants[i]) {
			class, key, _ := s.grants[i].sizes(at)
			if want := s.classOf(string(s.grants[i].read(nil, at+headerSize, key))); class != want {
				t.Fatalf("class of an id's record: got %d, want %d", class, want)
			}
			used[&s.ids]++
			classes[&s.ids][class]++
		}
	}
	for _, r := range []*room{&s.keys, &s.ids} {
		if r.used.Load() != used[r] {
			t.Fatalf("%s: got %d, want the %d live slots", r.of, r.used.Load(), used[r])
		}
		for class := range r.classes {
			if got, want := r.classes[class].Load(), classes[r][uint64(class)]; got != want {
				t.Fatalf("%s of class %d: got %d, want %d", r.of, class, got, want)
			}
		}
	}
}

// TestSweepingChangesNothing runs histories over many keys, in which crowds come and expire so that shards
// grow, sweep and shrink, beside a map from which nothing is ever removed: each decision is the same.
func TestSweepingChangesNothing(t *testing.T) {
	withoutRace(t)
	r := random(t)
	limits := append(everyRule(5, time.Second), bucket("slow", 1000, 24*time.Hour))
	s, c := withClock(0)
	m := model{}
	keys := sized(4_000, 40_000)
	most, least := 0, math.MaxInt
	for range sized(6, 12) {
		crowd := 1 + r.IntN(keys)
		for range 3 * crowd {
			c.add(time.Duration(r.IntN(20)) * time.Microsecond)
			same(t, s, m, c, randomCharges(r, limits, crowd))
		}
		most = max(most, s.Len())
		s.checkAll(t)
		c.add(3 * time.Second)
		for range 30_000 {
			c.add(time.Duration(r.IntN(20)) * time.Microsecond)
			same(t, s, m, c, randomCharges(r, limits[:5], 100))
		}
		least = min(least, s.Len()-slowKeys(s))
		s.checkAll(t)
	}
	if least > most/4 {
		t.Errorf("keys after sweeping: got %d of %d, want a quarter at most", least, most)
	}
	for i := range keys { // every key, also those that were moved and never asked for since
		for _, l := range limits {
			same(t, s, m, c, []quota.Charge{{Limit: l, Key: fmt.Sprint("k", i), Op: quota.OpPeek, Cost: 2}})
		}
	}
}

func slowKeys(s *Store) (n int) {
	for i := range s.shards {
		for tb, sl := range s.shards[i].each {
			if tb.kinds.list[sl.kind].limit.Value() == "slow" {
				n++
			}
		}
	}
	return n
}

func randomCharges(r *rand.Rand, limits []*quota.Limit, keys int) []quota.Charge {
	cs := []quota.Charge{{Limit: limits[r.IntN(len(limits))], Key: fmt.Sprint("k", r.IntN(keys)), Cost: r.Int64N(4)}}
	switch r.IntN(12) {
	case 0:
		cs[0].Op = quota.OpDebit
	case 1:
		cs[0].Op = quota.OpReset
	case 2:
		cs = append(cs, quota.Charge{Limit: limits[r.IntN(len(limits))], Key: fmt.Sprint("l", r.IntN(keys)), Cost: 3})
	}
	return cs
}

func same(t *testing.T, s *Store, m model, c *clock, cs []quota.Charge) {
	t.Helper()
	want := m.apply(t, cs, c.now())
	got := make([]quota.Decision, len(cs))
	var err error
	if len(cs) == 1 {
		got[0], err = s.Charge(bg, cs[0])
	} else {
		err = s.ChargeAll(bg, cs, got)
	}
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("%v: got %+v, %v; want %+v, nil", cs, got, err, want)
	}
}

func TestTailsGoWithTheirKeys(t *testing.T) {
	s, c := withClock(0)
	log := everyRule(3, time.Second)[2]
	slow := quota.NewLimit("slow", everyRule(3, time.Hour)[2].Algorithm())
	tails := func() (n int) {
		for i := range s.shards {
			sh := &s.shards[i]
			n += len(sh.table.tails)
			if sh.old != nil && sh.old.table != nil { // they move to the new table with their keys
				n += len(sh.old.table.tails)
			}
		}
		return n
	}
	const keys, kept = 3000, 100
	for i := range keys {
		take(t, s, quota.Charge{Limit: log, Key: fmt.Sprint("k", i), Cost: 1})
		if i < kept {
			take(t, s, quota.Charge{Limit: slow, Key: fmt.Sprint("k", i), Cost: 2})
		}
	}
	if got := tails(); got != keys+kept {
		t.Fatalf("tails: got %d, want %d", got, keys+kept)
	}
	c.add(2 * time.Second)
	for range 4 { // to move, to look and to remove, and to move again
		for i := range s.shards {
			s.shards[i].sweep(2*len(s.shards[i].index)+1, c.now(), s)
		}
	}
	s.checkAll(t)
	if got := tails(); got != kept || s.Len() != kept {
		t.Errorf("left: got %d tails and %d keys, want %d", got, s.Len(), kept)
	}
	for i := range kept {
		if d := take(t, s, quota.Charge{Limit: slow, Key: fmt.Sprint("k", i), Cost: 2}); d.Allowed || d.Remaining != 1 {
			t.Fatalf("key %d: got %+v, want it denied, remaining 1", i, d)
		}
	}
	for i := range kept {
		take(t, s, quota.Charge{Limit: slow, Key: fmt.Sprint("k", i), Op: quota.OpReset})
	}
	if got := tails(); got != 0 || s.Len() != 0 {
		t.Errorf("left after the resets: got %d tails and %d keys, want none", got, s.Len())
	}
}
