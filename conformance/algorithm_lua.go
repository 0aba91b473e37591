package conformance

import (
	"context"
	_ "embed"
	"fmt"
	"slices"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

//go:embed algorithm.lua
var luaText string

// lua compares the decisions of the search with those of the algorithm's Lua text, which eval runs.
func (p *prober) lua(ctx context.Context, eval func(ctx context.Context, script string, args []any) (any, error)) {
	scripted, ok := p.family[0].(driver.Scripted)
	switch {
	case !ok:
		p.skips[a15] = "the algorithm is no driver.Scripted"
		return
	case eval == nil:
		p.skips[a15] = "AlgorithmHarness.Eval is nil: the Lua text was not run"
		return
	case len(p.seen) == 0:
		return
	}
	kernel := ""
	p.guard(a15, func() {
		kernel = scripted.Lua()
		for i, a := range p.family {
			if s, ok := a.(driver.Scripted); !ok || s.Lua() != kernel {
				p.fail(a15, "got: another Lua text, or none, from %+v; want: one text for a Rule", p.specs[i])
			}
		}
	})
	if kernel == "" {
		p.fail(a15, "got: no Lua text; want: the body of a function")
		return
	}
	script := strings.Replace(luaText, "KERNEL", kernel, 1)
	const batch = 500
	for samples := range slices.Chunk(p.seen, batch) {
		args, serve := make([]any, len(samples)), make([]bool, len(samples))
		for i := range samples {
			p.guard(a15, func() { args[i], serve[i] = p.luaArgs(&samples[i], i) })
			if args[i] == nil {
				return
			}
		}
		reply, err := eval(ctx, script, args)
		answers, _ := reply.([]any)
		if err != nil || len(answers) != len(samples) {
			p.fail(a15, "got: a reply of %T with %d elements, error %v; want: a Lua text that Redis runs, and %d answers", reply, len(answers), err, len(samples))
			return
		}
		for i := range samples {
			s := &samples[i]
			// Clients return a string or its bytes.
			got, want := fmt.Sprintf("%s", answers[i]), "nothing decided"
			if serve[i] {
				want = p.luaAnswer(s)
			}
			if got != want {
				p.fail(a15, "got: %s\nwant: %s\nafter %v of %d (at %d, above %d) at %d on %+v by %+v", got, want, s.req.Op, s.req.Cost, s.req.Arg, s.req.Floor, s.now, s.state, p.specs[s.by])
				return
			}
		}
	}
}

// luaArgs returns the input of a decision in the form that the script reads, and whether its numbers serve for the time. Those of a
// driver.Moving, of which the ith sample takes some, may be for another.
func (p *prober) luaArgs(s *sample, i int) (text string, serve bool) {
	spec := p.specs[s.by]
	serve = true
	if m, ok := p.family[s.by].(driver.Moving); ok {
		params, from, to := m.ParamsAt(s.now)
		if from > s.now || s.now >= to {
			p.fail(a15, "got: for %d numbers that serve from %d until %d; want: numbers for that time", s.now, from, to)
		}
		if i%4 > 0 {
			params, from, to = m.ParamsAt([]quota.Micros{to, from - 1, to + 2*second}[i%4-1])
		}
		spec.Params, serve = params, from <= s.now && s.now < to
	}
	text = fmt.Sprint(s.state.Unit, s.state.A, s.state.B, s.state.C, int(s.req.Op), min(s.req.Cost, 1<<52), int64(s.req.Arg), int64(s.now), spec.Unit)
	for _, n := range spec.Params {
		text += fmt.Sprint(" ", n)
	}
	text += fmt.Sprint(" ", min(s.req.Floor, 1<<52))
	if len(s.state.Tail) > 0 {
		text += " t " + strings.Trim(fmt.Sprint(s.state.Tail), "[]")
	}
	return text, serve
}

// luaAnswer returns the answer that the script must give.
func (p *prober) luaAnswer(s *sample) string {
	text := luaVerdict(s)
	if s.req.Op == quota.OpUpTo && s.v.Allowed {
		left := peeked(p.family[s.by], s.state, 0, s.now).Remaining
		if p.specs[s.by].Unit != 0 {
			left -= s.req.Floor
		}
		text += fmt.Sprint(" taken ", min(s.req.Cost, left, 1<<52))
	}
	if (s.req.Op == quota.OpHold || s.req.Op == quota.OpRenew) && s.v.Allowed {
		text += fmt.Sprint(" taken ", int64(p.specs[s.by].Lapse(s.now)))
	}
	return text
}

func luaVerdict(s *sample) string {
	allowed, written := "denied", "unwritten"
	if s.v.Allowed {
		allowed = "allowed"
	}
	if !s.v.Write {
		return fmt.Sprint(allowed, " ", written, " ", int64(s.v.ResetAfter))
	}
	text := fmt.Sprint(allowed, " written ", int64(s.v.ResetAfter), " ", s.answer.Unit, " ", s.answer.A, " ", s.answer.B, " ", s.answer.C)
	if len(s.answer.Tail) > 0 {
		text += " " + strings.Trim(fmt.Sprint(s.answer.Tail), "[]")
	}
	return text
}
