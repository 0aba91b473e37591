package quota

import (
	"context"
	"errors"
	"math"
	"slices"
)

// TakeFirst charges the first of several lists that fits, and none of the others: a guaranteed share or else the common pool,
// the rate limit or else purchased credits. Each list is decided all-or-nothing, as by [Charger.ChargeAll], and all of them in
// one step where the store can; a limit and key may be in several lists, once in each, under one limit. There are
// [MaxCharges] charges at most, all of which may be denied: takes, peeks, takes ahead and takes of up to so many.
//
// The result says which list was taken, has its decisions, and the verdicts on the others, which charged nothing. If none fits,
// it is denied by the list that fits first, so that RetryAfter is the least of all. A request id, the same on all charges,
// covers all lists: a repeat gets the one that was granted.
//
// Where the store cannot decide all lists in one step, because their keys are in several groups, the lists are asked for in
// their order until one is granted. Their decisions are marked Split then, those on lists behind the granted one are empty,
// and an error ends the call: a list whose outcome is unknown may have been charged, and no other is tried. With a request id
// the call is ErrCrossSlot there, for an id covers one group.
func (ch *Charger) TakeFirst(ctx context.Context, lists ...[]Charge) (Result, error) {
	return ch.first(ctx, nil, lists)
}

// TakeFirst is [Charger.TakeFirst]; a charge without a limit goes to the limiter's own.
func (l *Limiter) TakeFirst(ctx context.Context, lists ...[]Charge) (Result, error) {
	return l.first(ctx, l.limit, lists)
}

func (ch *Charger) first(ctx context.Context, own *Limit, lists [][]Charge) (Result, error) {
	var cs []Charge
	for i, list := range lists {
		if len(list) == 0 {
			return Result{}, invalid("number of charges of a list", 0, "1 or more")
		}
		for _, c := range list {
			c.Alternative = uint8(min(i+1, math.MaxUint8))
			cs = append(cs, c)
		}
		if len(cs) > MaxCharges { // also so that the numbers suffice
			break
		}
	}
	ds := make([]Decision, len(cs))
	o := ch.observe(cs, ds)
	err := ch.takeFirst(ctx, own, cs, ds, o)
	ch.over(ctx, own, o, err)
	if err != nil {
		return Result{}, err
	}
	r := Result{Granted: Granted(ds), Lists: alternatives(ds)}
	r.Taken = taken(r.Lists)
	r.Decisions = r.Lists[r.Taken]
	r.Decider = Decider(r.Decisions)
	return r, nil
}

// takeFirst fills in the limits, checks, and asks the store for all lists at once or, if it cannot, for one after the other.
func (ch *Charger) takeFirst(ctx context.Context, own *Limit, cs []Charge, ds []Decision, o *observed) error {
	if _, err := ch.fillAll(own, cs); err != nil {
		return err
	}
	err := ch.chargeAll(ctx, cs, ds, o)
	if !errors.Is(err, ErrCrossSlot) || Charged(err) != NotCharged || cs[0].ID != "" {
		return err
	}
	for i := range ds {
		ds[i] = Decision{Alternative: cs[i].Alternative, Split: true}
	}
	for _, out := range alternatives(ds) {
		list, number := slices.Clone(cs[:len(out)]), cs[0].Alternative
		cs = cs[len(out):]
		for i := range list {
			list[i].Alternative = 0
		}
		if err := ch.chargeAll(ctx, list, out, o); err != nil {
			return err
		}
		granted := Granted(out)
		for i := range out {
			out[i].Alternative, out[i].Split = number, true
		}
		if granted {
			break
		}
	}
	return nil
}
