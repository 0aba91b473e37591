package resilience_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
	"github.com/fleetquota/fleetquota/resilience"
)

// remote is a primary whose faults a test scripts: a local store behind a hook, with a log of what it charged.
type remote struct {
	*local.Store
	atomic driver.Atomicity

	mu     sync.Mutex
	before error                   // instead of the answer: nothing is charged
	after  error                   // instead of the answer: it is charged
	hook   func(cs []quota.Charge) // before anything
	log    []string
	ids    []string
}

func (r *remote) Atomicity() driver.Atomicity { return r.atomic }
func (r *remote) Prompt() bool                { return false }

func (r *remote) set(before, after error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.before, r.after = before, after
}

func (r *remote) hooked(hook func(cs []quota.Charge)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.hook = hook
}

// calls returns what was asked since the last time: operation, cost and key of each charge.
func (r *remote) calls() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	log := strings.Join(r.log, "; ")
	r.log = nil
	return log
}

func (r *remote) take(cs []quota.Charge, do func() error) error {
	r.mu.Lock()
	hook := r.hook
	var parts []string
	for _, c := range cs {
		part := fmt.Sprint(c.Op, " ", c.Cost)
		if len(cs) > 1 {
			part += " " + c.Key
		}
		parts = append(parts, part)
	}
	r.log = append(r.log, strings.Join(parts, ", "))
	r.ids = append(r.ids, cs[0].ID)
	r.mu.Unlock()
	if hook != nil {
		hook(cs)
	}
	r.mu.Lock()
	before, after := r.before, r.after
	r.mu.Unlock()
	if before != nil {
		return before
	}
	if err := do(); err != nil {
		return err
	}
	return after
}

func (r *remote) Charge(ctx context.Context, c quota.Charge) (d quota.Decision, err error) {
	err = r.take([]quota.Charge{c}, func() (err error) {
		d, err = r.Store.Charge(ctx, c)
		return err
	})
	return d, err
}

func (r *remote) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return r.take(cs, func() error { return r.Store.ChargeAll(ctx, cs, out) })
}

// outage is one instance of four: a share of the limit "tokens", 100 and 10 a second, is 25 and 2.5 a second.
type outage struct {
	t     *testing.T
	r     *remote
	here  *local.Store
	s     quota.Store
	notes notices
}

func inOutage(t *testing.T, test func(o *outage)) {
	t.Helper()
	withFallback(t, resilience.Instances(4), 0, test)
}

func withFallback(t *testing.T, n func() int64, maxKeys int, test func(o *outage)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		o := &outage{t: t, r: &remote{Store: local.New()}, here: local.New()}
		o.s = wrap(t, o.r, resilience.Fallback(o.here, n, &resilience.FallbackOptions{MaxKeys: maxKeys, Notice: o.notes.add}))
		test(o)
		if err := o.s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func (o *outage) down() { o.r.set(as(quota.ErrUnavailable), nil) }
func (o *outage) up()   { o.r.set(nil, nil) }

func (o *outage) do(c quota.Charge) quota.Decision {
	o.t.Helper()
	d, err := o.s.Charge(bg, c)
	if err != nil {
		o.t.Fatalf("%v %d: got %v, want a decision", c.Op, c.Cost, err)
	}
	return d
}

// want makes a charge and compares.
func (o *outage) want(c quota.Charge, source quota.Source, allowed bool, remaining int64) quota.Decision {
	o.t.Helper()
	d := o.do(c)
	if d.Source != source || d.Allowed != allowed || d.Remaining != remaining {
		o.t.Fatalf("%v %d: %+v; want source %v, allowed %v, %d remaining", c.Op, c.Cost, d, source, allowed, remaining)
	}
	return d
}

func (o *outage) asked(want string) {
	o.t.Helper()
	if got := o.r.calls(); got != want {
		o.t.Fatalf("the primary was asked %q, want %q", got, want)
	}
}

func op(op quota.Op, n int64) quota.Charge {
	c := charge(n)
	c.Op = op
	return c
}

const (
	store = quota.FromStore
	fall  = quota.FromFallback
)

func TestFallbackShareIsWarm(t *testing.T) {
	for _, test := range []struct {
		name  string
		spend int64
		idle  time.Duration
		want  int64
	}{
		{"never seen", -1, 0, 25},
		{"whole", 0, 0, 25},
		{"hardly used", 1, 0, 24},
		{"half used", 50, 0, 12},
		{"nearly exhausted", 97, 0, 0},
		{"exhausted", 100, 0, 0},
		{"in debt", 141, 0, -11},
		{"exhausted, refilled since", 100, 5 * time.Second, 12},
		{"exhausted, whole since", 100, 10 * time.Second, 25},
		{"in debt, hardly repaid since", 141, 5 * time.Second, 2},
		{"in debt, not repaid since", 141, 4 * time.Second, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			inOutage(t, func(o *outage) {
				if test.spend >= 0 {
					o.do(op(quota.OpDebit, test.spend))
				}
				time.Sleep(test.idle)
				o.down()
				o.want(peek(0), fall, test.want >= 0, test.want)
				// And a second time: it is not made anew.
				if test.want > 0 {
					o.want(charge(1), fall, true, test.want-1)
				}
				o.want(charge(test.want+1), fall, false, test.want-min(1, max(test.want, 0)))
			})
		})
	}
}

func TestFallbackShareRefills(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.do(charge(100))
		o.down()
		o.want(charge(1), fall, false, 0)
		time.Sleep(399 * time.Millisecond)
		o.want(charge(1), fall, false, 0)
		time.Sleep(time.Millisecond)
		o.want(charge(1), fall, true, 0)
		time.Sleep(time.Minute)
		o.want(charge(25), fall, true, 0)
	})
}

func TestFallbackPersists(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.do(charge(1))
		time.Sleep(time.Second)
		for range 100 { // as often as the primary comes and goes, with nobody asking for the key
			o.down()
			if d := o.do(charge(3)); d.Source != fall {
				t.Fatalf("got %+v, want a decision of the fallback", d)
			}
			o.up()
			o.do(quota.Charge{Limit: limit, Key: "team/other", Cost: 1})
		}
		o.down()
		o.want(charge(1), fall, true, 0)
		o.want(charge(1), fall, false, 0)
		o.up()
		o.r.calls()
		o.want(peek(0), store, true, 75)
		o.asked("debit 25; peek 0")
	})
}

func TestFallbackDoesNotRefillWhileThePrimaryServes(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		o.want(charge(25), fall, true, 0)
		o.up()
		// While the reconciliation is under way other calls of the key do not wait for it, and are served.
		release := make(chan struct{})
		o.r.hooked(func(cs []quota.Charge) {
			if cs[0].Op == quota.OpDebit {
				<-release
			}
		})
		var wg sync.WaitGroup
		wg.Go(func() { o.do(peek(0)) })
		synctest.Wait()
		time.Sleep(time.Second) // refills 2 here, the primary serves from then on
		o.want(charge(1), store, true, 99)
		time.Sleep(8 * time.Second)
		o.down()
		o.want(peek(0), fall, true, 2)
		time.Sleep(400 * time.Millisecond)
		o.want(peek(0), fall, true, 3)
		o.up()
		o.r.hooked(nil)
		close(release)
		wg.Wait()
		o.want(peek(0), store, true, 75)
	})
}

