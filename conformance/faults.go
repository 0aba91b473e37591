package conformance

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// noPower begins the reason why faults that the harness injects show too little.
const noPower = "the harness never loses the reply to a charge"

var faultCases = []testCase{
	{rule: s4, name: "faults", run: func(t *trial) { faults(t, false) }},
	{rule: s4, name: "ids and faults", needs: []Feature{IDs}, run: func(t *trial) { faults(t, true) }},
	{rule: s4, name: "calls and faults", needs: []Feature{Exact}, provisional: "1.1", run: callsAndFaults},
	{rule: c5, name: "limit under faults", provisional: "1.1", run: limitUnderFaults},
	{rule: c7, name: "frozen", run: frozen},
}

// breakable opens a handle whose connection can be broken, and a second one on the same data whose connection cannot; if
// handles do not share data, the second is the first.
func (t *trial) breakable() (broken, sound *handle, set func(Fault)) {
	if t.suite.h.Fault == nil {
		t.skipf("Harness.Fault is nil: no faults are injected")
	}
	o := Opening{Data: t.data()}
	s, set := t.suite.h.Fault(t.root, o)
	if s == nil || set == nil {
		t.fatalf("Harness.Fault returned nil")
	}
	broken = t.handle(t.root, s, o)
	t.root.Cleanup(func() { set(NoFault) }) // before the store is closed
	sound = broken
	if !t.lacks(Shared) {
		sound = t.open(o)
	}
	return broken, sound, set
}

// faults breaks the connection again and again, and compares the charged tokens with the answers.
func faults(t *trial, withIDs bool) {
	h, sound, set := t.breakable()
	l := t.named("tokens", fromFirst, numbers{limit: 1 << 40, period: year})
	var book ledger
	var serial atomic.Int64
	calls := func(n int) {
		t.together(4, func(int) {
			for range n {
				c := quota.Charge{Limit: l, Key: "k", Cost: 1}
				if withIDs {
					c.ID = fmt.Sprint(serial.Add(1))
				}
				ctx, cancel := context.WithTimeout(bg, 200*time.Millisecond)
				d, err := h.take(ctx, c)
				if err != nil || d.Source == quota.FromFallback || !withIDs {
					book.book(t, ctx, c, d, err)
				}
				cancel()
			}
		})
	}
	t.rounds(2, func(int) {
		for _, f := range []Fault{LostReply, Refused, Frozen} {
			set(f)
			n := 3
			if f == Frozen {
				n = 1
			}
			calls(n)
			set(NoFault)
			t.ask(h, quota.Charge{Limit: l, Key: "k", Op: quota.OpPeek}) // until the store answers again
			calls(2)
		}
	})
	if !withIDs {
		book.audit(t, sound, l, "k")
		return
	}
	// If every call is repeated until it is answered, each has charged once.
	for n := range serial.Load() {
		c := quota.Charge{Limit: l, Key: "k", Cost: 1, ID: fmt.Sprint(n + 1)}
		if d := t.ask(h, c); !d.Allowed || d.Charged != 1 {
			t.fatalf("Charge%s:\n%s\n\twant a grant: there is enough left", show([]quota.Charge{c}), answer([]quota.Decision{d}, nil))
		}
	}
	admitted := book.admitted.Load() // by a fallback, to which ids of the store mean nothing
	if got := t.used(sound, l, "k"); (got < serial.Load() || got > serial.Load()+admitted) && !t.lacks(Exact) {
		t.fatalf("got: %d tokens are charged; want: %d, which is 1 for each request id, however often it was repeated, and up to %d more, which were admitted in the store's place", got, serial.Load(), admitted)
	}
}

// callsAndFaults breaks the connection under calls of all forms: from their beginning; while the store decides, so that a
// store of several round trips meets the fault at its last; and at some time, again and again.
func callsAndFaults(t *trial) {
	h, sound, set := t.breakable()
	a := t.auditor(h, sound)
	w := &wire{t: t, set: set}
	t.root.Cleanup(w.pending.Wait)
	brief := func(int) (context.Context, context.CancelFunc) { return context.WithTimeout(bg, 200*time.Millisecond) }
	answers := func() { // until the store answers again
		w.to(NoFault)
		t.ask(h, quota.Charge{Limit: a.limit, Key: "idle", Op: quota.OpPeek})
	}
	prepare := func(n int) (calls []*asked) {
		for _, i := range t.rng.Perm(len(a.forms))[:min(n, len(a.forms))] {
			calls = append(calls, a.prepare(&a.forms[i], 0, nil))
		}
		return calls
	}
	faults := []Fault{LostReply, Refused, Frozen}
	for _, f := range faults {
		calls := prepare(len(a.forms))
		w.to(f)
		a.all(calls, f.String(), brief)
		answers()
		a.look(calls)
	}
	for _, f := range faults {
		begun := time.Now()
		for _, i := range t.rng.Perm(len(a.forms)) {
			if a.first != "" || time.Since(begun) > time.Duration(t.suite.sized(1))*enough {
				break
			}
			k := a.prepare(&a.forms[i], 1+t.rng.IntN(len(a.forms[i].ops)), func() { w.during(f) })
			ctx, cancel := brief(0)
			a.make(ctx, k, f.String()+" since the store decided")
			cancel()
			answers()
			a.look([]*asked{k})
		}
	}
	for _, f := range faults {
		t.rounds(2, func(int) {
			if a.first != "" {
				return
			}
			calls := prepare(40)
			stop := w.blink(f, t.suite.random(fmt.Sprint(t.of.path(), f, a.serial)))
			defer stop()
			a.all(calls, f.String()+" now and then", brief)
			stop()
			answers()
			a.look(calls)
		})
	}
	a.end()
	if a.lost == 0 {
		t.skipf("%s: of %d calls that failed while replies were lost, none had been charged. Harness.Fault must let the server execute the request that charges, and lose the reply to that, as FaultyKV and Proxy do",
			noPower, a.failed)
	}
}

