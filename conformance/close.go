package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"runtime/pprof"
	"strings"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var closeCases = []testCase{
	{rule: s8, name: "closed", run: closed},
	{rule: s8, name: "another handle", needs: []Feature{Shared}, run: anotherHandle},
	{rule: s8, name: "while in use", run: closedInUse},
	{rule: s8, name: "goroutines", run: goroutines},
	{rule: s4, name: "calls in flight at Close", needs: []Feature{Exact, Shared}, provisional: "1.1", run: func(t *trial) { closedInFlight(t, true) }},
	{rule: s8, name: "several callers of Close", provisional: "1.1", run: func(t *trial) { closedInFlight(t, false) }},
	{rule: s8, name: "lasting contexts", provisional: "1.1", run: lastingContexts},
}

// closed closes a store twice, and calls it after each Close.
func closed(t *trial) {
	h := t.open(Opening{})
	l := t.named("tokens", tokenBucket, numbers{10, 10, year})
	t.used(h, l, "key")
	for n := range 2 {
		if err := h.close(); err != nil {
			t.fatalf("call %d of Close:\n\tgot  error: %v\n\twant nil", n+1, err)
		}
		for i := range operations {
			for _, id := range []string{"", "r"} {
				if id != "" && t.lacks(IDs) {
					continue
				}
				c := operations[i].on(l, "key", id, quota.Decision{At: 1, Until: 1})
				d, err := h.take(bg, c)
				t.wantClosed("Charge", c, []quota.Decision{d}, err)
				ds, err := h.chargeAll(bg, c)
				t.wantClosed("ChargeAll", c, ds, err)
			}
		}
	}
}

func (t *trial) wantClosed(method string, c quota.Charge, got []quota.Decision, err error) {
	if !errors.Is(err, quota.ErrClosed) {
		t.fatalf("%s%s after Close:\n%s\n\twant quota.ErrClosed", method, show([]quota.Charge{c}), answer(got, err))
	}
}

// anotherHandle closes one handle of two.
func anotherHandle(t *trial) {
	o := Opening{Data: t.data()}
	one, two := t.open(o), t.open(o)
	l := t.named("tokens", fromFirst, numbers{limit: 10, period: year})
	take := func(h *handle, remaining int64) {
		for r := t.retry(); ; {
			d, err := h.take(bg, quota.Charge{Limit: l, Key: "key", Cost: 1})
			switch {
			case err == nil && d.Allowed && (d.Remaining == remaining || t.lacks(Exact)):
				return
			case transient(err) && r.again():
			default:
				t.fatalf("a handle on data of which another handle was closed:\n%s\n\twant allowed, remaining %d", answer([]quota.Decision{d}, err), remaining)
			}
		}
	}
	take(one, 9)
	take(two, 8)
	if err := one.close(); err != nil {
		t.fatalf("Close: %v", err)
	}
	take(two, 7)
	take(t.open(o), 6)
}

// closedInUse closes a store while callers use it.
func closedInUse(t *trial) {
	t.rounds(10, func(int) {
		t.within(func(in *recorder) {
			h := t.openIn(in, Opening{})
			c := quota.Charge{Limit: t.named("tokens", fromFirst, numbers{limit: 1 << 30, period: year}), Key: "k", Cost: 1}
			var begun atomic.Int64
			var closed atomic.Bool
			t.together(5, func(i int) {
				if i == 0 {
					for begun.Load() < 20 && !t.hasFailed() {
						time.Sleep(50 * time.Microsecond)
					}
					if err := h.close(); err != nil {
						t.fatalf("Close while calls are under way:\n\tgot  error: %v\n\twant nil", err)
					}
					closed.Store(true)
					return
				}
				for over := false; !over && !t.hasFailed(); {
					over = closed.Load()
					begun.Add(1)
					ds, err := h.chargeAll(bg, c)
					switch {
					case over && !errors.Is(err, quota.ErrClosed):
						t.wantClosed("ChargeAll", c, ds, err)
					case err != nil:
						t.wantKnown(bg, c, err)
					}
				}
			})
		})
	})
}

