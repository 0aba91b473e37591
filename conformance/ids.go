package conformance

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var idCases = []testCase{
	{rule: c1, name: "ids", needs: []Feature{Exact, IDs}, run: distinctIDs},
	{rule: c3, name: "race", needs: []Feature{IDs}, run: sameID},
	{rule: c3, name: "refused", run: refusedIDs},
	{rule: c1, name: "ids that meet", needs: []Feature{Exact, IDs}, provisional: "1.1", run: meetingIDs},
	{rule: c3, name: "one field", needs: []Feature{Exact, IDs}, provisional: "1.1", run: otherField},
	{rule: c3, name: "large", needs: []Feature{Exact, IDs}, provisional: "1.1", run: largeGrants},
	{rule: c3, name: "thousands", needs: []Feature{IDs}, provisional: "1.1", run: thousandsOfIDs},
	{rule: c3, name: "handles", needs: []Feature{IDs, Shared}, provisional: "1.1", run: idsByHandles},
}

// distinctIDs makes charges under similar ids, and repeats all.
func distinctIDs(t *trial) {
	l := t.named("limit", goOnly, numbers{limit: 1 << 30})
	var trace []step
	add := func(id, key string, cost int64) {
		if len(id) > 128 {
			return
		}
		trace = append(trace, step{id: 1 + len(trace), list: t.rng.IntN(2) == 0, charges: []charge{{Charge: quota.Charge{Limit: l, Key: key, Cost: cost, ID: id}}}})
	}
	for range 2 {
		for i, id := range texts {
			add(id, "g", int64(1+i%97))
		}
		// Ids count within their group, and are no keys.
		for i, key := range []string{"a", "A", "b", "{a}", "a#r", "{a}#r", "g#r", "#r", "r"} {
			add("r", key, int64(1+i))
			add("r2", key+"/sub", int64(1+i))
		}
	}
	t.perform(trace)
}

// refusedIDs calls a store that does not remember ids with an id: it must refuse, for its callers would repeat the call
// and be charged each time.
func refusedIDs(t *trial) {
	if !t.lacks(IDs) {
		t.excusef("the backend remembers ids")
	}
	h := t.open(Opening{})
	c := quota.Charge{Limit: t.named("tokens", fromFirst, numbers{limit: 10, period: year}), Key: "k", Cost: 1, ID: "r"}
	d, err := h.take(bg, c)
	if !errors.Is(err, quota.ErrCrossSlot) {
		t.fatalf("Charge%s:\n%s\n\twant quota.ErrCrossSlot", show([]quota.Charge{c}), answer([]quota.Decision{d}, err))
	}
	if got := t.used(h, c.Limit, c.Key); got != 0 {
		t.fatalf("got: %d tokens are charged by a call that was refused; want: 0", got)
	}
}

// sameID has many goroutines make the same call under the same id.
func sameID(t *trial) {
	t.rounds(5, func(n int) {
		t.within(func(in *recorder) {
			hs := t.handles(in, 8)
			c := quota.Charge{Limit: t.named("tokens", goOnly, numbers{limit: 1 << 30}), Key: "g/k", Cost: 2, ID: "r"}
			var made, unknown atomic.Int64
			t.together(len(hs), func(i int) {
				for j := range 4 {
					ds, unsure := t.persist(hs[i], j%2 == 0, c)
					switch {
					case unsure:
						unknown.Add(1)
					case !ds[0].Allowed || ds[0].Charged != 2:
						t.fatalf("many calls of%s:\n%s\n\twant a grant, or its repeat", show([]quota.Charge{c}), answer(ds, nil))
					case !ds[0].Replayed:
						made.Add(1)
					}
				}
			})
			if n := made.Load(); n > 1 || n == 0 && unknown.Load() == 0 {
				t.fatalf("many calls of%s:\n\tgot  %d of them granted anew\n\twant 1, and the others replayed", show([]quota.Charge{c}), n)
			}
			if got := t.used(hs[0], c.Limit, c.Key); got != 2 && !t.lacks(Exact) {
				t.fatalf("many calls of%s:\n\tgot  %d tokens charged\n\twant 2", show([]quota.Charge{c}), got)
			}
		})
	})
}

// separators are texts that a store may put between the parts of a name: each character of ASCII but '/', which no group
// has, and some longer ones.
var separators = func() []string {
	all := []string{"", "::", "#id", "}#", "#{", "%23", "%3A", "\u00a0", "\u00ff", "\u2028", "\U0010ffff", "id", "\r\n"}
	for c := rune(0); c < 128; c++ {
		if c != '/' {
			all = append(all, string(c))
		}
	}
	return all
}()