func TestFallbackReconcilesExactlyOnce(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		o.do(charge(10))
		o.do(op(quota.OpDebit, 30)) // into debt here
		o.want(charge(1), fall, false, -15)
		o.r.calls()

		// Definitely not charged: next time with whatever is owed then.
		o.want(charge(1), fall, false, -15)
		o.asked("debit 40")
		o.do(op(quota.OpDebit, 1))
		o.asked("debit 40")
		// The reply is lost: charged, but who knows.
		o.r.set(nil, as(quota.ErrIndeterminate))
		o.want(charge(1), fall, false, -16)
		o.asked("debit 41")
		o.do(op(quota.OpDebit, 5))
		o.asked("debit 41")
		o.up()
		o.want(peek(0), store, true, 54) // the same again, and then what came after
		o.asked("debit 41; debit 5; peek 0")
		o.want(charge(1), store, true, 53)
		o.asked("take 1")
		o.want(charge(1), store, true, 52)
		o.asked("take 1")

		ids := slices.Compact(slices.DeleteFunc(slices.Clone(o.r.ids), func(id string) bool { return id == "" }))
		if len(ids) != 6 || len(ids[0]) > 128 { // 10, 40, 40, 40, 41 (three times), 5
			t.Errorf("request ids: got %q, want 6 of up to 128 bytes", ids)
		}
	})
}

func TestFallbackAnIndeterminateClaimStaysSo(t *testing.T) {
	// The reply to a reconciliation is lost, then the store is refused: the first attempt may have been charged all the same.
	inOutage(t, func(o *outage) {
		o.down()
		o.do(charge(10))
		o.r.set(nil, as(quota.ErrIndeterminate))
		o.do(charge(1))
		o.down()
		o.do(charge(1))
		o.up()
		o.r.calls()
		o.want(peek(0), store, true, 88)
		o.asked("debit 10; debit 2; peek 0")
		o.want(peek(0), store, true, 88)
		o.asked("peek 0")
	})
}

func TestFallbackLearnsFromReconciliations(t *testing.T) {
	// Reconciliations get through, the calls behind them do not: each time the share is what the debits left.
	inOutage(t, func(o *outage) {
		o.do(peek(0))
		o.down()
		o.want(charge(25), fall, true, 0)
		o.r.hooked(func(cs []quota.Charge) {
			if cs[0].Op == quota.OpDebit {
				o.up()
			} else {
				o.down()
			}
		})
		o.want(charge(18), fall, true, 0) // a quarter of 75
		o.want(charge(14), fall, true, 0) // of 57
		o.want(charge(10), fall, true, 0)
	})
}

func TestFallbackReconcilesIntoDebt(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.do(charge(80))
		o.down()
		for range 100 {
			o.do(charge(2))
			time.Sleep(400 * time.Millisecond)
		}
		o.up()
		d := o.do(peek(1))
		// 100 s of refill at the primary, whole since; 2 tokens were admitted in every 800 ms, and 4 at first.
		if d.Source != store || d.Remaining != 100-o.admitted() || d.Allowed {
			t.Fatalf("got %+v, want a denial of the store with %d remaining", d, 100-o.admitted())
		}
		o.down()
		o.want(charge(1), fall, false, -1)
	})
}

// admitted returns what the reconciliations charged.
func (o *outage) admitted() (n int64) {
	for _, call := range strings.Split(o.r.calls(), "; ") {
		var k int64
		if _, err := fmt.Sscanf(call, "debit %d", &k); err == nil {
			n = k
		}
	}
	return n
}

func TestFallbackLists(t *testing.T) {
	a, b, other := quota.Charge{Limit: limit, Key: "team/a", Cost: 3}, quota.Charge{Limit: limit, Key: "team/b", Cost: 4}, quota.Charge{Limit: limit, Key: "other/c", Cost: 5}
	list := []quota.Charge{a, b, other}
	for _, test := range []struct {
		atomic driver.Atomicity
		want   string
	}{
		{driver.AnyKeys, "debit 3 team/a, debit 4 team/b; debit 5; take 3 team/a, take 4 team/b, take 5 other/c"},
		{driver.OneGroup, "debit 3 team/a, debit 4 team/b; debit 5; take 3 team/a, take 4 team/b, take 5 other/c"},
		{driver.OneKey, "debit 3; debit 4; debit 5; take 3 team/a, take 4 team/b, take 5 other/c"},
	} {
		inOutage(t, func(o *outage) {
			o.r.atomic = test.atomic
			out := make([]quota.Decision, 3)
			o.down()
			if err := o.s.ChargeAll(bg, list, out); err != nil || !quota.Granted(out) || out[1].Source != fall || out[1].Remaining != 21 {
				t.Fatalf("a list: got %+v, %v; want grants of the fallback, 21 remaining of the second", out, err)
			}
			// A denied list is owed nowhere.
			big := slices.Clone(list)
			big[2].Cost = 25
			if err := o.s.ChargeAll(bg, big, out); err != nil || quota.Granted(out) || out[0].Remaining != 22 || out[2].Source != fall {
				t.Fatalf("a list that is too big: got %+v, %v; want a denial of the fallback, 22 remaining of the first", out, err)
			}
			// The lost reply to a list is repeated as it was, by a call of any of its keys.
			o.r.set(nil, as(quota.ErrIndeterminate))
			if test.atomic == driver.OneKey {
				o.up()
			}
			o.r.calls()
			if err := o.s.ChargeAll(bg, list, out); err != nil {
				t.Fatal(err)
			}
			if test.atomic == driver.OneKey {
				o.asked(test.want)
				return
			}
			o.asked("debit 3 team/a, debit 4 team/b")
			o.up()
			if d := o.do(quota.Charge{Limit: limit, Key: "team/b", Op: quota.OpPeek}); d.Remaining != 92 {
				t.Fatalf("got %+v, want 92 remaining", d)
			}
			o.asked("debit 3 team/a, debit 4 team/b; debit 4; peek 0") // and then the 4 of meanwhile
			if err := o.s.ChargeAll(bg, list, out); err != nil || out[0].Source != store {
				t.Fatal(err)
			}
			o.asked("debit 3; debit 10; take 3 team/a, take 4 team/b, take 5 other/c")
			if out[0].Remaining != 91 || out[1].Remaining != 88 || out[2].Remaining != 85 {
				t.Fatalf("got %+v, want 91, 88 and 85 remaining", out)
			}
		})
	}
}

