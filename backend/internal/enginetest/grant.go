package enginetest

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// Grants: a request id is granted once and repeated faithfully, whoever repeats it, whether scripts or
// compare-and-swap decide.
func Grants(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	for _, hide := range []bool{false, true} {
		t.Run(fmt.Sprintf("hidden=%v", hide), func(t *testing.T) {
			server.FlushAll(bg)
			grants(t, server, open(engine.Options{}), hide)
		})
	}
}

func grants(t *testing.T, server *server, store *engine.Store, hide bool) {
	limit := func(name string) *quota.Limit {
		l := yearly(name, 10)
		if hide {
			l = limitOf(name, hidden{l.Algorithm()})
		}
		return l
	}
	a, b := limit("a"), limit("b")
	left := func(t *testing.T, l *quota.Limit, key string) int64 {
		t.Helper()
		return take(t, store, quota.Charge{Limit: l, Key: key, Op: quota.OpPeek}).Remaining
	}

	t.Run("once", func(t *testing.T) {
		c := quota.Charge{Limit: a, Key: "once", Cost: 3, ID: "r{1} :%"}
		first := take(t, store, c)
		if !first.Allowed || first.Replayed || first.Charged != 3 || first.Remaining != 7 {
			t.Fatalf("%+v", first)
		}
		if ttl := server.PTTL(bg, "quota:{once}#r%7B1%7D%20%3A%25").Val(); ttl > quota.IDWindow+time.Millisecond || ttl < quota.IDWindow-10*time.Second {
			t.Errorf("the record lives for %v, not %v", ttl, quota.IDWindow)
		}
		take(t, store, quota.Charge{Limit: a, Key: "once", Cost: 5}) // the state moves on
		first.Replayed = true
		for range 2 {
			if d := take(t, store, c); d != first {
				t.Errorf("repeated as\n %+v, first was\n %+v", d, first)
			}
			if ds := takeAll(t, store, c); ds[0] != first {
				t.Errorf("repeated in a list as\n %+v, first was\n %+v", ds[0], first)
			}
		}
		if n := left(t, a, "once"); n != 2 {
			t.Errorf("%d left, not 2", n)
		}
		take(t, store, quota.Charge{Limit: a, Key: "once", Op: quota.OpReset})
		if d := take(t, store, c); d != first || left(t, a, "once") != 10 {
			t.Errorf("repeated after a reset as %+v", d)
		}
		// The limit's numbers change; that it was granted does not.
		smaller := quota.Must(quota.NewLimit("a", quota.Must(newRule(fixed, 1, 1, year))))
		if hide {
			smaller = limitOf("a", hidden{smaller.Algorithm()})
		}
		c.Limit = smaller
		if d := take(t, store, c); !d.Allowed || !d.Replayed || d.Charged != 3 || d.RetryAfter != 0 {
			t.Errorf("repeated under other numbers as %+v", d)
		}
	})

	t.Run("denial", func(t *testing.T) {
		c := quota.Charge{Limit: a, Key: "denial", Cost: 8, ID: "r"}
		held := take(t, store, quota.Charge{Limit: a, Key: "denial", Cost: 5})
		if d := take(t, store, c); d.Allowed || d.Replayed {
			t.Errorf("%+v", d)
		}
		if n := server.Exists(bg, "quota:{denial}#r").Val(); n != 0 {
			t.Error("a denial was remembered")
		}
		take(t, store, c.Refund(held, 5))
		if d := take(t, store, c); !d.Allowed || d.Replayed || d.Remaining != 2 {
			t.Errorf("decided anew as %+v", d)
		}
	})

	t.Run("other charges", func(t *testing.T) {
		c := quota.Charge{Limit: a, Key: "other/k", Cost: 1, ID: "r"}
		take(t, store, c)
		was := server.held(t, c)
		for what, change := range map[string]func(*quota.Charge){
			"cost": func(c *quota.Charge) { c.Cost = 2 }, "op": func(c *quota.Charge) { c.Op = quota.OpDebit }, "peek": func(c *quota.Charge) { c.Op = quota.OpPeek },
			"at": func(c *quota.Charge) { c.At = 1 }, "limit": func(c *quota.Charge) { c.Limit = b }, "key": func(c *quota.Charge) { c.Key = "other/l" },
		} {
			d := c
			change(&d)
			if got, err := store.Take(bg, d); !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("another %s: %+v, %v", what, got, err)
			}
		}
		if err := store.TakeAll(bg, []quota.Charge{c, {Limit: b, Key: "other/k", ID: "r"}}, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("another length: %v", err)
		}
		if server.held(t, c) != was || left(t, b, "other/k") != 10 {
			t.Error("a refused charge was made")
		}
		// Ids count within their group.
		if d := take(t, store, quota.Charge{Limit: a, Key: "another/k", Cost: 1, ID: "r"}); d.Replayed || d.Remaining != 9 {
			t.Errorf("another group's id: %+v", d)
		}
	})

	t.Run("list", func(t *testing.T) {
		cs := []quota.Charge{{Limit: a, Key: "list/k", Cost: 2, ID: "r"}, {Limit: b, Key: "list/k", Cost: 3, Op: quota.OpDebit, ID: "r"}, {Limit: a, Key: "list/l", Op: quota.OpPeek, Cost: 4, ID: "r"}}
		first := takeAll(t, store, cs...)
		takeAll(t, store, quota.Charge{Limit: a, Key: "list/k", Cost: 8}, quota.Charge{Limit: a, Key: "list/l", Cost: 8})
		again := takeAll(t, store, cs...)
		for i := range first {
			if first[i].Replayed || first[i].Charged != []int64{2, 3, 0}[i] {
				t.Errorf("charge %d: %+v", i, first[i])
			}
			first[i].Replayed = true
			if again[i] != first[i] {
				t.Errorf("charge %d repeated as\n %+v, first was\n %+v", i, again[i], first[i])
			}
		}
		if n := left(t, b, "list/k"); n != 7 {
			t.Errorf("%d left, not 7", n)
		}
		swapped := []quota.Charge{cs[1], cs[0], cs[2]}
		if err := store.TakeAll(bg, swapped, make([]quota.Decision, 3)); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("in another order: %v", err)
		}
	})

	t.Run("peeks", func(t *testing.T) {
		c := quota.Charge{Limit: a, Key: "peek", Op: quota.OpPeek, Cost: 1, ID: "r"}
		for range 2 {
			if d := take(t, store, c); d.Replayed {
				t.Errorf("%+v", d)
			}
		}
		if n := server.Exists(bg, "quota:{peek}#r").Val(); n != 0 {
			t.Error("a peek was remembered")
		}
	})

	t.Run("refund", func(t *testing.T) {
		d := take(t, store, quota.Charge{Limit: a, Key: "refund", Cost: 6})
		c := quota.Charge{Limit: a, Key: "refund"}.Refund(d, 2)
		c.ID = "back"
		for range 3 {
			take(t, store, c)
		}
		if n := left(t, a, "refund"); n != 6 {
			t.Errorf("%d left: 2 of 6 were given back once, or should have been", n)
		}
	})

	t.Run("parallel", func(t *testing.T) {
		c := quota.Charge{Limit: a, Key: "parallel", Cost: 2, ID: "r"}
		var made, replayed atomic.Int64
		var wg sync.WaitGroup
		for range 16 {
			wg.Go(func() {
				for range 8 {
					switch d, err := store.Take(bg, c); {
					case err != nil || !d.Allowed || d.Charged != 2 || d.Remaining != 8:
						t.Errorf("%+v, %v", d, err)
					case d.Replayed:
						replayed.Add(1)
					default:
						made.Add(1)
					}
				}
			})
		}
		wg.Wait()
		if made.Load() != 1 || replayed.Load() != 127 || left(t, a, "parallel") != 8 {
			t.Errorf("%d grants, %d repeats, %d left", made.Load(), replayed.Load(), left(t, a, "parallel"))
		}
	})

	t.Run("broken record", func(t *testing.T) {
		c := quota.Charge{Limit: a, Key: "broken", Cost: 1, ID: "r"}
		take(t, store, c)
		record := server.Get(bg, "quota:{broken}#r").Val()
		was := server.held(t, c)
		for n := 1; n < len(record); n++ {
			server.Set(bg, "quota:{broken}#r", record[:n], 0)
			d, err := store.Take(bg, c)
			if !hide && !errors.Is(err, quota.ErrMisconfigured) && !errors.Is(err, quota.ErrInvalid) { // text may be cut behind any digit
				t.Errorf("a record cut at %d of %d: %+v, %v", n, len(record), d, err)
			}
			if server.held(t, c) != was {
				t.Fatalf("a record cut at %d: charged again", n)
			}
		}
		server.Del(bg, "quota:{broken}#r")
		server.LPush(bg, "quota:{broken}#r", "x")
		if d, err := store.Take(bg, c); !errors.Is(err, quota.ErrMisconfigured) || server.held(t, c) != was {
			t.Errorf("a record of another type: %+v, %v", d, err)
		}
	})
}
