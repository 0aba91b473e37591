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
				c := operations[i].on(l, "key", id, 1)
				d, err := h.take(bg, c)
				t.wantClosed("Take", c, []quota.Decision{d}, err)
				ds, err := h.takeAll(bg, c)
				t.wantClosed("TakeAll", c, ds, err)
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
					ds, err := h.takeAll(bg, c)
					switch {
					case over && !errors.Is(err, quota.ErrClosed):
						t.wantClosed("TakeAll", c, ds, err)
					case err != nil:
						t.wantKnown(bg, c, err)
					}
				}
			})
		})
	})
}

// goroutines opens, uses and closes stores, and counts the goroutines that their calls started; a label marks those. A
// goroutine that stays for good, such as that of a client that all handles share, is there once, however many stores
// were opened.
func goroutines(t *trial) {
	const rounds = 16
	mine := pprof.Labels("fleetquota-conformance", t.suite.run)
	c := quota.Charge{Limit: t.named("tokens", fromFirst, numbers{limit: 1 << 30, period: year}), Key: "k", Cost: 1}
	use := func() {
		t.within(func(in *recorder) {
			h := t.openIn(in, Opening{})
			for range 3 {
				t.ask(h, quota.Charge{Limit: c.Limit, Key: "k", Op: quota.OpPeek})
				h.take(bg, c)
			}
			if driver.AtomicityOf(h.store) != driver.OneKey {
				h.takeAll(bg, c, quota.Charge{Limit: c.Limit, Key: "k/sub", Cost: 1})
			}
			h.close()
		})
	}
	pprof.Do(bg, mine, func(context.Context) {
		for range rounds {
			use()
		}
		before, _ := labelled(t.suite.run)
		for range rounds {
			use()
		}
		const looks = 200
		var after int
		var stacks string
		for range looks {
			if after, stacks = labelled(t.suite.run); after < before+rounds {
				return
			}
			t.progress.Add(1)
			time.Sleep(t.suite.patience / looks)
		}
		t.fatalf("got: %d goroutines more, after %d stores were opened, used and closed; want: none\n%s", after-before, rounds, stacks)
	})
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
