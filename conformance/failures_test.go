package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// altered is a store whose calls go through a function.
type altered struct {
	quota.Store
	call func(cs []quota.Charge, out []quota.Decision, decide func() error) error
}

func (s altered) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.call(cs, out, func() error { return s.Store.ChargeAll(ctx, cs, out) })
}

func (s altered) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	out := make([]quota.Decision, 1)
	err := s.ChargeAll(ctx, []quota.Charge{c}, out)
	return out[0], err
}

// broken is a harness of stores that are altered.
func broken(call func(cs []quota.Charge, out []quota.Decision, decide func() error) error) Harness {
	h := newMemory().harness()
	open := h.Open
	h.Open = func(t testing.TB, o Opening) quota.Store { return altered{open(t, o), call} }
	h.Fault = nil
	return h
}

// wrong is a store whose Remaining is one too many after a second token.
func wrong() Harness {
	return broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		err := decide()
		for i := range cs {
			if d := &out[i]; d.Allowed && d.Remaining < d.Capacity-1 {
				d.Remaining++
			}
		}
		return err
	})
}

// only returns the result of one case.
func only(t *testing.T, h Harness, name string, patience time.Duration) Result {
	t.Helper()
	r, err := examine(t, h, options{only: []string{name}, patience: patience})
	if err != nil || len(r.Results) != 1 {
		t.Fatalf("%s: got %+v, error %v, want one result", name, r, err)
	}
	return r.Results[0]
}

func TestFailureText(t *testing.T) {
	r := only(t, wrong(), "S1_Meaning/TokenBucket", 0)
	if r.Outcome != Failed {
		t.Fatalf("outcome: got %s, want %s: %+v", r.Outcome, Failed, r)
	}
	for _, part := range []string{
		"S1 Meaning: verdicts are those of Apply", // the rule, and its meaning
		"\n\tgot  allowed, limit ", "\n\twant allowed, limit ",
		"\n\t1. Charge [", " is TokenBucket(",
		"\nreplay with FLEETQUOTA_SEED=",
	} {
		if !strings.Contains(r.Text, part) {
			t.Errorf("text: got no %q in\n%s", part, r.Text)
		}
	}
	// One charge of two, or two of one, show it.
	if strings.Contains(r.Text, "\n\t3. ") {
		t.Errorf("trace: got 3 calls or more, want at most 2:\n%s", r.Text)
	}
}

func TestSeedReplays(t *testing.T) {
	examine := func(seed uint64) string {
		s, err := newSuite(wrong(), options{seed: seed})
		if err != nil {
			t.Fatal(err)
		}
		var trace string
		s.try(t, &testCase{rule: s1, name: "replay", run: func(t *trial) {
			p := t.player(t.root, true)
			steps, _ := t.improvise(p, t.rng, &shape{kinds: kinds, limits: 2, keys: 2, list: 2, steps: 20, ops: anyOps, cost: randomCost})
			for _, s := range steps {
				for _, c := range s.charges {
					trace += show([]quota.Charge{c.Charge})
				}
			}
		}})
		return trace
	}
	if a, b := examine(7), examine(7); a != b || a == "" {
		t.Errorf("one seed, run again: got\n%s\nwant\n%s", b, a)
	}
	if examine(7) == examine(8) {
		t.Error("two seeds: got the same choices, want different ones")
	}
	t.Setenv("FLEETQUOTA_SEED", "eight")
	if _, err := newSuite(wrong(), options{}); err == nil {
		t.Error("FLEETQUOTA_SEED=eight: got no error, want one")
	}
}

// Under go test -short random traces take a third of their time, and all else as long as ever.
func TestShort(t *testing.T) {
	t.Setenv("FLEETQUOTA_FULL", "")
	defer flag.Set("test.short", fmt.Sprint(testing.Short()))
	for setting, want := range map[string]time.Duration{"false": enough, "true": enough / 3} {
		flag.Set("test.short", setting)
		s, err := newSuite(wrong(), options{})
		if err != nil {
			t.Fatal(err)
		}
		of := newTrial(s, t, cases()[1])
		if got := enough - of.until.Sub(of.traced); s.search != enough || got != want {
			t.Errorf("-short=%s: got traces for %v, and %v for all else; want %v and %v", setting, got, s.search, want, enough)
		}
	}
}

