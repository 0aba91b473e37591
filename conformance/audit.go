package conformance

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// auditor makes calls that meet faults, each on keys of its own, and afterwards compares the tokens in use of every key
// with the answer to its call. Between them it charges two keys together, again and again, for calls that contend.
type auditor struct {
	t      *trial
	breaks *handle // makes the calls
	looks  *handle // prepares the keys, and looks at them afterwards
	grade  driver.Atomicity
	forms  []form
	limit  *quota.Limit // comes back so slowly that no token does within a test
	shared *quota.Limit // of the two keys that are charged together
	serial int
	lost   int           // calls that were charged and not answered, because the reply was lost
	failed int           // calls that were not answered where replies were lost
	first  string        // the first fault that was found
	lines  map[line]*sum // all calls
	pair   ledger        // of the shared limit

	substituted []*asked // that a fallback granted in the store's place
}

// line is a line of an audit: an event, and how the calls that met it ended.
type line struct{ event, end string }

// sum counts calls that charged all their keys once, none, or neither all nor none.
type sum struct{ charged, not, other int }

// asked is a call on keys of its own.
type asked struct {
	*form
	event string // that it met, such as "lost reply"
	cs    []quota.Charge
	ds    []quota.Decision
	err   error
	known bool // whether the error is one that callers know
}

func (t *trial) auditor(breaks, looks *handle) *auditor {
	a := &auditor{t: t, breaks: breaks, looks: looks, grade: driver.AtomicityOf(looks.store), lines: map[line]*sum{}}
	a.forms = t.forms(a.grade)
	a.limit = t.named("tokens", tokenBucket, numbers{1 << 10, 1 << 10, year})
	a.shared = t.named("pair", fromFirst, numbers{limit: 1 << 40, period: year})
	return a
}

// oneStep reports whether a call's keys are decided in one step.
func (a *auditor) oneStep(f *form) bool {
	return len(f.ops) == 1 || a.grade == driver.AnyKeys || a.grade == driver.OneGroup && !f.spread
}

// prepare returns a call of a form on new keys, of which inUse tokens each are in use. With a function, the limit's rule is
// in Go only, and calls the function at the n-th decision.
func (a *auditor) prepare(f *form, n int, then func()) *asked {
	a.serial++
	id, between := "", "/"
	if f.id {
		id = fmt.Sprint("r", a.serial)
	}
	if f.spread {
		between = "-"
	}
	limit := a.limit
	if then != nil {
		limit = quota.NewLimit(limit.Name(), &midway{Algorithm: tokenBucket.make(numbers{1 << 10, 1 << 10, year}), at: int64(n), then: then})
	}
	cs := make([]quota.Charge, len(f.ops))
	for i := range cs {
		cs[i] = f.ops[i].use(a.limit, fmt.Sprint("c", a.serial, between, i))
	}
	for i, d := range a.inSteps(f, cs, a.charge) {
		cs[i] = f.ops[i].on(limit, cs[i].Key, id, d)
	}
	return &asked{form: f, cs: cs}
}

// inSteps has a list decided in one step, or charge by charge where the store decides fewer keys.
func (a *auditor) inSteps(f *form, cs []quota.Charge, decide func([]quota.Charge) []quota.Decision) (ds []quota.Decision) {
	if a.oneStep(f) {
		return decide(cs)
	}
	for i := range cs {
		ds = append(ds, decide(cs[i:i+1])...)
	}
	return ds
}

func (a *auditor) charge(cs []quota.Charge) []quota.Decision {
	ds, unknown := a.t.persist(a.looks, false, cs...)
	if unknown {
		a.t.skipf("not judged, because the store does not answer a handle whose connection works")
	}
	return ds
}

func (a *auditor) ask(cs []quota.Charge) []quota.Decision { return a.t.askAll(a.looks, cs) }

