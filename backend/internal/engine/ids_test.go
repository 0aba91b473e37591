package engine

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Charges and lists with request ids wait for a call as others do, and go together. In a batch a request id is as much work as a
// charge.
func TestGatherIDs(t *testing.T) {
	for name, charges := range map[string]int{"charges": 1, "lists": 3} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				g := newGathering(t, false, Options{})
				ids := 0
				var mu sync.Mutex
				var errs []error
				begin := func(n int) {
					for range n {
						ids++
						cs := make([]quota.Charge, charges)
						for i := range cs {
							cs[i] = quota.Charge{Limit: g.limit, Key: fmt.Sprint("k", ids, "/", i), Cost: 1, ID: fmt.Sprint("id", ids)}
						}
						g.wg.Go(func() {
							out := make([]quota.Decision, charges)
							err := g.store.ChargeAll(bg, cs, out)
							if err == nil && (!quota.Granted(out) || out[0].Remaining != 9) {
								err = fmt.Errorf("got %v, want a grant with 9 remaining", out)
							}
							mu.Lock()
							defer mu.Unlock()
							errs = append(errs, err)
						})
						synctest.Wait()
					}
				}
				one, batch := charges+1, maxBatch/(charges+1)
				begin(maxInFlight)
				begin(batch + 3)
				g.keys(t, one, one, one, one)
				g.answer(0, nil)
				g.keys(t, one, one, one, one, batch*one)
				g.answer(1, nil)
				g.keys(t, one, one, one, one, batch*one, 3*one)
				g.end()
				if err := errors.Join(errs...); err != nil || len(errs) != ids {
					t.Errorf("%d calls: got %d answers, errors %v; want none", ids, len(errs), err)
				}
			})
		})
	}
}

// The refund of charges that one slot granted, where another did not, does not wait for calls in flight.
func TestGiveBackDoesNotWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGathering(t, true, Options{})
		g.wg.Go(func() {
			cs := []quota.Charge{{Limit: g.limit, Key: "team/a", Cost: 1}, {Limit: g.limit, Key: "other", Cost: 1}}
			if err := g.store.ChargeAll(bg, cs, make([]quota.Decision, 2)); !errors.Is(err, quota.ErrUnavailable) {
				t.Errorf("a list of which one slot refused its part: got %v, want ErrUnavailable", err)
			}
		})
		synctest.Wait()
		g.fill("team/b", maxInFlight)
		for i := range 2 {
			refusal := ReplyError(errors.New("LOADING"))
			if g.calls[i].args[3] == "quota:{team}/a:n" {
				refusal = nil
			}
			g.answer(i, refusal)
		}
		// The grant's call ended, so that one of the four others was sent: then the refund.
		if last := g.calls[len(g.calls)-1]; len(g.calls) != 2+maxInFlight+1 || last.keys != 2 {
			t.Errorf("calls: got %d, the last with %d keys; want %d, and the refund with its id", len(g.calls), last.keys, 2+maxInFlight+1)
		}
		g.end()
	})
}

// named is a key with a limit.
type named struct {
	limit *quota.Limit
	key   string
}

// wantStates fails unless the server has the states of items, byte by byte.
func wantStates(t *testing.T, s *Store, client *redis.Client, items map[named]driver.Item) {
	t.Helper()
	for n, it := range items {
		c := quota.Charge{Limit: n.limit, Key: n.key}
		var to target
		s.locate(&to, &c)
		want := ""
		if !it.State.IsZero() {
			want = pack(&it)
		}
		if got, err := client.Get(bg, to.key).Result(); err != nil && err != redis.Nil || got != want {
			t.Errorf("state of%s:\n got %x, error %v\nwant %x", show([]quota.Charge{c}), got, err, want)
		}
	}
}

// idGrant is what a request id was granted to.
type idGrant struct {
	charges   []quota.Charge
	decisions []quota.Decision
	record    string
	lifetime  time.Duration
	at        time.Time // by the test's clock
}