// goroutines opens, uses and closes stores, and counts the goroutines that their calls started.
func goroutines(t *trial) { t.leftBehind(bg) }

// leftBehind opens stores, uses them with contexts, closes them, and counts the goroutines that their calls started; a label
// marks those. A goroutine that stays for good, such as that of a client that all handles share, is there once, however many
// stores were opened.
func (t *trial) leftBehind(contexts ...context.Context) {
	const rounds = 16
	label := t.suite.run
	c := quota.Charge{Limit: t.named("tokens", fromFirst, numbers{limit: 1 << 30, period: year}), Key: "k", Cost: 1}
	denied, named := c, c
	denied.Cost, named.ID = 1<<30+1, "r"
	ended, cancel := context.WithCancel(bg)
	cancel()
	use := func() {
		t.within(func(in *recorder) {
			h := t.openIn(in, Opening{})
			for _, ctx := range contexts {
				for range 3 {
					t.ask(h, quota.Charge{Limit: c.Limit, Key: "k", Op: quota.OpPeek})
					h.take(ctx, c)
				}
				h.take(ctx, denied)
				h.take(ended, c)
				if driver.AtomicityOf(h.store) != driver.OneKey {
					h.chargeAll(ctx, c, quota.Charge{Limit: c.Limit, Key: "k/sub", Cost: 1})
					h.chargeAll(ctx, denied, quota.Charge{Limit: c.Limit, Key: "k/sub", Cost: 1})
				}
				if !t.lacks(IDs) {
					h.take(ctx, named)
					h.take(ctx, named)
				}
			}
			h.close()
		})
	}
	pprof.Do(bg, pprof.Labels("fleetquota-conformance", label), func(context.Context) {
		for range rounds {
			use()
		}
		before, _ := t.labelled(label)
		for range rounds {
			use()
		}
		t.quiet(label, before, rounds, fmt.Sprintf("%d stores were opened, used and closed", rounds))
	})
}

// quiet waits until fewer than n goroutines more than before have a label.
func (t *trial) quiet(label string, before, n int, when string) {
	const looks = 20
	var now int
	var stacks string
	for looked := 0.0; looked < looks; looked += 1 / t.suite.slowness() {
		if now, stacks = t.labelled(label); now < before+n {
			return
		}
		t.progress.Add(1)
		time.Sleep(t.suite.patience / looks)
	}
	t.fatalf("got: %d goroutines more, after %s; want: none\n%s", now-before, when, stacks)
}

// labelled is labelled as the suite's own work.
func (t *trial) labelled(label string) (int, string) {
	t.own.Add(1)
	defer t.own.Add(-1)
	return labelled(label)
}

// labelled returns the number of goroutines that were started under a label, and their stacks.
func labelled(label string) (n int, stacks string) {
	var b bytes.Buffer
	pprof.Lookup("goroutine").WriteTo(&b, 1)
	for group := range strings.SplitSeq(b.String(), "\n\n") {
		if !strings.Contains(group, `"`+label+`"`) {
			continue
		}
		var count int
		for line := range strings.Lines(group) {
			if m, _ := fmt.Sscanf(line, "%d @ ", &count); m == 1 {
				break
			}
		}
		n += count
		stacks += group + "\n\n"
	}
	return n, stacks
}

