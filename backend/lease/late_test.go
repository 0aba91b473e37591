package lease

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// used opens a store, has it lease, and returns how many tokens were taken. The bucket is far from full, so that all of a
// lease can be given back.
func used(t *testing.T, below *remote) (s *Store, took int64) {
	s = open(t, below, Options{})
	take(t, s, one(2000))
	return s, 2000 + warm(t, s, one(1), 50)
}

// butRefunds returns a remote's faults: the same for every charge, and none for refunds.
func butRefunds(f fault) func(*quota.Charge) fault {
	return func(c *quota.Charge) fault {
		if c.Op == quota.OpRefund {
			return fault{}
		}
		return f
	}
}

// takes returns how many takes the remote saw since it was last asked.
func (r *remote) takes() (n int) {
	for _, c := range r.seen() {
		if c.Op == quota.OpTake {
			n++
		}
	}
	return n
}

// TestLateCombined has a take paid in part by the lease, whose end comes before the store's answer: the take is charged
// once, whatever the answer, and no token is lost.
func TestLateCombined(t *testing.T) {
	const late = 150 * time.Millisecond
	for name, test := range map[string]struct {
		fault   fault
		cost    int64 // 0: a few more than there are
		granted bool
		charged int64 // by the store and not given back, beside what was taken before
		err     error
		before  func(*Store) // the answer
	}{
		"granted":              {fault{after: late}, 2000, true, 2000, nil, nil},
		"asked late":           {fault{before: late}, 2000, true, 2000, nil, nil},
		"denied":               {fault{after: late}, 0, false, 0, nil, nil},
		"refused":              {fault{refused: true}, 2000, false, 0, quota.ErrUnavailable, nil},
		"the reply is lost":    {fault{after: late, lost: true}, 2000, false, 2000, quota.ErrIndeterminate, nil},
		"denied during Close":  {fault{after: late}, 0, false, 0, nil, func(s *Store) { s.Close() }},
		"granted during Close": {fault{after: late}, 2000, true, 2000, nil, func(s *Store) { s.Close() }},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				s, took := used(t, below)
				for range 9 { // in use until shortly before its end
					time.Sleep(100 * time.Millisecond)
					take(t, s, one(1))
					took++
				}
				if test.cost == 0 {
					test.cost = 6400 - took + 5
				}
				held := s.left(one(1))
				if held < 2 {
					t.Fatalf("leased: got %d, want 2 or more, else the test is void", held)
				}
				below.seen()
				below.set(butRefunds(test.fault))
				var closed sync.WaitGroup
				if test.before != nil {
					closed.Go(func() {
						time.Sleep(late / 2)
						test.before(s)
					})
				}
				d, err := s.Charge(bg, one(test.cost))
				if !errors.Is(err, test.err) {
					t.Errorf("error: got %v, want %v", err, test.err)
				}
				if d.Allowed != test.granted || d.Allowed && d.Charged != test.cost {
					t.Errorf("take of %d: got %+v; want allowed %v, charged all of it", test.cost, d, test.granted)
				}
				if asked := below.takes(); asked != 1 {
					t.Errorf("takes at the store: got %d, want 1", asked)
				}
				closed.Wait()
				time.Sleep(2 * time.Second)
				want := took + test.charged
				if errors.Is(test.err, quota.ErrIndeterminate) {
					want -= held // which the store did not charge for this take
				}
				if net := below.net(); net != want {
					t.Errorf("charged: got %d, want %d: %d taken before and %d", net, want, took, want-took)
				}
			})
		})
	}
	synctest.Test(t, func(t *testing.T) { // a chunk whose time is over does not pay
		below := newRemote(t)
		s := open(t, below, Options{})
		c := one(1000)
		warm(t, s, c, 50)
		over := &chunk{limit: slow, size: 10, until: s.now()}
		over.left.Store(10)
		s.table.find(driver.Hash(s.seed, &c), &c).lease.Store(over)
		below.seen()
		take(t, s, c)
		if calls := below.seen(); len(calls) != 1 || calls[0].Cost != 1000 {
			t.Errorf("requests to the store: got %+v, want one of 1000", calls)
		}
	})
}

