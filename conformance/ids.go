package conformance

import (
	"errors"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/quota"
)

var idCases = []testCase{
	{rule: c1, name: "ids", needs: []Feature{Exact, IDs}, run: distinctIDs},
	{rule: c3, name: "race", needs: []Feature{IDs}, run: sameID},
	{rule: c3, name: "refused", run: refusedIDs},
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
		t.fatalf("Take%s:\n%s\n\twant quota.ErrCrossSlot", show([]quota.Charge{c}), answer([]quota.Decision{d}, err))
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
