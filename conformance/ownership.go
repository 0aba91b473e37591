package conformance

import (
	"fmt"
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var ownershipCases = []testCase{
	{rule: s7, name: "charges", needs: []Feature{Exact}, run: reusedCharges},
	{rule: s7, name: "decisions", run: keptDecisions},
}

// reusedCharges overwrites charges and decisions as soon as a call has returned.
func reusedCharges(t *trial) {
	p := t.player(t.root, false)
	l := t.named("tokens", tokenBucket, numbers{1 << 20, 10, time.Second})
	junk := t.named("junk", tokenBucket, numbers{1 << 20, 10, time.Second})
	n := 2
	if driver.AtomicityOf(p.first.store) == driver.OneKey {
		n = 1
	}
	cs, out := make([]quota.Charge, n), make([]quota.Decision, n)
	call := func(i int) (cs0 []quota.Charge, got []quota.Decision, err error) {
		for j := range cs {
			cs[j] = quota.Charge{Limit: l, Key: fmt.Sprintf("g/%d", j), Cost: int64(1 + i%3)}
			if !t.lacks(IDs) && i%2 == 0 {
				cs[j].ID = fmt.Sprint("r", i)
			}
		}
		defer p.first.called(&err, "ChargeAll", cs...)()
		err = p.first.store.ChargeAll(bg, cs, out)
		cs0, got = slices.Clone(cs), slices.Clone(out)
		for j := range cs {
			cs[j] = quota.Charge{Limit: junk, Key: "g/junk", Cost: 7, Op: quota.OpDebit}
			out[j] = quota.Decision{Capacity: -7}
		}
		return cs0, got, err
	}
	for pass := range 2 { // the second repeats the ids of the first, in other slices
		cs, out = make([]quota.Charge, n), make([]quota.Decision, n)
		for i := range 30 {
			cs0, got, err := call(i)
			for r := t.retry(); transient(err) && r.again(); {
				cs0, got, err = call(i)
			}
			if err != nil && (transient(err) || indeterminate(err)) || err == nil && substituted(got) {
				return
			}
			if wrong := p.model.check(cs0, got, err, 0); wrong != "" {
				t.fatalf("ChargeAll%s, with a slice of charges and one of decisions that were overwritten after every call before, in pass %d:\n%s", show(cs0), pass+1, wrong)
			}
		}
	}
	if got := t.used(p.first, junk, "g/junk"); got != 0 {
		t.fatalf("got: %d tokens were charged to a charge that was written into the slice after ChargeAll had returned; want: 0", got)
	}
}

// keptDecisions ends contexts while calls are under way, and checks that the store does not write decisions later.
func keptDecisions(t *trial) {
	h := t.open(Opening{})
	l := t.named("tokens", tokenBucket, numbers{1 << 20, 10, time.Second})
	type call struct{ out, was []quota.Decision }
	calls := make([]call, t.suite.sized(120))
	t.together(4, func(g int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), g))
		for i := g; i < len(calls); i += 4 {
			cs := []quota.Charge{{Limit: l, Key: "k", Cost: 1}}
			ctx, cancel := shortly(rng)
			out, _ := h.chargeAll(ctx, cs...)
			calls[i] = call{out, slices.Clone(out)}
			cancel()
		}
	})
	// A late write has had its time by then; a store that waits for it in Close has given it more.
	time.Sleep(50 * time.Millisecond)
	h.close()
	for _, c := range calls {
		if !slices.Equal(c.out, c.was) {
			t.fatalf("decisions were written after ChargeAll had returned:\n\tgot  %s\n\twant %s", decisions(c.out), decisions(c.was))
		}
	}
}
