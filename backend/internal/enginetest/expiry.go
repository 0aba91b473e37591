package enginetest

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Expiry: a key lives as long as its state means something and at most the slack longer, a key made
// fresh is gone at once, and denials and peeks leave a key and its lifetime alone.
func Expiry(t *testing.T, connect Connect) {
	server, open := single(t, connect)
	store := open(engine.Options{})
	for k := range kinds {
		for _, hide := range []bool{false, true} {
			name := kindNames[k]
			if hide {
				name += "-cas"
			}
			limit := func(name string, n, refill int64, period time.Duration) *quota.Limit {
				a := quota.Must(newRule(k, n, refill, period))
				if hide {
					a = hidden{a}
				}
				return limitOf(name, a)
			}
			t.Run(name, func(t *testing.T) {
				lifetimes(t, server, store, name, limit)
				traceless(t, server, store, name, limit)
			})
		}
	}
}

func lifetimes(t *testing.T, server *server, store quota.Store, name string, limit func(string, int64, int64, time.Duration) *quota.Limit) {
	rng := rand.New(rand.NewPCG(seed(t), 0))
	periods := []time.Duration{time.Microsecond, 999 * time.Microsecond, time.Second, time.Hour, 9 * year}
	for i := range 200 {
		period := periods[rng.IntN(len(periods))]
		n := magnitude(rng, 3)
		c := quota.Charge{Limit: limit(name, n, n, period), Key: string(rune('a' + rng.IntN(20))), Cost: 1 + rng.Int64N(n), Op: quota.Op(rng.IntN(2) * int(quota.OpDebit))}
		was := server.held(t, c)
		d := take(t, store, c)
		if d.Charged == 0 || server.held(t, c) == was {
			continue // not granted, or in debt as deep as can be: not written
		}
		// The server reads its clock for SET after it did for us, so at is never too early, and PTTL never too late.
		at := server.expires(t, place(c))
		left := server.PTTL(bg, place(c)).Val()
		if at < 0 && time.Since(d.At.Time()) > d.ResetAfter+driver.ExpirySlack {
			continue // gone by rights; the machine is slow
		}
		if earliest := int64(d.At) + d.ResetAfter.Microseconds() + driver.ExpirySlack.Microseconds() - 1000; at*1000 < earliest {
			t.Errorf("step %d: expires at %d ms, before %d µs", i, at, earliest)
		}
		most := d.ResetAfter + driver.ExpirySlack + time.Millisecond
		if strings.HasSuffix(name, "cas") {
			most += time.Second // a lifetime begins with the swap, a trip after the decision
		}
		if left > most {
			t.Errorf("step %d: PTTL %v, more than %v", i, left, most)
		}
	}
}

func traceless(t *testing.T, server *server, store quota.Store, name string, limit func(string, int64, int64, time.Duration) *quota.Limit) {
	l := limit(name+".t", 10, 1, year)
	c := quota.Charge{Limit: l, Key: "k", Cost: 3}
	other := quota.Charge{Limit: l, Key: "other", Cost: 1}
	first := take(t, store, c)
	key, was, until := place(c), server.held(t, c), server.expires(t, place(c))
	unchanged := func(after string) {
		t.Helper()
		if now := server.held(t, c); now != was {
			t.Errorf("%s changed the state from %x to %x", after, was, now)
		}
		if now := server.expires(t, key); now != until {
			t.Errorf("%s moved the key's end from %d to %d", after, until, now)
		}
		if server.held(t, other) != "" {
			t.Errorf("%s left a state for a key that was charged nothing", after)
		}
	}
	for _, q := range []quota.Charge{{Cost: 8}, {Cost: 11}, {Cost: 1 << 62}, {Cost: 0}, {Op: quota.OpPeek, Cost: 1}, {Op: quota.OpPeek, Cost: 8}, {Op: quota.OpRefund, Cost: 3, At: 1}, {Op: quota.OpDebit}} {
		q.Limit, q.Key = l, "k"
		take(t, store, q)
		unchanged(show([]quota.Charge{q}))
	}
	denied := c
	denied.Cost = 8
	for _, list := range [][]quota.Charge{{denied, other}, {other, denied}} {
		if quota.Granted(takeAll(t, store, list...)) {
			t.Error("granted 11 of 10")
		}
		unchanged("a denied list")
	}
	if d := take(t, store, c.Refund(first, 3)); d.Remaining != 10 || server.held(t, c) != "" {
		t.Errorf("a refund to whole left %+v and %x", d, server.held(t, c))
	}
	take(t, store, c)
	if d := take(t, store, quota.Charge{Limit: l, Key: "k", Op: quota.OpReset}); d.Remaining != 10 || server.held(t, c) != "" {
		t.Errorf("a reset left %+v and %x", d, server.held(t, c))
	}
}
