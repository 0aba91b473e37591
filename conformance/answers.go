package conformance

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var answerCases = []testCase{
	{rule: s1, name: "answers", first: true, run: answers},
}

// answers makes the simplest calls. If one of them is not answered, the run ends.
func answers(t *trial) {
	for _, o := range []Opening{{}, {Clock: newClock().time}} {
		if o.Clock != nil && t.lacks(Clock) {
			continue
		}
		h := t.open(o)
		l := t.named("tokens", tokenBucket, numbers{10, 10, year})
		keys := []string{"g/a", "g/b"}
		if driver.AtomicityOf(h.store) == driver.OneKey {
			keys = keys[:1]
		}
		for _, op := range []quota.Op{quota.OpPeek, quota.OpTake} {
			var cs []quota.Charge
			for _, key := range keys {
				cs = append(cs, quota.Charge{Limit: l, Key: key, Cost: 1, Op: op})
			}
			t.persist(h, false, cs[0])
			t.persist(h, true, cs...)
		}
	}
}

// show returns charges as text, in which different keys differ: characters that look alike are escaped.
func show(cs []quota.Charge) string {
	var b strings.Builder
	for i := range cs {
		c := &cs[i]
		b.WriteString(" [")
		if c.Shadow {
			b.WriteString("shadow ")
		}
		fmt.Fprintf(&b, "%s %d of %+q to %+q", c.Op, c.Cost, c.Limit.Name(), c.Key)
		if c.Op == quota.OpRefund {
			fmt.Fprintf(&b, " charged at %d", c.MadeAt)
		}
		if c.Op == quota.OpAhead {
			fmt.Fprintf(&b, " within %v", c.Within)
		}
		if c.Op == quota.OpUpTo {
			fmt.Fprintf(&b, ", at least %d,", c.Least)
		}
		if c.Op == quota.OpSpend || c.Op == quota.OpRenew {
			fmt.Fprintf(&b, " of %d held until %d", c.Held, c.Until)
		}
		if c.Floor > 0 {
			fmt.Fprintf(&b, " above %d", c.Floor)
			if c.FloorOf > 0 {
				fmt.Fprintf(&b, " of %d parts", c.FloorOf)
			}
		}
		if c.Alternative > 0 {
			fmt.Fprintf(&b, " of list %d", c.Alternative)
		}
		if c.ID != "" {
			fmt.Fprintf(&b, " with id %+q", c.ID)
		}
		b.WriteByte(']')
	}
	return b.String()
}

func answer(got []quota.Decision, err error) string {
	if err != nil {
		return fmt.Sprintf("\tgot  error: %v", err)
	}
	return "\tgot  " + decisions(got)
}

func expectation(want []quota.Decision) string { return "\twant " + decisions(want) }

// decisions returns decisions as text.
func decisions(ds []quota.Decision) string {
	texts := make([]string, len(ds))
	for i, d := range ds {
		flags := "denied"
		if d.Allowed {
			flags = "allowed"
		}
		if d.Split {
			flags += " split"
		}
		if d.Replayed {
			flags += " replayed"
		}
		if d.Shadow {
			flags += " shadow"
		}
		if d.Alternative > 0 {
			flags += fmt.Sprintf(" of list %d", d.Alternative)
		}
		if d.Source != quota.FromStore {
			flags += " by " + d.Source.String()
		}
		if d.Until != 0 {
			flags += fmt.Sprintf(" holding %d until %d", d.Held, d.Until)
		}
		texts[i] = fmt.Sprintf("%s, limit %d, remaining %d, charged %d, retry after %v, reset after %v, delay %v, at %d",
			flags, d.Capacity, d.Remaining, d.Charged, d.RetryAfter, d.ResetAfter, d.Delay, d.At)
	}
	return strings.Join(texts, "\n\t     ")
}

// differ returns the difference between an answer and the right one, or "".
func differ(got []quota.Decision, err error, want []quota.Decision, failed error) string {
	switch {
	case failed != nil:
		if errors.Is(err, quota.ErrMisconfigured) {
			return ""
		}
		return fmt.Sprintf("%s\n\twant quota.ErrMisconfigured", answer(got, err))
	case err == nil && slices.Equal(got, want):
		return ""
	}
	return fmt.Sprintf("%s\n%s%s", answer(got, err), expectation(want), differing(got, err, want))
}

// differing names the fields in which decisions differ.
func differing(got []quota.Decision, err error, want []quota.Decision) string {
	if err != nil || len(got) != len(want) {
		return ""
	}
	var names []string
	for i := range got {
		g, w := &got[i], &want[i]
		for _, f := range []struct {
			name string
			same bool
		}{
			{"Allowed", g.Allowed == w.Allowed}, {"Source", g.Source == w.Source}, {"Split", g.Split == w.Split}, {"Replayed", g.Replayed == w.Replayed},
			{"Limit", g.Capacity == w.Capacity}, {"Remaining", g.Remaining == w.Remaining}, {"Charged", g.Charged == w.Charged}, {"RetryAfter", g.RetryAfter == w.RetryAfter},
			{"ResetAfter", g.ResetAfter == w.ResetAfter}, {"Delay", g.Delay == w.Delay}, {"At", g.At == w.At}, {"Shadow", g.Shadow == w.Shadow},
			{"Held", g.Held == w.Held}, {"Until", g.Until == w.Until},
		} {
			if !f.same && !slices.Contains(names, f.name) {
				names = append(names, f.name)
			}
		}
	}
	return "\n\tdiffering in " + strings.Join(names, ", ")
}

func sameState(a, b quota.State) bool {
	return a.Unit == b.Unit && a.A == b.A && a.B == b.B && a.C == b.C && slices.Equal(a.Tail, b.Tail)
}
