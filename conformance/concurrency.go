package conformance

import (
	"fmt"
	"strings"
	"sync/atomic"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var concurrencyCases = []testCase{
	{rule: s2, name: "pairs", needs: []Feature{Exact}, run: pairs},
	{rule: c4, name: "budget", run: budget},
	{rule: c4, name: "linearizable", needs: []Feature{Exact}, run: func(t *trial) { linearizable(t, kinds, anyOps, 1) }},
	{rule: c4, name: "linearizable holds", needs: []Feature{Exact}, provisional: "1.1", run: func(t *trial) { linearizable(t, heldKinds, holdOps, 59_999, 1) }},
	{rule: c5, name: "total", run: total},
}

// budget has goroutines race for tokens that do not come back, until all are spent.
func budget(t *trial) {
	const capacity, callers = 120, 8
	for _, k := range []kind{tokenBucket, fromFirst, slidingLog, goOnly} {
		t.within(func(in *recorder) {
			l := t.named("tokens", k, numbers{capacity, 1, 100 * time.Hour})
			var granted, unknown atomic.Int64
			hs := t.handles(in, callers)
			lists := driver.AtomicityOf(hs[0].store) != driver.OneKey
			take := func(h *handle, cost int64, list bool) bool {
				cs := []quota.Charge{{Limit: l, Key: "k", Cost: cost}}
				if list && lists {
					cs = append(cs, quota.Charge{Limit: l, Key: "k/free", Op: quota.OpPeek, Cost: 1})
				}
				ds, unsure := t.persist(h, list, cs...)
				switch {
				case unsure:
					unknown.Add(cost)
				case ds[0].Allowed:
					granted.Add(cost)
					return true
				}
				return unsure
			}
			t.together(callers, func(i int) {
				rng := t.suite.random(fmt.Sprint(t.of.path(), k.name, i))
				for n := 0; n < capacity && take(hs[i], 1+rng.Int64N(3), rng.IntN(3) == 0); n++ {
				}
				for n := 0; n < capacity && take(hs[i], 1, rng.IntN(3) == 0); n++ {
				}
			})
			got, most := granted.Load(), granted.Load()+unknown.Load()
			switch {
			case got > capacity:
				t.fatalf("got: %d goroutines were granted %d tokens of %s; want: no more than %d", callers, got, t.describe(l), capacity)
			case t.lacks(Exact) && most == 0:
				t.fatalf("got: no token was granted of %s; want: at least 1", t.describe(l))
			case !t.lacks(Exact) && most < capacity:
				t.fatalf("got: %d goroutines were granted %d tokens of %s before they were denied one; want: all %d", callers, got, t.describe(l), capacity)
			}
		})
	}
}

// pairs has goroutines charge two keys together, and peek at both together.
func pairs(t *trial) {
	needLists(t)
	l := t.named("tokens", goOnly, numbers{limit: 1 << 30})
	tight := t.named("tight", goOnly, numbers{limit: 40})
	hs := t.handles(t.root, 6)
	var granted, unknown atomic.Int64
	pair := func(op quota.Op, cost int64) []quota.Charge {
		return []quota.Charge{{Limit: l, Key: "g/a", Op: op, Cost: cost}, {Limit: l, Key: "g/b", Op: op, Cost: cost}}
	}
	t.together(len(hs), func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		for range t.suite.sized(40) {
			if rng.IntN(3) == 0 {
				ds, unsure := t.persist(hs[i], true, pair(quota.OpPeek, 1)...)
				if !unsure && ds[0].Remaining != ds[1].Remaining {
					t.fatalf("two keys that are charged in lists only:\n%s\n\twant the same remaining for both", answer(ds, nil))
				}
				continue
			}
			cs := append(pair(quota.OpTake, 1), quota.Charge{Limit: tight, Key: "g/c", Cost: 1})
			if rng.IntN(2) == 0 { // the charge that is denied comes first, or last
				cs[0], cs[2] = cs[2], cs[0]
			}
			switch ds, unsure := t.persist(hs[i], true, cs...); {
			case unsure:
				unknown.Add(1)
			case quota.Granted(ds):
				granted.Add(1)
			}
		}
	})
	for _, key := range []string{"g/a", "g/b"} {
		if got, least := t.used(hs[0], l, key), granted.Load(); got < least || got > least+unknown.Load() {
			t.fatalf("got: %d tokens are charged to %q; want: %d, which is 1 for each list that was granted, and up to %d more, whose outcome is unknown", got, key, least, unknown.Load())
		}
	}
}

// linear is the sequential model of a store: Apply on the states of some keys, at the time of the decision. Its state
// is the text of the keys' states, which can be compared.
type linear struct{ places []place }

func (m linear) step(state, in, out any) (bool, any) {
	lines := strings.Split(state.(string), "\n")
	cs, got := in.([]quota.Charge), out.([]quota.Decision)
	items := make([]driver.Item, len(cs))
	at := make([]int, len(cs))
	for i := range cs {
		for j, p := range m.places {
			if p == placeOf(&cs[i]) {
				at[i] = j
			}
		}
		var err error
		if items[i], err = driver.ParseItem(lines[at[i]]); err != nil {
			return false, state
		}
	}
	want := make([]quota.Decision, len(cs))
	if err := driver.Apply(cs, items, got[0].At, want); err != nil || differ(got, nil, want, nil) != "" {
		return false, state
	}
	for i := range items {
		if items[i].Write {
			lines[at[i]] = ""
			if !items[i].State.IsZero() {
				lines[at[i]] = string(items[i].AppendText(nil))
			}
		}
	}
	return true, strings.Join(lines, "\n")
}