func TestPanicIsAFailure(t *testing.T) {
	h := broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		if strings.Contains(cs[0].Key, "{") {
			panic("braces")
		}
		return decide()
	})
	if r := only(t, h, "C1_Keys/keys", 0); r.Outcome != Failed || !strings.Contains(r.Text, "the store panicked on Charge") || !strings.Contains(r.Text, "braces") || !strings.Contains(r.Text, "failures_test.go:") {
		t.Errorf("a panic of Charge: got %+v, want %s, with the text of the panic and its stack", r, Failed)
	}
	h.Open = func(testing.TB, Opening) quota.Store { panic("no server") }
	if r := only(t, h, "C1_Keys/keys", 0); r.Outcome != Failed || !strings.Contains(r.Text, "no server") {
		t.Errorf("a panic of Open: got %+v, want %s, with the text of the panic", r, Failed)
	}
}

// hanging is a store whose calls do not return until the test ends.
func hanging(t *testing.T) Harness {
	stuck := make(chan struct{})
	t.Cleanup(func() { close(stuck) })
	return broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		waitFor(stuck)
		return errors.New("too late")
	})
}

func waitFor(stuck <-chan struct{}) { <-stuck }

// While the suite looks at goroutines, no call returns, however long that takes.
func TestOwnWorkIsNoHang(t *testing.T) {
	s, err := newSuite(wrong(), options{patience: 30 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	busy := newTrial(s, t, cases()[1])
	busy.own.Add(1)
	done := make(chan struct{})
	time.AfterFunc(200*time.Millisecond, func() { close(done) })
	if !busy.watch(done) {
		t.Error("200 ms of the suite's own work, with a patience of 30 ms: got a store that hangs, want none")
	}
	r := s.try(t, &testCase{rule: s1, name: "a trace that waits", run: func(t *trial) {
		l := t.named("tokens", tokenBucket, numbers{10, 10, time.Second})
		if wrong, _, err := t.replay([]step{{id: 1, wait: 200 * time.Millisecond, charges: []charge{{Charge: quota.Charge{Limit: l, Key: "k"}}}}}, false); wrong != "" || err != nil {
			t.fatalf("%s, %v", wrong, err)
		}
	}})
	if r.Outcome != Passed {
		t.Errorf("a trace that waits for 200 ms, with a patience of 30 ms: got %+v, want it passed", r)
	}
	if newTrial(s, t, cases()[1]).watch(make(chan struct{})) {
		t.Error("a case without an end: got no store that hangs, want one")
	}
}

func TestHangIsAFailure(t *testing.T) {
	t.Parallel()
	r := only(t, hanging(t), "S8_Close/closed", 300*time.Millisecond)
	for _, part := range []string{"no call has returned for 300ms: under way are\n\tCharge [peek", "conformance.waitFor"} {
		if r.Outcome != Failed || !strings.Contains(r.Text, part) {
			t.Errorf("a call that hangs: got %+v, want %s, with %q", r, Failed, part)
		}
	}
}

// prompt is a store whose calls return by their deadline, and their errors after a while.
type prompt struct {
	quota.Store
	until <-chan struct{}
}

func (s prompt) Prompt() bool { return true }

func (s prompt) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(ctx, c)
	if err != nil && ctx.Err() != nil {
		<-s.until
	}
	return d, err
}

// A store that a busy machine lets do little is waited for as much longer: here until the suite has asked some times how busy the machine
// is. On one that is not busy the same store fails.
func TestBusyMachine(t *testing.T) {
	t.Parallel()
	wait := func(until <-chan struct{}) Harness {
		return broken(func(_ []quota.Charge, _ []quota.Decision, decide func() error) error {
			<-until
			return decide()
		})
	}
	for name, c := range map[string]struct {
		of, says string
		asked    int64
		patience time.Duration
		harness  func(until <-chan struct{}) Harness
	}{
		"a call that takes long": {"S1_Meaning/answers", "no call has returned for", 40, 90 * time.Millisecond, wait},
		"Open that takes long": {"S1_Meaning/answers", "under way are\n\tHarness.Open", 40, 90 * time.Millisecond, func(until <-chan struct{}) Harness {
			h := newMemory().harness()
			open := h.Open
			h.Open = func(t testing.TB, o Opening) quota.Store {
				<-until
				return open(t, o)
			}
			return h
		}},
		"a call that is refused": {"S1_Meaning/answers", "want an answer", 60, 90 * time.Millisecond, func(until <-chan struct{}) Harness {
			return broken(func(_ []quota.Charge, _ []quota.Decision, decide func() error) error {
				select {
				case <-until:
					return decide()
				default:
					return quota.ErrUnavailable
				}
			})
		}},
		"a goroutine that ends late": {"S8_Close/goroutines", "goroutines more", 30, 90 * time.Millisecond, func(until <-chan struct{}) Harness {
			return broken(func(_ []quota.Charge, _ []quota.Decision, decide func() error) error {
				go waitFor(until)
				return decide()
			})
		}},
		"a deadline that is met late": {"C7_Prompt/frozen", "had not returned 2s after", 40, 6 * time.Second, func(until <-chan struct{}) Harness {
			m := newMemory()
			h := m.harness()
			h.Open = func(t testing.TB, o Opening) quota.Store { return prompt{m.open(t, o), until} }
			h.Fault = func(t testing.TB, o Opening) (quota.Store, func(Fault)) {
				s, set := m.broken(nil)(t, o)
				return prompt{s, until}, set
			}
			return h
		}},
	} {
		for slow, want := range map[float64]Outcome{1: Failed, 1000: Passed} {
			t.Run(fmt.Sprintf("%s, %v times as slow", name, slow), func(t *testing.T) {
				t.Parallel()
				until := make(chan struct{})
				release := sync.OnceFunc(func() { close(until) })
				defer release()
				var asked atomic.Int64
				r, err := examine(t, c.harness(until), options{only: []string{c.of}, patience: c.patience, slowness: func() float64 {
					if slow > 1 && asked.Add(1) == c.asked {
						release()
					}
					return slow
				}})
				if err != nil {
					t.Fatal(err)
				}
				if got := r.Results[0]; got.Outcome != want || want == Failed && !strings.Contains(got.Text, c.says) {
					t.Errorf("got %s, %q; want %s, and if it fails %q", got.Outcome, got.Text, want, c.says)
				}
			})
		}
	}
}

// The machine is measured.
func TestSlowness(t *testing.T) {
	if n := slowness(); n < 1 {
		t.Errorf("slowness: got %v, want 1 or more", n)
	}
}

func idle() float64 { return 1 } // a machine

// A store that answers no call is told so once, in seconds, with the stacks of its calls alone.
func TestHopelessRun(t *testing.T) {
	t.Parallel()
	for name, h := range map[string]Harness{
		"hangs": hanging(t),
		"fails": broken(func([]quota.Charge, []quota.Decision, func() error) error { return quota.ErrUnavailable }),
		"opens never": {Open: func(t testing.TB, o Opening) quota.Store {
			waitFor(make(chan struct{}))
			return nil
		}},
		"panics": broken(func([]quota.Charge, []quota.Decision, func() error) error { panic("no table") }),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			start := time.Now()
			r, err := examine(t, h, options{patience: time.Second, slowness: idle})
			if err != nil {
				t.Fatal(err)
			}
			for i, c := range r.Results {
				if want := i == 0; (c.Outcome == Failed) != want || !want && !strings.Contains(c.Text, "see S1_Meaning/answers") {
					t.Errorf("%s %s: got %+v, want the case answers failed, and the others not tested", c.Rule, c.Case, c)
				}
			}
			if n := strings.Count(r.Results[0].Text, "\n"); n > 150 {
				t.Errorf("failure: got %d lines, want at most 150", n)
			}
			if took := time.Since(start); took > 15*time.Second {
				t.Errorf("the run took: got %v, want seconds", took)
			}
		})
	}
}

