package conformance

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// altered is a store whose calls go through a function.
type altered struct {
	quota.Store
	call func(cs []quota.Charge, out []quota.Decision, decide func() error) error
}

func (s altered) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.call(cs, out, func() error { return s.Store.TakeAll(ctx, cs, out) })
}

func (s altered) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	out := make([]quota.Decision, 1)
	err := s.TakeAll(ctx, []quota.Charge{c}, out)
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

// wrong is a store that says of a second token that one more is left than is.
func wrong() Harness {
	return broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		err := decide()
		for i := range cs {
			if d := &out[i]; d.Allowed && d.Remaining < d.Limit-1 {
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
		t.Fatalf("%+v, %v", r, err)
	}
	return r.Results[0]
}

func TestFailureText(t *testing.T) {
	r := only(t, wrong(), "S1_Meaning/TokenBucket", 0)
	if r.Outcome != Failed {
		t.Fatal(r)
	}
	for _, part := range []string{
		"S1 Meaning: verdicts are those of Apply", // the rule, and what it means
		"\n\tgot  allowed, limit ", "\n\twant allowed, limit ",
		"\n\t1. Take [", " is TokenBucket(",
		"\nreplay with FLEETQUOTA_SEED=",
	} {
		if !strings.Contains(r.Text, part) {
			t.Errorf("no %q in\n%s", part, r.Text)
		}
	}
	// One charge of two, or two of one, show it.
	if strings.Contains(r.Text, "\n\t3. ") {
		t.Errorf("not the shortest trace:\n%s", r.Text)
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
		t.Errorf("one seed chose\n%s\nand\n%s", a, b)
	}
	if examine(7) == examine(8) {
		t.Error("two seeds chose the same")
	}
	t.Setenv("FLEETQUOTA_SEED", "eight")
	if _, err := newSuite(wrong(), options{}); err == nil {
		t.Error("a seed that is no number was taken")
	}
}

func TestPanicIsAFailure(t *testing.T) {
	h := broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		if strings.Contains(cs[0].Key, "{") {
			panic("braces")
		}
		return decide()
	})
	if r := only(t, h, "C1_Keys/keys", 0); r.Outcome != Failed || !strings.Contains(r.Text, "the store panicked on Take") || !strings.Contains(r.Text, "braces") {
		t.Errorf("%+v", r)
	}
	h.Open = func(testing.TB, Opening) quota.Store { panic("no server") }
	if r := only(t, h, "C1_Keys/keys", 0); r.Outcome != Failed || !strings.Contains(r.Text, "no server") {
		t.Errorf("%+v", r)
	}
}

func TestHangIsAFailure(t *testing.T) {
	t.Parallel()
	stuck := make(chan struct{})
	defer close(stuck)
	h := broken(func(cs []quota.Charge, out []quota.Decision, decide func() error) error {
		<-stuck
		return errors.New("too late")
	})
	if r := only(t, h, "S8_Close/closed", 300*time.Millisecond); r.Outcome != Failed || !strings.Contains(r.Text, "no call has returned for 300ms: under way are\n\tTake [peek") {
		t.Errorf("%+v", r)
	}
}

func TestGoexitIsAFailure(t *testing.T) {
	h := broken(func([]quota.Charge, []quota.Decision, func() error) error {
		runtime.Goexit()
		return nil
	})
	if r := only(t, h, "S8_Close/closed", 0); r.Outcome != Failed || !strings.Contains(r.Text, "ended the goroutine") {
		t.Errorf("%+v", r)
	}
}

