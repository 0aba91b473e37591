package engine

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
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
		n := slot(quota.AppendEscaped(buf[:0], quota.Group(cs[i].Key)))
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

// takeSplit decides a list slot by slot, in parallel. Charges that can be denied come first; where one
// is, what the other slots granted is given back, once: a give-back that fails is not repeated, since
// two would mint quota. The rest of the list, which is never denied, follows a grant.
func (s *Store) takeSplit(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) error {
	firm := make([]part, 0, len(parts)) // of charges that are always allowed and cannot be taken back
	ask := make([]part, 0, len(parts))
	for _, p := range parts {
		var f, a part
		for _, i := range p.places {
			if op := cs[i].Op; op == quota.OpRefund || op == quota.OpReset {
				f.places = append(f.places, i)
			} else {
				a.places = append(a.places, i)
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
		if _, err := s.takeParts(ctx, cs, firm, out); err != nil {
			if len(ask) > 0 {
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

// takeParts decides parts in parallel and gives back what was granted unless all were.
func (s *Store) takeParts(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) (granted bool, err error) {
	errs := make([]error, len(parts))
	lists := make([][]quota.Charge, len(parts))
	answers := make([][]quota.Decision, len(parts))
	each(len(parts), func(i int) {
		lists[i], answers[i] = parts[i].of(cs), make([]quota.Decision, len(parts[i].places))
		errs[i] = s.decide(ctx, lists[i], answers[i])
	})
	granted = true
	for i := range parts {
		granted = granted && errs[i] == nil && quota.Granted(answers[i])
		if errs[i] != nil && (err == nil || errors.Is(errs[i], quota.ErrIndeterminate)) {
			err = errs[i]
		}
	}
	if !granted {
		back, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
		defer cancel()
		lost := make([]error, len(parts))
		each(len(parts), func(i int) {
			if errs[i] == nil && quota.Granted(answers[i]) {
				lost[i] = s.giveBack(back, lists[i], answers[i])
			}
		})
		if e := errors.Join(lost...); err != nil && e != nil {
			err = partly(err)
		}
	}
	for i := range parts {
		for j, place := range parts[i].places {
			out[place] = answers[i][j]
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

// giveBack refunds what a part was granted and corrects its decisions.
func (s *Store) giveBack(ctx context.Context, cs []quota.Charge, ds []quota.Decision) error {
	refunds := make([]quota.Charge, len(cs))
	for i := range cs {
		refunds[i] = cs[i].Refund(ds[i], ds[i].Charged)
	}
	after := make([]quota.Decision, len(cs))
	err := s.decide(ctx, refunds, after)
	for i := range ds {
		if err == nil {
			ds[i].Remaining, ds[i].ResetAfter = after[i].Remaining, after[i].ResetAfter
		}
		ds[i].Charged = 0
	}
	return err
}

// peekParts fills in decisions for charges that a denied list did not make.
func (s *Store) peekParts(ctx context.Context, cs []quota.Charge, parts []part, out []quota.Decision) error {
	peeks := make([]quota.Charge, len(cs))
	for i := range cs {
		peeks[i] = quota.Charge{Limit: cs[i].Limit, Key: cs[i].Key, Op: quota.OpPeek}
	}
	_, err := s.takeParts(ctx, peeks, parts, out)
	for _, p := range parts {
		for _, i := range p.places {
			out[i].Allowed, out[i].RetryAfter = true, 0
		}
	}
	return err
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