// limitUnderFaults takes all tokens of a limit one by one, at first while the connection breaks now and then. A store that holds
// tokens in its process, or makes several calls for a decision, admits no more for that, and loses none whose outcome was told.
func limitUnderFaults(t *trial) {
	const capacity = 120
	h, _, set := t.breakable()
	w := &wire{t: t, set: set}
	l := t.named("tokens", tokenBucket, numbers{limit: capacity, refill: capacity, period: year})
	for _, f := range []Fault{LostReply, Refused, Frozen} {
		c := quota.Charge{Limit: l, Key: f.String(), Cost: 1}
		var granted, unknown atomic.Int64
		book := func(ctx context.Context, d quota.Decision, err error) (denied bool) {
			switch {
			case indeterminate(err):
				unknown.Add(1)
			case err != nil:
				t.wantKnown(ctx, c, err)
			case substituted([]quota.Decision{d}):
				unknown.Add(2) // see ledger
			case d.Allowed:
				granted.Add(1)
			default:
				return true
			}
			return false
		}
		w.to(f)
		stop := w.blink(f, t.suite.random(fmt.Sprint(t.of.path(), f)))
		defer stop()
		t.together(4, func(int) {
			for range 8 {
				ctx, cancel := context.WithTimeout(bg, 100*time.Millisecond)
				d, err := h.take(ctx, c)
				book(ctx, d, err)
				cancel()
			}
		})
		stop()
		w.to(NoFault)
		t.ask(h, quota.Charge{Limit: l, Key: c.Key, Op: quota.OpPeek})
		for denied, tries := false, 0; !denied && tries < 3*capacity; tries++ {
			if ds, unsure := t.persist(h, false, c); unsure {
				unknown.Add(2)
			} else {
				denied = book(bg, ds[0], nil)
			}
		}
		got, most := granted.Load(), granted.Load()+unknown.Load()
		if got > capacity || most < capacity && !t.lacks(Exact) {
			t.fatalf("got: %d single takes of %s were granted, at first with this event now and then: %s, and up to %d more were charged whose outcome is unknown; want: no more than %d granted, and no fewer with those",
				got, t.describe(l), f, unknown.Load(), capacity)
		}
	}
}

// frozen freezes the server of a store that says it is prompt. Calls must return within 2 s after their deadline. The
// time is counted in ticks, and counts as watch does it.
func frozen(t *trial) {
	if !driver.IsPrompt(t.open(Opening{}).store) {
		t.excusef("the store does not say that it is prompt")
	}
	h, _, set := t.breakable()
	c := quota.Charge{Limit: t.named("tokens", fromFirst, numbers{limit: 100, period: year}), Key: "k", Cost: 1}
	t.ask(h, quota.Charge{Limit: c.Limit, Key: "k", Op: quota.OpPeek})
	for round := range 3 {
		set(Frozen)
		ctx, cancel := context.WithTimeout(bg, 100*time.Millisecond)
		type result struct {
			d   quota.Decision
			err error
		}
		returned := make(chan result, 1)
		go func() {
			defer t.rescue()
			d, err := h.take(ctx, c)
			returned <- result{d, err}
		}()
		ticker := time.NewTicker(100 * time.Millisecond)
		var r result
		waiting := true
		for ticks := 0.0; waiting && ticks < 21; {
			select {
			case r = <-returned:
				waiting = false
			case <-ticker.C:
				ticks += 1 / t.suite.slowness()
			}
		}
		ticker.Stop()
		set(NoFault)
		if waiting {
			t.fatalf("got: with a server that is frozen, a call in round %d had not returned 2s after its deadline; want: it returns by its deadline", round+1)
		}
		cancel()
		switch ds := []quota.Decision{r.d}; {
		case r.err != nil:
			t.wantKnown(ctx, c, r.err)
		case !substituted(ds) && r.d.Source != quota.FromLease:
			t.fatalf("with a server that is frozen, a call in round %d:\n%s\n\twant an error", round+1, answer(ds, nil))
		}
		t.ask(h, quota.Charge{Limit: c.Limit, Key: "k", Op: quota.OpPeek})
	}
}