func TestFallbackRefunds(t *testing.T) {
	inOutage(t, func(o *outage) {
		before := o.do(charge(10))
		o.down()
		d := o.want(charge(10), fall, true, 12)
		// A receipt of the fallback lowers what is owed.
		o.want(charge(0).Settle(d, 4), fall, true, 18)
		more := o.want(charge(5), fall, true, 13)
		// A receipt of the store belongs there.
		_, err := o.s.Charge(bg, charge(0).Refund(before, 3))
		wantErr(t, err, quota.ErrUnavailable)
		o.want(peek(0), fall, true, 13)
		// A debit does not wait for the store.
		o.want(charge(0).Settle(before, 11), fall, true, 12)
		o.up()
		o.r.calls()
		o.want(charge(0), store, true, 100-10-4-5-1)
		o.asked("debit 10; take 0")
		// What is reconciled is refunded at the store.
		o.want(charge(0).Refund(more, 2), store, true, 82)
		o.asked("refund 2")
		// And not here, where it is owed no more.
		o.down()
		_, err = o.s.Charge(bg, charge(0).Refund(more, 3))
		wantErr(t, err, quota.ErrUnavailable)
		o.want(peek(0), fall, true, 20)
		o.up()
		o.want(charge(0), store, true, 82)
		// A receipt that nobody here gave out gives nothing.
		stranger := quota.Decision{Allowed: true, Source: fall, Charged: 50, At: more.At + 1e9}
		o.want(charge(0).Refund(stranger, 50), store, true, 82)
		if d, err := o.s.Charge(bg, quota.Charge{Limit: limit, Key: "team/unseen"}.Refund(stranger, 50)); err != nil || d.Remaining != 100 {
			t.Fatalf("an unknown receipt of a key never seen: got %+v, %v; want 100 remaining", d, err)
		}
	})
}

func TestFallbackForgottenReceipt(t *testing.T) {
	// The account that knew of a receipt was dropped. A new one does not take the receipt for one of its own.
	inOutage(t, func(o *outage) {
		o.down()
		d := o.do(charge(10))
		o.up()
		o.do(peek(0))
		time.Sleep(time.Second)
		for i := range 1000 {
			o.do(quota.Charge{Limit: limit, Key: fmt.Sprint("k", i), Cost: 1})
		}
		o.down()
		o.want(charge(20), fall, true, 5)
		_, err := o.s.Charge(bg, charge(0).Refund(d, 10))
		wantErr(t, err, quota.ErrUnavailable)
		o.up()
		o.want(charge(0).Refund(d, 10), store, true, 80)
	})
}

func TestFallbackRefundGoesToItsWindow(t *testing.T) {
	// 8 calls a minute, of which a share is 2. What a window had is not given back to a later one.
	calls := quota.NewLimit("calls", algorithm.FixedWindow(8, time.Minute))
	c := quota.Charge{Limit: calls, Key: "k", Cost: 1}
	inOutage(t, func(o *outage) {
		o.down()
		first := o.do(c)
		o.up()
		o.want(c, store, true, 6)
		time.Sleep(time.Minute)
		o.want(c, store, true, 7)
		o.want(c.Refund(first, 1), store, true, 7)
		o.down()
		second := o.do(c)
		o.up()
		o.want(c, store, true, 5)
		o.want(c.Refund(second, 1), store, true, 6)
	})
}

func TestFallbackReset(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.do(charge(100))
		o.down()
		o.want(charge(1), fall, false, 0)
		time.Sleep(4 * time.Second)
		o.want(charge(10), fall, true, 0)
		_, err := o.s.Charge(bg, op(quota.OpReset, 0))
		wantErr(t, err, quota.ErrUnavailable)
		o.want(charge(1), fall, false, 0)
		o.up()
		o.r.calls()
		o.want(op(quota.OpReset, 0), store, true, 100)
		o.asked("reset 0")
		o.down()
		o.want(peek(0), fall, true, 25)
		o.up()
		o.r.calls()
		o.want(peek(0), store, true, 100) // nothing is owed
		o.asked("peek 0")
	})
}

// A take ahead is decided on the share as on the whole, charged to the store when it returns, and given back where it was
// made.
func TestFallbackAhead(t *testing.T) {
	inOutage(t, func(o *outage) {
		ahead := func(n int64, within time.Duration) quota.Charge {
			c := op(quota.OpAhead, n)
			c.Within = within
			return c
		}
		o.want(charge(20), store, true, 80)
		o.down()
		o.want(charge(20), fall, true, 0)
		if d := o.want(ahead(5, time.Second), fall, false, 0); d.RetryAfter != time.Second {
			o.t.Errorf("5 ahead of a share of 2.5 a second, within 1s: got %v, want retry after 1s", d)
		}
		d := o.want(ahead(5, 2*time.Second), fall, true, -5)
		if d.Delay != 2*time.Second || d.Charged != 5 {
			o.t.Errorf("5 ahead of a share of 2.5 a second: got %v, want 5 charged, usable after 2s", d)
		}
		o.want(peek(0), fall, false, -5)
		e := o.want(ahead(5, 4*time.Second), fall, true, -10)
		o.want(charge(0).Refund(e, 5), fall, true, -5)
		o.up()
		o.r.calls()
		o.want(peek(0), store, true, 55)
		o.asked("debit 25; peek 0")
		o.want(charge(0).Refund(d, 5), store, true, 60)
		if d := o.want(ahead(70, time.Hour), store, true, -10); d.Delay != time.Second {
			o.t.Errorf("70 ahead of the whole, of which 60 are left: got %v, want them usable after 1s", d)
		}
	})
}

// A take of up to so many takes what the share has left, and is charged to the store when it returns.
func TestFallbackUpTo(t *testing.T) {
	inOutage(t, func(o *outage) {
		upTo := func(n, least int64) quota.Charge {
			c := op(quota.OpUpTo, n)
			c.Least = least
			return c
		}
		o.want(charge(20), store, true, 80)
		o.down()
		o.want(upTo(40, 21), fall, false, 20)
		if d := o.want(upTo(40, 20), fall, true, 0); d.Charged != 20 {
			o.t.Errorf("up to 40 of a share with 20 left: got %v, want 20 charged", d)
		}
		o.up()
		o.r.calls()
		o.want(peek(0), store, true, 60)
		o.asked("debit 20; peek 0")
	})
}

// The first list that fits a share is taken, and that alone is charged to the store when it returns.
func TestFallbackAlternatives(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.want(charge(20), store, true, 80)
		o.down() // the share is 25, of which 20 are left
		lim := quota.Must(quota.NewLimiter(o.s, limit, nil))
		r, err := lim.TakeFirst(bg, []quota.Charge{charge(21)}, []quota.Charge{charge(15)}, []quota.Charge{charge(1)})
		if err != nil || !r.Granted || r.Taken != 1 || r.Decisions[0].Source != quota.FromFallback || r.Decisions[0].Remaining != 5 {
			o.t.Errorf("21, 15 or 1 of a share with 20 left: got %+v, %v; want the second list, 5 left", r, err)
		}
		o.up()
		o.r.calls()
		o.want(peek(0), store, true, 65)
		o.asked("debit 15; peek 0")
	})
}

// A floor is the same part of the share as of the whole, in tokens and as a part.
func TestFallbackFloor(t *testing.T) {
	for name, floor := range map[string]func(c *quota.Charge){
		"tokens": func(c *quota.Charge) { c.Floor = 20 },
		"part":   func(c *quota.Charge) { c.Floor, c.FloorOf = 1, 5 },
	} {
		t.Run(name, func(t *testing.T) {
			inOutage(t, func(o *outage) {
				free := func(n int64) quota.Charge {
					c := charge(n)
					floor(&c)
					return c
				}
				o.want(free(0), store, true, 100)
				o.down() // 4 instances: the share is 25, of which 5 stay
				if d := o.want(free(21), fall, false, 25); d.RetryAfter == quota.Never {
					o.t.Errorf("21 above 5 of a share of 25: got %v, want a guess, for the whole limit could admit it", d)
				}
				if d := o.want(free(81), fall, false, 25); d.RetryAfter != quota.Never {
					o.t.Errorf("81 above 20 of 100: got %v, want never", d)
				}
				o.want(free(20), fall, true, 5)
				o.want(free(1), fall, false, 5)
				o.want(charge(5), fall, true, 0)
			})
		})
	}
}

