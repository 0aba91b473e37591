package conformance

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// A step is one call of a trace.
type step struct {
	id      int           // by which refunds find the receipt
	wait    time.Duration // before the call: the clock moves by it, or real time passes
	other   bool          // by the second handle
	list    bool          // by ChargeAll, though it is one charge
	charges []charge
}

// charge is a charge whose receipt, for a refund, may be a decision of an earlier step.
type charge struct {
	quota.Charge
	receipt receipt // step 0 is none: At stays as it is
}

type receipt struct{ step, charge int }

// clock is a clock that the suite sets.
type clock struct {
	mu  sync.Mutex
	now quota.Micros
}

// epoch is where clocks begin. It is not aligned to any window.
const epoch quota.Micros = 1_795_427_141_791_724

func newClock() *clock { return &clock{now: epoch} }

func (c *clock) micros() quota.Micros {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) time() time.Time { return c.micros().Time() }

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += quota.Micros(d / time.Microsecond)
}

// player makes the calls of traces on one set of data, and compares the answers with a model.
type player struct {
	t      *trial
	prefix string // of the keys of the trace that is played
	clock  *clock // nil: the store's own
	first  *handle
	second *handle // the first where handles do not share
	model  *model
	at     map[receipt]quota.Decision
	last   []quota.Decision
	unsure error // the trace cannot be judged: the store did not answer
}

// player opens new data, by a clock of the suite's or the store's own.
func (t *trial) player(in *recorder, injected bool) *player {
	p := &player{t: t, model: newModel()}
	o := Opening{Data: t.data()}
	if injected {
		p.clock = newClock()
		o.Clock = p.clock.time
	}
	p.first = t.openIn(in, o)
	p.second = p.first
	if !t.lacks(Shared) {
		p.second = t.openSecond(in, o)
	}
	p.begin("")
	return p
}

// begin begins another trace, on keys of its own.
func (p *player) begin(prefix string) {
	p.prefix, p.model, p.at, p.last, p.unsure = prefix, newModel(), map[receipt]quota.Decision{}, nil, nil
}

// play makes one call and returns the fault of the answer, or "".
func (p *player) play(s *step) string {
	now := quota.Micros(0)
	if p.clock != nil {
		p.clock.add(s.wait)
		now = p.clock.micros()
	} else if s.wait > 0 {
		p.t.pause(s.wait)
	}
	cs := make([]quota.Charge, len(s.charges))
	for i, c := range s.charges {
		cs[i] = c.Charge
		cs[i].Key = p.prefix + c.Key
		if c.receipt.step > 0 {
			of := p.at[c.receipt]
			if c.Op == quota.OpSpend || c.Op == quota.OpRenew {
				cs[i].Held, cs[i].Until = of.Held, of.Until
			} else {
				cs[i].MadeAt = of.At
			}
		}
	}
	if p.unsure = quota.Check(cs); p.unsure != nil { // a store never gets such a list
		return ""
	}
	h := p.first
	if s.other {
		h = p.second
	}
	got, err := p.call(h, cs, s.list)
	if p.unsure != nil {
		return ""
	}
	if err == nil {
		for i := range got {
			p.at[receipt{s.id, i}] = got[i]
			if got[i].Replayed { // a decision of an earlier time
				continue
			}
			if p.clock != nil && got[i].At != now {
				return fmt.Sprintf("%s\n\twant every decision at the time of Opening.Clock, %d", answer(got, nil), now)
			}
			if got[i].At != got[0].At || got[i].At <= 0 {
				return fmt.Sprintf("%s\n\twant one time for all, in microseconds since 1970", answer(got, nil))
			}
		}
	}
	if wrong := p.model.check(cs, got, err, now); wrong != "" {
		return wrong
	}
	if p.last = nil; err == nil {
		p.last = got
	}
	return ""
}

// call makes a call, and repeats it while the store cannot answer. If the store does not answer, or the outcome is
// unknown, the trace cannot be judged.
func (p *player) call(h *handle, cs []quota.Charge, list bool) (got []quota.Decision, err error) {
	for r := p.t.retry(); ; {
		if len(cs) == 1 && !list {
			var d quota.Decision
			d, err = h.take(bg, cs[0])
			got = []quota.Decision{d}
		} else {
			got, err = h.chargeAll(bg, cs...)
		}
		switch {
		case indeterminate(err):
			p.unsure = err
			return nil, err
		case transient(err):
			if !r.again() {
				p.unsure = err
				return nil, err
			}
		case err == nil && substituted(got):
			p.unsure = fmt.Errorf("answered in place of the store:\n%s", decisions(got))
			return got, nil
		default:
			return got, err
		}
	}
}

// replay plays a trace on new data. It returns the first wrong answer and its step, or the reason why the trace cannot
// be judged.
func (t *trial) replay(trace []step, injected bool) (wrong string, at int, unsure error) {
	t.within(func(in *recorder) {
		p := t.player(in, injected)
		for i := range trace {
			if wrong, at = p.play(&trace[i]), i; wrong != "" || p.unsure != nil {
				break
			}
		}
		unsure = p.unsure
	})
	return wrong, at, unsure
}