// A store that hangs in some calls is given up after a few cases.
func TestHangsNowAndThen(t *testing.T) {
	t.Parallel()
	stuck := make(chan struct{})
	defer close(stuck)
	h := broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		if cs[0].Op == quota.OpRefund {
			waitFor(stuck)
		}
		return decide()
	})
	r, err := examine(t, h, options{patience: time.Second, slowness: idle})
	if err != nil {
		t.Fatal(err)
	}
	stacks, failures := 0, 0
	for _, c := range r.Results {
		stacks += strings.Count(c.Text, "conformance.waitFor+")
		if c.Outcome == Failed {
			failures++
		}
	}
	if failures != 3 || stacks == 0 || stacks > 4 {
		t.Errorf("a store that hangs on refunds: got %d failures, with %d stacks of the call, want 3, the first with its stacks", failures, stacks)
	}
}

// The last line says where to begin.
func TestLastLines(t *testing.T) {
	t.Parallel()
	s, err := newSuite(wrong(), options{})
	if err != nil {
		t.Fatal(err)
	}
	said := &lines{TB: t, failed: true}
	s.sayLast(said, &Report{Faults: false, Results: []Result{
		{Rule: "S1", Name: "Meaning", Case: "lists", Outcome: Passed},
		{Rule: "S2", Name: "AllOrNothing", Case: "pairs", Outcome: Provisional},
		{Rule: "S4", Name: "AtMostOnce", Case: "ids and faults", Outcome: Failed},
		{Rule: "C1", Name: "Keys", Case: "keys", Outcome: Failed},
	}})
	want := []string{
		"1 new cases failed, which will fail the test in the next version: S2_AllOrNothing/pairs",
		"NOT TESTED WHETHER CALLS ARE CHARGED ONCE WHEN THE CONNECTION BREAKS: Harness.Fault is nil",
		"2 of 4 cases failed; begin with S4_AtMostOnce/ids_and_faults",
	}
	if len(said.all) != len(want) {
		t.Fatalf("last lines: got %q, want %q", said.all, want)
	}
	for i := range want {
		if !strings.Contains(said.all[i], want[i]) {
			t.Errorf("line %d from the end: got %q, want %q", len(want)-i, said.all[i], want[i])
		}
	}
}