func TestFallbackIDs(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		first := o.do(withID(charge(5), "x"))
		again := o.do(withID(charge(5), "x"))
		if !again.Replayed || again.Source != fall || first.Replayed {
			t.Fatalf("got %+v, then %+v; want a grant of the fallback, then its replay", first, again)
		}
		o.want(peek(0), fall, true, 20)
		o.up()
		o.want(peek(0), store, true, 95)
	})
}

func TestFallbackErrors(t *testing.T) {
	unknown := errors.New("what is this")
	for _, test := range []struct {
		err   error
		falls bool
	}{
		{as(quota.ErrUnavailable), true},
		{connecting{}, true},
		{as(quota.ErrIndeterminate), true},
		{as(quota.ErrOverloaded), true},
		{fmt.Errorf("%w: %w", quota.ErrOverloaded, resilience.ErrRejected), true},
		{unknown, true},
		{context.DeadlineExceeded, true}, // of another's context
		{as(quota.ErrInvalid), false},
		{as(quota.ErrMisconfigured), false},
		{as(quota.ErrCrossSlot), false},
		{as(quota.ErrConflict), false},
		{as(quota.ErrClosed), false},
	} {
		both(t, func(t *testing.T, take func(quota.Store, context.Context, quota.Charge) (quota.Decision, error)) {
			inOutage(t, func(o *outage) {
				o.r.set(test.err, nil)
				d, err := take(o.s, bg, charge(1))
				if test.falls != (err == nil && d.Source == fall) || !test.falls && err != test.err {
					t.Errorf("%v: got %+v, %v; want a decision of the fallback: %v", test.err, d, err, test.falls)
				}
				// The same from the reconciliation.
				o.down()
				o.do(charge(1))
				o.r.set(test.err, nil)
				d, err = take(o.s, bg, charge(1))
				if test.falls != (err == nil && d.Source == fall) || !test.falls && err != test.err {
					t.Errorf("%v to a reconciliation: got %+v, %v; want a decision of the fallback: %v", test.err, d, err, test.falls)
				}
				synctest.Wait()
				o.notes.take()
				if errors.Is(test.err, quota.ErrMisconfigured) {
					time.Sleep(time.Minute)
					take(o.s, bg, charge(1))
					synctest.Wait()
					if ns := o.notes.take(); len(ns) != 1 || ns[0].Name != "misconfigured" {
						t.Errorf("notices: got %v, want one \"misconfigured\"", ns)
					}
				}
			})
		})
	}
}

func TestFallbackCallersContext(t *testing.T) {
	inOutage(t, func(o *outage) {
		ctx, cancel := context.WithCancel(bg)
		o.r.hooked(func([]quota.Charge) { cancel() })
		o.r.set(as(quota.ErrIndeterminate), nil)
		_, err := o.s.Charge(ctx, charge(1))
		wantErr(t, err, quota.ErrIndeterminate)
		o.r.hooked(nil)
		o.do(charge(1))
		_, err = o.s.Charge(ctx, charge(1)) // what was owed cannot be paid, the call was not sent
		wantErr(t, err, context.Canceled)
		wantNot(t, err, quota.ErrIndeterminate)
		o.up()
		o.want(peek(0), store, true, 99)
	})
}

func TestFallbackBothFail(t *testing.T) {
	for _, test := range []struct{ cause, here, is, not error }{
		{quota.ErrUnavailable, quota.ErrOverloaded, quota.ErrUnavailable, quota.ErrIndeterminate},
		{quota.ErrIndeterminate, quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrUnavailable},
		{quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrIndeterminate, quota.ErrUnavailable},
	} {
		bad := &remote{Store: local.New()}
		s := wrap(t, &remote{Store: local.New(), before: as(test.cause)}, resilience.Fallback(bad, resilience.Instances(4), nil))
		for _, at := range []string{"while the share is made", "later"} {
			bad.set(as(test.here), nil)
			_, err := s.Charge(bg, charge(1))
			if wantErr(t, err, test.is); errors.Is(err, test.not) {
				t.Errorf("%s: got %v, want an error that is not %v", at, err, test.not)
			}
			bad.set(nil, nil)
			if d, err := s.Charge(bg, charge(1)); err != nil || d.Source != fall {
				t.Errorf("%s: got %+v, %v from a fallback that is well again, want its decision", at, d, err)
			}
		}
	}
}

func TestFallbackCostAboveTheShare(t *testing.T) {
	inOutage(t, func(o *outage) {
		o.down()
		if d := o.do(charge(26)); d.Allowed || d.RetryAfter != resilience.DefaultRetryAfter || d.Capacity != 25 {
			t.Errorf("a cost above the share: got %+v, want a denial with a guess", d)
		}
		if d := o.do(charge(101)); d.Allowed || d.RetryAfter != quota.Never {
			t.Errorf("a cost above the limit: got %+v, want a denial for ever", d)
		}
	})
}

func TestFallbackNeedsSharer(t *testing.T) {
	type plain struct{ quota.Algorithm }
	whole := quota.NewLimit("whole", plain{limit.Algorithm()})
	slow := bucket("slow", 8, 7, 3*365*24*time.Hour) // a share gains 7 in twelve years
	inOutage(t, func(o *outage) {
		for _, l := range []*quota.Limit{whole, slow} {
			c := quota.Charge{Limit: l, Key: "k", Cost: 1}
			_, err := o.s.Charge(bg, c)
			wantErr(t, err, quota.ErrInvalid)
			wantErr(t, o.s.ChargeAll(bg, []quota.Charge{c, charge(1)}, make([]quota.Decision, 2)), quota.ErrInvalid)
			if !strings.Contains(err.Error(), l.Name()) {
				t.Error(err)
			}
		}
		o.asked("") // before anything is charged
	})
}

// TestFallbackShareOfZero: the shares of a limit never add up to more than the limit. An instance whose share is 0 denies,
// says so once, and does not say that this is for ever.
func TestFallbackShareOfZero(t *testing.T) {
	rules := map[string]func(int64) quota.Algorithm{
		"TokenBucket":          func(n int64) quota.Algorithm { return algorithm.TokenBucket(n, 1, time.Hour) },
		"FixedWindow":          func(n int64) quota.Algorithm { return algorithm.FixedWindow(n, time.Hour) },
		"FixedWindowFromFirst": func(n int64) quota.Algorithm { return algorithm.FixedWindowFromFirst(n, time.Hour) },
		"SlidingWindow":        func(n int64) quota.Algorithm { return algorithm.SlidingWindow(n, time.Hour) },
		"SlidingWindowLog":     func(n int64) quota.Algorithm { return algorithm.SlidingWindowLog(n, time.Hour) },
	}
	for name, of := range rules {
		for _, capacity := range []int64{1, 2, 3, 4, 7, 100} {
			t.Run(fmt.Sprintf("%s of %d", name, capacity), func(t *testing.T) {
				few := quota.NewLimit("few", of(capacity))
				const n = 4
				admitted := int64(0)
				for range n {
					inOutage(t, func(o *outage) {
						o.down()
						for range 2 * capacity {
							d := o.do(quota.Charge{Limit: few, Key: "k", Cost: 1})
							if d.Allowed {
								admitted++
							} else if d.RetryAfter < resilience.DefaultRetryAfter || d.RetryAfter == quota.Never {
								t.Fatalf("denial: got %+v, want a RetryAfter that is a guess", d)
							}
							if d.Capacity != capacity/n {
								t.Fatalf("limit of the share: got %d, want %d", d.Capacity, capacity/n)
							}
						}
					})
				}
				if want := capacity / n * n; admitted != want {
					t.Errorf("admitted by %d shares of %d: got %d, want %d", n, capacity, admitted, want)
				}
			})
		}
	}
}

