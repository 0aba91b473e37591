package enginetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// Batches: charges that go together, to the same keys and others, decide and leave behind exactly what the
// Go kernels say of each alone, in order, and take one script call.
func Batches(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	const workers = 16
	n := seed(t)
	var wg sync.WaitGroup
	for i := range workers {
		r := &run{server: server, injected: true}
		w := &worker{run: r, name: fmt.Sprintf("batch.%d", i), rng: rand.New(rand.NewPCG(n, uint64(i))), now: 1_795_427_141_791_724,
			model: map[string]*item{}, limits: map[string]*quota.Limit{}, key: fmt.Sprintf("batch.%d.0/agent", i)}
		store := open(engine.Options{Clock: func() time.Time { return time.UnixMicro(w.now) }})
		wg.Go(func() {
			for range sized(40_000, 400_000) / workers / 16 {
				if t.Failed() {
					return
				}
				w.batch(t, store)
			}
		})
	}
	wg.Wait()
}

// batch has random charges decided together.
func (w *worker) batch(t *testing.T, store *engine.Store) {
	w.tick()
	var cs []quota.Charge
	var items []*item
	for want := 1 + w.rng.IntN(32); len(cs) < want; {
		c, it := w.request(t)
		for range 1 + w.rng.IntN(3)*w.rng.IntN(3) { // the same again
			cs, items = append(cs, c...), append(items, it...)
		}
	}
	const most = 60
	cs, items = cs[:min(len(cs), most)], items[:min(len(items), most)]
	got, errs := engine.Together(bg, store, cs)
	held := map[*item]int{}
	for _, left := range order(cs, items) {
		for _, i := range left {
			it, before := items[i], items[i].Item
			want, err := quota.ApplyOne(&cs[i], &it.Item, quota.Micros(w.now))
			if err != nil || errs[i] != nil || got[i] != want {
				t.Errorf("%s at %d, charge %d of %d:%s\n decided %+v, %v\n Go says %+v, %v\n on %+v", w.name, w.now, i, len(cs), show(cs[i:i+1]), got[i], errs[i], want, err, before)
				return
			}
			it.left = want.Remaining
			if want.Charged > 0 {
				it.receipts = append(it.receipts[max(0, len(it.receipts)-7):], quota.Micros(w.now))
			}
			held[it] = i
			w.last, w.key = want, cs[i].Key
		}
	}
	for it, i := range held {
		if text := w.server.held(t, cs[i]); text != packed(&it.Item) {
			t.Errorf("%s at %d left %x\n Go says %x = %+v%s", w.name, w.now, text, packed(&it.Item), it.Item, show(cs[i:i+1]))
		}
	}
}

// order returns the charges in the order in which a batch decides them: those whose limit has other numbers
// than the first to the same key come after all the others.
func order(cs []quota.Charge, items []*item) (passes [][]int) {
	rest := make([]int, len(cs))
	for i := range rest {
		rest[i] = i
	}
	for len(rest) > 0 {
		first := map[*item]*quota.Spec{}
		var now, later []int
		for _, i := range rest {
			spec := cs[i].Limit.Spec()
			if first[items[i]] == nil {
				first[items[i]] = spec
			}
			if *first[items[i]] == *spec {
				now = append(now, i)
			} else {
				later = append(later, i)
			}
		}
		passes, rest = append(passes, now), later
	}
	return passes
}

// BatchCalls: a batch is one script call, whatever is in it, and a key that holds something else fails nobody
// but those who ask for it.
func BatchCalls(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	store := open(engine.Options{})
	a, b := yearly("a", 40), limitOf("b", quota.Must(newRule(bucket, 1000, 1, time.Hour)))
	charge := func(l *quota.Limit, key string) quota.Charge { return quota.Charge{Limit: l, Key: key, Cost: 1} }
	if err := server.LPush(bg, place(charge(a, "list")), "x").Err(); err != nil {
		t.Fatal(err)
	}
	if err := server.Set(bg, place(charge(b, "text")), "17", 0).Err(); err != nil {
		t.Fatal(err)
	}
	var cs []quota.Charge
	for range 60 {
		cs = append(cs, charge(a, "hot"))
	}
	cs = append(cs, charge(b, "hot"), charge(a, "list"), charge(b, "text"), charge(b, "cold"))
	engine.Together(bg, store, []quota.Charge{charge(a, "other"), charge(b, "other")}) // the server learns the script
	server.resetCounts(t)
	got, errs := engine.Together(bg, store, cs)
	if n := server.count(t); n["evalsha"].calls != 1 || n["eval"].calls != 0 || n["set"].calls != 3 {
		t.Errorf("EVALSHA %+v, EVAL %+v, SET %+v", n["evalsha"], n["eval"], n["set"])
	}
	for i := range cs {
		key := cs[i].Key
		if foreign := key == "list" || key == "text"; foreign != errors.Is(errs[i], quota.ErrMisconfigured) || !foreign && errs[i] != nil {
			t.Errorf("charge %d to %s: %v", i, key, errs[i])
		}
		if i < 60 && (got[i].Allowed != (i < 40) || got[i].Remaining != max(0, 39-int64(i))) {
			t.Errorf("charge %d to the hot key: %+v", i, got[i])
		}
	}
	if got[60].Remaining != 999 || got[63].Remaining != 999 {
		t.Errorf("the others: %+v, %+v", got[60], got[63])
	}
}
