package conformance

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime/debug"
	"runtime/pprof"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota/driver"
)

// Run tests a backend: each rule is a subtest, and each case of the rule a subtest below it. An incomplete harness ends
// the test at once, and so does a store that does not answer. The last lines say with which failure to begin, and which
// promises were not tested.
func Run(t *testing.T, h Harness) {
	t.Helper()
	s, err := newSuite(h, options{})
	if err != nil {
		t.Fatal(err)
	}
	if s.child(t) {
		return
	}
	defer s.endProcess()
	report := s.report(t)
	t.Logf("conformance suite %s on %s, seed %d", Version, report.Backend, s.seed)
	all := cases()
	for len(all) > 0 {
		r := all[0].rule
		n := slices.IndexFunc(all, func(c *testCase) bool { return c.rule != r })
		if n < 0 {
			n = len(all)
		}
		of := all[:n]
		all = all[n:]
		t.Run(r.id+"_"+r.name, func(t *testing.T) {
			for _, c := range of {
				t.Run(c.name, func(t *testing.T) {
					result := s.try(t, c)
					report.Results = append(report.Results, result)
					result.tell(t)
				})
			}
		})
	}
	s.about(report)
	report.write(t)
	s.sayLast(t, report)
}

// tell tells the author's test of a result.
func (r *Result) tell(t testing.TB) {
	switch r.Outcome {
	case Failed:
		t.Error(r.Text)
	case Provisional:
		if text := "provisional: " + r.Text; strict() {
			t.Error(text)
		} else {
			t.Log(text)
		}
	case Skipped, NotApplicable:
		t.Skip(r.Text)
	}
}

// options are settings of a run beside the harness. Only tests of the suite itself set them.
type options struct {
	seed     uint64         // 0 stands for the environment's seed, or a random one
	only     []string       // rules and cases, as an Exemption names them; nil stands for all
	patience time.Duration  // 0 stands for the constant patience
	search   time.Duration  // of each random search; 0 stands for enough
	slowness func() float64 // of the machine; nil stands for the function slowness
}

// patience is the time that the suite waits for a call or the end of a goroutine. It waits longer on a machine that is slower than
// usual, by as much as it is slower.
const patience = 30 * time.Second

// examine runs the suite and returns its results, without failing tb.
func examine(tb testing.TB, h Harness, o options) (*Report, error) {
	s, err := newSuite(h, o)
	if err != nil {
		return nil, err
	}
	r := s.report(tb)
	if s.child(tb) {
		return r, nil
	}
	defer s.endProcess()
	for _, c := range cases() {
		if o.only == nil || slices.ContainsFunc(o.only, c.named) {
			r.Results = append(r.Results, s.try(tb, c))
		}
	}
	s.about(r)
	return r, nil
}

// suite is one run.
type suite struct {
	options
	h        Harness
	full     bool
	short    bool   // whether random traces take a third of search, as go test -short asks
	run      string // the beginning of the names of this run's data, which no other run has
	opened   atomic.Int64
	grade    atomic.Uint32 // as the store that was opened last says
	prompt   atomic.Bool
	gaveUp   atomic.Bool // whether a call was repeated in vain
	test     string      // the name of the test that called Run
	starting sync.Mutex
	process  *process // that opens handles for the suite, or nil
	hung     int      // cases in which a call did not return
	over     string   // why the other cases are not tested, or ""
}

