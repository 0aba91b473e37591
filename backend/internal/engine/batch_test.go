package engine

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A batch with single charges and lists is one call. It decides as Go does: first the single charges, in
// order, and then the lists, in order.
func TestMixedBatch(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	calls := 0
	now := quota.Micros(1_795_427_141_791_724)
	s, err := New(sender(client, &calls), false, Options{Batching: BatchAll, Clock: func() time.Time { return time.UnixMicro(int64(now)) }})
	if err != nil {
		t.Fatal(err)
	}
	rng := random(t)
	var limits []*quota.Limit
	for name, a := range rules() {
		limits = append(limits, limitOf(name, a))
	}
	items := map[named]driver.Item{}
	charge := func() quota.Charge {
		c := quota.Charge{Limit: limits[rng.IntN(len(limits))], Key: fmt.Sprint("k", rng.IntN(4)), Cost: rng.Int64N(5), Op: quota.Op(rng.IntN(7))}
		switch c.Op {
		case quota.OpRefund:
			c.MadeAt = now - quota.Micros(rng.Int64N(1_000_000))
		case quota.OpReset:
			c.Cost = 0
		case quota.OpAhead:
			if !c.Limit.Spec().Ahead {
				c.Op = quota.OpTake
				break
			}
			c.Within = time.Duration(rng.Int64N(int64(5 * time.Second)))
		}
		c.Shadow = rng.IntN(4) == 0
		if c.Op == quota.OpUpTo {
			c.Least = rng.Int64N(c.Cost + 1)
		}
		if (c.Op <= quota.OpPeek || c.Op == quota.OpUpTo) && rng.IntN(3) == 0 {
			c.Floor, c.FloorOf = rng.Int64N(5), uint32(5*rng.IntN(2))
		}
		return c
	}
	for range 2_000 {
		now += quota.Micros(rng.Int64N(2_000_000))
		batch := make([][]quota.Charge, 1+rng.IntN(12))
		for i := range batch {
			for len(batch[i]) == 0 || rng.IntN(2) == 0 {
				if c := charge(); !slices.ContainsFunc(batch[i], func(d quota.Charge) bool { return d.Limit == c.Limit && d.Key == c.Key }) {
					batch[i] = append(batch[i], c)
				}
			}
		}
		calls = 0
		got, errs := Together(bg, s, batch)
		if calls != 1 {
			t.Fatalf("calls for %d requests: got %d, want 1", len(batch), calls)
		}
		for _, lists := range []bool{false, true} {
			for i, cs := range batch {
				if len(cs) > 1 != lists {
					continue
				}
				its, want := make([]driver.Item, len(cs)), make([]quota.Decision, len(cs))
				for j, c := range cs {
					its[j] = items[named{c.Limit, c.Key}]
				}
				if err := driver.Apply(cs, its, now, want); err != nil {
					t.Fatal(err)
				}
				if errs[i] != nil || !slices.Equal(got[i], want) {
					t.Fatalf("request %d of %d:%s\n got %v, error %v\nwant %v", i, len(batch), show(cs), got[i], errs[i], want)
				}
				for j, c := range cs {
					items[named{c.Limit, c.Key}] = its[j]
				}
			}
		}
	}
	wantStates(t, s, client, items)
}

// Every script keeps a state until it is as fresh, and for ExpirySlack longer.
func TestLifetimes(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	s := newStore(t, false, sender(client, new(int)))
	for name, a := range rules() {
		limit := limitOf(name, a)
		charge := func(key string) quota.Charge { return quota.Charge{Limit: limit, Key: key, Cost: 5} }
		decided := map[string]quota.Decision{}
		var err error
		if decided["alone"], err = s.Charge(bg, charge("alone")); err != nil {
			t.Fatal(err)
		}
		got, errs := Together(bg, s, [][]quota.Charge{{charge("single")}, {charge("list"), charge("list2")}})
		if errs[0] != nil || errs[1] != nil {
			t.Fatal(errs)
		}
		decided["single"], decided["list"] = got[0][0], got[1][0]
		for key, d := range decided {
			c := charge(key)
			var to target
			s.locate(&to, &c)
			// PEXPIRETIME is not in all versions; the test itself may take a while.
			ttl := client.PTTL(bg, to.key).Val()
			passed := time.Since(d.At.Time())
			if want := d.ResetAfter + driver.ExpirySlack; ttl > want+10*time.Millisecond || ttl < want-passed-10*time.Millisecond {
				t.Errorf("%s, %s: got a lifetime of %v, %v after the decision; want %v from the decision", name, key, ttl, passed, want)
			}
		}
	}
}