// meetingIDs makes charges whose group and id, put together with any separator, give one text; whose ids look like the keys
// and limits of the same group; and whose lengths put before them do.
func meetingIDs(t *trial) {
	l := t.named("limit", goOnly, numbers{limit: 1 << 30})
	var trace []step
	add := func(id, key string) {
		trace = append(trace, step{id: 1 + len(trace), other: t.rng.IntN(2) == 0, list: t.rng.IntN(2) == 0,
			charges: []charge{{Charge: quota.Charge{Limit: l, Key: key, Cost: int64(1 + len(trace)%97), ID: id}}}})
	}
	for i, s := range separators[:t.suite.part(len(separators))] {
		a, b, c := fmt.Sprint("a", i), fmt.Sprint("b", i), fmt.Sprint("c", i)
		add(b+s+c, a)
		add(c, a+s+b)
		add(b+s+c, a+s)
		add(s+b, a)
		add(b, a+s)
		for j, id := range []string{s + "limit", "k" + s + "limit", "limit" + s + "k", s + "k", "g" + s + "k"} {
			add(id, []string{"g", "g/k"}[j%2])
		}
	}
	for _, n := range []int{1, 11, 2, 12} {
		add(fmt.Sprint(n, "1x"), fmt.Sprint(n))
		add(fmt.Sprint("1x", n), fmt.Sprint(n, 1))
	}
	for _, s := range trace { // each is repeated, or refused again
		s.id = 1 + len(trace)
		trace = append(trace, s)
	}
	t.perform(trace)
}

