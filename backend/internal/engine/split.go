package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// giveBackTimeout bounds the refund of what one slot granted and another denied.
const giveBackTimeout = time.Second

// part is the charges of a list that share a slot, by their places in it.
type part struct {
	slot   uint16
	places []int
}

// bySlot returns the parts of a list, in the order of their first charges.
func bySlot(cs []quota.Charge) []part {
	var parts []part
	var buf [128]byte
next:
	for i := range cs {
		n := slot(driver.AppendEscaped(buf[:0], quota.Group(cs[i].Key)))
		for j := range parts {
			if parts[j].slot == n {
				parts[j].places = append(parts[j].places, i)
				continue next
			}
		}
		parts = append(parts, part{n, []int{i}})
	}
	return parts
}

// takeSplit decides a list slot by slot, in parallel. What can be denied comes first; where one slot
// denies, what the others granted is given back, once: a give-back that fails is not repeated, since two
// would mint quota. What is never denied follows a grant, for it could not be taken back: a debit may
// have charged less than its cost.
func (s *Store) takeSplit(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) error {
	firm := make([]part, 0, len(parts))
	ask := make([]part, 0, len(parts))
	for _, p := range parts {
		var f, a part
		for _, i := range p.places {
			if op := cs[i].Op; op == quota.OpTake || op == quota.OpPeek {
				a.places = append(a.places, i)
			} else {
				f.places = append(f.places, i)
			}
		}
		if len(f.places) > 0 {
			firm = append(firm, f)
		}
		if len(a.places) > 0 {
			ask = append(ask, a)
		}
	}
	granted, err := s.takeParts(ctx, cs, ask, out)
	switch {
	case err != nil:
		return err
	case granted:
		made, errs := s.decideParts(ctx, cs, firm, out)
		if err := worst(errs); err != nil {
			if made || len(ask) > 0 {
				err = partly(err)
			}
			return err
		}
	default:
		if err := s.peekParts(ctx, cs, firm, out); err != nil {
			return err
		}
	}
	for i := range out {
		out[i].Split = true
	}
	return nil
}

// decideParts decides parts in parallel. It returns an error for each, nil where it was decided, and
// whether any was.
func (s *Store) decideParts(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) (any bool, errs []error) {
	errs = make([]error, len(parts))
	each(len(parts), func(i int) {
		answers := make([]quota.Decision, len(parts[i].places))
		if errs[i] = s.decide(ctx, parts[i].of(cs), answers); errs[i] != nil {
			return
		}
		for j, place := range parts[i].places {
			out[place] = answers[j]
		}
	})
	for _, err := range errs {
		any = any || err == nil
	}
	return any, errs
}

// worst returns the error that says least of what was charged.
func worst(errs []error) (err error) {
	for _, e := range errs {
		if e != nil && (err == nil || errors.Is(e, quota.ErrIndeterminate)) {
			err = e
		}
	}
	return err
}

// takeParts decides parts in parallel and gives back what was granted unless all were.
func (s *Store) takeParts(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) (granted bool, err error) {
	_, errs := s.decideParts(ctx, cs, parts, out)
	err = worst(errs)
	granted = err == nil
	var back []part
	for i, p := range parts {
		if errs[i] == nil && p.granted(out) {
			back = append(back, p)
		} else {
			granted = false
		}
	}
	if !granted {
		if e := s.giveBack(ctx, cs, back, out); e != nil && err != nil {
			err = partly(err)
		}
	}
	return granted, err
}

// partly turns an error that may say 'not charged' into one that does not: another part was charged.
func partly(err error) error {
	if errors.Is(err, quota.ErrIndeterminate) {
		return err
	}
	return fmt.Errorf("redis: %w: part of the list was charged: %v", quota.ErrIndeterminate, err)
}

// giveBack refunds what parts were granted and corrects their decisions.
func (s *Store) giveBack(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
	defer cancel()
	refunds := make([]quota.Charge, len(cs))
	after := make([]quota.Decision, len(cs))
	var charged []part
	for _, p := range parts {
		var c part
		for _, i := range p.places {
			if out[i].Charged > 0 {
				refunds[i] = cs[i].Refund(out[i], out[i].Charged)
				c.places = append(c.places, i)
			}
		}
		if len(c.places) > 0 {
			charged = append(charged, c)
		}
	}
	_, errs := s.decideParts(ctx, refunds, charged, after)
	for k, p := range charged {
		for _, i := range p.places {
			if out[i].Charged = 0; errs[k] == nil {
				out[i].Remaining, out[i].ResetAfter = after[i].Remaining, after[i].ResetAfter
			}
		}
	}
	return worst(errs)
}

// peekParts fills in decisions for charges that a denied list did not make.
func (s *Store) peekParts(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) error {
	peeks := make([]quota.Charge, len(cs))
	for i := range cs {
		peeks[i] = quota.Charge{Limit: cs[i].Limit, Key: cs[i].Key, Op: quota.OpPeek}
	}
	_, errs := s.decideParts(ctx, peeks, parts, out)
	for _, p := range parts {
		for _, i := range p.places {
			out[i].Allowed, out[i].RetryAfter = true, 0
		}
	}
	return worst(errs)
}

// granted reports whether all of the part's decisions are allowed.
func (p part) granted(out []quota.Decision) bool {
	for _, i := range p.places {
		if !out[i].Allowed {
			return false
		}
	}
	return true
}

// of returns the part's charges.
func (p part) of(cs []quota.Charge) []quota.Charge {
	list := make([]quota.Charge, len(p.places))
	for i, place := range p.places {
		list[i] = cs[place]
	}
	return list
}

// each calls f for 0 to n-1, concurrently, and returns when all have.
func each(n int, f func(int)) {
	var wg sync.WaitGroup
	for i := 1; i < n; i++ {
		wg.Go(func() { f(i) })
	}
	if n > 0 {
		f(0)
	}
	wg.Wait()
}
