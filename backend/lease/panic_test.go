package lease

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// panicky is a lease around code of others that panics when told to.
type panicky struct {
	*Store
	below    *remote
	failing  atomic.Bool  // Instances and the rule panic
	calls    atomic.Int64 // of the clock
	failAt   atomic.Int64 // the call of the clock that panics; 0 is none
	waiting  sync.WaitGroup
	failures atomic.Int64 // calls that ended in a panic or in the error of one
}

// call makes a call on a goroutine of its own.
func (p *panicky) call(do func() error) {
	p.waiting.Go(func() {
		defer func() {
			if recover() != nil {
				p.failures.Add(1)
			}
		}()
		if err := do(); errors.Is(err, quota.ErrIndeterminate) && errors.Is(err, quota.ErrMisconfigured) {
			p.failures.Add(1)
		}
	})
}

func (p *panicky) takes(n int, c quota.Charge) {
	for range n {
		p.call(func() error { _, err := p.Charge(bg, c); return err })
	}
}

func (p *panicky) list(cost int64) {
	p.call(func() error {
		return p.ChargeAll(bg, []quota.Charge{one(cost), {Limit: slow, Key: "other", Cost: 1}}, make([]quota.Decision, 2))
	})
}

// panickyRule is a rule that panics while failing is set.
type panickyRule struct {
	quota.Algorithm
	failing *atomic.Bool
}

func (r panickyRule) Decide(s quota.State, q quota.Request, now quota.Micros) (quota.State, quota.Verdict) {
	if r.failing.Load() {
		panic("test: a panic in the rule")
	}
	return r.Algorithm.Decide(s, q, now)
}

// testPanics leases a key, has code panic while do runs, and checks that no lock, request or count is left behind: the
// key is leased again, and Close returns without an error.
func testPanics(t *testing.T, failAt int64, do func(p *panicky)) (failures int64) {
	synctest.Test(t, func(t *testing.T) {
		p := &panicky{below: newRemote(t)}
		base := time.Now()
		p.Store = open(t, p.below, Options{
			Instances: func() int64 {
				if p.failing.Load() {
					panic("test: a panic in Instances")
				}
				return 1
			},
			Clock: func() time.Time {
				if n := p.calls.Add(1); n == p.failAt.Load() {
					panic("test: a panic in the clock")
				}
				return base.Add(time.Since(base))
			},
		})
		take(t, p, one(2000))
		warm(t, p.Store, one(1), 50)
		if failAt > 0 {
			p.failAt.Store(p.calls.Load() + failAt)
		}
		do(p)
		p.waiting.Wait()
		p.below.set(nil)
		p.failing.Store(false)
		p.failAt.Store(0)
		failures = p.failures.Load()
		time.Sleep(3 * time.Second)
		warm(t, p.Store, one(1), 20)
		if err := p.Close(); err != nil {
			t.Errorf("Close: got %v, want nil", err)
		}
	})
	return failures
}

// TestPanics has code of others panic where the store calls it. On the goroutine of a caller the panic reaches the
// caller, otherwise it is an error of the callers that wait; it never ends the process.
func TestPanics(t *testing.T) {
	always := func(*quota.Charge) fault { return fault{before: 50 * time.Millisecond, panics: true} }
	for name, test := range map[string]struct {
		do   func(p *panicky)
		want int64 // calls that fail
	}{
		"a request for a chunk": {func(p *panicky) {
			for p.left(one(1)) > 0 {
				p.Charge(bg, one(1))
			}
			p.below.set(always)
			p.takes(10, one(1))
		}, 10},
		"a take paid in part by the lease": {func(p *panicky) {
			p.below.set(always)
			p.takes(3, one(2000))
		}, 3},
		"a give-back": {func(p *panicky) {
			p.below.set(always)
			time.Sleep(2 * time.Second)
		}, 0},
		"the give-back of a list's leases": {func(p *panicky) {
			p.below.set(func(c *quota.Charge) fault { return fault{panics: c.Op == quota.OpRefund} })
			p.list(6400)
		}, 0},
		"a list": {func(p *panicky) {
			p.below.set(always)
			p.list(1)
		}, 1},
		"a reset": {func(p *panicky) {
			p.below.set(always)
			p.takes(1, op(quota.OpReset, 0))
		}, 1},
		"Instances": {func(p *panicky) {
			p.failing.Store(true)
			p.takes(3, one(2000))
		}, 3},
		"a rule": {func(p *panicky) {
			c := one(2000)
			c.Limit = quota.NewLimit("tokens", panickyRule{slow.Algorithm(), &p.failing})
			p.failing.Store(true)
			p.takes(3, c)
		}, 3},
	} {
		t.Run(name, func(t *testing.T) {
			if got := testPanics(t, 0, test.do); got != test.want {
				t.Errorf("calls that failed: got %d, want %d", got, test.want)
			}
		})
	}
	for at := int64(1); at <= 60; at++ {
		t.Run(fmt.Sprintf("call %d of the clock", at), func(t *testing.T) {
			testPanics(t, at, func(p *panicky) {
				for range 10 {
					p.takes(3, one(1))
					p.takes(1, one(150))
					p.takes(1, op(quota.OpDebit, 3))
					p.list(1)
					p.list(6400)
					time.Sleep(100 * time.Millisecond)
				}
				p.takes(1, op(quota.OpReset, 0))
				time.Sleep(2 * time.Second)
			})
		})
	}
}