func newSuite(h Harness, o options) (*suite, error) {
	if err := h.check(); err != nil {
		return nil, err
	}
	s := &suite{options: o, h: h, full: full(), run: fmt.Sprintf("q%013x", rand.Uint64()>>12)}
	if s.patience == 0 {
		s.patience = patience
	}
	if s.search == 0 {
		s.search, s.short = enough, testing.Short()
	}
	if s.slowness == nil {
		s.slowness = slowness
	}
	if s.seed == 0 {
		var err error
		if s.seed, err = seed(); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// report returns a report without results.
func (s *suite) report(tb testing.TB) *Report {
	r := &Report{Suite: Version, Backend: s.h.Name, Seed: s.seed, Faults: s.h.Fault != nil, Race: raceEnabled, Processes: s.h.Process != nil, Lacks: s.h.Lacks, Exempt: s.h.Exempt}
	if r.Backend == "" {
		r.Backend = tb.Name()
	}
	return r
}

// about adds to a report what the store says of itself.
func (s *suite) about(r *Report) {
	r.Atomicity, r.Prompt = atomicityNames[min(s.grade.Load(), uint32(driver.OneKey))], s.prompt.Load()
}

var atomicityNames = [...]string{driver.AnyKeys: "any keys", driver.OneGroup: "one group", driver.OneKey: "one key"}

// try runs a case on a goroutine of its own, so that panics, hangs and runtime.Goexit of the store are outcomes too.
func (s *suite) try(tb testing.TB, c *testCase) Result {
	result := Result{Rule: c.rule.id, Name: c.rule.name, Case: c.name, Outcome: Passed}
	if reason := s.h.exempt(c); reason != "" {
		result.Outcome, result.Text = Skipped, "exempt: "+reason
		return result
	}
	for _, f := range c.needs {
		if reason := s.h.lacks(f); reason != "" {
			result.Outcome, result.Text = Skipped, fmt.Sprintf("the backend lacks %q: %s", f, reason)
			return result
		}
	}
	if s.over != "" {
		result.Outcome, result.Text = Skipped, s.over
		return result
	}
	start := time.Now()
	t := newTrial(s, tb, c)
	done := make(chan struct{})
	go pprof.Do(bg, pprof.Labels("fleetquota-conformance", t.label()), func(context.Context) {
		defer close(done)
		defer t.root.end()
		defer t.rescue()
		c.run(t)
		t.finished.Store(true)
	})
	gaveUp := s.gaveUp.Load()
	hangs := !t.watch(done)
	result.Seconds = time.Since(start).Seconds()
	defer s.goOn(tb, c, &result, hangs, hangs || !gaveUp && s.gaveUp.Load())
	t.mu.Lock()
	defer t.mu.Unlock()
	t.over = true
	switch {
	case t.failure != "":
		result.Outcome = Failed
		if c.provisional == Version {
			result.Outcome = Provisional
		}
		result.Text = fmt.Sprintf("%s %s: %s\n%s\nreplay with FLEETQUOTA_SEED=%d", c.rule.id, c.rule.name, c.rule.text, t.failure, s.seed)
	case t.skipped != "":
		result.Outcome, result.Text = Skipped, t.skipped
		if t.excused {
			result.Outcome = NotApplicable
		}
	case !t.finished.Load():
		result.Outcome, result.Text = Failed, "the store ended the goroutine that called it"
	}
	return result
}

// goOn decides after a case whether the others are tested: not if the store answers none of the simplest calls, nor if
// calls hang in one case after the other.
func (s *suite) goOn(tb testing.TB, c *testCase, result *Result, hangs, inVain bool) {
	const most = 3
	if hangs {
		s.hung++
	}
	failed := result.Outcome == Failed || result.Outcome == Provisional
	switch {
	case c.first && failed:
		s.over = "not tested, since the store does not answer: see " + c.path()
	case s.hung == most:
		s.over = fmt.Sprintf("not tested, since calls did not return in %d cases, the last of them %s", most, c.path())
	case !c.first && inVain && s.over == "" && s.try(tb, cases()[0]).Outcome == Failed:
		s.over = "not tested, since the store does not answer any more: see " + c.path()
	}
}

// watch waits until the case is done, and returns true, or until no call has returned for the case's patience. It counts
// ticks, so that it does not mistake a process that was stopped for a store that hangs, and counts a tick of a slow machine in part.
func (t *trial) watch(done <-chan struct{}) bool {
	const ticks = 30
	patience := t.patience()
	if t.suite.hung > 0 && !t.of.first { // the first time was enough to be sure
		patience /= 6
	}
	ticker := time.NewTicker(patience / ticks)
	defer ticker.Stop()
	last, idle := t.progress.Load(), 0.0
	for {
		select {
		case <-done:
			return true
		case <-ticker.C:
		}
		if now := t.progress.Load(); now != last || t.own.Load() > 0 {
			last, idle = now, 0
		} else if idle += 1 / t.suite.slowness(); idle > ticks {
			stacks := "their stacks are those of the first case that hung"
			if t.suite.hung == 0 {
				_, here := labelled(t.label())
				_, below := labelled(t.suite.run)
				stacks = firstLines(here+below, 100)
			}
			t.record("no call has returned for %v: %s\n%s", patience, t.under(), stacks)
			return false
		}
	}
}

// label is the label of the goroutines that the case starts, and of those that these start.
func (t *trial) label() string { return t.suite.run + " " + t.of.path() }

// patience is the time that the case waits for the store: less in the first case, which makes the simplest calls.
func (t *trial) patience() time.Duration {
	if t.of.first {
		return min(t.suite.patience, 10*time.Second)
	}
	return t.suite.patience
}

// firstLines returns the first n lines of a text.
func firstLines(text string, n int) string {
	lines := strings.SplitAfterN(text, "\n", n+1)
	if len(lines) <= n {
		return text
	}
	return strings.Join(lines[:n], "") + "…"
}

// rescue records a panic as a failure. Goroutines of a case defer it.
func (t *trial) rescue() {
	if v := recover(); v != nil {
		t.record("panic: %v\n%s", v, stackOfPanic())
	}
}

// stackOfPanic returns the stack of the panic that is recovered, down to the suite's own call.
func stackOfPanic() string {
	text := string(debug.Stack())
	if _, from, found := strings.Cut(text, "\npanic("); found {
		if _, rest, found := strings.Cut(from, "\n"); found {
			if _, rest, found = strings.Cut(rest, "\n"); found {
				text = rest
			}
		}
	}
	if below, _, found := strings.Cut(text, "\ngithub.com/fleetquota/fleetquota/conformance.(*handle)."); found {
		text = below
	}
	return firstLines(text, 60)
}

// sayLast says in the last lines of the test's output with which failure to begin, and which promises were not tested. A
// test that passes prints those too, though go test shows them only where it runs one package, or with -v.
func (s *suite) sayLast(t testing.TB, r *Report) {
	var failed, provisional []string
	for _, c := range r.Results {
		path := (&testCase{rule: &rule{id: c.Rule, name: c.Name}, name: c.Case}).path()
		switch c.Outcome {
		case Failed:
			failed = append(failed, path)
		case Provisional:
			provisional = append(provisional, path)
		}
	}
	say := func(format string, args ...any) {
		line := fmt.Sprintf("conformance: "+format, args...)
		if t.Log(line); !t.Failed() && !testing.Verbose() {
			fmt.Fprintln(os.Stdout, line)
		}
	}
	if len(provisional) > 0 {
		say("%d new cases failed, which will fail the test in the next version: %s", len(provisional), strings.Join(provisional, ", "))
	}
	if why := r.weak(); why != "" {
		say("NOT TESTED WHETHER CALLS ARE CHARGED ONCE WHEN THE CONNECTION BREAKS: %s", why)
	}
	if s.over != "" {
		say("%s", s.over)
	}
	if len(failed) > 0 {
		say("%d of %d cases failed; begin with %s: later failures may follow from it", len(failed), len(r.Results), failed[0])
	}
}