// otherField grants ids to lists, repeats each under its id with one field changed by itself, which must be refused, and then
// as it was, which must be answered as the first time. Peeks show that the refused calls charged nothing.
func otherField(t *trial) {
	numbersOf := numbers{limit: 1 << 30, refill: 1 << 20, period: time.Second}
	l, m := t.named("tokens", tokenBucket, numbersOf), t.named("tokens2", tokenBucket, numbersOf)
	type list = []quota.Charge
	at := func(f func(c *quota.Charge)) func(list, int) list {
		return func(cs list, i int) list { f(&cs[i]); return cs }
	}
	op := func(o quota.Op, within time.Duration) func(list, int) list {
		return at(func(c *quota.Charge) { c.Op, c.Within = o, within })
	}
	changes := []func(cs list, i int) list{
		at(func(c *quota.Charge) { c.Key += "x" }),
		at(func(c *quota.Charge) { c.Key += "/x" }),
		at(func(c *quota.Charge) { c.Key = quota.Group(c.Key) }),
		at(func(c *quota.Charge) { c.Key = c.Key[:len(c.Key)-1] + "K" }),
		at(func(c *quota.Charge) { c.Limit = m }),
		at(func(c *quota.Charge) { c.Cost++ }),
		at(func(c *quota.Charge) { c.Cost-- }),
		at(func(c *quota.Charge) { c.Cost = 0 }),
		at(func(c *quota.Charge) { c.Cost += 1 << 32 }),
		at(func(c *quota.Charge) { c.Cost *= 11 }),
		at(func(c *quota.Charge) { c.Cost = math.MaxInt64 }),
		op(quota.OpTake, 0), op(quota.OpPeek, 0), op(quota.OpDebit, 0), op(quota.OpRefund, 0), op(quota.OpReset, 0), op(quota.OpAhead, 0), op(quota.OpAhead, quota.Never),
		at(func(c *quota.Charge) { c.Within += time.Microsecond }),
		at(func(c *quota.Charge) { c.Within += time.Hour }),
		at(func(c *quota.Charge) { c.MadeAt++ }),
		at(func(c *quota.Charge) { c.MadeAt += 1 << 32 }),
		at(func(c *quota.Charge) { c.MadeAt = 0 }),
		func(cs list, i int) list { // a number that runs into the next one
			cs[i].Cost, cs[i].MadeAt = cs[i].Cost*10+1, cs[i].MadeAt%1_000_000
			return cs
		},
		func(cs list, i int) list { // in another order
			j := (i + 1) % len(cs)
			cs[i], cs[j] = cs[j], cs[i]
			return cs
		},
		func(cs list, _ int) list { slices.Reverse(cs); return cs },
		func(cs list, i int) list { // the same sum
			if j := (i + 1) % len(cs); cs[j].Cost > 0 {
				cs[i].Cost, cs[j].Cost = cs[i].Cost+1, cs[j].Cost-1
			}
			return cs
		},
		func(cs list, i int) list { return slices.Delete(cs, i, i+1) },
		func(cs list, _ int) list { return cs[:1] },
		func(cs list, _ int) list { return cs[len(cs)-1:] },
		func(cs list, _ int) list {
			return append(cs, quota.Charge{Limit: l, Key: quota.Group(cs[0].Key) + "/more", Cost: 1, ID: cs[0].ID})
		},
		func(cs list, _ int) list {
			return append(list{{Limit: l, Key: quota.Group(cs[0].Key) + "/more", Cost: 1, ID: cs[0].ID}}, cs...)
		},
	}
	ops := []quota.Charge{
		{Op: quota.OpTake}, {Op: quota.OpDebit}, {Op: quota.OpRefund, MadeAt: 1_700_000_000_000_000}, {Op: quota.OpReset}, {Op: quota.OpAhead, Within: time.Second}, {Op: quota.OpPeek},
	}
	var grants [][]quota.Charge
	add := func(n int, of func(i int) quota.Charge) {
		var cs list
		for i := range n {
			c := of(i)
			c.Limit, c.Key, c.Cost = l, fmt.Sprintf("g/%dk", i), int64(2+i)
			cs = append(cs, c)
		}
		grants = append(grants, cs)
	}
	for i := range ops {
		if ops[i].Op != quota.OpPeek {
			add(1, func(int) quota.Charge { return ops[i] })
		}
	}
	if driver.AtomicityOf(t.open(Opening{}).store) != driver.OneKey {
		add(3, func(int) quota.Charge { return ops[0] })
		add(len(ops), func(i int) quota.Charge { return ops[i] })
		add(quota.MaxCharges, func(i int) quota.Charge { return ops[i%len(ops)] })
	}
	for n, cs := range grants[:t.suite.part(len(grants))] {
		var trace []step
		play := func(cs []quota.Charge) {
			s := step{id: 1 + len(trace), other: t.rng.IntN(2) == 0, list: t.rng.IntN(2) == 0}
			for _, c := range cs {
				s.charges = append(s.charges, charge{Charge: c})
			}
			trace = append(trace, s)
		}
		for i := range cs {
			cs[i].ID = fmt.Sprint("r", n)
		}
		for _, c := range cs {
			if c.Op == quota.OpAhead { // in debt, so that there is a delay to tell
				play([]quota.Charge{{Limit: l, Key: c.Key, Op: quota.OpDebit, Cost: 1<<30 + 1<<18}})
			}
		}
		play(cs)
		for _, i := range []int{0, len(cs) / 2, len(cs) - 1} {
			for _, change := range changes {
				other := change(slices.Clone(cs), i)
				if quota.Check(other) != nil || slices.EqualFunc(other, cs, driver.SameCharge) {
					continue
				}
				play(other)
			}
			play(cs)
			if i == len(cs)-1 {
				break
			}
		}
		for _, of := range []*quota.Limit{l, m} {
			for _, key := range []string{"g", "g/more", "g/0k", "g/0kx", "g/0k/x", "g/0K", fmt.Sprintf("g/%dk", len(cs)-1)} {
				play([]quota.Charge{{Limit: of, Key: key, Op: quota.OpPeek, Cost: 1}})
			}
		}
		t.perform(trace)
		if t.hasFailed() {
			return
		}
	}
}

// largeGrants grants ids to charges of amounts that no double, and none of seven bytes, holds, and repeats them: also after the
// limit has become another.
func largeGrants(t *trial) {
	whole := numbers{limit: 1<<52 - 1, refill: 1 << 50, period: 365 * 24 * time.Hour}
	lists := 2
	if driver.AtomicityOf(t.open(Opening{}).store) == driver.OneKey {
		lists = 1
	}
	for _, of := range []kind{keepNone[1], fromFirst, goOnly} {
		l, was := t.named("tokens", of, whole), t.named("tokens", of, whole)
		if of.name == keepNone[1].name {
			l = t.named("tokens", fromFirst, numbers{limit: 10, period: year})
		}
		var trace []step
		for _, op := range []quota.Op{quota.OpUpTo, quota.OpTake, quota.OpDebit} {
			for _, cost := range []int64{1<<52 - 2, 1<<52 - 1, 1 << 52, 1<<52 + 1, 1<<53 - 1, 1 << 53, 1<<53 + 1, 1<<55 - 1, 1 << 55, 1<<56 + 1, math.MaxInt64 - 1, math.MaxInt64} {
				for n := 1; n <= lists; n++ {
					serial := len(trace)
					for _, limit := range []*quota.Limit{was, was, l} {
						s := step{id: 1 + len(trace), other: t.rng.IntN(2) == 0, list: n > 1}
						for i := range n {
							s.charges = append(s.charges, charge{Charge: quota.Charge{Limit: limit, Key: fmt.Sprintf("g%d/%d", serial, i), Op: op, Cost: cost, ID: "r"}})
						}
						trace = append(trace, s)
					}
				}
			}
		}
		t.perform(trace)
	}
}

