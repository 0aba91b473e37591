package mutant

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// twoTrips sends a request that begins, whose failure charges nothing, and one that decides and commits. end gives the answer
// to the second.
func twoTrips(end func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision, err error) error) func(*parts) {
	return sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
		err := s.link.request(ctx)
		if err == nil {
			err = s.link.response()
		}
		if err != nil {
			return fmt.Errorf("mutant: %w: begin: %v", quota.ErrUnavailable, err)
		}
		return end(s, ctx, cs, out, s.once(ctx, cs, out))
	})
}

// fallsBack admits takes and debits in the store's place where it does not answer, and charges it for them when the handle is
// closed: as many times as the fault says for the n-th call.
func fallsBack(times func(n int) int64) func(*parts) {
	return func(p *parts) {
		var mu sync.Mutex
		var owed []quota.Charge
		calls := 0
		p.send = func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if !errors.Is(err, quota.ErrUnavailable) && !errors.Is(err, quota.ErrIndeterminate) || ctx.Err() != nil {
				return err
			}
			for i := range cs {
				if op := cs[i].Op; op != quota.OpTake && op != quota.OpDebit {
					return err
				}
			}
			mu.Lock()
			defer mu.Unlock()
			if calls++; !s.fault || times(calls) > 0 {
				for _, c := range cs {
					c.Op, c.ID, c.MadeAt, c.Floor, c.FloorOf, c.Shadow = quota.OpDebit, "", 0, 0, 0, false
					if s.fault {
						c.Cost *= times(calls)
					}
					owed = append(owed, c)
				}
			}
			for i := range cs {
				out[i] = quota.Decision{Allowed: true, Source: quota.FromFallback, Shadow: cs[i].Shadow, Capacity: cs[i].Limit.Capacity(), Charged: cs[i].Cost}
			}
			return nil
		}
		p.close = func(s *Handle) error {
			mu.Lock()
			defer mu.Unlock()
			for i := range owed {
				if err := s.serve(owed[i:i+1], make([]quota.Decision, 1)); err != nil {
					return err
				}
			}
			owed = nil
			return sound().close(s)
		}
	}
}

