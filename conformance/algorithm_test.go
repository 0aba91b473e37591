package conformance

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// luaResult returns the result of rule A15 for a token bucket.
func luaResult(t *testing.T, eval func(context.Context, string, []any) (any, error)) Result {
	t.Helper()
	h := AlgorithmHarness{Algorithms: []quota.Algorithm{algorithm.TokenBucket(10, 7, time.Second)}, Eval: eval}
	for _, r := range ExamineAlgorithm(t, 1, h, 3) {
		if r.Rule == "A15" {
			return r
		}
	}
	t.Fatal("results: got none of A15, want one")
	return Result{}
}

// Without a function that evaluates Lua, rule A15 is skipped with the reason, and the last line says so.
func TestWithoutEval(t *testing.T) {
	r := luaResult(t, nil)
	if r.Outcome != Skipped || !strings.Contains(r.Text, "AlgorithmHarness.Eval is nil") {
		t.Errorf("A15: got %+v, want %s, with the name of the missing field", r, Skipped)
	}
	got := summary([]Result{{Rule: "A14", Name: "Reset", Case: "tb1", Outcome: Passed}, r}, 7)
	const want = "conformance suite " + Version + ", seed 7: 1 passed, 0 failed, 1 not tested; " +
		"A15 Lua of tb1, because AlgorithmHarness.Eval is nil: the Lua text was not run"
	if got != want {
		t.Errorf("last line:\ngot  %s\nwant %s", got, want)
	}
}

// Every answer that is not the right one fails rule A15.
func TestEvalFails(t *testing.T) {
	repeat := func(text any, n int) []any {
		all := make([]any, n)
		for i := range all {
			all[i] = text
		}
		return all
	}
	for name, c := range map[string]struct {
		eval func(args []any) (any, error)
		want string
	}{
		"an error":         {func([]any) (any, error) { return nil, errors.New("ERR compiling script") }, "ERR compiling script"},
		"no list":          {func([]any) (any, error) { return "OK", nil }, "a reply of string with 0 elements"},
		"a short list":     {func(args []any) (any, error) { return repeat("denied", len(args)-1), nil }, "elements"},
		"wrong answers":    {func(args []any) (any, error) { return repeat("denied unwritten -1", len(args)), nil }, "got: denied unwritten -1\nwant: "},
		"answers as bytes": {func(args []any) (any, error) { return repeat([]byte("denied unwritten -1"), len(args)), nil }, "got: denied unwritten -1\nwant: "},
	} {
		r := luaResult(t, func(_ context.Context, script string, args []any) (any, error) {
			if lua := algorithm.TokenBucket(1, 1, time.Second).(driver.Scripted).Lua(); !strings.Contains(script, lua) {
				t.Errorf("%s: script: got %s, want one that has the algorithm's Lua text", name, script)
			}
			return c.eval(args)
		})
		if r.Outcome != Failed || !strings.Contains(r.Text, c.want) {
			t.Errorf("%s: got %+v, want %s, with %q", name, r, Failed, c.want)
		}
	}
}