// thousandsOfIDs grants as many ids as a few seconds allow, up to some thousands, and repeats all of them afterwards.
func thousandsOfIDs(t *trial) {
	const callers, each = 8, 500
	l := t.named("tokens", goOnly, numbers{limit: 1 << 40})
	hs := t.handles(t.root, callers)
	type granted struct {
		c quota.Charge
		d quota.Decision
	}
	var mu sync.Mutex
	var all []granted
	end := time.Now().Add(3 * time.Second)
	t.together(callers, func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		for n := range t.suite.sized(t.suite.part(each)) {
			if n > 50 && time.Now().After(end) {
				return
			}
			// At random, for sums of texts in a row may all differ.
			id := strings.Repeat("-", n%5) + strconv.FormatUint(rng.Uint64(), 36)
			c := quota.Charge{Limit: l, Key: fmt.Sprintf("g%d/k", i/2), Cost: 1 + int64(n%7), ID: id}
			if ds, unknown := t.persist(hs[i], n%2 == 0, c); !unknown {
				if !ds[0].Allowed || ds[0].Replayed {
					t.fatalf("Charge%s, an id that is new:\n%s\n\twant a grant", show([]quota.Charge{c}), answer(ds, nil))
				}
				mu.Lock()
				all = append(all, granted{c, ds[0]})
				mu.Unlock()
			}
		}
	})
	t.together(callers, func(i int) {
		for n := i; n < len(all); n += callers {
			g := &all[n]
			want := g.d
			want.Replayed = true
			ds, unknown := t.persist(hs[i], n%3 == 0, g.c)
			if !unknown && ds[0] != want {
				t.fatalf("Charge%s, which was granted before, as were %d other ids since the first:\n%s\n%s", show([]quota.Charge{g.c}), len(all)-1, answer(ds, nil), expectation([]quota.Decision{want}))
			}
		}
	})
}

// idsByHandles repeats calls by another handle, by one that is opened later, and by one that is opened when the others are
// closed. No two handles have a limit in common.
func idsByHandles(t *trial) {
	o := Opening{Data: t.data()}
	first, second := t.open(o), t.open(o)
	lists := driver.AtomicityOf(first.store) != driver.OneKey
	type call struct {
		cs []quota.Charge
		ds []quota.Decision
	}
	var calls []call
	limit := func() *quota.Limit { return t.named("tokens", goOnly, numbers{limit: 1 << 40}) }
	l := limit()
	for i, id := range texts {
		if len(id) > 128 {
			continue
		}
		cs := []quota.Charge{{Limit: l, Key: "g/k", Cost: 1, ID: id}}
		if lists && i%2 == 0 {
			cs = append(cs, quota.Charge{Limit: l, Key: "g/l", Cost: 2, ID: id})
		}
		h := first
		if i%3 == 0 {
			h = second
		}
		if ds, unknown := t.persist(h, i%5 == 0, cs...); !unknown {
			calls = append(calls, call{cs, ds})
		}
	}
	repeat := func(h *handle, by string) {
		l := limit()
		for _, c := range calls {
			cs, want := slices.Clone(c.cs), slices.Clone(c.ds)
			for i := range cs {
				cs[i].Limit, want[i].Replayed = l, true
			}
			got, unknown := t.persist(h, true, cs...)
			if !unknown && !slices.Equal(got, want) {
				t.fatalf("ChargeAll%s by %s, which was granted before:\n%s\n%s", show(cs), by, answer(got, nil), expectation(want))
			}
		}
	}
	repeat(second, "another handle")
	repeat(t.open(o), "a handle that was opened later")
	// Another handle stays open, because some data live no longer than all of their handles.
	if err := first.close(); err != nil {
		t.fatalf("Close: %v", err)
	}
	repeat(t.open(o), "a handle that was opened when another one was closed")
}