func TestFallbackShareOfZeroInUse(t *testing.T) {
	few, other := bucket("few", 2, 1, time.Minute), bucket("other", 3, 1, time.Minute)
	n := int64(4)
	take := func(l *quota.Limit, cost int64) quota.Charge { return quota.Charge{Limit: l, Key: "k", Cost: cost} }
	withFallback(t, func() int64 { return n }, 0, func(o *outage) {
		told := func(want ...string) {
			t.Helper()
			synctest.Wait()
			var got []string
			for _, x := range o.notes.take() {
				if x.Name == "share" {
					got = append(got, x.Text)
				}
			}
			if len(got) != len(want) {
				t.Fatalf("notices: got %q, want %d", got, len(want))
			}
			for i := range want {
				if !strings.HasPrefix(got[i], want[i]) {
					t.Errorf("notice: got %q, want it to begin with %q", got[i], want[i])
				}
			}
		}
		o.want(take(few, 1), store, true, 1)
		told("limit few has a capacity of 2, which is less than one token for each of 4 instances") // before an outage
		o.down()
		o.want(take(few, 1), fall, false, 0)
		o.want(take(few, 0), fall, true, 0)
		o.want(take(other, 1), fall, false, 0)
		told("limit other has a capacity of 3")
		// A list with such a limit is denied, and charges no other limit.
		out := make([]quota.Decision, 2)
		if err := o.s.ChargeAll(bg, []quota.Charge{charge(1), take(few, 1)}, out); err != nil || !out[0].Allowed || out[1].Allowed {
			t.Errorf("list: got %v, %v; want the second denied", out, err)
		}
		o.want(peek(0), fall, true, 25)
		// The state carries over between shares: a debit, of which a larger share knows.
		o.want(quota.Charge{Limit: few, Key: "k", Op: quota.OpDebit, Cost: 1}, fall, true, -1)
		n = 1
		o.want(take(few, 1), fall, true, 0)
		n = 3
		o.want(take(few, 1), fall, false, -2)
		told()
		o.up()
		o.want(quota.Charge{Limit: few, Key: "k", Op: quota.OpPeek}, store, false, -1) // 1 taken, and 2 admitted here
		if d := o.do(take(few, 3)); d.Allowed || d.RetryAfter != quota.Never {
			t.Errorf("a cost above the limit: got %+v, want a denial for ever", d)
		}
	})
}

func TestFallbackAtLeastOne(t *testing.T) {
	few := quota.Charge{Limit: bucket("few", 2, 2, time.Minute), Key: "k", Cost: 1}
	synctest.Test(t, func(t *testing.T) {
		o := &outage{t: t, r: &remote{Store: local.New()}, here: local.New()}
		o.s = wrap(t, o.r, resilience.Fallback(o.here, resilience.Instances(4), &resilience.FallbackOptions{AtLeastOne: true, Notice: o.notes.add}))
		o.down()
		if d := o.want(few, fall, true, 0); d.Capacity != 1 {
			t.Errorf("limit of the share: got %d, want 1", d.Capacity)
		}
		o.want(few, fall, false, 0)
		time.Sleep(2*time.Minute - time.Microsecond)
		o.want(few, fall, false, 0)
		time.Sleep(time.Microsecond) // a quarter of the rate
		o.want(few, fall, true, 0)
		// After a debt the share is not full as soon as the whole limit is, but gains a quarter of the rate.
		debt := few
		debt.Op, debt.Cost = quota.OpDebit, 1
		o.up()
		o.want(debt, store, true, -1)
		time.Sleep(100 * time.Second) // the limit is whole after 90
		o.down()
		o.want(few, fall, false, 0)
		time.Sleep(2 * time.Minute)
		o.want(few, fall, true, 0)
		o.want(peek(0), fall, true, 25) // other limits have their part
		synctest.Wait()
		for _, x := range o.notes.take() {
			if x.Name == "share" {
				t.Errorf("notice: got %q, want none of a share", x.Text)
			}
		}
		if err := o.s.Close(); err != nil {
			t.Error(err)
		}
	})
	// An algorithm that has shares, but none that are kept at one token.
	type sharer struct {
		quota.Algorithm
		driver.Sharer
	}
	a := bucket("few", 2, 1, time.Minute).Algorithm()
	plain := quota.NewLimit("plain", sharer{a, a.(driver.Sharer)})
	s := wrap(t, &stub{}, resilience.Fallback(local.New(), resilience.Instances(4), &resilience.FallbackOptions{AtLeastOne: true}))
	_, err := s.Charge(bg, quota.Charge{Limit: plain, Key: "k", Cost: 1})
	wantErr(t, err, quota.ErrInvalid)
	if !strings.Contains(err.Error(), "plain") || !strings.Contains(err.Error(), "OneSharer") {
		t.Errorf("a limit without such shares: got %v, want it to name the limit and driver.OneSharer", err)
	}
}

func TestFallbackInstancesChange(t *testing.T) {
	n := int64(4)
	withFallback(t, func() int64 { return n }, 0, func(o *outage) {
		o.down()
		o.want(charge(20), fall, true, 5)
		n = 10
		o.want(charge(1), fall, false, -10)
		n = 2
		o.want(charge(1), fall, true, 29)
		n = 0 // nobody knows: as before
		o.want(charge(1), fall, true, 28)
		n = 4
		o.want(charge(1), fall, true, 2)
		o.up()
		o.want(peek(0), store, true, 77)
		n = 7
		o.down()
		o.want(peek(0), fall, true, 11)
	})
}

func TestFallbackRefuses(t *testing.T) {
	for name, p := range map[string]resilience.Policy{
		"no store":      resilience.Fallback(nil, resilience.Instances(1), nil),
		"no instances":  resilience.Fallback(local.New(), nil, nil),
		"0 instances":   resilience.Fallback(local.New(), resilience.Instances(0), nil),
		"negative keys": resilience.Fallback(local.New(), resilience.Instances(1), &resilience.FallbackOptions{MaxKeys: -1}),
	} {
		if _, err := resilience.Wrap(&stub{}, p); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("%s: got %v, want ErrInvalid", name, err)
		}
	}
}