// midway is a rule in Go only that calls a function at one of its decisions: a store that decides in its own process is
// then between reading and writing.
type midway struct {
	quota.Algorithm
	at, made int64
	then     func()
}

func (m *midway) Decide(s quota.State, r quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	if atomic.AddInt64(&m.made, 1) == m.at {
		m.then()
	}
	return m.Algorithm.Decide(s, r, now)
}

// Share returns the share of the rule without the call of the function: that is in the store.
func (m *midway) Share(n int64) (quota.Algorithm, error) {
	return m.Algorithm.(driver.Sharer).Share(n)
}

// make makes a call.
func (a *auditor) make(ctx context.Context, k *asked, event string) {
	k.event = event
	if len(k.cs) == 1 && !k.list {
		var d quota.Decision
		d, k.err = a.breaks.take(ctx, k.cs[0])
		k.ds = []quota.Decision{d}
	} else {
		k.ds, k.err = a.breaks.chargeAll(ctx, k.cs...)
	}
	k.known = known(ctx, k.err) || k.spread && driver.Sentinel(k.err) == quota.ErrCrossSlot
}

// pairOf returns the charges of a call that charges the two keys together; of a store of single keys one charge.
func (a *auditor) pairOf(op quota.Op) []quota.Charge {
	cs := []quota.Charge{{Limit: a.shared, Key: "pair/a", Op: op, Cost: 1}, {Limit: a.shared, Key: "pair/b", Op: op, Cost: 1}}
	if a.grade == driver.OneKey {
		cs = cs[:1]
	}
	return cs
}

// contend charges the pair.
func (a *auditor) contend(ctx context.Context) {
	cs := a.pairOf(quota.OpDebit)
	ds, err := a.breaks.chargeAll(ctx, cs...)
	a.pair.book(a.t, ctx, cs[0], ds[0], err)
}

// all makes the calls at once, on some goroutines, each with a context of its own.
func (a *auditor) all(calls []*asked, event string, contextFor func(i int) (context.Context, context.CancelFunc)) {
	const callers = 12
	a.t.together(callers, func(i int) {
		for ; i < len(calls); i += callers {
			ctx, cancel := contextFor(i)
			a.make(ctx, calls[i], event)
			a.contend(ctx)
			cancel()
		}
	})
}

// look compares the keys of calls with the answers.
func (a *auditor) look(calls []*asked) {
	for _, k := range calls {
		added := a.added(k)
		charged, not := true, true
		for i, o := range k.ops {
			charged, not = charged && added[i] == o.once, not && added[i] == 0
		}
		answered := k.err == nil && !substituted(k.ds)
		at := line{k.event, ending(a.t, k)}
		if a.lines[at] == nil {
			a.lines[at] = &sum{}
		}
		switch s := a.lines[at]; {
		case not:
			s.not++
		case charged:
			s.charged++
		default:
			s.other++
		}
		if !answered && strings.HasPrefix(k.event, LostReply.String()) {
			a.failed++
			if !not {
				a.lost++
			}
		}
		if k.err == nil && !answered && quota.Granted(k.ds) && k.ds[0].Source == quota.FromFallback {
			a.substituted = append(a.substituted, k)
		}
		if wrong := a.wrong(k, added, charged, not); wrong != "" && a.first == "" {
			a.first = fmt.Sprintf("%s, with this event: %s\n%s\n\tthen %s\n\twant %s", strings.TrimSpace(showSome(k.cs)), k.event, answer(k.ds[:min(len(k.ds), 4)], k.err), count(k, added), wrong)
		}
		if k.id && !driver.OnlyPeeks(k.cs) && a.first == "" {
			a.repeat(k)
		}
	}
}

// added returns the tokens that a call added to those in use, key by key.
func (a *auditor) added(k *asked) []int64 {
	peeks := make([]quota.Charge, len(k.cs))
	for i := range peeks {
		peeks[i] = quota.Charge{Limit: k.ops[i].limit(a.limit), Key: k.cs[i].Key, Op: quota.OpPeek}
	}
	added := make([]int64, len(peeks))
	for i, d := range a.inSteps(k.form, peeks, a.ask) {
		added[i] = d.Capacity - d.Remaining - inUse
	}
	return added
}

