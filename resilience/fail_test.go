package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

func TestFail(t *testing.T) {
	open := quota.Decision{Allowed: true, Source: quota.FromOpen, Capacity: 100, Remaining: 100}
	closed := quota.Decision{Source: quota.FromClosed, Capacity: 100, RetryAfter: time.Second, ResetAfter: time.Second}
	never := quota.Decision{Capacity: 100, RetryAfter: quota.Never, ResetAfter: quota.Never}
	charged := func(d quota.Decision, n int64) quota.Decision { d.Charged = n; return d }
	listed := func(d quota.Decision) quota.Decision { d.Alternative = 1; return d }
	shadow := func(d quota.Decision) quota.Decision { d.Shadow = true; return d }
	from := func(d quota.Decision, s quota.Source) quota.Decision { d.Source = s; return d }
	for _, c := range []struct {
		name          string
		err           error
		charge        quota.Charge
		overloaded    bool
		open, closed  quota.Decision
		passes, leave bool
	}{
		{name: "unavailable", err: quota.ErrUnavailable, charge: charge(1), open: open, closed: closed},
		{name: "connecting", err: connecting{}, charge: charge(1), open: open, closed: closed},
		{name: "unknown", err: quota.ErrIndeterminate, charge: charge(1), open: open, closed: closed},
		{name: "a peek", err: quota.ErrUnavailable, charge: peek(1), open: open, closed: closed},
		{name: "ahead", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Op: quota.OpAhead, Cost: 1, Within: time.Hour}, open: open, closed: closed},
		{name: "all of it", err: quota.ErrUnavailable, charge: charge(100), open: open, closed: closed},
		{name: "more than ever", err: quota.ErrUnavailable, charge: charge(101), open: from(never, quota.FromOpen), closed: from(never, quota.FromClosed)},
		{name: "all but the floor", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Cost: 80, Floor: 20}, open: open, closed: closed},
		{name: "more than the floor leaves", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Cost: 81, Floor: 20}, open: from(never, quota.FromOpen), closed: from(never, quota.FromClosed)},
		{name: "up to more than all", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Op: quota.OpUpTo, Cost: 200, Least: 80, Floor: 20}, open: charged(open, 80), closed: closed},
		{name: "a least above the floor", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Op: quota.OpUpTo, Cost: 200, Least: 81, Floor: 20}, open: from(never, quota.FromOpen), closed: from(never, quota.FromClosed)},
		{name: "an alternative", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Cost: 1, Alternative: 1}, open: listed(open), closed: listed(closed)},
		{name: "a shadow", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Cost: 1, Shadow: true}, open: shadow(open), closed: shadow(closed)},
		{name: "overloaded", err: quota.ErrOverloaded, charge: charge(1), passes: true},
		{name: "overloaded, set", err: quota.ErrOverloaded, charge: charge(1), overloaded: true, open: open, closed: closed},
		{name: "invalid", err: quota.ErrInvalid, charge: charge(1), overloaded: true, passes: true},
		{name: "misconfigured", err: quota.ErrMisconfigured, charge: charge(1), overloaded: true, passes: true},
		{name: "cross slot", err: quota.ErrCrossSlot, charge: charge(1), overloaded: true, passes: true},
		{name: "conflict", err: quota.ErrConflict, charge: charge(1), overloaded: true, passes: true},
		{name: "closed", err: quota.ErrClosed, charge: charge(1), overloaded: true, passes: true},
		{name: "left", err: quota.ErrIndeterminate, charge: charge(1), leave: true, passes: true},
		{name: "a context's", err: context.DeadlineExceeded, charge: charge(1), passes: true},
		{name: "a debit", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Op: quota.OpDebit}, passes: true},
		{name: "a refund", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Op: quota.OpRefund}, passes: true},
		{name: "a reset", err: quota.ErrUnavailable, charge: quota.Charge{Limit: limit, Key: "k", Op: quota.OpReset}, passes: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
				for _, mode := range []func(*resilience.FailOptions) resilience.Policy{resilience.FailOpen, resilience.FailClosed} {
					want := c.open
					p := mode(&resilience.FailOptions{Overloaded: c.overloaded})
					if fmt.Sprint(p) == fmt.Sprint(resilience.FailClosed(&resilience.FailOptions{Overloaded: c.overloaded})) {
						want = c.closed
					}
					ctx, cancel := context.WithCancel(bg)
					defer cancel()
					err := as(c.err)
					store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) {
						if c.leave {
							cancel()
						}
						return quota.Decision{}, err
					}}
					d, got := take(wrap(t, store, p), ctx, c.charge)
					if c.passes && got != err || !c.passes && (got != nil || d != want) {
						t.Errorf("got %+v, %v; want %+v, or the store's error: %v", d, got, want, c.passes)
					}
				}
			})
		})
	}
	// A list: one decision each, and none where the list has a debit, refund or reset.
	store := &stub{answer: func(context.Context, quota.Charge) (quota.Decision, error) { return granted, as(quota.ErrUnavailable) }}
	s := wrap(t, store, resilience.FailOpen(nil))
	out := make([]quota.Decision, 2)
	cs := []quota.Charge{charge(1), {Limit: limit, Key: "b", Cost: 101}}
	if err := s.ChargeAll(bg, cs, out); err != nil || out[0] != open || out[1] != from(never, quota.FromOpen) || quota.Granted(out) {
		t.Errorf("a list: got %+v, %v; want %+v and a denial for ever", out, err, open)
	}
	// Of alternatives, and of a denied list, no tokens are said to be charged that were not.
	for name, c := range map[string]struct {
		costs   [2]int64
		charged [2]int64
		lists   [2]uint8
	}{"the first fits": {[2]int64{5, 5}, [2]int64{5, 0}, [2]uint8{1, 2}}, "the second fits": {[2]int64{101, 5}, [2]int64{0, 5}, [2]uint8{1, 2}}, "a list": {[2]int64{5, 101}, [2]int64{0, 0}, [2]uint8{}}} {
		cs := []quota.Charge{charge(0), {Limit: limit, Key: "b"}}
		for i := range cs {
			cs[i].Op, cs[i].Cost, cs[i].Least, cs[i].Alternative = quota.OpUpTo, c.costs[i], c.costs[i], c.lists[i]
		}
		if err := s.ChargeAll(bg, cs, out); err != nil || out[0].Charged != c.charged[0] || out[1].Charged != c.charged[1] {
			t.Errorf("up to, %s: got %+v, %v; want charged %v", name, out, err, c.charged)
		}
	}
	cs[1].Op = quota.OpRefund
	wantErr(t, s.ChargeAll(bg, cs, out), quota.ErrUnavailable)
	// The receipt of an open decision gives nothing back.
	if r := charge(5).Refund(open, open.Charged); r.Cost != 0 || r.From != quota.FromOpen {
		t.Errorf("the refund of an open decision: got %+v, want cost 0", r)
	}
	// FailWithError returns errors.
	store.answer = script(as(quota.ErrUnavailable))
	_, err := wrap(t, store, resilience.FailWithError()).Charge(bg, charge(1))
	wantErr(t, err, quota.ErrUnavailable)
}