// A store that never answers is failed, and not waited for in every case.
func TestErrorsAreFailures(t *testing.T) {
	t.Parallel()
	h := broken(func([]quota.Charge, []quota.Decision, func() error) error { return quota.ErrUnavailable })
	start := time.Now()
	r, err := examine(t, h, options{only: []string{"S1", "C4", "C5"}, patience: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range r.Results {
		if r.Outcome != Failed {
			t.Errorf("%+v", r)
		}
	}
	if took := time.Since(start); took > time.Minute {
		t.Errorf("it took %v", took)
	}
}

func TestOpenThatFails(t *testing.T) {
	t.Parallel()
	h := Harness{Open: func(t testing.TB, o Opening) quota.Store {
		t.Fatalf("no server for %s", o.Data)
		return nil
	}}
	if r := only(t, h, "S3_Traceless/single_charges", 0); r.Outcome != Failed || !strings.Contains(r.Text, "no server for q") {
		t.Errorf("%+v", r)
	}
	h.Open = func(t testing.TB, o Opening) quota.Store {
		t.Skip("no server here")
		return nil
	}
	if r := only(t, h, "S3_Traceless/single_charges", 0); r.Outcome != Skipped || !strings.Contains(r.Text, "no server here") {
		t.Errorf("%+v", r)
	}
}

func TestSkipsSayWhy(t *testing.T) {
	t.Parallel()
	h := wrong()
	h.Lacks = []Lack{{Exact, "it leases"}}
	if r := only(t, h, "S1_Meaning/TokenBucket", 0); r.Outcome != Skipped || !strings.Contains(r.Text, "it leases") {
		t.Errorf("%+v", r)
	}
	for _, name := range []string{"S1", "S1_Meaning", "S1_Meaning/TokenBucket", "S1_Meaning/own_clock"} {
		h := wrong()
		h.Exempt = []Exemption{{name, "issue 12"}}
		want := Skipped
		if strings.HasSuffix(name, "own_clock") {
			want = Failed
		}
		if r := only(t, h, "S1_Meaning/TokenBucket", 0); r.Outcome != want || want == Skipped && !strings.Contains(r.Text, "issue 12") {
			t.Errorf("%+v", r)
		}
	}
	// What does not concern a store, and what could not be judged, are different things.
	report, err := examine(t, newMemory().harness(), options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range report.Results {
		if r.Outcome == Skipped {
			t.Errorf("%+v", r)
		}
	}
}

// late is a store that looks at the context when it is too late.
type late struct{ quota.Store }

func (s late) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.Store.Take(context.WithoutCancel(ctx), c)
	if err == nil && ctx.Err() != nil {
		return quota.Decision{}, ctx.Err()
	}
	return d, err
}

func TestContextThatEndsTooLate(t *testing.T) {
	h := newMemory().harness()
	open := h.Open
	h.Open = func(t testing.TB, o Opening) quota.Store { return late{open(t, o)} }
	if r := only(t, h, "S4_AtMostOnce/contexts_that_end", 0); r.Outcome != Failed || !strings.Contains(r.Text, "tokens are charged; want") {
		t.Errorf("%+v", r)
	}
}

// Who says that it has no ids must not take them.
func TestIDsThatAreIgnored(t *testing.T) {
	h := newMemory().harness()
	h.Lacks = []Lack{{IDs, "not yet"}}
	if r := only(t, h, "C3_IDs/refused", 0); r.Outcome != Failed || !strings.Contains(r.Text, "want quota.ErrCrossSlot") {
		t.Errorf("%+v", r)
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
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A new case does not fail anybody before the next version.
func TestProvisional(t *testing.T) {
	s, err := newSuite(wrong(), options{})
	if err != nil {
		t.Fatal(err)
	}
	c := *cases()[0]
	for version, want := range map[string]Outcome{Version: Provisional, "0.9": Failed, "": Failed} {
		c.provisional = version
		if r := s.try(t, &c); r.Outcome != want {
			t.Errorf("provisional in %q: %+v", version, r)
		}
	}
}

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
		t.Errorf("%s", text)
	}
	for _, r := range r.Results {
		if r.Rule == "S6" && (r.Outcome != Passed || r.Name != "Context" || r.Case != "done before") || r.Rule != "S6" && r.Outcome != Skipped {
			t.Errorf("%+v", r)
		}
	}
}

// The rules are those of package quota, and package documentation lists them all.
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
			t.Errorf("two cases are %s", c.path())
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
	if len(seen) != 16 {
		t.Errorf("%d rules have cases", len(seen))
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
		module + "quota", module + "quota/driver", module + "algorithm", module + "conformance", "github.com/anishathalye/porcupine",
	}
	for name := range strings.FieldsSeq(string(out)) {
		if !slices.Contains(accepted, name) {
			t.Errorf("imports: got %s; want: only %v", name, accepted)
		}
	}
}
