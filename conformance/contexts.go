package conformance

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var contextCases = []testCase{
	{rule: s4, name: "contexts that end", run: endingContexts},
	{rule: s4, name: "ids and contexts that end", needs: []Feature{IDs}, run: endingContextsWithIDs},
	{rule: s4, name: "calls and contexts that end", needs: []Feature{Exact}, provisional: "1.1", run: callsAndContexts},
	{rule: s6, name: "done before", run: doneContexts},
}

// callsAndContexts ends contexts while calls of all forms are under way: at some time, and while the store decides.
func callsAndContexts(t *trial) {
	h := t.open(Opening{})
	a := t.auditor(h, h)
	t.rounds(10, func(int) {
		var calls []*asked
		for i := range a.forms {
			calls = append(calls, a.prepare(&a.forms[i], 0, nil))
		}
		rngs := make([]*rand.Rand, len(calls))
		for i := range rngs {
			rngs[i] = t.suite.random(fmt.Sprint(t.of.path(), a.serial, i))
		}
		a.all(calls, "a context that ends", func(i int) (context.Context, context.CancelFunc) { return shortly(rngs[i]) })
		a.look(calls)
	})
	for _, i := range t.rng.Perm(len(a.forms)) {
		if i > 0 && time.Now().After(t.until.Add(3*enough)) || a.first != "" {
			break
		}
		ctx, cancel := context.WithCancel(bg)
		f := &a.forms[i]
		k := a.prepare(f, 1+t.rng.IntN(len(f.ops)), cancel)
		a.make(ctx, k, "a context that ends while the store decides")
		a.look([]*asked{k})
		cancel()
	}
	a.end()
}

// doneContexts calls with contexts that are done.
func doneContexts(t *trial) {
	h := t.open(Opening{})
	l := t.named("tokens", tokenBucket, numbers{100, 100, year})
	before := t.used(h, l, "g")
	cancelled, cancel := context.WithCancel(bg)
	cancel()
	caused, cancelCause := context.WithCancelCause(bg)
	cancelCause(errors.New("the caller's own reason"))
	expired, cancel := context.WithDeadline(bg, time.Unix(1, 0))
	defer cancel()
	for name, ctx := range map[string]context.Context{"cancelled": cancelled, "cancelled with a cause": caused, "past its deadline": expired} {
		for i := range operations {
			for _, id := range []string{"", "r"} {
				if id != "" && t.lacks(IDs) {
					continue
				}
				c := operations[i].on(l, "g", id, quota.Decision{At: 1, Until: 1})
				d, err := h.take(ctx, c)
				if err != nil {
					d = quota.Decision{}
				}
				t.wantContext(ctx, name, "Charge", []quota.Charge{c}, []quota.Decision{d}, err)
				list := []quota.Charge{c}
				if driver.AtomicityOf(h.store) != driver.OneKey {
					list = append(list, quota.Charge{Limit: l, Key: "g/other", Cost: 1, ID: id})
				}
				ds, err := h.chargeAll(ctx, list...)
				t.wantContext(ctx, name, "ChargeAll", list, ds, err)
			}
		}
	}
	if after := t.used(h, l, "g") + t.used(h, l, "g/other"); after != before && !t.lacks(Exact) {
		t.fatalf("got: calls with contexts that were done charged %d; want: 0", after-before)
	}
}

func (t *trial) wantContext(ctx context.Context, name, method string, cs []quota.Charge, got []quota.Decision, err error) {
	if !errors.Is(err, ctx.Err()) || errors.Is(err, quota.ErrIndeterminate) {
		t.fatalf("%s%s with a context that is %s:\n%s\n\twant error: %v", method, show(cs), name, answer(got, err), ctx.Err())
	}
}

// endingContexts has contexts end while calls are under way, and compares the charged tokens with the answers.
func endingContexts(t *trial) {
	h := t.open(Opening{})
	l := t.named("tokens", fromFirst, numbers{limit: 1 << 40, period: year})
	var ledger ledger
	t.together(8, func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		for range t.suite.sized(40) {
			c := quota.Charge{Limit: l, Key: "k", Cost: 1}
			ctx, cancel := shortly(rng)
			d, err := h.take(ctx, c)
			cancel()
			ledger.book(t, ctx, c, d, err)
		}
	})
	ledger.audit(t, h, l, "k")
}

// endingContextsWithIDs does the same with request ids, and repeats each call under its id until it is answered.
func endingContextsWithIDs(t *trial) {
	h := t.open(Opening{})
	l := t.named("tokens", fromFirst, numbers{limit: 1 << 40, period: year})
	var made atomic.Int64
	var book ledger
	t.together(4, func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		for n := range t.suite.sized(20) {
			c := quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprintf("%d.%d", i, n)}
			ctx, cancel := shortly(rng)
			d, err := h.take(ctx, c)
			cancel()
			if err != nil {
				t.wantKnown(ctx, c, err)
				d = t.ask(h, c)
			} else if substituted([]quota.Decision{d}) {
				book.book(t, ctx, c, d, nil)
				d = t.ask(h, c)
			}
			if !d.Allowed {
				t.fatalf("Charge%s:\n%s\n\twant a grant: there is enough left", show([]quota.Charge{c}), answer([]quota.Decision{d}, nil))
			}
			made.Add(1)
		}
	})
	if got := t.used(h, l, "k"); (got < made.Load() || got > made.Load()+book.admitted.Load()) && !t.lacks(Exact) {
		t.fatalf("got: %d tokens are charged; want: %d, which is 1 for each request id, however often it was repeated", got, made.Load())
	}
}

// shortly returns a context that ends within some microseconds or milliseconds.
func shortly(rng *rand.Rand) (context.Context, context.CancelFunc) {
	in := time.Duration(magnitude(rng, 13)) * time.Microsecond
	if rng.IntN(2) == 0 {
		return context.WithTimeout(bg, in)
	}
	ctx, cancel := context.WithCancel(bg)
	timer := time.AfterFunc(in, cancel)
	return ctx, func() {
		timer.Stop()
		cancel()
	}
}
