package conformance

import (
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var panicCases = []testCase{
	{rule: s4, name: "panics", run: panics},
	{rule: s4, name: "panics at each point", needs: []Feature{Exact}, provisional: "1.1", run: panicsAtEachPoint},
	{rule: s4, name: "panics of the clock", needs: []Feature{Exact, Clock}, provisional: "1.1", run: panicsOfTheClock},
	{rule: s4, name: "panics beside others", needs: []Feature{Exact}, provisional: "1.1", run: panicsBesideOthers},
}

// panicky is a tally that panics instead of a verdict on a take.
type panicky struct{ tally }

func (p panicky) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	if r.Op == quota.OpTake {
		panic("a fault in an algorithm")
	}
	return p.tally.Decide(s, r, now)
}

func (p panicky) Share(n int64) (quota.Algorithm, error) {
	return panicky{tally{p.capacity / max(n, 1)}}, nil
}

// panics makes calls in which an algorithm panics. The panic may reach the caller or become an error, and nothing is charged
// by the call; later calls, on the same keys too, are answered as if it had never been made.
func panics(t *trial) {
	h := t.open(Opening{})
	l := t.named("tally", goOnly, numbers{limit: 10})
	bad := quota.NewLimit(l.Name(), panicky{tally{10}})
	used := map[string]int64{}
	take := func(key string) {
		ds, _ := t.persist(h, false, quota.Charge{Limit: l, Key: key, Cost: 1})
		used[key]++
		if want := 10 - used[key]; len(ds) != 1 || !ds[0].Allowed || ds[0].Remaining != want {
			t.fatalf("take of 1 on %q after calls in which the algorithm panicked: got %v, want it allowed, with %d left", key, ds, want)
		}
	}
	take("g/a")
	take("g/b")
	for range 3 {
		if d, err := h.take(bg, quota.Charge{Limit: bad, Key: "g/a", Cost: 1}); err == nil {
			t.fatalf("take in which the algorithm panics: got %v, want the panic or an error", d)
		}
		take("g/a")
		if driver.AtomicityOf(h.store) == driver.OneKey {
			continue
		}
		if ds, err := h.chargeAll(bg, quota.Charge{Limit: l, Key: "g/b", Cost: 1}, quota.Charge{Limit: bad, Key: "g/a", Cost: 1}); err == nil {
			t.fatalf("list in which the algorithm panics: got %v, want the panic or an error", ds)
		}
		take("g/b")
	}
}

// trap panics in one of its next calls.
type trap struct {
	left  atomic.Int64 // the call that panics; 0 stands for none
	value any
}

func (w *trap) set(call int, value any) {
	w.value = value
	w.left.Store(int64(call))
}

func (w *trap) step() {
	if w.left.Load() > 0 && w.left.Add(-1) == 0 {
		panic(w.value)
	}
}

// tripping is a tally with a trap.
type tripping struct {
	tally
	wire *trap
}

func (a tripping) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	a.wire.step()
	return a.tally.Decide(s, r, now)
}

func (a tripping) Share(n int64) (quota.Algorithm, error) {
	return tripping{tally{a.capacity / max(n, 1)}, a.wire}, nil
}

// scenes are calls that panic at some point: operations, positions in a list, denials, ids. Limit i of a charge is said by its
// name: "bad" panics.
type scene struct {
	name    string
	charges []quota.Charge
}

func (t *trial) scenes(lists bool, good, bad *quota.Limit) (all []scene) {
	for _, op := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset} {
		all = append(all, scene{op.String(), []quota.Charge{{Limit: bad, Key: "g/a", Op: op, Cost: 1, MadeAt: 0}}})
	}
	all = append(all, scene{"a denied take", []quota.Charge{{Limit: bad, Key: "g/a", Cost: 1 << 20}}})
	if lists {
		const n = 4
		for at := range n {
			for _, denied := range []int{-1, 0, n - 1} {
				s := scene{fmt.Sprintf("a list in which charge %d panics", at+1), make([]quota.Charge, n)}
				for i := range s.charges {
					c := quota.Charge{Limit: good, Key: fmt.Sprint("g/", i), Cost: 1, Op: []quota.Op{quota.OpTake, quota.OpDebit, quota.OpRefund, quota.OpTake}[i]}
					if i == at {
						c.Limit = bad
					}
					if i == denied {
						c.Op, c.Cost = quota.OpTake, 1<<20
						s.name += fmt.Sprintf(", and charge %d is denied", i+1)
					}
					s.charges[i] = c
				}
				all = append(all, s)
			}
		}
	}
	if !t.lacks(IDs) {
		for _, s := range all {
			if driver.OnlyPeeks(s.charges) {
				continue
			}
			cs := make([]quota.Charge, len(s.charges))
			for i, c := range s.charges {
				c.ID = "r"
				cs[i] = c
			}
			all = append(all, scene{s.name + ", with an id", cs})
		}
	}
	return all
}

