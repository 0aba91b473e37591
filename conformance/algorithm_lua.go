package conformance

import (
	_ "embed"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota/driver"
)

//go:embed algorithm.lua
var luaText string

// lua decides in Lua, on a redis-server of its own, what was decided on the way.
func (p *prober) lua(t *testing.T) {
	scripted, ok := p.family[0].(driver.Scripted)
	if !ok {
		p.skips[a15] = "the algorithm is no driver.Scripted"
		return
	}
	if len(p.seen) == 0 {
		return
	}
	server := redisserver.Start(t)
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
		p.fail(a15, "got: no Lua text")
		return
	}
	script := strings.Replace(luaText, "KERNEL", kernel, 1)
	const batch = 500
	for samples := range slices.Chunk(p.seen, batch) {
		args := []string{"EVAL", script, "0"}
		for i := range samples {
			args = append(args, p.luaArgs(&samples[i]))
		}
		reply, err := server.Do(args...)
		answers, _ := reply.([]any)
		if e, ok := reply.(redisserver.Error); ok {
			err = e
		}
		if err != nil || len(answers) != len(samples) {
			p.fail(a15, "got: %v; want: a Lua text that Redis runs", err)
			return
		}
		for i := range samples {
			s := &samples[i]
			if got, want := answers[i], luaAnswer(s); got != want {
				p.fail(a15, "got: %v\nwant: %s\nafter %v of %d (charged at %d) at %d on %+v by %+v", got, want, s.req.Op, s.req.Cost, s.req.At, s.now, s.state, p.specs[s.by])
				return
			}
		}
	}
}

// luaArgs returns a decision's input as the script takes it.
func (p *prober) luaArgs(s *sample) string {
	spec := &p.specs[s.by]
	text := fmt.Sprint(s.state.Unit, s.state.A, s.state.B, s.state.C, int(s.req.Op), min(s.req.Cost, 1<<52), int64(s.req.At), int64(s.now), spec.Unit)
	for _, n := range spec.Params {
		text += fmt.Sprint(" ", n)
	}
	if len(s.state.Tail) > 0 {
		text += " t " + strings.Trim(fmt.Sprint(s.state.Tail), "[]")
	}
	return text
}

// luaAnswer returns what the script is to answer.
func luaAnswer(s *sample) string {
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