// linearizable records the calls and answers of goroutines, and looks for an order that explains them. The refills, of which
// each round has another, are the ttls of holds too: with 1 they lapse meanwhile.
func linearizable(t *trial, kinds []kind, ops []quota.Op, refills ...int64) {
	const clients, calls = 6, 8
	t.rounds(4*len(kinds), func(round int) {
		t.within(func(in *recorder) {
			k := kinds[round%len(kinds)]
			l := t.named("tokens", k, numbers{6, refills[round/len(kinds)%len(refills)], 100 * time.Hour})
			hs := t.handles(in, clients)
			lists := driver.AtomicityOf(hs[0].store) != driver.OneKey
			names := []string{"g/a", "g/b", "g/c"}
			model := linear{}
			for _, name := range names {
				model.places = append(model.places, place{l.Name(), name})
			}
			histories := make([][]porcupine.Operation, clients)
			var tick atomic.Int64
			var unknown atomic.Bool
			t.together(clients, func(i int) {
				rng := t.suite.random(fmt.Sprint(t.of.path(), round, i))
				made, held := map[string]quota.Micros{}, map[string]quota.Decision{}
				for range calls {
					var cs []quota.Charge
					for j, n := range rng.Perm(len(names)) {
						if j > 0 && (!lists || rng.IntN(3) > 0) {
							continue
						}
						c := quota.Charge{Limit: l, Key: names[n], Cost: 1 + rng.Int64N(3), Op: oneOf(rng, ops)}
						switch of, ok := held[c.Key]; {
						case c.Op == quota.OpRefund:
							c.MadeAt = made[c.Key]
						case c.Op != quota.OpSpend && c.Op != quota.OpRenew:
						case !ok:
							c.Op = quota.OpHold
						default:
							if c.Held, c.Until = of.Held, of.Until; c.Op == quota.OpRenew {
								c.Cost = 0
							}
						}
						accept(rng, &c, quota.Decision{ResetAfter: 1000 * time.Hour})
						cs = append(cs, c)
					}
					op := porcupine.Operation{ClientId: i, Input: cs, Call: tick.Add(1)}
					ds, unsure := t.persist(hs[i], rng.IntN(2) == 0, cs...)
					op.Return = tick.Add(1)
					if unsure {
						unknown.Store(true)
						return
					}
					for j := range ds {
						if ds[j].Charged > 0 {
							made[cs[j].Key] = ds[j].At
						}
						if ds[j].Until > 0 {
							held[cs[j].Key] = ds[j]
						}
					}
					op.Output = ds
					histories[i] = append(histories[i], op)
				}
			})
			if unknown.Load() {
				return
			}
			var all []porcupine.Operation
			for _, h := range histories {
				all = append(all, h...)
			}
			m := porcupine.Model{
				Init: func() any { return strings.Repeat("\n", len(names)-1) },
				Step: model.step,
			}
			t.own.Add(1)
			defer t.own.Add(-1)
			if porcupine.CheckOperationsTimeout(m, all, 10*time.Second) == porcupine.Illegal {
				t.fatalf("No order of these calls explains the answers, each at the time it tells; from and to are when it began and ended.%s\n\t%q is %s", history(m, all), l.Name(), t.describe(l))
			}
		})
	})
}

// history returns, as text, the shortest beginning of a history that no order explains.
func history(m porcupine.Model, all []porcupine.Operation) string {
	end := int64(0)
	for _, op := range all {
		end = max(end, op.Return)
	}
	upTo := func(end int64) (some []porcupine.Operation) {
		for _, op := range all {
			if op.Return <= end {
				some = append(some, op)
			}
		}
		return some
	}
	// A call that had begun by then, and not ended, may matter; mostly it does not.
	for at, until := int64(1), time.Now().Add(5*time.Second); at < end && time.Now().Before(until); at++ {
		if porcupine.CheckOperationsTimeout(m, upTo(at), time.Second) == porcupine.Illegal {
			end = at
		}
	}
	var b strings.Builder
	for _, op := range upTo(end) {
		fmt.Fprintf(&b, "\n\tfrom %d to %d:%s\n%s", op.Call, op.Return, show(op.Input.([]quota.Charge)), answer(op.Output.([]quota.Decision), nil))
	}
	return b.String()
}

// total has goroutines ask for twice as many tokens as there are.
func total(t *trial) {
	const capacity, callers = 60, 4
	l := t.named("tokens", fromFirst, numbers{limit: capacity, period: year})
	hs := t.handles(t.root, callers)
	var granted, unknown atomic.Int64
	t.together(callers, func(i int) {
		for range 2 * capacity / callers {
			switch ds, unsure := t.persist(hs[i], false, quota.Charge{Limit: l, Key: "k", Cost: 1}); {
			case unsure:
				unknown.Add(1)
			case ds[0].Allowed:
				granted.Add(1)
			}
		}
	})
	got, most := granted.Load(), granted.Load()+unknown.Load()
	least := int64(capacity)
	if t.lacks(Exact) {
		least = 1
	}
	if got > capacity || most < least {
		t.fatalf("got: %d of %d single tokens were granted, of %s; want: %d to %d", got, 2*capacity, t.describe(l), least, capacity)
	}
}