// trip makes the call of a scene again and again, which panics at its first use of something, at its second, and so on, until a
// call comes to its end. After each panic, all keys and a call for each show if a part of it was charged, or its id
// remembered. whole says that a call that panics may have been charged as a whole.
func (t *trial) trip(h, other *handle, s scene, n int, wire *trap, user string, whole bool) {
	values := []any{"a fault", errors.New("a fault"), 7, fmt.Errorf("a fault: %w", quota.ErrUnavailable)}
	cs := make([]quota.Charge, len(s.charges))
	used := make([]int64, len(cs))
	for i, c := range s.charges { // fresh keys, of which 5 tokens are taken
		c.Key = fmt.Sprintf("s%d/%s", n, c.Key[2:])
		cs[i] = c
		ds, unknown := t.persist(h, false, quota.Charge{Limit: c.Limit, Key: c.Key, Cost: 5})
		if unknown || !ds[0].Allowed {
			t.skipf("not judged, because the store does not answer")
		}
		used[i] = 5
	}
	look := func(h *handle, i int) int64 { return t.used(h, cs[i].Limit, cs[i].Key) }
	for call := 1; ; call++ {
		if call > 400 {
			t.fatalf("%s: got: %d uses of %s in one call, or a call that repeats itself when it panics; want: fewer", s.name, call, user)
		}
		for i := range cs {
			if cs[i].ID != "" {
				cs[i].ID = fmt.Sprint("r", call)
			}
		}
		wire.set(call, values[call%len(values)])
		var ds []quota.Decision
		var err error
		if len(cs) == 1 && call%2 == 0 {
			var d quota.Decision
			d, err = h.take(bg, cs[0])
			ds = []quota.Decision{d}
		} else {
			ds, err = h.chargeAll(bg, cs...)
		}
		fell := wire.left.Load() <= 0
		wire.set(0, nil)
		if !fell {
			if transient(err) || indeterminate(err) {
				t.skipf("not judged, because the store does not answer: %v", err)
			}
			if err != nil {
				t.fatalf("%s, in which %s works, after %d in which it panicked: ChargeAll%s:\n%s\n\twant decisions", s.name, user, call-1, show(cs), answer(ds, err))
			}
			if ds[0].Replayed {
				t.fatalf("%s, in which %s works: ChargeAll%s, an id that is new:\n%s\n\twant it not replayed", s.name, user, show(cs), answer(ds, nil))
			}
			return
		}
		if err == nil && !whole {
			t.fatalf("%s, in which %s panics in its use %d: ChargeAll%s:\n%s\n\twant the panic or an error", s.name, user, call, show(cs), answer(ds, nil))
		}
		var none, all bool
		got := make([]int64, len(cs))
		none, all = true, whole
		for i := range cs {
			got[i] = look(h, i)
			if by := look(other, i); by != got[i] {
				t.fatalf("%s, after %s panicked in its use %d in ChargeAll%s: %q:\n\tgot  %d tokens charged by the one handle, %d by the other\n\twant the same", s.name, user, call, show(cs), cs[i].Key, got[i], by)
			}
			then := used[i]
			switch c := &cs[i]; c.Op {
			case quota.OpTake, quota.OpDebit:
				if c.Cost < 1<<20 {
					then += c.Cost
				} else {
					all = false // a denial
				}
			case quota.OpRefund:
				then = max(then-c.Cost, 0)
			case quota.OpReset:
				then = 0
			}
			none = none && got[i] == used[i]
			all = all && got[i] == then
		}
		if !none && !all {
			t.fatalf("%s, after %s panicked in its use %d in ChargeAll%s:\n\tgot  %v tokens charged\n\twant %v, as before", s.name, user, call, show(cs), got, used)
		}
		copy(used, got)
		// Each key still decides, and so do all together.
		for i := range cs {
			d, unknown := t.persist(h, false, quota.Charge{Limit: cs[i].Limit, Key: cs[i].Key, Cost: 1})
			if unknown {
				t.skipf("not judged, because the store does not answer")
			}
			if used[i]++; !d[0].Allowed || cs[i].Limit.Spec().Capacity-d[0].Remaining != used[i] {
				t.fatalf("%s, a take of 1 on %q after %s panicked:\n%s\n\twant it allowed, with %d left", s.name, cs[i].Key, user, answer(d, nil), cs[i].Limit.Spec().Capacity-used[i])
			}
		}
	}
}