// closedInFlight closes a store from several goroutines while others charge single keys and lists. Close never fails, and as
// soon as one Close has returned every call is ErrClosed. An audit by another handle shows that a call which returned nil
// charged once, and one that returned an error charged nothing, unless that was ErrIndeterminate.
func closedInFlight(t *trial, audit bool) {
	const closers, callers = 3, 5
	l := t.named("tokens", fromFirst, numbers{limit: 1 << 40, period: year})
	t.rounds(10, func(round int) {
		t.within(func(in *recorder) {
			o := Opening{Data: t.data()}
			h := t.openIn(in, o)
			watch := h
			if audit {
				watch = t.openIn(in, o)
			}
			lists := driver.AtomicityOf(h.store) != driver.OneKey
			var single, pair ledger
			var begun atomic.Int64
			var closed atomic.Bool
			t.together(closers+callers, func(i int) {
				if i < closers {
					for begun.Load() < int64(10+10*round) && !t.hasFailed() {
						time.Sleep(20 * time.Microsecond)
					}
					if err := h.close(); err != nil && !audit {
						t.fatalf("Close from %d goroutines while calls are in flight:\n\tgot  error: %v\n\twant nil", closers, err)
					}
					closed.Store(true)
					return
				}
				for n := 0; !t.hasFailed(); n++ {
					over := closed.Load()
					begun.Add(1)
					cs := []quota.Charge{{Limit: l, Key: "g/single", Cost: 1}}
					book := &single
					if lists && n%2 == 1 {
						cs = []quota.Charge{{Limit: l, Key: "g/a", Cost: 1}, {Limit: l, Key: "g/b", Cost: 1}}
						book = &pair
					}
					ds, err := h.chargeAll(bg, cs...)
					switch {
					case errors.Is(err, quota.ErrClosed):
						return
					case over && !audit:
						t.wantClosed("ChargeAll", cs[0], ds, err)
					case over:
						return
					}
					book.book(t, bg, cs[0], ds[0], err)
				}
			})
			if !audit {
				return
			}
			time.Sleep(time.Millisecond) // a request that was sent, of a call that did not await it
			single.audit(t, watch, l, "g/single")
			pair.audit(t, watch, l, "g/a")
			pair.audit(t, watch, l, "g/b")
		})
	})
}

// lasting is a context that ends with the test. The standard library does not know its type, so that a context derived from
// it and never ended keeps a goroutine.
type lasting struct {
	context.Context
	done chan struct{}
}

func (l lasting) Done() <-chan struct{} { return l.done }

func (l lasting) Err() error {
	select {
	case <-l.done:
		return context.Canceled
	default:
		return nil
	}
}

// lastingContexts makes calls with contexts that go on after Close. No goroutine may wait for their end: not when the calls
// have returned while the store is in use, and not after Close.
func lastingContexts(t *trial) {
	const calls = 64
	label := t.suite.run
	l := t.named("tokens", fromFirst, numbers{limit: 1 << 40, period: year})
	ctx := lasting{bg, make(chan struct{})}
	defer close(ctx.done)
	plain, cancel := context.WithCancel(bg)
	defer cancel()
	pprof.Do(bg, pprof.Labels("fleetquota-conformance", label), func(context.Context) {
		h := t.open(Opening{})
		lists := driver.AtomicityOf(h.store) != driver.OneKey
		call := func(n int) {
			with := context.Context(ctx)
			if n%2 == 0 {
				with = plain
			}
			c := quota.Charge{Limit: l, Key: "g/k", Cost: 1, Op: quota.Op(n / 2 % 2)}
			h.take(with, c)
			if c.Cost = 1 << 41; !t.lacks(IDs) {
				c.ID = fmt.Sprint(n / 4)
			}
			h.take(with, c) // denied
			if lists {
				h.chargeAll(with, quota.Charge{Limit: l, Key: "g/k", Cost: 1}, quota.Charge{Limit: l, Key: "g/l", Cost: 1})
			}
		}
		// A call that is answered from memory may leave less behind, so each has a key that others charge too.
		for n := range 4 {
			call(n)
		}
		before, _ := t.labelled(label)
		for n := range calls {
			call(n)
		}
		t.quiet(label, before, calls/2, fmt.Sprintf("%d calls had returned, whose contexts have not ended", calls))
		if err := h.close(); err != nil {
			t.fatalf("Close: %v", err)
		}
	})
	t.leftBehind(ctx, plain)
}