// TestLateChunk has a chunk come when it can no longer be leased: it pays the caller that asked for it, whom no second
// request charges or denies, and the rest goes back.
func TestLateChunk(t *testing.T) {
	for name, test := range map[string]struct {
		fault  fault
		during func(*Store)
		source quota.Source
	}{
		"after its lifetime": {fault{after: 1100 * time.Millisecond, deaf: true}, func(*Store) {}, quota.FromStore},
		"during Close":       {fault{after: 200 * time.Millisecond}, func(s *Store) { s.Close() }, quota.FromStore},
		"of a policy below":  {fault{}, func(*Store) {}, quota.FromOpen},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				s, took := used(t, below)
				for s.left(one(1)) > 0 {
					take(t, s, one(1))
					took++
				}
				if test.source != quota.FromStore {
					s.inner = &disguise{below}
				}
				below.seen()
				below.set(butRefunds(test.fault))
				var wg sync.WaitGroup
				wg.Go(func() {
					time.Sleep(100 * time.Millisecond)
					test.during(s)
				})
				d, err := s.Charge(bg, one(1))
				if err != nil || !d.Allowed || d.Charged != 1 || d.Source != test.source {
					t.Errorf("take: got %+v, %v; want it allowed, charged 1, from %v", d, err, test.source)
				}
				wg.Wait()
				time.Sleep(2 * time.Second)
				if asked := below.takes(); asked != 1 {
					t.Errorf("takes at the store: got %d, want 1", asked)
				}
				if net := below.net(); net != took+1 {
					t.Errorf("charged: got %d, want %d", net, took+1)
				}
			})
		})
	}
}

// TestLateReset gives the lease back where the store did not reset the key, and never where it did or may have.
func TestLateReset(t *testing.T) {
	for name, test := range map[string]struct {
		fault fault
		back  bool
	}{
		"refused":           {fault{refused: true}, true},
		"carried out":       {fault{after: time.Second}, false},
		"the reply is lost": {fault{lost: true}, false},
	} {
		for _, list := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, in a list %v", name, list), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					below := newRemote(t)
					s, took := used(t, below)
					below.seen()
					below.set(butRefunds(test.fault))
					if list {
						s.ChargeAll(bg, []quota.Charge{{Limit: slow, Key: "other"}, op(quota.OpReset, 0)}, make([]quota.Decision, 2))
					} else {
						s.Charge(bg, op(quota.OpReset, 0))
					}
					time.Sleep(2 * time.Second)
					refunded := false
					for _, c := range below.seen() {
						refunded = refunded || c.Op == quota.OpRefund
					}
					if refunded != test.back {
						t.Errorf("the lease was given back: got %v, want %v", refunded, test.back)
					}
					if net := below.net(); test.back && net != took {
						t.Errorf("charged: got %d, want the %d taken", net, took)
					}
					below.set(nil)
					warm(t, s, one(1), 50) // the key is leased again
				})
			})
		}
	}
}

// TestCallerLeavesList gives all leases of a denied list back though its caller does not wait for that.
func TestCallerLeavesList(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		took := int64(4000)
		take(t, s, one(took))
		took += warm(t, s, one(1), 50)
		below.set(func(c *quota.Charge) fault {
			if c.Op == quota.OpRefund {
				return fault{before: 50 * time.Millisecond}
			}
			return fault{}
		})
		ctx, cancel := context.WithTimeout(bg, 10*time.Millisecond)
		defer cancel()
		err := s.ChargeAll(ctx, []quota.Charge{one(6400), {Limit: slow, Key: "other", Cost: 1}}, make([]quota.Decision, 2))
		if !errors.Is(err, context.DeadlineExceeded) || quota.Charged(err) != quota.NotCharged {
			t.Errorf("error: got %v, want the context's own", err)
		}
		time.Sleep(time.Second)
		if net := below.net(); net != took {
			t.Errorf("charged: got %d, want the %d taken", net, took)
		}
	})
}