// interrupted are mutants whose fault shows where the connection breaks, or the context ends, in some calls alone.
func interrupted() []*Store {
	const atMost, definite = "a call that returns nil charged once", "one that returns an error charged nothing"
	unsafe := func(which func(cs []quota.Charge) bool) func(*parts) {
		return sent(func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
			err := s.once(ctx, cs, out)
			if s.fault && errors.Is(err, quota.ErrIndeterminate) && which(cs) {
				return fmt.Errorf("mutant: %w: %v", quota.ErrUnavailable, err)
			}
			return err
		})
	}
	return []*Store{
		{Name: "a lost reply to a commit is ErrUnavailable", Rule: "S4", Clause: definite, Case: "calls and faults", Says: "want no key charged", alter: twoTrips(
			func(s *Handle, _ context.Context, _ []quota.Charge, _ []quota.Decision, err error) error {
				if s.fault && errors.Is(err, quota.ErrIndeterminate) {
					return fmt.Errorf("mutant: %w: commit: %v", quota.ErrUnavailable, err)
				}
				return err
			})},
		{Name: "a commit whose reply was lost is sent again", Rule: "S4", Clause: atMost, Case: "calls and faults", Says: "the outcome is unknown", alter: twoTrips(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision, err error) error {
				if s.fault && errors.Is(err, quota.ErrIndeterminate) && ctx.Err() == nil {
					return s.once(ctx, cs, out)
				}
				return err
			})},
		{Name: "a lost reply to a refund is ErrUnavailable", Rule: "S4", Clause: definite, Case: "calls and faults", Says: "want no key charged", alter: unsafe(
			func(cs []quota.Charge) bool { return len(cs) == 1 && cs[0].Op == quota.OpRefund })},
		{Name: "a lost reply to the longest list is ErrUnavailable", Rule: "S4", Clause: definite, Case: "calls and faults", Says: "want no key charged", alter: unsafe(
			func(cs []quota.Charge) bool { return len(cs) == quota.MaxCharges })},
		{Name: "a lost reply to a take ahead with an id is ErrUnavailable", Rule: "S4", Clause: definite, Case: "calls and faults", Says: "want no key charged", alter: unsafe(
			func(cs []quota.Charge) bool { return cs[0].Op == quota.OpAhead && cs[0].ID != "" })},
		{Name: "the first key of a list is charged again where the reply was lost", Rule: "S4", Clause: atMost, Case: "calls and faults", Says: "the outcome is unknown", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if s.fault && errors.Is(err, quota.ErrIndeterminate) && len(cs) > 1 {
					first := cs[0]
					first.ID = ""
					s.serve([]quota.Charge{first}, make([]quota.Decision, 1))
				}
				return err
			})},
		{Name: "the first key of a list is given back where the reply was lost", Rule: "S4", Clause: "the error is ErrIndeterminate", Case: "calls and faults", Says: "all keys charged, or none", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if s.fault && errors.Is(err, quota.ErrIndeterminate) && len(cs) > 1 && cs[0].Op == quota.OpDebit && out[0].Charged > 0 {
					s.serve([]quota.Charge{{Limit: cs[0].Limit, Key: cs[0].Key, Op: quota.OpRefund, Cost: out[0].Charged, MadeAt: out[0].At}}, make([]quota.Decision, 1))
				}
				return err
			})},
		{Name: "an id is forgotten where the reply was lost", Rule: "S4", Clause: atMost, Case: "calls and faults", Says: "however often the id is repeated", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if s.fault && errors.Is(err, quota.ErrIndeterminate) && cs[0].ID != "" {
					s.data.mu.Lock()
					delete(s.data.grants, s.id(s, &cs[0]))
					s.data.mu.Unlock()
				}
				return err
			})},
		{Name: "a part of a list that failed leaves the parts before it", Rule: "S4", Clause: definite, Case: "calls and faults", Says: "want no key charged", Grade: driver.OneGroup, alter: parting(manner{definite: true})},
		{Name: "a context that ends while a reset is made is its error", Rule: "S4", Clause: definite, Case: "calls and contexts that end", Says: "want no key charged", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if s.fault && err == nil && ctx.Err() != nil && cs[0].Op == quota.OpReset {
					return ctx.Err()
				}
				return err
			})},
		{Name: "a fallback forgets one in seven of the calls that it admitted", Rule: "S4", Clause: atMost, Case: "calls and faults", Says: "in the store's place", alter: fallsBack(
			func(n int) int64 {
				if n%7 == 0 {
					return 0
				}
				return 1
			})},
		{Name: "a fallback charges the store twice for one in seven of the calls that it admitted", Rule: "S4", Clause: atMost, Case: "calls and faults", Says: "in the store's place", alter: fallsBack(
			func(n int) int64 {
				if n%7 == 0 {
					return 2
				}
				return 1
			})},
		{Name: "a token that the process holds is spent while the server refuses, and again", Rule: "C5", Clause: "never more is admitted than the limit allows", Case: "limit under faults", Says: "now and then: refused", alter: sent(
			func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
				err := s.once(ctx, cs, out)
				if s.fault && errors.Is(err, quota.ErrUnavailable) && len(cs) == 1 && cs[0].Op == quota.OpTake && ctx.Err() == nil {
					out[0] = quota.Decision{Allowed: true, Source: quota.FromLease, Capacity: cs[0].Limit.Capacity(), Charged: cs[0].Cost}
					return nil
				}
				return err
			})},
		{Name: "clocks that differ bring tokens back at each turn", Rule: "C5", Clause: "never more is admitted than the limit allows", Case: "clocks that differ", Says: "by two handles in turn", ClientClock: true, alter: func(p *parts) {
			p.now = func(s *Handle) quota.Micros {
				now := quota.Micros(s.clock().UnixMicro())
				if !p.fault {
					now = max(now, s.data.latest)
					s.data.latest = now
				}
				return now
			}
		}},
	}
}
