package enginetest

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
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

// batch has random charges, or lists of several, decided together.
func (w *worker) batch(t *testing.T, store *engine.Store) {
	w.tick()
	var calls [][]quota.Charge
	var items [][]*item
	lists := w.rng.IntN(2) == 0
	for want := 1 + w.rng.IntN(24); len(calls) < want; {
		cs, its := w.request(t)
		for range 1 + w.rng.IntN(3)*w.rng.IntN(3) { // the same again
			switch {
			case !lists:
				for i := range cs {
					calls, items = append(calls, cs[i:i+1]), append(items, its[i:i+1])
				}
			case len(cs) > 1:
				calls, items = append(calls, cs), append(items, its)
			}
		}
	}
	got, errs := engine.Together(bg, store, calls)
	held := map[*item]quota.Charge{}
	for _, i := range order(calls, items) {
		cs := calls[i]
		before, want := make([]driver.Item, len(cs)), make([]quota.Decision, len(cs))
		for j, it := range items[i] {
			before[j] = it.Item
		}
		after := slices.Clone(before)
		err := driver.Apply(cs, after, quota.Micros(w.now), want)
		if err != nil || errs[i] != nil || !slices.Equal(got[i], want) {
			t.Errorf("%s at %d, call %d of %d:%s\n decided %+v, %v\n Go says %+v, %v\n on %+v", w.name, w.now, i, len(calls), show(cs), got[i], errs[i], want, err, before)
			return
		}
		for j, it := range items[i] {
			it.Item, it.left = after[j], want[j].Remaining
			if want[j].Charged > 0 {
				it.receipts = append(it.receipts[max(0, len(it.receipts)-7):], quota.Micros(w.now))
			}
			held[it] = cs[j]
		}
		w.last, w.key = want[0], cs[0].Key
	}
	for it, c := range held {
		if text := w.server.held(t, c); text != packed(&it.Item) {
			t.Errorf("%s at %d left %x\n Go says %x = %+v%s", w.name, w.now, text, packed(&it.Item), it.Item, show([]quota.Charge{c}))
		}
	}
}

// order returns the calls in the order in which a batch decides them: those to a key whose limit had other
// numbers in a call before come after all the others.
func order(calls [][]quota.Charge, items [][]*item) (done []int) {
	rest := make([]int, len(calls))
	for i := range rest {
		rest[i] = i
	}
	for len(rest) > 0 {
		specs := map[*item]*quota.Spec{}
		var later []int
	next:
		for _, i := range rest {
			for j, it := range items[i] {
				if spec := specs[it]; spec != nil && *spec != *calls[i][j].Limit.Spec() {
					later = append(later, i)
					continue next
				}
			}
			for j, it := range items[i] {
				specs[it] = calls[i][j].Limit.Spec()
			}
			done = append(done, i)
		}
		rest = later
	}
	return done
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
	var calls [][]quota.Charge
	for range 60 {
		calls = append(calls, []quota.Charge{charge(a, "hot")})
	}
	for _, c := range []quota.Charge{charge(b, "hot"), charge(a, "list"), charge(b, "text"), charge(b, "cold")} {
		calls = append(calls, []quota.Charge{c})
	}
	for _, both := range []bool{false, true} {
		if both { // the same with another key in each
			for i, cs := range calls {
				calls[i] = append([]quota.Charge{charge(b, "both")}, cs...)
			}
			server.Del(bg, place(charge(a, "hot")), place(charge(b, "hot")), place(charge(b, "cold")))
		}
		warm := []quota.Charge{charge(a, "other"), charge(b, "other")}
		engine.Together(bg, store, [][]quota.Charge{warm, warm[:1], warm[1:]}) // the server learns the scripts
		server.resetCounts(t)
		got, errs := engine.Together(bg, store, calls)
		sets := 3
		if both {
			sets++
		}
		if n := server.count(t); n["evalsha"].calls != 1 || n["eval"].calls != 0 || n["set"].calls != sets {
			t.Errorf("EVALSHA %+v, EVAL %+v, SET %+v", n["evalsha"], n["eval"], n["set"])
		}
		for i, cs := range calls {
			last := len(cs) - 1
			key := cs[last].Key
			if foreign := key == "list" || key == "text"; foreign != errors.Is(errs[i], quota.ErrMisconfigured) || !foreign && errs[i] != nil {
				t.Errorf("charge %d to %s: %v", i, key, errs[i])
			}
			if d := got[i][last]; i < 60 && (d.Allowed != (i < 40) || d.Remaining != max(0, 39-int64(i))) {
				t.Errorf("charge %d to the hot key: %+v", i, d)
			}
		}
		last := len(got[60]) - 1
		if got[60][last].Remaining != 999 || got[63][last].Remaining != 999 || both && got[63][0].Remaining != 1000-42 {
			t.Errorf("the others: %+v, %+v", got[60], got[63])
		}
	}
}