// lines keeps what is logged.
type lines struct {
	testing.TB
	failed bool
	all    []string
}

func (l *lines) Log(args ...any) { l.all = append(l.all, fmt.Sprint(args...)) }
func (l *lines) Failed() bool    { return l.failed }

// Characters that look alike differ in failures.
func TestOddCharacters(t *testing.T) {
	limit := tokenBucket.limit("tokens", 10, 10, time.Second)
	if a, b := show([]quota.Charge{{Limit: limit, Key: "é"}}), show([]quota.Charge{{Limit: limit, Key: "e\u0301"}}); a == b || strings.ContainsFunc(a+b, func(r rune) bool { return r > 127 }) {
		t.Errorf("two keys that look alike: got %s and %s, want them escaped", a, b)
	}
}

func TestGoexitIsAFailure(t *testing.T) {
	h := broken(func([]quota.Charge, []quota.Decision, func() error) error {
		runtime.Goexit()
		return nil
	})
	if r := only(t, h, "S8_Close/closed", 0); r.Outcome != Failed || !strings.Contains(r.Text, "ended the goroutine") {
		t.Errorf("a call that ends its goroutine: got %+v, want %s", r, Failed)
	}
}

// A store that stops answering fails, and the suite does not wait for it in every case.
func TestErrorsAreFailures(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	h := broken(func(_ []quota.Charge, _ []quota.Decision, decide func() error) error {
		if calls.Add(1) > 500 {
			return quota.ErrUnavailable
		}
		return decide()
	})
	start := time.Now()
	r, err := examine(t, h, options{patience: time.Second, slowness: idle})
	if err != nil {
		t.Fatal(err)
	}
	var failed []Result
	for _, r := range r.Results {
		if r.Outcome == Failed {
			failed = append(failed, r)
		}
	}
	if last := r.Results[len(r.Results)-1]; len(failed) == 0 || len(failed) > 2 || !strings.Contains(last.Text, "does not answer any more") {
		t.Errorf("a store that stops answering: got failures %+v, and last %+v, want one or two, and then none tested", failed, last)
	}
	if took := time.Since(start); took > 30*time.Second {
		t.Errorf("the run took: got %v, want at most %v", took, 30*time.Second)
	}
}

