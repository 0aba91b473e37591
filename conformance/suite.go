package conformance

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"runtime/debug"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota/driver"
)

// Run tests a backend: each rule is a subtest, and each case of the rule a subtest below it. An incomplete harness ends
// the test at once.
func Run(t *testing.T, h Harness) {
	t.Helper()
	s, err := newSuite(h, options{})
	if err != nil {
		t.Fatal(err)
	}
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
					switch result.Outcome {
					case Failed:
						t.Error(result.Text)
					case Provisional:
						t.Log("provisional: " + result.Text)
					case Skipped, NotApplicable:
						t.Skip(result.Text)
					}
				})
			}
		})
	}
	report.write(t)
}

// options are settings of a run beside the harness. Only tests of the suite itself set them.
type options struct {
	seed     uint64        // 0 stands for the environment's seed, or a random one
	only     []string      // rules and cases, as an Exemption names them; nil stands for all
	patience time.Duration // 0 stands for the constant patience
	search   time.Duration // of each random search; 0 stands for enough
}

// patience is the time that the suite waits for a call or the end of a goroutine: longer than the slowest machine that
// still works needs.
const patience = 30 * time.Second

// examine runs the suite and returns its results, without failing tb.
func examine(tb testing.TB, h Harness, o options) (*Report, error) {
	s, err := newSuite(h, o)
	if err != nil {
		return nil, err
	}
	r := s.report(tb)
	for _, c := range cases() {
		if o.only == nil || slices.ContainsFunc(o.only, c.named) {
			r.Results = append(r.Results, s.try(tb, c))
		}
	}
	return r, nil
}

// suite is one run.
type suite struct {
	options
	h      Harness
	full   bool
	run    string // the beginning of the names of this run's data, which no other run has
	opened atomic.Int64
	gaveUp atomic.Bool // whether a call was repeated in vain
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
		s.search = enough
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
	r := &Report{Suite: Version, Backend: s.h.Name, Seed: s.seed, Faults: s.h.Fault != nil, Lacks: s.h.Lacks, Exempt: s.h.Exempt}
	if r.Backend == "" {
		r.Backend = tb.Name()
	}
	s.try(tb, &testCase{rule: s1, name: "opening", run: func(t *trial) {
		h := t.open(Opening{})
		r.Atomicity, r.Prompt = atomicityNames[min(driver.AtomicityOf(h.store), driver.OneKey)], driver.IsPrompt(h.store)
	}})
	return r
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
	start := time.Now()
	t := newTrial(s, tb, c)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer t.root.end()
		defer t.rescue()
		c.run(t)
		t.finished.Store(true)
	}()
	t.watch(done)
	result.Seconds = time.Since(start).Seconds()
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

// watch waits until the case is done, or no call has returned for the suite's patience. It counts ticks, so that it
// does not mistake a process that was stopped for a store that hangs.
func (t *trial) watch(done <-chan struct{}) {
	const ticks = 30
	ticker := time.NewTicker(t.suite.patience / ticks)
	defer ticker.Stop()
	last, idle := t.progress.Load(), 0
	for {
		select {
		case <-done:
			return
		case <-ticker.C:
		}
		if now := t.progress.Load(); now != last {
			last, idle = now, 0
		} else if idle++; idle > ticks {
			buf := make([]byte, 1<<16)
			t.record("no call has returned for %v: %s\n%s", t.suite.patience, t.under(), buf[:runtime.Stack(buf, true)])
			return
		}
	}
}

// rescue records a panic as a failure. Goroutines of a case defer it.
func (t *trial) rescue() {
	if v := recover(); v != nil {
		t.record("panic: %v\n%s", v, debug.Stack())
	}
}