// TestTotal runs instances whose store answers late, refuses, and loses replies, and balances the account: the tokens
// that the store charged and did not get back are those granted to callers, those of requests without a reply, and those
// of give-backs that failed. A caller whose own request had no reply is told.
func TestTotal(t *testing.T) {
	for range sized(40, 2000) {
		seed := seedOf(t)
		random := rand.New(rand.NewPCG(seed, 5))
		n := 1 + random.IntN(3)
		capacity := int64(10_000 << random.IntN(8))
		lifetime := 400 * time.Millisecond
		t.Run(fmt.Sprintf("%d instances, %d tokens, seed %d", n, capacity, seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				limit := bucket(capacity, 1, time.Minute)
				granted := capacity / 2 // far from full: all of a chunk can be given back
				take(t, below, quota.Charge{Limit: limit, Key: "k", Cost: granted})
				below.set(func(c *quota.Charge) fault { // called under the remote's lock
					f := fault{before: time.Duration(random.Int64N(int64(lifetime) / 50)), after: time.Duration(random.Int64N(int64(lifetime) / 50))}
					switch random.IntN(12) {
					case 0:
						f.refused = true
					case 1:
						f.lost = true
					case 2, 3:
						f.before *= 40
					case 4, 5:
						f.after *= 40
					case 6:
						f.after, f.deaf = f.after*60, true
					}
					if c.Op == quota.OpRefund {
						f.before, f.after = f.before/2, f.after/2
					}
					return f
				})
				var mu sync.Mutex
				one := func(s *Store, cost int64, patience time.Duration, back bool) {
					ctx, cancel := context.WithTimeout(bg, patience)
					defer cancel()
					k := &taker{}
					c := quota.Charge{Limit: limit, Key: "k", Cost: cost}
					d, err := s.Charge(context.WithValue(ctx, takerKey{}, k), c)
					if err == nil && d.Allowed {
						if d.Charged != cost {
							t.Errorf("take of %d: got %+v, want it charged", cost, d)
						}
						mu.Lock()
						granted += cost
						mu.Unlock()
						if !back {
							return
						}
						if r, err := s.Charge(context.WithValue(bg, takerKey{}, &taker{refunds: true}), c.Refund(d, cost/2)); err == nil {
							mu.Lock()
							granted -= cost / 2
							mu.Unlock()
							if r.Charged != -(cost / 2) {
								t.Errorf("refund of %d: got %+v, want all of it", cost/2, r)
							}
						}
						return
					}
					below.mu.Lock()
					defer below.mu.Unlock()
					if k.untold > 0 && !errors.Is(err, quota.ErrIndeterminate) && (ctx.Err() == nil || k.sent <= cost) {
						t.Errorf("take of %d, whose request was charged and had no reply: got %+v, %v; want ErrIndeterminate", cost, d, err)
					}
				}
				var wg sync.WaitGroup
				for i := range n {
					wg.Go(func() {
						s := open(t, below, Options{Instances: instances(int64(n)), Lifetime: lifetime})
						random := rand.New(rand.NewPCG(seed, uint64(10+i)))
						var takes sync.WaitGroup
						for range 200 {
							time.Sleep(time.Duration(random.Int64N(int64(10 * time.Millisecond))))
							cost, patience := 1+random.Int64N(4), time.Second
							switch random.IntN(30) {
							case 0:
								cost = 1 + random.Int64N(capacity/100)
							case 1:
								cost = capacity
							case 2:
								patience = 5 * time.Millisecond
							}
							takes.Go(func() { one(s, cost, patience, cost%2 == 0) })
						}
						if i%2 == 0 {
							takes.Wait()
						}
						s.Close()
						takes.Wait()
					})
				}
				wg.Wait()
				time.Sleep(time.Minute)
				below.mu.Lock()
				defer below.mu.Unlock()
				if want := granted + below.untold + below.kept; below.charged != want {
					t.Errorf("charged: got %d, want %d: %d granted, %d without a reply, %d not given back; %d differ",
						below.charged, want, granted, below.untold, below.kept, below.charged-want)
				}
			})
		})
	}
}