func TestFallbackTableIsBounded(t *testing.T) {
	key := func(i int) quota.Charge { return quota.Charge{Limit: limit, Key: fmt.Sprint("k", i), Cost: 1} }
	const keys = 2000 // for 640 accounts
	withFallback(t, resilience.Instances(4), 640, func(o *outage) {
		o.down()
		here, denied := 0, 0
		for i := range keys {
			d := o.do(key(i))
			if d.Source != fall || d.Capacity != 25 || !d.Allowed && d.RetryAfter <= 0 {
				t.Fatalf("got %+v, want a decision of the fallback, and a RetryAfter of a denial", d)
			}
			if d.Allowed {
				here++
			} else {
				denied++
			}
		}
		if here > 640 || here < 500 || denied != keys-here {
			t.Fatalf("keys: got %d admitted and %d denied, want 500 to 640 of %d admitted", here, denied, keys)
		}
		_, err := o.s.Charge(bg, quota.Charge{Limit: limit, Key: "k1999", Op: quota.OpDebit, Cost: 1})
		wantErr(t, err, quota.ErrOverloaded)
		time.Sleep(time.Hour) // what is owed is not forgotten
		if d := o.do(key(keys)); d.Allowed {
			t.Fatalf("a key without room: got %+v, want a denial", d)
		}
		o.up()
		owed := int64(0)
		for i := range keys {
			c := key(i)
			c.Op = quota.OpPeek
			owed += 100 - o.do(c).Remaining
		}
		if owed != int64(here) {
			t.Fatalf("charged: got %d, want the %d that were admitted", owed, here)
		}
		// While the primary says that keys are in use, those left out are not known to be well.
		for i := range keys {
			c := key(i)
			c.Cost = 99
			o.do(c)
		}
		o.down()
		for i := range keys {
			if d := o.do(key(i)); d.Allowed {
				t.Fatalf("exhausted key %d: got %+v, want a denial", i, d)
			}
		}
		time.Sleep(10 * time.Second)
		if d := o.do(key(keys + 1)); !d.Allowed {
			t.Fatalf("a new key, when all are whole again: got %+v, want a grant", d)
		}
	})
}

func TestFallbackLeftOutKeys(t *testing.T) {
	// A key that was exhausted when there was no room for its account is not taken for a new one when there is.
	withFallback(t, resilience.Instances(4), 64, func(o *outage) {
		for i := range 500 {
			o.do(quota.Charge{Limit: limit, Key: fmt.Sprint("k", i), Cost: 100})
		}
		time.Sleep(time.Second)
		o.down()
		for i := range 500 {
			// Those that have an account have a share of the 10 tokens that they gained.
			if d := o.do(quota.Charge{Limit: limit, Key: fmt.Sprint("k", i), Cost: 3}); d.Allowed {
				t.Fatalf("an exhausted key: got %+v, want a denial", d)
			}
		}
		time.Sleep(9 * time.Second)
		if d := o.do(quota.Charge{Limit: limit, Key: "k499", Cost: 3}); !d.Allowed {
			t.Fatalf("the key, whole again: got %+v, want a grant", d)
		}
	})
}

// TestFallbackFlood has many more keys in use than there is room for. Those that used little are forgotten, so new keys
// have a share in an outage, and exhausted ones stay exhausted. Where there is no room at all, that is told.
func TestFallbackFlood(t *testing.T) {
	day := quota.NewLimit("day", algorithm.FixedWindow(8, 24*time.Hour))
	const room, flood = 1280, 10_000
	var keys []string
	told := func(o *outage) int {
		synctest.Wait()
		for _, n := range o.notes.take() {
			if n.Name == "keys" {
				keys = append(keys, n.Text)
			}
		}
		return len(keys)
	}
	withFallback(t, resilience.Instances(4), room, func(o *outage) {
		key := func(name string, i, cost int) quota.Charge {
			return quota.Charge{Limit: day, Key: fmt.Sprint(name, i), Cost: int64(cost)}
		}
		for i := range 50 {
			o.do(key("early/", i, 8))
		}
		for i := range flood {
			o.do(key("flood/", i, 1+i%4))
		}
		for i := range 50 {
			o.do(key("late/", i, 8))
		}
		if got := told(o); got != 1 {
			t.Errorf("notices that keys are forgotten: got %d of %v, want 1", got, keys)
		}
		for round := range 2 {
			o.down()
			for i := range 50 {
				for _, name := range []string{"early/", "late/"} {
					if d := o.do(key(name, i, 1)); d.Allowed || d.Source != fall {
						t.Fatalf("exhausted key %s%d: got %+v, want a denial of the fallback", name, i, d)
					}
				}
			}
			denied := 0
			for i := range room / 4 {
				if d := o.do(key("new/", 1000*round+i, 1)); !d.Allowed {
					denied++
				}
			}
			if denied > 0 {
				t.Errorf("outage %d: got %d of %d new keys denied, want 0", round, denied, room/4)
			}
			if got := told(o); got != 1+round {
				t.Errorf("outage %d: notices about keys: got %d, want %d", round, got, 1+round)
			}
			for i := range room {
				o.do(key("more/", 10_000*round+i, 1))
			}
			if got := told(o); got != 2+round {
				t.Errorf("outage %d: notices about keys: got %d of %v, want %d", round, got, keys, 2+round)
			}
			o.up()
			for i := range room { // the keys pay
				o.do(key("more/", 10_000*round+i, 0))
			}
			for i := range room / 4 {
				o.do(key("new/", 1000*round+i, 0))
			}
			time.Sleep(6 * time.Second)
			o.do(key("new/", 0, 0))
		}
	})
}

// TestFallbackLargest computes with the largest capacity and the largest number of instances.
func TestFallbackLargest(t *testing.T) {
	const most = 1<<52 - 1
	large := quota.NewLimit("large", algorithm.TokenBucket(most, 20_000_000, time.Second))
	withFallback(t, resilience.Instances(3), 0, func(o *outage) {
		at := func(op quota.Op, n int64) quota.Charge { return quota.Charge{Limit: large, Key: "k", Op: op, Cost: n} }
		o.do(at(quota.OpTake, 4))
		o.down()
		left := int64(most-4) / 3
		if d := o.do(at(quota.OpTake, left)); !d.Allowed || d.Remaining != 0 || d.Capacity != most/3 {
			t.Errorf("take of the share: got %+v, want it allowed, 0 of %d left", d, int64(most/3))
		}
		o.do(at(quota.OpDebit, most/3)) // into debt
		o.up()
		if d := o.do(at(quota.OpPeek, 0)); d.Remaining != most-4-left-most/3 {
			t.Errorf("remaining in the store: got %d, want %d", d.Remaining, most-4-left-most/3)
		}
	})
	// A fleet of 300 million on one token a second: a share gains one in nine and a half years. After a
	// debt it begins empty.
	synctest.Test(t, func(t *testing.T) {
		one := quota.NewLimit("one", algorithm.TokenBucket(1, 1, time.Second))
		o := &outage{t: t, r: &remote{Store: local.New()}}
		o.s = wrap(t, o.r, resilience.Fallback(local.New(), resilience.Instances(300_000_000), &resilience.FallbackOptions{AtLeastOne: true}))
		for range 3 { // into debt
			o.do(quota.Charge{Limit: one, Key: "k", Op: quota.OpDebit, Cost: 1})
		}
		o.down()
		time.Sleep(10 * time.Second) // the whole limit is full again
		if d := o.do(quota.Charge{Limit: one, Key: "k", Cost: 1}); d.Allowed || d.Remaining != 0 || d.RetryAfter < 9*365*24*time.Hour {
			t.Errorf("a share of a key that was in debt: got %v, want a denial for more than nine years", d)
		}
		if d := o.do(quota.Charge{Limit: one, Key: "unseen", Cost: 1}); !d.Allowed || d.Remaining != 0 {
			t.Errorf("a share at least one: got %v, want it allowed", d)
		}
		if err := o.s.Close(); err != nil {
			t.Error(err)
		}
	})
}