// wrong returns the charges that would fit the answer to a call, or "" if those that were made do.
func (a *auditor) wrong(k *asked, added []int64, charged, not bool) string {
	switch {
	case k.err == nil && substituted(k.ds), indeterminate(k.err):
		for i, o := range k.ops {
			if added[i] != 0 && added[i] != o.once {
				return "each key charged once, or not at all: the outcome is unknown"
			}
		}
		if k.err != nil && a.oneStep(k.form) && !charged && !not {
			return "all keys charged, or none: they are one list"
		}
	case k.err == nil && !quota.Granted(k.ds):
		return "a grant, or an error: there is enough left"
	case k.err == nil && !charged:
		return "each key charged once, as the answer says"
	case k.err != nil && !k.known:
		return "an error of package quota, or that of a context that is done"
	case k.err != nil && !not:
		return "no key charged, as the error says; where that is not known, quota.ErrIndeterminate"
	}
	return ""
}

// repeat repeats a call with an id by the other handle, until it is answered. Then it must have been charged once.
func (a *auditor) repeat(k *asked) {
	ds := a.ask(k.cs)
	added := a.added(k)
	for i, o := range k.ops {
		if !quota.Granted(ds) || added[i] != o.once {
			a.first = fmt.Sprintf("%s, with this event: %s\n%s\n\tand which was repeated:\n%s\n\tthen %s\n\twant each key charged once, however often the id is repeated",
				strings.TrimSpace(showSome(k.cs)), k.event, answer(k.ds[:min(len(k.ds), 4)], k.err), answer(ds[:min(len(ds), 4)], nil), count(k, added))
			return
		}
	}
}

// end fails the case if a fault was found.
func (a *auditor) end() {
	if a.first == "" {
		got := a.ask(a.pairOf(quota.OpPeek))
		used := got[0].Capacity - got[0].Remaining
		least, unknown := a.pair.bounds()
		switch {
		case used < least || used > least+unknown:
			a.first = fmt.Sprintf("got: %d tokens are charged to %q; want: %d, for which calls returned nil, and up to %d more, whose outcome is unknown", used, "pair/a", least, unknown)
		case got[0].Remaining != got[len(got)-1].Remaining:
			a.first = fmt.Sprintf("two keys that are charged in lists only:\n%s\n\twant the same remaining for both", answer(got, nil))
		default:
			if a.settled(); a.first == "" {
				return
			}
		}
	}
	var b strings.Builder
	for _, at := range slices.SortedFunc(maps.Keys(a.lines), func(a, b line) int {
		return cmp.Or(strings.Compare(a.event, b.event), strings.Compare(a.end, b.end))
	}) {
		s := a.lines[at]
		fmt.Fprintf(&b, "\n\t%s, %s: %d charged, %d not", at.event, at.end, s.charged, s.not)
		if s.other > 0 {
			fmt.Fprintf(&b, ", %d in part or more than once", s.other)
		}
	}
	a.t.fatalf("%s\nAll calls, by the event that they met and by their end:%s", a.first, b.String())
}