// shorten returns the shortest trace it finds that has a wrong answer on new data, and that answer. If the whole trace
// has no wrong answer on new data, it is returned whole.
func (t *trial) shorten(trace []step, injected bool) ([]step, string) {
	end := time.Now().Add(10 * time.Second)
	tries := 500
	best, how := trace, ""
	try := func(trace []step) bool {
		t.progress.Add(1)
		if tries--; tries < 0 || time.Now().After(end) {
			return false
		}
		wrong, at, _ := t.replay(trace, injected)
		if wrong == "" {
			return false
		}
		best, how = trace[:at+1], wrong
		return true
	}
	if !try(trace) {
		return trace, ""
	}
	for before := 0; before != weight(best) && tries > 0; {
		before = weight(best)
		for size := len(best) / 2; size > 0; size /= 2 {
			for i := 0; i+size <= len(best); {
				without := slices.Delete(slices.Clone(best), i, i+size)
				// The clock still reaches the same times.
				for _, gone := range best[i : i+size] {
					if i < len(without) {
						without[i].wait += gone.wait
					}
				}
				if len(without) == 0 || !try(without) {
					i += size
				}
			}
		}
		for i := 0; i < len(best); i++ {
			for j := 0; i < len(best) && len(best[i].charges) > 1 && j < len(best[i].charges); {
				fewer := slices.Clone(best)
				fewer[i].charges = slices.Delete(slices.Clone(fewer[i].charges), j, j+1)
				fewer[i].list = true
				if !try(fewer) {
					j++
				}
			}
			for _, simpler := range []func(*step){
				func(s *step) { s.wait = 0 }, func(s *step) { s.other = false }, func(s *step) { s.list = false },
			} {
				if i < len(best) {
					next := slices.Clone(best)
					if simpler(&next[i]); !next[i].same(&best[i]) {
						try(next)
					}
				}
			}
		}
	}
	return best, how
}

func (s *step) same(o *step) bool { return s.wait == o.wait && s.other == o.other && s.list == o.list }

// weight is less for a trace that is simpler.
func weight(trace []step) (n int) {
	for i := range trace {
		n += 10 + 10*len(trace[i].charges)
		if trace[i].wait != 0 {
			n++
		}
		if trace[i].other {
			n++
		}
		if trace[i].list {
			n++
		}
	}
	return n
}

// refute fails the case with a trace that has a wrong answer, after making it as short as possible.
func (t *trial) refute(trace []step, wrong string, injected bool) {
	t.mu.Lock()
	late := t.refuting
	t.refuting = true
	t.mu.Unlock()
	if late { // another goroutine has found a wrong answer and shortens its trace
		return
	}
	short, how := t.shorten(trace, injected)
	note := ""
	if how == "" {
		how, note = wrong, "\nThe trace had no wrong answer when it was repeated on new data: other traces ran at the same time, or the result depends on real time."
	}
	var b strings.Builder
	b.WriteString("The last of these calls")
	if injected {
		b.WriteString(", on a clock that moves by the waits only,")
	}
	names := map[*quota.Limit]string{}
	for i := range short {
		s := &short[i]
		method := "Charge"
		if s.list || len(s.charges) > 1 {
			method = "ChargeAll"
		}
		fmt.Fprintf(&b, "\n\t%d. ", i+1)
		if s.wait != 0 {
			fmt.Fprintf(&b, "wait %v, ", s.wait)
		}
		b.WriteString(method)
		if s.other {
			b.WriteString(" by another handle")
		}
		for _, c := range s.charges {
			names[c.Limit] = t.describe(c.Limit)
			b.WriteString(show([]quota.Charge{c.Charge}))
			if c.receipt.step > 0 {
				fmt.Fprintf(&b, " (its receipt is decision %d of", c.receipt.charge+1)
				if n := slices.IndexFunc(short, func(o step) bool { return o.id == c.receipt.step }); n >= 0 {
					fmt.Fprintf(&b, " step %d)", n+1)
				} else {
					b.WriteString(" no step: it is zero)")
				}
			}
		}
	}
	fmt.Fprintf(&b, "\nhas a wrong answer:\n%s%s\nwhere", how, note)
	var lines []string
	for l, text := range names {
		lines = append(lines, fmt.Sprintf("\n\t%q is %s", l.Name(), text))
	}
	slices.Sort(lines)
	t.record("%s%s", b.String(), strings.Join(slices.Compact(lines), ""))
}

// perform plays a trace on new data, and fails the case if an answer is wrong.
func (t *trial) perform(trace []step) {
	injected := !t.lacks(Clock)
	var why error
	for range 3 {
		wrong, at, unsure := t.replay(trace, injected)
		switch {
		case wrong != "":
			t.refute(trace[:at+1], wrong, injected)
			return
		case unsure == nil:
			return
		}
		why = unsure
	}
	t.skipf("not judged, because the store does not answer: %v", why)
}