// A batch with single charges, lists, and request ids of both is one call, in which each is decided as by Go, in order. An
// id that has a record, also one of the same batch, has its charges made once, and repeated faithfully; the id of other
// charges is an error of its own call alone. The records have the bytes and the lifetimes of calls that go alone.
func TestBatchOfIDs(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	calls := 0
	now := quota.Micros(1_795_427_141_791_724)
	s := quota.Must(New(sender(client, &calls), false, Options{Batching: BatchAll, Clock: func() time.Time { return time.UnixMicro(int64(now)) }}))
	rng := random(t)
	var limits []*quota.Limit
	for name, a := range rules() {
		limits = append(limits, limitOf(name, a))
	}
	held := limitOf("held", algorithm.Held(rules()["TokenBucket"], time.Minute))
	limits = append(limits, held)
	items := map[named]driver.Item{}
	known := map[string]idGrant{}
	var holds []quota.Charge // that may be finished
	charge := func() quota.Charge {
		c := quota.Charge{Limit: limits[rng.IntN(len(limits))], Key: fmt.Sprint("k", rng.IntN(4)), Cost: rng.Int64N(5), Op: quota.Op(rng.IntN(int(quota.OpAhead)))}
		switch rng.IntN(6) {
		case 0:
			c.Op, c.Least = quota.OpUpTo, rng.Int64N(c.Cost+1)
		case 1:
			c.Limit, c.Op = held, quota.OpHold
		case 2:
			if len(holds) > 0 {
				c = holds[rng.IntN(len(holds))]
			}
		}
		switch c.Op {
		case quota.OpRefund:
			c.MadeAt = now - quota.Micros(rng.Int64N(1_000_000))
		case quota.OpReset:
			c.Cost = 0
		}
		c.Shadow = c.Op <= quota.OpPeek && rng.IntN(4) == 0
		if (c.Op <= quota.OpPeek || c.Op == quota.OpUpTo) && rng.IntN(3) == 0 {
			c.Floor, c.FloorOf = rng.Int64N(5), uint32(5*rng.IntN(2))
		}
		return c
	}
	kinds := map[string]int{} // of the calls with an id
	var earlier [][]quota.Charge
	for range 2_000 {
		now += quota.Micros(rng.Int64N(2_000_000))
		batch := make([][]quota.Charge, 1+rng.IntN(12))
		for i := range batch {
			switch rng.IntN(8) {
			case 0:
				if len(earlier) > 0 {
					batch[i] = earlier[rng.IntN(len(earlier))]
					continue
				}
			case 1, 2:
				if i > 0 {
					batch[i] = batch[rng.IntN(i)]
					continue
				}
			}
			id := ""
			if rng.IntN(3) > 0 {
				id = fmt.Sprint("id", rng.IntN(4*len(known)+20))
			}
			for len(batch[i]) == 0 || rng.IntN(2) == 0 {
				c := charge()
				c.ID = id
				if !slices.ContainsFunc(batch[i], func(d quota.Charge) bool { return d.Limit == c.Limit && d.Key == c.Key }) {
					batch[i] = append(batch[i], c)
				}
			}
		}
		calls = 0
		got, errs := Together(bg, s, batch)
		if calls != 1 {
			t.Fatalf("calls for %d requests: got %d, want 1", len(batch), calls)
		}
		earlier = append(earlier[max(0, len(earlier)-500):], batch...)
		var recorded []string
		for _, lists := range []bool{false, true} {
			for i, cs := range batch {
				id := cs[0].ID
				if (len(cs) > 1 || id != "") != lists {
					continue
				}
				its, want, key, kind := make([]driver.Item, len(cs)), make([]quota.Decision, len(cs)), s.idKey(&cs[0]), "granted"
				for j, c := range cs {
					its[j] = items[named{c.Limit, c.Key}]
				}
				before := slices.Clone(its)
				if g, found := known[key]; id != "" && found {
					if kind = "repeated"; slices.Contains(recorded, key) {
						kind = "repeated in the batch"
					}
					copy(want, g.decisions)
					for j := range want {
						want[j].Replayed = true
					}
					if !slices.EqualFunc(cs, g.charges, driver.SameCharge) {
						kinds["of other charges"]++
						if !errors.Is(errs[i], quota.ErrInvalid) {
							t.Fatalf("request %d of %d:%s\n got %v, error %v\nwant ErrInvalid", i, len(batch), show(cs), got[i], errs[i])
						}
						continue
					}
				} else if err := driver.Apply(cs, its, now, want); err != nil {
					t.Fatal(err)
				} else if !quota.Granted(want) {
					kind = "denied"
				} else if id != "" && !driver.OnlyPeeks(cs) {
					known[key] = idGrant{cs, want, recordOf(cs, before, want, now), driver.IDLifetime(cs, now), time.Now()}
					recorded = append(recorded, key)
				}
				if id != "" {
					kinds[kind]++
				}
				if errs[i] != nil || !slices.Equal(got[i], want) {
					t.Fatalf("request %d of %d:%s\n got %v, error %v\nwant %v", i, len(batch), show(cs), got[i], errs[i], want)
				}
				for j, c := range cs {
					items[named{c.Limit, c.Key}] = its[j]
					if d := want[j]; c.Op == quota.OpHold && quota.Granted(want) && d.Held > 0 && !d.Replayed {
						c.ID = ""
						holds = append(holds[max(0, len(holds)-7):], c.Settle(d, rng.Int64N(5)), c.Renew(d))
					}
				}
			}
		}
		for _, key := range recorded {
			g := known[key]
			if got := client.Get(bg, key).Val(); got != g.record {
				t.Fatalf("record of%s:\n got %x\nwant %x", show(g.charges), got, g.record)
			}
			passed := time.Since(g.at)
			if ttl := client.PTTL(bg, key).Val(); ttl > g.lifetime+2*time.Millisecond || ttl < g.lifetime-passed-time.Second {
				t.Errorf("lifetime of the record of%s: got %v, want %v", show(g.charges), ttl, g.lifetime)
			}
		}
	}
	for _, kind := range []string{"granted", "denied", "repeated", "repeated in the batch", "of other charges"} {
		if kinds[kind] < 20 {
			t.Errorf("calls with an id, %s: got %d, want 20 or more for the test to tell", kind, kinds[kind])
		}
	}
	wantStates(t, s, client, items)
}