func TestFallbackStaleAnswer(t *testing.T) {
	// The answer to a call that was decided before a reconciliation comes after it. It says that much is left.
	inOutage(t, func(o *outage) {
		held, answered := make(chan struct{}), make(chan struct{})
		s := &stub{answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
			d, err := o.r.Charge(ctx, c)
			if c.ID == "slow" {
				close(answered)
				<-held
			}
			return d, err
		}}
		f := wrap(t, s, resilience.Fallback(local.New(), resilience.Instances(4), nil))
		take := func(c quota.Charge, source quota.Source, remaining int64) {
			t.Helper()
			if d, err := f.Charge(bg, c); err != nil || d.Source != source || d.Remaining != remaining {
				t.Fatalf("%+v, %v; want %d from the %v", d, err, remaining, source)
			}
		}
		o.down()
		take(charge(20), fall, 5)
		o.up()
		var wg sync.WaitGroup
		o.r.hooked(func(cs []quota.Charge) {
			if cs[0].Op == quota.OpDebit {
				time.Sleep(time.Millisecond)
			}
		})
		wg.Go(func() { take(charge(80), store, 0) })
		time.Sleep(time.Microsecond)
		wg.Go(func() { f.Charge(bg, withID(peek(0), "slow")) }) // decided while the debit is on its way: 100 are left
		<-answered
		time.Sleep(10 * time.Millisecond)
		close(held)
		wg.Wait()
		o.down()
		take(peek(0), fall, 0)
	})
}

func TestFallbackWithinOneTimeout(t *testing.T) {
	// A call with a reconciliation in front of it makes two requests within one timeout.
	synctest.Test(t, func(t *testing.T) {
		r := &remote{Store: local.New(), before: as(quota.ErrUnavailable)}
		s := wrap(t, r, resilience.Fallback(local.New(), resilience.Instances(4), nil), resilience.Timeout(100*time.Millisecond, nil))
		s.Charge(bg, charge(1))
		r.set(nil, nil)
		r.hooked(func([]quota.Charge) { time.Sleep(80 * time.Millisecond) })
		began := time.Now()
		d, err := s.Charge(bg, charge(1))
		if took := time.Since(began); took != 100*time.Millisecond || err != nil || d.Source != fall {
			t.Errorf("got %+v, %v after %v; want a decision of the fallback after 100ms", d, err, took)
		}
		time.Sleep(time.Second)
		s.Close()
	})
}

func TestFallbackNotices(t *testing.T) {
	inOutage(t, func(o *outage) {
		want := func(texts ...string) {
			t.Helper()
			synctest.Wait()
			got := o.notes.take()
			if len(got) != len(texts) {
				t.Fatalf("notices %v, want %v", got, texts)
			}
			for i := range got {
				if got[i].Name != "fallback" || !strings.HasPrefix(got[i].Text, texts[i]) {
					t.Fatalf("notices %v, want %v", got, texts)
				}
			}
		}
		o.do(charge(1))
		want()
		o.down()
		o.do(charge(1))
		o.do(charge(1))
		want("began")
		for range 20 { // flapping
			o.up()
			o.do(charge(1))
			time.Sleep(time.Second)
			o.down()
			o.do(charge(1))
			time.Sleep(time.Second)
		}
		want()
		o.up()
		o.do(charge(1))
		want()
		time.Sleep(5 * time.Second)
		o.do(charge(1))
		o.do(charge(1))
		want("ended: the store decides again; 22 calls")
		o.down()
		o.do(charge(1))
		want("began")
	})
}

func TestFallbackClose(t *testing.T) {
	bad := errors.New("bad")
	primary, here := &stub{onClose: func() error { return bad }}, &stub{}
	s := wrap(t, primary, resilience.Fallback(here, resilience.Instances(1), nil))
	wantErr(t, s.Close(), bad)
	s.Close()
	if primary.closed != 1 || here.closed == 0 {
		t.Errorf("the stores were closed %d and %d times, want once", primary.closed, here.closed)
	}
}

func TestFallbackAtomicity(t *testing.T) {
	for a := driver.AnyKeys; a <= driver.OneKey; a++ {
		for b := driver.AnyKeys; b <= driver.OneKey; b++ {
			s := wrap(t, &stub{atomic: a}, resilience.Fallback(&stub{atomic: b}, resilience.Instances(1), nil))
			if got := s.(driver.Graded).Atomicity(); got != max(a, b) {
				t.Errorf("atomicity of %v and %v: got %v, want the weaker", a, b, got)
			}
		}
	}
}

func TestFallbackPanics(t *testing.T) {
	// Neither a primary nor a fallback that panics leaves the key stuck.
	r, here := &remote{Store: local.New(), before: as(quota.ErrUnavailable)}, &remote{Store: local.New()}
	s := wrap(t, r, resilience.Fallback(here, resilience.Instances(4), nil))
	panics := func(c quota.Charge) {
		t.Helper()
		defer func() {
			if recover() == nil {
				t.Error("got no panic, want the store's")
			}
		}()
		s.Charge(bg, c)
	}
	boom := func(of quota.Op) func([]quota.Charge) {
		return func(cs []quota.Charge) {
			if cs[0].Op == of {
				panic("boom")
			}
		}
	}
	for _, of := range []quota.Op{quota.OpReset, quota.OpTake} {
		here.hooked(boom(of))
		panics(charge(1))
	}
	here.hooked(nil)
	if d, err := s.Charge(bg, charge(5)); err != nil || d.Remaining != 20 {
		t.Fatalf("after the panics: got %+v, %v; want 20 remaining", d, err)
	}
	r.hooked(boom(quota.OpDebit))
	panics(charge(1))
	r.hooked(nil)
	r.set(nil, nil)
	if d, err := s.Charge(bg, peek(0)); err != nil || d.Remaining != 95 {
		t.Fatalf("after the panics: got %+v, %v; want 95 remaining", d, err)
	}
}