// TestFailClosedRetryAfter: it is the breaker's remaining delay, or that of the options.
func TestFailClosedRetryAfter(t *testing.T) {
	for _, b := range breakers {
		t.Run(b.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t, resilience.FailClosed(&resilience.FailOptions{RetryAfter: 7 * time.Second}), b.make(nil))
				for range 3 {
					r.call(says(as(quota.ErrUnavailable)))
				}
				time.Sleep(10 * time.Second)
				if d, err := r.Charge(bg, charge(1)); err != nil || d.RetryAfter != 20*time.Second {
					t.Errorf("while open: got %+v, %v; want RetryAfter 20s", d, err)
				}
				time.Sleep(20 * time.Second)
				r.inner.answer = func(context.Context, quota.Charge) (quota.Decision, error) {
					time.Sleep(time.Second)
					return granted, nil
				}
				go r.Charge(bg, charge(1))
				synctest.Wait()
				if d, err := r.Charge(bg, charge(1)); err != nil || d.RetryAfter != 7*time.Second {
					t.Errorf("while probing: got %+v, %v; want RetryAfter 7s", d, err)
				}
				time.Sleep(time.Second + 1)
				if d, err := r.Charge(bg, charge(1)); err != nil || !d.Allowed {
					t.Errorf("after the probe: got %+v, %v; want a grant", d, err)
				}
			})
		})
	}
}

func TestFailNotices(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var n notices
		r := newRig(t, resilience.FailOpen(&resilience.FailOptions{Notice: n.add}))
		cause := as(quota.ErrUnavailable)
		want := func(names ...string) {
			t.Helper()
			synctest.Wait()
			all := n.take()
			if len(all) != len(names) {
				t.Fatalf("%+v, want %v", all, names)
			}
			for i := range all {
				if all[i].Name != names[i] || (names[i] == "degraded") != errors.Is(all[i].Err, cause) {
					t.Errorf("%+v, want %s", all[i], names[i])
				}
			}
		}
		r.call(says(nil))
		want()
		for range 10 {
			r.call(says(cause))
		}
		want("degraded")
		for range 10 {
			r.call(says(nil))
		}
		want("recovered")
		// What is remembered is not the store's word.
		r.call(says(cause))
		r.call(func(context.Context, func()) (quota.Decision, error) {
			return quota.Decision{Source: quota.FromMemory}, nil
		})
		want("degraded")
	})
}
