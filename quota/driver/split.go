package driver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// giveBackTimeout bounds the refund of charges that one part of a list granted and another denied, also where the caller
// has left. A refund that fails is repeated, at first after giveBackPause, which doubles up to giveBackMaxPause.
const (
	giveBackTimeout  = time.Second
	giveBackPause    = 2 * time.Millisecond
	giveBackMaxPause = 100 * time.Millisecond
)

// splitter is a list whose keys the database does not reach in one step.
type splitter struct {
	store *store
	cs    []quota.Charge
	out   []quota.Decision
}

// parts returns the indexes of the charges that are decided together, of those that may be denied or of the others.
func (l *splitter) parts(deniable bool) (parts [][]int) {
	index := map[string]int{}
	for i := range l.cs {
		if l.cs[i].Op.Deniable() != deniable {
			continue
		}
		of := quota.Group(l.cs[i].Key)
		if l.store.atomicity == OneKey {
			of = string(AppendKey(nil, l.cs[i].Limit.Name(), l.cs[i].Key))
		}
		k, known := index[of]
		if !known {
			k = len(parts)
			index[of], parts = k, append(parts, nil)
		}
		parts[k] = append(parts[k], i)
	}
	return parts
}

// take decides the list part by part, the parts at once. Takes, also ahead, and peeks come first. If one part denies, the
// charges that the others granted are given back. Debits, refunds and resets follow a grant: they are never denied, and
// could not be taken back, for a debit may have charged less than its cost.
func (l *splitter) take(ctx context.Context) error {
	ask, firm := l.parts(true), l.parts(false)
	errs := l.decide(ctx, l.cs, ask)
	var granted [][]int
	for k, part := range ask {
		if errs[k] == nil && l.granted(part) {
			granted = append(granted, part)
		}
	}
	err := worst(errs)
	switch {
	case err != nil || len(granted) < len(ask):
		if e := l.giveBack(ctx, granted); e != nil {
			err = partly(worst([]error{err, e}))
		}
		if err == nil {
			err = l.peek(ctx, firm)
		}
	default:
		errs := l.decide(ctx, l.cs, firm)
		if err = worst(errs); err != nil && (len(ask) > 0 || slices.Contains(errs, nil)) {
			err = partly(err)
		}
	}
	for i := range l.out {
		l.out[i].Split = true
	}
	return err
}

// decide decides parts of charges at once, and returns an error for each.
func (l *splitter) decide(ctx context.Context, cs []quota.Charge, parts [][]int) []error {
	errs := make([]error, len(parts))
	var wg sync.WaitGroup
	for k, part := range parts {
		errs[k] = errEnded
		wg.Go(func() {
			of, out := make([]quota.Charge, len(part)), make([]quota.Decision, len(part))
			for j, i := range part {
				of[j] = cs[i]
			}
			if errs[k] = l.store.list(ctx, of, out); errs[k] == nil {
				for j, i := range part {
					l.out[i] = out[j]
				}
			}
		})
	}
	wg.Wait()
	return errs
}

func (l *splitter) granted(part []int) bool {
	for _, i := range part {
		if !l.out[i].Allowed && !l.out[i].Shadow {
			return false
		}
	}
	return true
}

// peek fills in the decisions of charges that were not made because the list was denied.
func (l *splitter) peek(ctx context.Context, parts [][]int) error {
	peeks := make([]quota.Charge, len(l.cs))
	for i := range l.cs {
		peeks[i] = quota.Charge{Limit: l.cs[i].Limit, Key: l.cs[i].Key, Op: quota.OpPeek}
	}
	err := worst(l.decide(ctx, peeks, parts))
	for _, part := range parts {
		for _, i := range part {
			l.out[i].Allowed, l.out[i].RetryAfter, l.out[i].Shadow = true, 0, l.cs[i].Shadow
		}
	}
	return err
}

// giveBack refunds the charges of parts and corrects their decisions. It returns when the caller's context ends; then the
// refunds go on, and the error says that they are not known to be made. A refund has a request id where the database can keep
// one: so it may be repeated whatever became of it, and mints no quota.
func (l *splitter) giveBack(ctx context.Context, parts [][]int) error {
	refunds := &splitter{store: l.store, cs: make([]quota.Charge, len(l.cs)), out: make([]quota.Decision, len(l.cs))}
	var backs [][]int
	for _, part := range parts {
		id := ""
		if l.store.atomicity == OneGroup {
			id = "back-" + l.store.newAttempt()
		}
		var back []int
		for _, i := range part {
			if n := max(l.out[i].Charged, l.out[i].Held); n > 0 && l.cs[i].Op != quota.OpRenew {
				back = append(back, i)
				refunds.cs[i] = l.cs[i].Refund(l.out[i], n)
				refunds.cs[i].ID = id
			}
		}
		if len(back) > 0 {
			backs = append(backs, back)
		}
	}
	if len(backs) == 0 {
		return nil
	}
	err := errEnded
	done := make(chan struct{})
	l.store.background(func() {
		defer close(done)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
		defer cancel()
		err = refunds.insist(ctx, backs)
	})
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("quota: %w: the context ended before the grants of other parts were given back: %w", quota.ErrIndeterminate, ctx.Err())
	}
	for _, back := range backs {
		for _, i := range back {
			if l.out[i].Charged, l.out[i].Delay, l.out[i].Held, l.out[i].Until = 0, 0, 0, 0; err == nil {
				l.out[i].Remaining, l.out[i].ResetAfter = refunds.out[i].Remaining, refunds.out[i].ResetAfter
			}
		}
	}
	return err
}

// insist makes refunds, and repeats those that fail and may succeed until the context ends.
func (l *splitter) insist(ctx context.Context, parts [][]int) error {
	var final []error // of refunds that are not repeated
	for pause := giveBackPause; ; pause = min(2*pause, giveBackMaxPause) {
		var left [][]int
		errs := l.decide(ctx, l.cs, parts)
		for k, part := range parts {
			switch err := errs[k]; Sentinel(err) {
			case quota.ErrUnavailable, quota.ErrOverloaded, quota.ErrConflict:
				left = append(left, part)
			case quota.ErrIndeterminate:
				if l.cs[part[0]].ID != "" {
					left = append(left, part)
					break
				}
				fallthrough
			default:
				final = append(final, err)
			}
		}
		if len(left) == 0 {
			return worst(final)
		}
		parts = left
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return worst(append(final, errs...))
		}
	}
}

// worst returns an ErrIndeterminate if there is one, else any error.
func worst(errs []error) (err error) {
	for _, e := range errs {
		if e != nil && (err == nil || errors.Is(e, quota.ErrIndeterminate)) {
			err = e
		}
	}
	return err
}

// partly returns an error of a list of which a part may be charged: the error must not say 'not charged'.
func partly(err error) error {
	if errors.Is(err, quota.ErrIndeterminate) {
		return err
	}
	return fmt.Errorf("quota: %w: the list was not granted, and a part of it may be charged: %v", quota.ErrIndeterminate, err)
}