func TestFallbackPanicInAList(t *testing.T) {
	// The fallback panics while the share of a list's second key is filled. The first key is usable afterwards.
	synctest.Test(t, func(t *testing.T) {
		r, here := &remote{Store: local.New(), before: as(quota.ErrUnavailable)}, &remote{Store: local.New()}
		s := wrap(t, r, resilience.Fallback(here, resilience.Instances(4), nil))
		a, b := quota.Charge{Limit: limit, Key: "team/a", Cost: 1}, quota.Charge{Limit: limit, Key: "team/b", Cost: 1}
		here.hooked(func(cs []quota.Charge) {
			if cs[0].Op == quota.OpReset && cs[0].Key == b.Key {
				panic("boom")
			}
		})
		func() {
			defer func() {
				if v := recover(); v != "boom" {
					t.Errorf("recovered: got %v, want boom", v)
				}
			}()
			s.ChargeAll(bg, []quota.Charge{a, b}, make([]quota.Decision, 2))
		}()
		here.hooked(nil)
		for _, c := range []quota.Charge{a, b} {
			r.set(nil, nil)
			if d, err := s.Charge(bg, c); err != nil || d.Source != store {
				t.Errorf("%s with the primary up: got %+v, %v; want a decision of the store", c.Key, d, err)
			}
			r.set(as(quota.ErrUnavailable), nil)
			ctx, cancel := context.WithTimeout(bg, time.Second)
			defer cancel()
			if d, err := s.Charge(ctx, c); err != nil || d.Source != fall {
				t.Errorf("%s with the primary down: got %+v, %v; want a decision of the fallback", c.Key, d, err)
			}
		}
	})
}

func TestFallbackWaitsWhileAShareIsMade(t *testing.T) {
	// Between its two steps the bucket is whole, though the key is exhausted: nobody may take from it.
	synctest.Test(t, func(t *testing.T) {
		r, here := &remote{Store: local.New()}, &remote{Store: local.New()}
		s := wrap(t, r, resilience.Fallback(here, resilience.Instances(4), nil))
		s.Charge(bg, op(quota.OpDebit, 200))
		r.set(as(quota.ErrUnavailable), nil)
		here.hooked(func(cs []quota.Charge) {
			if cs[0].Op == quota.OpDebit {
				time.Sleep(time.Second)
			}
		})
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 300 * time.Millisecond)
				if d, err := s.Charge(bg, charge(1)); err != nil || d.Allowed {
					t.Errorf("an exhausted key: got %+v, %v; want a denial", d, err)
				}
			})
		}
		// Who does not want to wait need not.
		ctx, cancel := context.WithTimeout(bg, 500*time.Millisecond)
		defer cancel()
		wg.Go(func() {
			time.Sleep(time.Millisecond)
			_, err := s.Charge(ctx, charge(1))
			wantErr(t, err, context.DeadlineExceeded, quota.ErrUnavailable)
		})
		wg.Wait()
	})
}

func TestFallbackWaitsForThoseWhoTake(t *testing.T) {
	// What was taken is known only when the store has answered. Until then the share is not made anew.
	synctest.Test(t, func(t *testing.T) {
		r, buckets := &remote{Store: local.New(), before: as(quota.ErrUnavailable)}, local.New()
		here := &stub{answer: func(ctx context.Context, c quota.Charge) (quota.Decision, error) {
			d, err := buckets.Charge(ctx, c)
			if c.Op == quota.OpTake && c.Cost == 20 {
				time.Sleep(time.Second)
			}
			return d, err
		}}
		s := wrap(t, r, resilience.Fallback(here, resilience.Instances(4), nil))
		var wg sync.WaitGroup
		wg.Go(func() {
			if d, err := s.Charge(bg, charge(20)); err != nil || !d.Allowed {
				t.Errorf("got %+v, %v; want a grant", d, err)
			}
		})
		time.Sleep(100 * time.Millisecond)
		r.set(nil, nil)
		if d, err := s.Charge(bg, peek(0)); err != nil || d.Remaining != 100 {
			t.Fatalf("the primary: got %+v, %v; want 100 remaining", d, err)
		}
		r.set(as(quota.ErrUnavailable), nil)
		if d, err := s.Charge(bg, charge(10)); err != nil || d.Allowed || d.Source != fall || d.Remaining != 5 {
			t.Errorf("got %+v, %v; want a denial of the fallback with 5 remaining", d, err)
		}
		wg.Wait()
	})
}

// TestFallbackRace has many goroutines on few keys while the primary flaps: run it with the race detector.
func TestFallbackRace(t *testing.T) {
	r, here := &remote{Store: local.New()}, local.New()
	s := wrap(t, r, resilience.Fallback(here, resilience.Instances(4), nil))
	big := bucket("big", 1<<20, 100, time.Hour)
	var wg sync.WaitGroup
	var mu sync.Mutex
	total := map[string]int64{}
	stop := make(chan struct{})
	for range 8 {
		wg.Go(func() {
			for i := range 400 {
				keys := []string{"a/x", "a/y", "b"}
				cs := []quota.Charge{{Limit: big, Key: keys[i%3], Cost: 1}}
				if i%5 == 0 {
					cs = append(cs, quota.Charge{Limit: big, Key: keys[(i+1)%3], Cost: 2})
				}
				out := make([]quota.Decision, len(cs))
				if err := s.ChargeAll(bg, cs, out); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for j := range out {
					total[cs[j].Key] += out[j].Charged
				}
				mu.Unlock()
			}
		})
	}
	var flaps sync.WaitGroup
	flaps.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			r.set([]error{nil, as(quota.ErrUnavailable)}[i%2], nil)
		}
	})
	wg.Wait()
	close(stop)
	flaps.Wait()
	r.set(nil, nil)
	for key, want := range total {
		s.Charge(bg, quota.Charge{Limit: big, Key: key, Op: quota.OpPeek})
		if d, err := s.Charge(bg, quota.Charge{Limit: big, Key: key, Op: quota.OpPeek}); err != nil || 1<<20-d.Remaining != want {
			t.Errorf("%s: %d were admitted and %d charged, %v", key, want, 1<<20-d.Remaining, err)
		}
	}
}

// A key's limit becomes one that keeps no state, and the old one again, before an outage, in it and after it: neither the
// primary's word on the key, nor its share, nor its debt changes by that.
func TestFallbackBesideLimitsWithoutState(t *testing.T) {
	for _, rule := range []quota.Algorithm{algorithm.Unlimited, algorithm.DenyAll} {
		plan := quota.NewLimit(limit.Name(), rule)
		left := plan.Spec().Capacity
		other := func(op quota.Op, n int64) quota.Charge {
			c := charge(n)
			c.Limit, c.Op = plan, op
			return c
		}
		inOutage(t, func(o *outage) {
			each := func(source quota.Source) {
				o.t.Helper()
				o.want(other(quota.OpTake, 1<<40), source, left > 0, left)
				for _, op := range []quota.Op{quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset, quota.OpAhead} {
					o.want(other(op, 0), source, true, left)
				}
			}
			o.want(charge(60), store, true, 40)
			each(store)
			o.down()
			each(fall)
			o.want(charge(4), fall, true, 6) // a quarter of what was left
			each(fall)
			out := make([]quota.Decision, 2)
			list := []quota.Charge{{Limit: bucket("other", 100, 10, time.Second), Key: "team/agent", Cost: 1}, other(quota.OpTake, 0)}
			if err := o.s.ChargeAll(bg, list, out); err != nil || !quota.Granted(out) || out[1].Source != fall {
				o.t.Fatalf("list in an outage: got %+v, %v; want it granted by the fallback", out, err)
			}
			o.want(charge(7), fall, false, 6)
			o.up()
			o.r.calls()
			each(store) // owes nothing
			o.asked("take 1099511627776; peek 0; debit 0; refund 0; reset 0; take-ahead 0")
			o.want(charge(1), store, true, 35)
			o.asked("debit 4; take 1")
		})
	}
}
