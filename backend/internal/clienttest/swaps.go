package clienttest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// swaps: a rule whose Lua the store does not see makes the same decisions and states as the scripted one,
// alone and in lists with scripted ones, and its budget is exact under concurrency.
func swaps(t *testing.T, l library) {
	server, open := l.single(t)
	for _, injected := range []bool{true, false} {
		t.Run(fmt.Sprintf("injected=%v", injected), func(t *testing.T) {
			server.FlushAll(bg)
			r := replay(t, server, open, l.volume(8_000, 80_000), injected, func(k kind) bool { return k == bucket || k == slidingLog })
			t.Logf("%d lists, %d charges, %d granted, %d unsure", r.lists.Load(), r.charges.Load(), r.granted.Load(), r.unsure.Load())
		})
	}
	t.Run("same bytes", func(t *testing.T) {
		scripted, swapped := open(engine.Options{}), open(engine.Options{})
		for k := range kinds {
			a := newRule(k, 1000, 1000, year)
			// Each reads the state that the other wrote.
			for i := range int64(6) {
				store, l := scripted, limitOf(kindNames[k], a)
				if i%2 == 1 {
					store, l = swapped, limitOf(kindNames[k], hidden{a})
				}
				if d := take(t, store, quota.Charge{Limit: l, Key: "same", Cost: 100}); d.Remaining != 900-100*i {
					t.Errorf("%s: call %d: got %d left, want %d", kindNames[k], i, d.Remaining, 900-100*i)
				}
			}
		}
	})
	t.Run("signed", func(t *testing.T) {
		store := open(engine.Options{})
		c := quota.Charge{Limit: limitOf("signed", signedRule{}), Key: "k", Cost: 1}
		for i := range int64(3) {
			if d := take(t, store, c); d.Remaining != -1-i {
				t.Errorf("call %d: got %d left, want %d", i, d.Remaining, -1-i)
			}
		}
	})
	for _, lists := range []bool{false, true} {
		t.Run(fmt.Sprintf("budget, lists=%v", lists), func(t *testing.T) {
			const budget = 100
			store := open(engine.Options{})
			name := fmt.Sprintf("budget%v", lists)
			cs := []quota.Charge{{Limit: limitOf(name, hidden{yearly(name, budget).Algorithm()}), Key: "k", Cost: 1}}
			if lists {
				cs = append(cs, quota.Charge{Limit: limitOf(name+".b", newRule(bucket, 1000, 1000, year)), Key: "k", Cost: 1})
			}
			var granted atomic.Int64
			var wg sync.WaitGroup
			for range 8 {
				wg.Go(func() {
					conflicts := 0
					for out := make([]quota.Decision, len(cs)); ; {
						switch err := store.ChargeAll(bg, cs, out); {
						case errors.Is(err, quota.ErrConflict) && conflicts < budget: // not charged
							conflicts++
						case err != nil:
							t.Error(err)
							return
						case !quota.Granted(out):
							return
						default:
							granted.Add(1)
						}
					}
				})
			}
			wg.Wait()
			if granted.Load() != budget {
				t.Errorf("grants: got %d, want %d", granted.Load(), budget)
			}
			if lists {
				if got := left(t, store, cs[1].Limit, "k"); got != 1000-budget {
					t.Errorf("the limit beside it: got %d left, want %d", got, 1000-budget)
				}
			}
		})
	}
}

// signedRule counts down without end: a rule whose state has negative numbers, in its tail too.
type signedRule struct{}

func (signedRule) Spec() quota.Spec {
	return quota.Spec{Rule: quota.Rule{'n', 'e', 'g'}, Unit: 1, Capacity: 1 << 40}
}

func (signedRule) Decide(s quota.State, r quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	n := s.A - r.Cost
	if !s.IsZero() && (s.B != -1<<53 || s.C != 1<<53 || len(s.Tail) != 2 || s.Tail[0] != s.A || s.Tail[1] != 7) {
		return s, quota.Verdict{}
	}
	s = quota.State{Unit: 1, A: n, B: -1 << 53, C: 1 << 53, Tail: []int64{n, 7}}
	return s, quota.Verdict{Outcome: quota.Outcome{Allowed: true, Write: true}, Remaining: n, ResetAfter: 1_000_000_000}
}
