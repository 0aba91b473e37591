package resilience

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// DefaultRetryAfter is FailOptions.RetryAfter unless options say otherwise.
const DefaultRetryAfter = time.Second

// FailOptions change the policies that [FailOpen] and [FailClosed] make. The zero value, and nil, take the
// defaults.
type FailOptions struct {
	// Overloaded makes the policy answer quota.ErrOverloaded too. Otherwise that error passes, because a
	// client that can overload this process could be admitted without limit, or have all others denied.
	Overloaded bool
	// RetryAfter is the RetryAfter of a denial of FailClosed, unless a breaker inside knows when it probes
	// the store next; 0 is DefaultRetryAfter.
	RetryAfter time.Duration
	// Notice receives "degraded" when answers are no longer the store's, "recovered" when they are again, and
	// "misconfigured", at most once a minute, if the store is misconfigured. It may be nil.
	Notice func(quota.Notice)
}

// FailOpen returns the policy that a request is admitted where the store cannot decide it: where the store
// and the policies inside failed with quota.ErrUnavailable or quota.ErrIndeterminate. While that lasts there
// is no limit: use it for limits that are a courtesy, not a protection.
//
// Such a decision is Allowed, [quota.FromOpen], with Charged 0 and At 0, so that a refund of its receipt
// changes no state (of quota.OpUpTo Charged is how many tokens may be used, of which none are charged), and Remaining as the limit's capacity; if the outcome was unknown it may have been
// charged all the same. A cost above the capacity is denied with quota.Never, as always.
//
// Only takes, peeks and holds are answered. Of a hold that is admitted Held and Until are 0, as no store has it: the settle of
// its receipt is a debit. The error of a call with a debit, refund or reset, or that ends or renews a hold, passes: it was
// not carried out, and an answer would hide that. All other errors pass too, and so does every error of a call
// whose context has ended.
//
// A negative RetryAfter is refused by Wrap.
func FailOpen(o *FailOptions) Policy { return newFail(o, quota.FromOpen) }

// FailClosed returns the policy that a request is denied where the store cannot decide it, see [FailOpen] for
// when that is. While it lasts every request is denied: use it for limits that are a protection.
//
// Such a decision is denied, [quota.FromClosed], with Remaining 0 and a RetryAfter that is the time until the
// breaker inside probes the store next, or FailOptions.RetryAfter. If the outcome was unknown the request may
// have been charged.
func FailClosed(o *FailOptions) Policy { return newFail(o, quota.FromClosed) }

// FailWithError returns the policy that every error of the store is returned to the caller. It is for
// [Standard], which needs a policy for outages.
func FailWithError() Policy { return failPolicy{source: quota.FromStore} }

func newFail(o *FailOptions, source quota.Source) Policy {
	if o == nil {
		o = &FailOptions{}
	}
	return failPolicy{*o, source}
}

type failPolicy struct {
	o      FailOptions
	source quota.Source
}

func (failPolicy) kind() kind      { return kindFallback }
func (p failPolicy) reports() bool { return p.o.Notice != nil }

func (p failPolicy) wrap(inner quota.Store, alarms bool) (quota.Store, error) {
	switch {
	case p.source == quota.FromStore:
		return inner, nil
	case p.o.RetryAfter < 0:
		return nil, invalid(fmt.Sprintf("FailOptions.RetryAfter is %v", p.o.RetryAfter), "0 or more")
	case p.o.RetryAfter == 0:
		p.o.RetryAfter = DefaultRetryAfter
	}
	s := &fail{layer: layer{inner: inner, of: kindFallback}, o: p.o, source: p.source}
	s.notes.tell = p.o.Notice
	s.alarm = alarm{notifier: &s.notes, on: alarms, base: time.Now()}
	return s, nil
}

type fail struct {
	layer
	o        FailOptions
	source   quota.Source
	notes    notifier
	alarm    alarm
	degraded atomic.Bool
	decided  atomic.Int64
}

// Readings tells whether the policy decides in the store's place, and how many calls it decided.
func (s *fail) Readings(tell func(driver.Reading)) { tellDegraded(&s.degraded, &s.decided, tell) }

func tellDegraded(degraded *atomic.Bool, decided *atomic.Int64, tell func(driver.Reading)) {
	r := driver.Reading{Metric: driver.MetricDegraded}
	if degraded.Load() {
		r.Value = 1
	}
	tell(r)
	tell(driver.Reading{Metric: driver.MetricDegradedCalls, Value: decided.Load()})
}

func (s *fail) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	d, err := s.inner.Charge(ctx, c)
	if err == nil {
		s.answered(d.Source)
		return d, nil
	}
	if !answerable([]quota.Charge{c}) || !s.answers(ctx, err) {
		return d, err
	}
	if wrong := c.Limit.Err(); wrong != nil {
		return d, wrong
	}
	s.decided.Add(1)
	return s.decide(&c, err), nil
}

func (s *fail) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	err := s.inner.ChargeAll(ctx, cs, out)
	if err == nil {
		s.answered(out[0].Source)
		return nil
	}
	if !answerable(cs) || !s.answers(ctx, err) {
		return err
	}
	for i := range cs {
		if wrong := cs[i].Limit.Err(); wrong != nil {
			return wrong
		}
		out[i] = s.decide(&cs[i], err)
	}
	from, to := driver.Made(out[:len(cs)])
	for i := range cs {
		if i < from || i >= to {
			out[i].Charged = 0
		}
	}
	s.decided.Add(1)
	return nil
}

// answers reports whether the policy answers in the place of err.
func (s *fail) answers(ctx context.Context, err error) bool {
	if !cannotDecide(ctx, err, s.o.Overloaded) {
		s.alarm.check(err)
		return false
	}
	if !s.degraded.Load() && !s.degraded.Swap(true) {
		text := "the store cannot decide: every request is admitted"
		if s.source == quota.FromClosed {
			text = "the store cannot decide: every request is denied"
		}
		s.notes.send("degraded", text, err)
	}
	return true
}

// answered notes that the store decided.
func (s *fail) answered(by quota.Source) {
	if s.degraded.Load() && by == quota.FromStore && s.degraded.Swap(false) {
		s.notes.send("recovered", "the store decides again", nil)
	}
}

// cannotDecide reports whether err says that the store cannot decide, and the caller still waits for a
// decision.
func cannotDecide(ctx context.Context, err error, overloaded bool) bool {
	if ended(ctx) {
		return false
	}
	switch driver.Sentinel(err) {
	case quota.ErrUnavailable, quota.ErrIndeterminate:
		return true
	case quota.ErrOverloaded:
		return overloaded
	}
	return false
}

func (s *fail) decide(c *quota.Charge, err error) quota.Decision {
	d := quota.Decision{Source: s.source, Shadow: c.Shadow, Alternative: c.Alternative, Capacity: c.Limit.Spec().Capacity}
	switch {
	case need(c) > d.Capacity:
		d.RetryAfter = quota.Never
	case s.source == quota.FromOpen:
		if d.Allowed, d.Remaining = true, d.Capacity; c.Op == quota.OpUpTo {
			r := c.Request()
			d.Charged = min(c.Cost, d.Capacity-r.Floor)
		}
	default:
		d.RetryAfter = s.o.RetryAfter
		if wait := retryAfter(err); wait > 0 {
			d.RetryAfter = wait
		}
	}
	d.ResetAfter = d.RetryAfter
	return d
}