func TestOpenThatFails(t *testing.T) {
	t.Parallel()
	h := Harness{Open: func(t testing.TB, o Opening) quota.Store {
		t.Fatalf("no server for %s", o.Data)
		return nil
	}}
	if r := only(t, h, "S3_Traceless/single_charges", 0); r.Outcome != Failed || !strings.Contains(r.Text, "no server for q") {
		t.Errorf("t.Fatal in Open: got %+v, want %s, with its text", r, Failed)
	}
	h.Open = func(t testing.TB, o Opening) quota.Store {
		t.Skip("no server here")
		return nil
	}
	if r := only(t, h, "S3_Traceless/single_charges", 0); r.Outcome != Skipped || !strings.Contains(r.Text, "no server here") {
		t.Errorf("t.Skip in Open: got %+v, want %s, with its text", r, Skipped)
	}
}

func TestSkipsSayWhy(t *testing.T) {
	t.Parallel()
	h := wrong()
	h.Lacks = []Lack{{Exact, "it leases"}}
	if r := only(t, h, "S1_Meaning/TokenBucket", 0); r.Outcome != Skipped || !strings.Contains(r.Text, "it leases") {
		t.Errorf("a store that lacks Exact: got %+v, want %s, with the reason", r, Skipped)
	}
	for _, name := range []string{"S1", "S1_Meaning", "S1_Meaning/TokenBucket", "S1_Meaning/own_clock"} {
		h := wrong()
		h.Exempt = []Exemption{{name, "issue 12"}}
		want := Skipped
		if strings.HasSuffix(name, "own_clock") {
			want = Failed
		}
		if r := only(t, h, "S1_Meaning/TokenBucket", 0); r.Outcome != want || want == Skipped && !strings.Contains(r.Text, "issue 12") {
			t.Errorf("%s is exempt: got %+v, want %s", name, r, want)
		}
	}
	// A case that does not concern a store is not applicable. A skipped case was not tested, which this store has none of.
	report, err := examine(t, newMemory().harness(), options{search: 30 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range report.Results {
		if r.Outcome == Skipped && !strings.Contains(r.Text, "Harness.Process is nil") {
			t.Errorf("%s %s: got %+v, want no skipped case", r.Rule, r.Case, r)
		}
	}
}

// late is a store that checks the context after the charge, when the context has ended.
type late struct{ quota.Store }

func (s late) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Charge(context.WithoutCancel(ctx), c)
	if err == nil && ctx.Done() != nil {
		<-ctx.Done()
		return quota.Decision{}, ctx.Err()
	}
	return d, err
}

func TestContextThatEndsTooLate(t *testing.T) {
	h := newMemory().harness()
	open := h.Open
	h.Open = func(t testing.TB, o Opening) quota.Store { return late{open(t, o)} }
	if r := only(t, h, "S4_AtMostOnce/contexts_that_end", 0); r.Outcome != Failed || !strings.Contains(r.Text, "tokens are charged; want") {
		t.Errorf("a context that is checked too late: got %+v, want %s, with the charged tokens", r, Failed)
	}
}

// A store that declares that it lacks ids must refuse them.
func TestIDsThatAreIgnored(t *testing.T) {
	h := newMemory().harness()
	h.Lacks = []Lack{{IDs, "not yet"}}
	if r := only(t, h, "C3_IDs/refused", 0); r.Outcome != Failed || !strings.Contains(r.Text, "want quota.ErrCrossSlot") {
		t.Errorf("ids that are ignored: got %+v, want %s", r, Failed)
	}
}

func TestHarnessIsChecked(t *testing.T) {
	for name, alter := range map[string]func(*Harness){
		"Open":          func(h *Harness) { h.Open = nil },
		"[clock shared": func(h *Harness) { h.Lacks = []Lack{{"speed", "it is slow"}} },
		"Lacks":         func(h *Harness) { h.Lacks = []Lack{{Exact, ""}} },
		"S1_Meaning/":   func(h *Harness) { h.Exempt = []Exemption{{"S99", "no such rule"}} },
		"Exempt":        func(h *Harness) { h.Exempt = []Exemption{{"S1", ""}} },
	} {
		h := wrong()
		alter(&h)
		if _, err := newSuite(h, options{}); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("harness: got error %v, want one that has %q", err, name)
		}
	}
}

// A new case fails no test before the next version.
func TestProvisional(t *testing.T) {
	s, err := newSuite(wrong(), options{})
	if err != nil {
		t.Fatal(err)
	}
	c := *cases()[1]
	for version, want := range map[string]Outcome{Version: Provisional, "0.9": Failed, "": Failed} {
		c.provisional = version
		if r := s.try(t, &c); r.Outcome != want {
			t.Errorf("a case that is provisional in %q: got %+v, want %s", version, r, want)
		}
	}
}