// panicsAtEachPoint makes calls in which an algorithm panics: at its first question, its second, and so on.
func panicsAtEachPoint(t *trial) {
	wire := &trap{}
	good := t.named("good", goOnly, numbers{limit: 1000})
	bad := quota.NewLimit("bad", tripping{tally{1000}, wire})
	o := Opening{Data: t.data()}
	h := t.open(o)
	other := h
	if !t.lacks(Shared) {
		other = t.open(o)
	}
	for n, s := range t.scenes(driver.AtomicityOf(h.store) != driver.OneKey, good, bad) {
		t.trip(h, other, s, n, wire, "the algorithm", false)
	}
}

// panicsOfTheClock makes calls in which the clock panics: when it is read first, second, and so on. Only reads on the goroutine
// of the call panic, because a panic on a goroutine of the store's ends the program.
func panicsOfTheClock(t *trial) {
	wire := &trap{}
	c := newClock()
	o := Opening{Data: t.data(), Clock: func() time.Time {
		if wire.left.Load() > 0 {
			stack := make([]byte, 1<<14)
			if strings.Contains(string(stack[:runtime.Stack(stack, false)]), "(*trial).trip(") {
				wire.step()
			}
		}
		return c.time()
	}}
	h := t.open(o)
	other := h
	if !t.lacks(Shared) {
		other = t.open(o)
	}
	good, bad := t.named("good", goOnly, numbers{limit: 1000}), t.named("bad", goOnly, numbers{limit: 1000})
	for n, s := range t.scenes(driver.AtomicityOf(h.store) != driver.OneKey, good, bad) {
		t.trip(h, other, s, n, wire, "the clock", true)
	}
}

// panicsBesideOthers has goroutines use the same keys, some by an algorithm that panics now and then. The calls of the others
// are answered, each once, and a call that panicked has charged nothing.
func panicsBesideOthers(t *trial) {
	const callers, calls = 8, 100
	hs := t.handles(t.root, callers)
	lists := driver.AtomicityOf(hs[0].store) != driver.OneKey
	l := t.named("tally", goOnly, numbers{limit: 1 << 30})
	bad := quota.NewLimit(l.Name(), panicky{tally{1 << 30}})
	var granted, unknown, listed, unknownLists atomic.Int64
	t.together(callers, func(i int) {
		for n := range calls {
			runtime.Gosched()
			cs := []quota.Charge{{Limit: l, Key: "g/a", Cost: 1}}
			if lists && n%3 == 0 {
				cs = append(cs, quota.Charge{Limit: l, Key: "g/b", Cost: 1})
			}
			if i/2%2 == 0 { // the last charge panics, when the first is decided
				cs[len(cs)-1].Limit = bad
				if ds, err := hs[i].chargeAll(bg, cs...); err == nil {
					t.fatalf("ChargeAll%s, in which the algorithm panics:\n%s\n\twant the panic or an error", show(cs), answer(ds, nil))
				}
				continue
			}
			ds, unsure := t.persist(hs[i], len(cs) > 1, cs...)
			switch {
			case unsure:
				unknown.Add(1)
				if len(cs) > 1 {
					unknownLists.Add(1)
				}
			case !quota.Granted(ds):
				t.fatalf("ChargeAll%s, beside calls in which the algorithm panics:\n%s\n\twant a grant", show(cs), answer(ds, nil))
			default:
				granted.Add(1)
				if len(cs) > 1 {
					listed.Add(1)
				}
			}
		}
	})
	for key, n := range map[string][2]int64{"g/a": {granted.Load(), unknown.Load()}, "g/b": {listed.Load(), unknownLists.Load()}} {
		if got := t.used(hs[0], l, key); got < n[0] || got > n[0]+n[1] {
			t.fatalf("%q, after calls beside others in which the algorithm panicked:\n\tgot  %d tokens charged\n\twant %d, and up to %d more, whose outcome is unknown", key, got, n[0], n[1])
		}
	}
}
