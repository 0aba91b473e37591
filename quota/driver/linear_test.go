package driver_test

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

const (
	linearKeys     = 3
	linearCapacity = 6
)

// used is the state of the sequential model: with the clock standing still, every rule is a counter a key.
type used [linearKeys]int64

// step applies a list to the counters without the library: all of its charges or none.
func (u used) step(cs []quota.Charge) (out []quota.Decision, next used) {
	next = u
	granted := true
	for _, c := range cs {
		k := c.Key[len(c.Key)-1] - '0'
		d := quota.Decision{Allowed: true}
		switch c.Op {
		case quota.OpTake, quota.OpPeek:
			d.Allowed = u[k]+c.Cost <= linearCapacity
			if d.Allowed && c.Op == quota.OpTake {
				next[k], d.Charged = u[k]+c.Cost, c.Cost
			}
		case quota.OpDebit:
			next[k], d.Charged = u[k]+c.Cost, c.Cost
		case quota.OpRefund:
			next[k] = max(u[k]-c.Cost, 0)
			d.Charged = next[k] - u[k]
		case quota.OpReset:
			next[k] = 0
			d.Charged = min(-u[k], 0)
		}
		granted = granted && d.Allowed
		d.Remaining = linearCapacity - next[k]
		out = append(out, d)
	}
	if !granted {
		next = u
		for i, c := range cs {
			out[i].Charged, out[i].Remaining = 0, linearCapacity-u[c.Key[len(c.Key)-1]-'0']
		}
	}
	return out, next
}

var counters = porcupine.Model{
	Init: func() any { return used{} },
	Step: func(state, in, out any) (bool, any) {
		want, next := state.(used).step(in.([]quota.Charge))
		for i, d := range out.([]quota.Decision) {
			if d.Allowed != want[i].Allowed || d.Remaining != want[i].Remaining || d.Charged != want[i].Charged {
				return false, state
			}
		}
		return true, next
	},
	DescribeOperation: func(in, out any) string { return fmt.Sprint(testkit.Show(in.([]quota.Charge)), " ", out) },
}

func linearCharge(r *rand.Rand, l *quota.Limit, key int) quota.Charge {
	c := quota.Charge{Limit: l, Key: fmt.Sprint("g/", key), Cost: 1 + r.Int64N(3)}
	switch r.IntN(10) {
	case 0, 1:
		c.Op, c.MadeAt = quota.OpRefund, testkit.Epoch
	case 2:
		c.Op = quota.OpDebit
	case 3:
		c.Op = quota.OpPeek
	case 4:
		if r.IntN(3) == 0 {
			c.Op = quota.OpReset
		}
	}
	return c
}

func TestLinearizable(t *testing.T) {
	const clients, calls = 8, 12
	testkit.EachRule(t, linearCapacity, 1000*time.Hour, func(t *testing.T, l *quota.Limit) {
		for _, kind := range []string{"local", "cas"} {
			t.Run(kind, func(t *testing.T) {
				r := random(t)
				for range sized(15, 300) {
					synctest.Test(t, func(t *testing.T) { // so that the pauses of compare-and-swap take no time
						c := testkit.NewClock()
						var s quota.Store = quota.Must(local.NewWithOptions(local.Options{Clock: c.Time}))
						if kind == "cas" {
							kv := newKV(c.Micros)
							kv.beforeSwap = runtime.Gosched
							s = newCAS(t, kv, &driver.Options{Attempts: 1000})
						}
						history := make([][]porcupine.Operation, clients)
						var tick atomic.Int64
						var wg sync.WaitGroup
						for client := range clients {
							r := rand.New(rand.NewPCG(r.Uint64(), 0))
							wg.Go(func() {
								for range calls {
									var cs []quota.Charge
									for i, key := range r.Perm(linearKeys) {
										if i == 0 || r.IntN(3) == 0 {
											cs = append(cs, linearCharge(r, l, key))
										}
									}
									out := make([]quota.Decision, len(cs))
									op := porcupine.Operation{ClientId: client, Input: cs, Output: out, Call: tick.Add(1)}
									var err error
									if len(cs) == 1 {
										out[0], err = s.Charge(bg, cs[0])
									} else {
										err = s.ChargeAll(bg, cs, out)
									}
									if op.Return = tick.Add(1); err != nil {
										t.Errorf("%s: got %v, want a decision", testkit.Show(cs), err)
									}
									history[client] = append(history[client], op)
								}
							})
						}
						wg.Wait()
						var all []porcupine.Operation
						for _, h := range history {
							all = append(all, h...)
						}
						if !porcupine.CheckOperations(counters, all) {
							for _, op := range all {
								t.Logf("%d-%d %s", op.Call, op.Return, counters.DescribeOperation(op.Input, op.Output))
							}
							t.Fatal("sequential order of the calls above that gives their decisions: got none, want one")
						}
					})
				}
			})
		}
	})
}

// TestExactBudget lets many goroutines race for more than there is: exactly the capacity is admitted.
func TestExactBudget(t *testing.T) {
	const capacity, clients = 500, 16
	testkit.EachRule(t, capacity, 1000*time.Hour, func(t *testing.T, l *quota.Limit) {
		eachStore(t, func(t *testing.T, s quota.Store, _ *testkit.Clock) {
			if _, graded := s.(driver.Graded); graded {
				s = newCAS(t, newKV(testkit.NewClock().Micros), &driver.Options{Attempts: 100_000})
			}
			var admitted atomic.Int64
			synctest.Test(t, func(t *testing.T) {
				var wg sync.WaitGroup
				defer wg.Wait()
				for client := range clients {
					r := rand.New(rand.NewPCG(uint64(client), 0))
					wg.Go(func() {
						for range sized(60, 300) {
							c := quota.Charge{Limit: l, Key: "k", Cost: 1 + r.Int64N(2)}
							out := make([]quota.Decision, 2)
							if err := s.ChargeAll(bg, []quota.Charge{c, {Limit: l, Key: fmt.Sprint("free", client), Op: quota.OpPeek}}, out); err != nil {
								t.Errorf("ChargeAll of %v and a peek: got %v, want decisions", c, err)
							} else if out[0].Allowed {
								admitted.Add(c.Cost)
							}
						}
						for { // the last tokens, one at a time
							d, err := s.Charge(bg, quota.Charge{Limit: l, Key: "k", Cost: 1})
							if err != nil {
								t.Errorf("Charge of 1: got %v, want a decision", err)
							}
							if err != nil || !d.Allowed {
								return
							}
							admitted.Add(1)
						}
					})
				}
			})
			if n := admitted.Load(); n != capacity {
				t.Errorf("admitted tokens: got %d, want %d", n, capacity)
			}
		})
	})
}