// settled closes the handle of the calls, where a fallback answered some of them in the store's place, and looks whether the
// store has been charged for them: once, and once more where the call reached it and its reply was lost.
func (a *auditor) settled() {
	admitted := a.pair.admitted.Load()
	if len(a.substituted) == 0 && admitted == 0 {
		return
	}
	const want = "all that was admitted in the store's place charged to it when the handle is closed: once, and once more where the reply of the store was lost"
	if err := a.breaks.close(); err != nil {
		a.first = fmt.Sprintf("Close:\n\tgot  error: %v\n\twant nil", err)
		return
	}
	for _, k := range a.substituted {
		added := a.added(k)
		for i, o := range k.ops {
			lapses := o.charge.Op == quota.OpHold && added[i] == 0 // it charges nothing, and may have been on the fallback alone
			if added[i] != o.once && added[i] != o.twice && !lapses && a.first == "" {
				a.first = fmt.Sprintf("%s, with this event: %s\n%s\n\tthen %s\n\twant %s", strings.TrimSpace(showSome(k.cs)), k.event, answer(k.ds[:min(len(k.ds), 4)], nil), count(k, added), want)
			}
		}
	}
	d := a.ask(a.pairOf(quota.OpPeek))[0]
	if least, more := a.pair.bounds(); a.first == "" && (d.Capacity-d.Remaining < least+admitted || d.Capacity-d.Remaining > least+more) {
		a.first = fmt.Sprintf("got: %d tokens are charged to %q; want: %d, for which calls returned nil, and up to %d more, whose outcome is unknown: %s", d.Capacity-d.Remaining, "pair/a", least+admitted, more-admitted, want)
	}
}

// numbersOf are numbers in the texts of errors, such as ports, in which errors of one kind differ.
var numbersOf = regexp.MustCompile(`[0-9]+`)

// ending returns how a call ended, in words that calls of one kind share.
func ending(t *trial, k *asked) string {
	switch {
	case k.err == nil && substituted(k.ds):
		return "answered " + k.ds[0].Source.String()
	case k.err == nil:
		return "answered"
	}
	text, _, _ := strings.Cut(strings.ReplaceAll(k.err.Error(), t.suite.run, "…"), "\n")
	if runes := []rune(numbersOf.ReplaceAllString(text, "#")); len(runes) > 120 {
		text = string(runes[:120]) + "…"
	} else {
		text = string(runes)
	}
	return fmt.Sprintf("error %+q", text)
}

// count says how often the keys of a call were charged.
func count(k *asked, added []int64) string {
	var keys, once, none, twice, other int
	for i, o := range k.ops {
		if o.once == 0 && added[i] == 0 { // a peek
			continue
		}
		keys++
		switch added[i] {
		case 0:
			none++
		case o.once:
			once++
		case o.twice:
			twice++
		default:
			other++
		}
	}
	text := fmt.Sprintf("of the %d keys that it charges, %d are charged once, %d not, %d twice", keys, once, none, twice)
	if other > 0 {
		text += fmt.Sprintf(", and %d otherwise", other)
	}
	return text
}

// showSome is show for lists that may be long.
func showSome(cs []quota.Charge) string {
	const most = 8
	if len(cs) <= most {
		return show(cs)
	}
	return fmt.Sprintf("%s … and %d more", show(cs[:most]), len(cs)-most)
}

// wire sets faults, from within the store's own calls too.
type wire struct {
	t       *trial
	set     func(Fault)
	pending sync.WaitGroup
}

// to sets a fault.
func (w *wire) to(f Fault) {
	w.pending.Wait()
	w.set(f)
}

// during sets a fault while the store decides. It does not wait long: the store may hold a lock that set needs.
func (w *wire) during(f Fault) {
	done := make(chan struct{})
	w.pending.Go(func() {
		defer close(done)
		defer w.t.rescue()
		w.set(f)
	})
	select {
	case <-done:
	case <-time.After(20 * time.Millisecond):
	}
}

// blink sets a fault and mends it, again and again, until it is stopped.
func (w *wire) blink(f Fault, rng *rand.Rand) (stop func()) {
	over, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		defer w.t.rescue()
		for next := f; ; next = f - next { // NoFault, and f again
			select {
			case <-over:
				return
			case <-time.After(time.Duration(magnitude(rng, 11)) * time.Microsecond):
				w.set(next)
			}
		}
	}()
	return sync.OnceFunc(func() {
		close(over)
		<-done
	})
}