// With FLEETQUOTA_STRICT=1 it fails tests at once.
func TestStrict(t *testing.T) {
	for setting, want := range map[string]string{"": "log", "0": "log", "1": "error"} {
		t.Setenv("FLEETQUOTA_STRICT", setting)
		got := &told{TB: t}
		(&Result{Outcome: Provisional}).tell(got)
		if got.by != want {
			t.Errorf("FLEETQUOTA_STRICT=%s: got a provisional failure told as %s, want %s", setting, got.by, want)
		}
	}
}

// told is a test that keeps how it was told of a result.
type told struct {
	testing.TB
	by string
}

func (t *told) Error(...any) { t.by = "error" }
func (t *told) Log(...any)   { t.by = "log" }

func TestReport(t *testing.T) {
	dir := t.TempDir()
	t.Setenv(reportVariable, dir)
	h := newMemory().harness()
	h.Name = "a/store: one"
	for _, c := range cases() {
		if c.rule != s6 {
			h.Exempt = append(h.Exempt, Exemption{c.path(), "for a quick test"})
		}
	}
	t.Run("run", func(t *testing.T) { Run(t, h) })
	text, err := os.ReadFile(filepath.Join(dir, "a-store--one.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r Report
	if err := json.Unmarshal(text, &r); err != nil {
		t.Fatal(err)
	}
	if r.Suite != Version || r.Backend != h.Name || r.Atomicity != "any keys" || !r.Faults || r.Seed == 0 || len(r.Results) != len(cases()) {
		t.Errorf("report: got %s, want suite %s of %q, any keys, with faults, a seed and %d results", text, Version, h.Name, len(cases()))
	}
	for _, r := range r.Results {
		if r.Rule == "S6" && (r.Outcome != Passed || r.Name != "Context" || r.Case != "done before") || r.Rule != "S6" && r.Outcome != Skipped {
			t.Errorf("%s %s: got %+v, want S6 Context, done before, %s, and the other cases %s", r.Rule, r.Case, r, Passed, Skipped)
		}
	}
}

// S rules have the text of quota.Store, and the package documentation lists all rules.
func TestRulesAreDocumented(t *testing.T) {
	store, err := os.ReadFile("../quota/store.go")
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile("doc.go")
	if err != nil {
		t.Fatal(err)
	}
	plain := func(text string) string {
		return strings.ToLower(strings.Join(strings.Fields(strings.NewReplacer("//", " ", "[", "", "]", "", "driver.", "").Replace(text)), " "))
	}
	seen := map[*rule]bool{}
	names := map[string]bool{}
	for _, c := range cases() {
		if names[c.path()] {
			t.Errorf("cases called %s: got 2, want 1", c.path())
		}
		names[c.path()] = true
		if seen[c.rule] {
			continue
		}
		seen[c.rule] = true
		text := plain(c.rule.text)
		if want := plain(c.rule.id + " " + c.rule.name + " " + c.rule.text); !strings.Contains(plain(string(doc)), want) {
			t.Errorf("doc.go: got no %q", want)
		}
		if number, ok := strings.CutPrefix(c.rule.id, "S"); ok {
			first, _, _ := strings.Cut(text, ";")
			if !strings.Contains(plain(string(store)), number+". ") || !strings.Contains(plain(string(store)), strings.TrimSuffix(first, ".")) {
				t.Errorf("quota.Store, rule %s: got no %q", number, first)
			}
		}
	}
	if len(seen) != 17 {
		t.Errorf("rules with cases: got %d, want 17", len(seen))
	}
}

// A test that imports the suite links no client, no server and no launcher of servers: besides package quota and the
// algorithms there is one library, which checks histories.
func TestImports(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-f", "{{if not .Standard}}{{.ImportPath}}{{end}}", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	const module = "github.com/fleetquota/fleetquota/"
	accepted := []string{
		module + "quota", module + "quota/driver", module + "internal/panics", module + "algorithm", module + "conformance", "github.com/anishathalye/porcupine",
	}
	for name := range strings.FieldsSeq(string(out)) {
		if !slices.Contains(accepted, name) {
			t.Errorf("imports: got %s; want: only %v", name, accepted)
		}
	}
}