// recordOf returns the record of a grant, byte by byte as grant.go describes it.
func recordOf(cs []quota.Charge, its []driver.Item, ds []quota.Decision, now quota.Micros) string {
	b := appendNumber([]byte(recordHead(cs)), int64(now))
	for i := range its {
		state := ""
		if !its[i].State.IsZero() {
			state = pack(&its[i])
		}
		b = append(appendNumber(b, int64(len(state))), state...)
	}
	for i, d := range ds {
		if !marked(cs) {
			break
		}
		mark := int64(2)
		switch {
		case d.Shadow && !d.Allowed:
			mark = 1
		case cs[i].Op == quota.OpUpTo:
			mark += d.Charged
		case cs[i].Op == quota.OpHold || cs[i].Op == quota.OpRenew:
			mark += int64(d.Until)
		}
		b = appendNumber(b, mark)
	}
	return string(b)
}

// A batch whose reply was lost is charged once, however often it is repeated, and each call of it gets its answer.
func TestBatchOfIDsIsLost(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	calls, lose := 0, true
	send := sender(client, &calls)
	s := newStore(t, false, func(args []any, keys int) (Reply, error) {
		if r, err := send(args, keys); err != nil || !lose {
			return r, err
		}
		return nil, TransportError(io.EOF)
	})
	limit, other := limitOf("n", window(100)), limitOf("o", window(100))
	batch := [][]quota.Charge{
		{{Limit: limit, Key: "k", Cost: 1, ID: "a"}},
		{{Limit: limit, Key: "k", Cost: 2, ID: "b"}, {Limit: other, Key: "k", Cost: 3, ID: "b"}},
		{{Limit: limit, Key: "k", Cost: 1, ID: "a"}},
		{{Limit: limit, Key: "k", Cost: 5, ID: "a"}},
		{{Limit: limit, Key: "k/l", Cost: 7, ID: "c"}},
	}
	_, errs := Together(bg, s, batch)
	for i, err := range errs {
		if !errors.Is(err, quota.ErrIndeterminate) {
			t.Errorf("call %d, whose reply was lost: got %v, want ErrIndeterminate", i, err)
		}
	}
	lose = false
	for range 2 {
		ds, errs := Together(bg, s, batch)
		for i, want := range []int64{99, 97, 99, 0, 93} {
			if i == 3 {
				if !errors.Is(errs[i], quota.ErrInvalid) {
					t.Errorf("call %d, of other charges: got %v, %v, want ErrInvalid", i, ds[i], errs[i])
				}
			} else if d := ds[i][0]; errs[i] != nil || !d.Allowed || !d.Replayed || d.Remaining != want {
				t.Errorf("call %d, repeated: got %v, %v, want the grant that left %d", i, d, errs[i], want)
			}
		}
	}
	for _, left := range []struct {
		limit *quota.Limit
		key   string
		want  int64
	}{{limit, "k", 97}, {other, "k", 97}, {limit, "k/l", 93}} {
		d, err := s.Charge(bg, quota.Charge{Limit: left.limit, Key: left.key, Op: quota.OpPeek})
		if err != nil || d.Remaining != left.want {
			t.Errorf("%s, %s: got %d remaining, error %v; want %d", left.limit.Name(), left.key, d.Remaining, err, left.want)
		}
	}
}

// A key that holds no string where the record of a request id should be is an error of the calls with that id alone.
func TestRecordOfAnotherType(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	s := newStore(t, false, sender(client, new(int)))
	charge := func(id string) []quota.Charge {
		return []quota.Charge{{Limit: limitOf("n", window(10)), Key: "k", Cost: 1, ID: id}}
	}
	client.LPush(bg, s.idKey(&charge("list")[0]), 1)
	client.Set(bg, s.idKey(&charge("text")[0]), "no record", 0)
	ds, errs := Together(bg, s, [][]quota.Charge{charge("list"), charge("a"), charge("list"), charge("text"), charge("")})
	for i, want := range []error{quota.ErrMisconfigured, nil, quota.ErrMisconfigured, quota.ErrInvalid, nil} {
		if !errors.Is(errs[i], want) || want == nil && !ds[i][0].Allowed || quota.Charged(errs[i]) == quota.ChargeUnknown {
			t.Errorf("call %d: got %v, error %v, want %v", i, ds[i], errs[i], want)
		}
	}
}
