package lease

import (
	"context"
	"errors"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// slow is a limit that hardly refills in a test: 6400 tokens, one a second.
var slow = bucket(6400, 1, time.Second)

func one(n int64) quota.Charge { return quota.Charge{Limit: slow, Key: "team/agent", Cost: n} }

func op(o quota.Op, n int64) quota.Charge {
	c := one(n)
	c.Op = o
	return c
}

// above gives a charge a floor.
func above(c quota.Charge) quota.Charge {
	c.Floor = 100
	return c
}

// shadow makes a charge a shadow.
func shadow(c quota.Charge) quota.Charge {
	c.Shadow = true
	return c
}

// held returns the chunk that is leased for a charge's key, or nil.
func (s *Store) held(c quota.Charge) *chunk {
	if e := s.table.find(driver.Hash(s.seed, &c), &c); e != nil {
		return e.lease.Load()
	}
	return nil
}

func (s *Store) left(c quota.Charge) int64 {
	if k := s.held(c); k != nil {
		return k.left.Load()
	}
	return 0
}

// keys returns how many keys are in the table.
func (s *Store) keys() int {
	s.table.mu.Lock()
	defer s.table.mu.Unlock()
	return s.table.live
}

// warm takes tokens one by one until more than n are leased, and returns how many it took.
func warm(t *testing.T, s *Store, c quota.Charge, n int64) (took int64) {
	t.Helper()
	c.Cost = 1
	for s.left(c) <= n {
		if d := take(t, s, c); !d.Allowed || took > 1e6 {
			t.Fatalf("leased after %d takes: got %d, want more than %d; the last take got %+v", took, s.left(c), n, d)
		}
		took++
	}
	return took
}

func wantErr(t testing.TB, err, want error, parts ...string) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Fatalf("error: got %v, want %v", err, want)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error: got %q, want it to say %q", err, p)
		}
	}
}

func TestNewRefuses(t *testing.T) {
	s := local.New()
	two := instances(2)
	window := quota.NewLimit("daily", algorithm.FixedWindow(10, time.Hour))
	for name, bad := range map[string]struct {
		store quota.Store
		o     *Options
		names []string
	}{
		"no store":        {nil, &Options{Instances: two}, []string{"store is nil"}},
		"no options":      {s, nil, []string{"Options.Instances", "nil"}},
		"short lifetime":  {s, &Options{Instances: two, Lifetime: time.Microsecond}, []string{"Options.Lifetime", "1µs", "1ms to 1h"}},
		"long lifetime":   {s, &Options{Instances: two, Lifetime: 2 * time.Hour}, []string{"Options.Lifetime", "2h", "1ms to 1h"}},
		"negative":        {s, &Options{Instances: two, Lifetime: -1}, []string{"Options.Lifetime", "-1ns"}},
		"negative keys":   {s, &Options{Instances: two, MaxKeys: -1}, []string{"Options.MaxKeys", "-1"}},
		"too many keys":   {s, &Options{Instances: two, MaxKeys: 1<<30 + 1}, []string{"Options.MaxKeys", "2^30"}},
		"a window":        {s, &Options{Instances: two, Limits: []*quota.Limit{slow, window}}, []string{`"daily"`, `"fw1"`, "token bucket", "worthless in the next"}},
		"a missing limit": {s, &Options{Instances: two, Limits: []*quota.Limit{nil}}, []string{"Options.Limits[0]", "nil"}},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := New(bad.store, bad.o)
			wantErr(t, err, quota.ErrInvalid, append(bad.names, "accepted: ")...)
		})
	}
}

// TestGrowth sees chunks double up to their bound while a key is busy, and only exact charges of a key that
// is not.
func TestGrowth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{Instances: instances(4)})
		for i := range 3000 {
			if d := take(t, s, one(1)); !d.Allowed || d.Charged != 1 || d.Capacity != 6400 {
				t.Fatalf("take %d: got %+v, want allowed, charged 1, limit 6400", i, d)
			}
		}
		var sizes []int64
		most := int64(6400)
		for _, c := range below.seen() {
			if c.Cost > most/part/4 {
				t.Errorf("chunk with %d left: got %d, want at most %d", most, c.Cost, most/part/4)
			}
			sizes, most = append(sizes, c.Cost), most-c.Cost
		}
		want := []int64{1, 1, 2, 4, 8, 16, 32, 64, 128}
		for i := range want {
			if sizes[i] != want[i] {
				t.Fatalf("charges: got %v, want %v first", sizes, want)
			}
		}
		for range 100 { // once in a while
			time.Sleep(time.Second)
			take(t, s, quota.Charge{Limit: slow, Key: "rare", Cost: 1})
		}
		for _, c := range below.seen() {
			if c.Key == "rare" && c.Cost != 1 {
				t.Fatalf("charge of a key that is charged once a second: got %d, want 1", c.Cost)
			}
		}
	})
}

// TestLargest leases the largest bucket with the largest number of instances, and with one.
func TestLargest(t *testing.T) {
	const most = 1<<52 - 1
	for _, n := range []int64{1, math.MaxInt64} {
		synctest.Test(t, func(t *testing.T) {
			below := newRemote(t)
			s := open(t, below, Options{Instances: instances(n)})
			c := quota.Charge{Limit: bucket(most, 20_000_000, time.Second), Key: "k", Cost: 1 << 46}
			total, leased := int64(0), false
			for {
				d := take(t, s, c)
				if !d.Allowed {
					break
				}
				if d.Charged != c.Cost || d.Remaining < 0 || d.Remaining > most-total-c.Cost {
					t.Fatalf("take: got %+v, want it charged %d, at most %d left", d, c.Cost, most-total-c.Cost)
				}
				total += c.Cost
				leased = leased || d.Source == quota.FromLease
			}
			if total <= most-2*c.Cost || leased != (n == 1) {
				t.Errorf("admitted with %d instances: got %d, out of a lease %v; want more than %d, out of a lease only with one instance",
					n, total, leased, most-2*c.Cost)
			}
			s.Close()
			if net := below.net(); net != total {
				t.Errorf("charged: got %d, want %d", net, total)
			}
		})
	}
}

// TestLastTokens has four processes use up a bucket: all of it is admitted, not one token more.
func TestLastTokens(t *testing.T) {
	for _, cost := range []int64{1, 7} {
		synctest.Test(t, func(t *testing.T) {
			below := newRemote(t)
			limit := bucket(6400, 1, time.Hour)
			var ss []*Store
			for range 4 {
				ss = append(ss, open(t, below, Options{Instances: instances(4)}))
			}
			total, fromLease := int64(0), 0
			for denied := 0; denied < len(ss); {
				denied = 0
				for _, s := range ss {
					d := take(t, s, quota.Charge{Limit: limit, Key: "k", Cost: cost})
					switch {
					case !d.Allowed:
						denied++
						if d.Source != quota.FromStore || d.RetryAfter <= 0 {
							t.Fatalf("denial: got %+v, want it from the store, with a time to wait", d)
						}
					case d.Source == quota.FromLease:
						fromLease++
						fallthrough
					default:
						total += cost
					}
				}
			}
			if total > 6400 || total <= 6400-4*cost {
				t.Errorf("admitted, %d at a time: got %d, want %d to 6400", cost, total, 6400-4*cost+1)
			}
			if fromLease < 400 {
				t.Errorf("decisions out of a lease: got %d, want 400 or more, else the test is void", fromLease)
			}
		})
	}
}

// TestLifetime spends a chunk until its time, counted from before the request, has passed.
func TestLifetime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		warm(t, s, one(1), 50)
		for s.left(one(1)) > 0 {
			take(t, s, one(1))
		}
		sent := time.Now()
		below.set(always(fault{before: 100 * time.Millisecond, after: 200 * time.Millisecond}))
		take(t, s, one(1))
		below.set(always(fault{refused: true}))
		for _, at := range []time.Duration{400, 500, 600, 700, 800, 900, 1000} { // always in use
			time.Sleep(time.Until(sent.Add(at*time.Millisecond - 1)))
			if d := take(t, s, one(1)); d.Source != quota.FromLease {
				t.Fatalf("take 1 ns before %d ms: got %+v, want it from the lease", at, d)
			}
		}
		if s.left(one(1)) < 10 {
			t.Fatalf("left in the lease: got %d, want 10 or more, else the test is void", s.left(one(1)))
		}
		time.Sleep(time.Nanosecond)
		for _, o := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit} {
			if d, err := s.Charge(bg, op(o, 1)); err == nil {
				t.Errorf("%s 1 s after the request was sent: got %+v, want an error", o, d)
			}
		}
	})
}

// TestLate lets chunks come when half a lifetime has passed, or a whole one: they are not leased, and go
// back.
func TestLate(t *testing.T) {
	for _, deaf := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			below := newRemote(t)
			s := open(t, below, Options{})
			warm(t, s, one(1), 50)
			for s.left(one(1)) > 0 {
				take(t, s, one(1))
			}
			before := below.net()
			below.set(always(fault{after: 1100 * time.Millisecond, deaf: deaf}))
			start := time.Now()
			_, err := s.Charge(bg, one(1))
			if !deaf {
				wantErr(t, err, quota.ErrIndeterminate)
				if took := time.Since(start); took != 500*time.Millisecond {
					t.Errorf("time of the call: got %v, want half a lifetime", took)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if k := s.held(one(1)); k != nil {
				t.Errorf("lease of a chunk that came after its lifetime: got %d tokens, want none", k.left.Load())
			}
			below.set(nil)
			time.Sleep(2 * time.Second)
			if net := below.net(); net > before+4 { // the call's token, and the refill meanwhile
				t.Errorf("charged: got %d more, want 4 at most", net-before)
			}
		})
	}
}

// TestIdle gives back an idle lease, less the refill since its charge where the bucket is nearly full.
func TestIdle(t *testing.T) {
	for name, test := range map[string]struct {
		used, lost int64 // tokens of the bucket used beforehand; tokens of the lease lost at most
	}{
		"far from full": {4000, 0},
		"nearly full":   {0, 3},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				s := open(t, below, Options{})
				if test.used > 0 {
					take(t, s, one(test.used))
				}
				took := test.used + warm(t, s, one(1), 100)
				time.Sleep(510 * time.Millisecond)
				synctest.Wait()
				if n := s.left(one(1)); n != 0 {
					t.Errorf("leased after half a second without use: got %d, want 0", n)
				}
				if lost := below.net() - took; lost < 0 || lost > test.lost {
					t.Errorf("charged and not given back: got %d, want 0 to %d", lost, test.lost)
				}
				time.Sleep(time.Second)
				if s.keys() != 0 {
					t.Errorf("keys after two seconds without use: got %d, want 0", s.keys())
				}
				if d := take(t, s, one(1)); !d.Allowed {
					t.Errorf("take after that: got %+v, want it allowed", d)
				}
			})
		})
	}
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		took := int64(4000)
		take(t, s, one(took))
		took += warm(t, s, one(1), 100)
		other := one(1)
		other.Key = "other"
		other.Limit = bucket(6400, 1, time.Second)
		take(t, s, quota.Charge{Limit: other.Limit, Key: other.Key, Cost: 4000})
		took += 4000 + warm(t, s, other, 100)
		below.seen()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if net := below.net(); net != took {
			t.Errorf("charged after Close: got %d, want the %d taken", net, took)
		}
		if below.closed != 1 {
			t.Errorf("Close of the store below: got %d calls, want 1", below.closed)
		}
		if err := s.Close(); err != nil || below.closed != 1 {
			t.Errorf("second Close: got %v, with %d calls below; want nil, with 1 call", err, below.closed)
		}
		calls := len(below.seen())
		// A charge that came before Close may want a chunk only now.
		c := one(1)
		if _, err := s.ask(bg, &c, driver.Hash(s.seed, &c), s.table.find(driver.Hash(s.seed, &c), &c)); !errors.Is(err, quota.ErrClosed) {
			t.Errorf("request for a chunk after Close: got %v, want ErrClosed", err)
		}
		for _, o := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset, quota.OpAhead} {
			_, err := s.Charge(bg, op(o, 1))
			wantErr(t, err, quota.ErrClosed)
			wantErr(t, s.ChargeAll(bg, []quota.Charge{op(o, 1), other}, make([]quota.Decision, 2)), quota.ErrClosed)
		}
		if n := len(below.seen()); n > 0 || calls != 2 {
			t.Errorf("requests: got %d during Close and %d after it, want 2 and 0", calls, n)
		}
	})
}

// TestCloseDuringRequests closes while a request is in flight: its chunk goes back, in time or with an error.
func TestCloseDuringRequests(t *testing.T) {
	for _, slow := range []time.Duration{200 * time.Millisecond, 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			below := newRemote(t)
			s := open(t, below, Options{})
			take(t, s, one(4000))
			took := 4000 + warm(t, s, one(1), 50)
			for ; s.left(one(1)) > 0; took++ {
				take(t, s, one(1))
			}
			below.set(func(c *quota.Charge) fault {
				if c.Op == quota.OpRefund {
					return fault{}
				}
				return fault{after: slow, deaf: true}
			})
			answered := make(chan error)
			go func() {
				ctx, cancel := context.WithTimeout(bg, time.Second)
				defer cancel()
				d, err := s.Charge(ctx, one(1))
				if err == nil && d.Allowed {
					took++
				}
				answered <- err
			}()
			time.Sleep(100 * time.Millisecond)
			start := time.Now()
			err := s.Close()
			if in := time.Since(start); in > 500*time.Millisecond {
				t.Errorf("time of Close: got %v, want 500ms at most", in)
			}
			if late := slow > time.Second; late != (err != nil) {
				t.Errorf("Close, with a request that is late %v: got %v, want an error only if late", late, err)
			}
			<-answered
			time.Sleep(4 * time.Second)
			if net := below.net(); net < took || net > took+8 {
				t.Errorf("charged in the end: got %d, want %d to %d", net, took, took+8)
			}
		})
	}
}

func TestContexts(t *testing.T) {
	ended, cancel := context.WithCancel(bg)
	cancel()
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		warm(t, s, one(1), 50)
		if _, err := s.Charge(ended, one(1)); err != context.Canceled {
			t.Errorf("take with an ended context: got %v, want context.Canceled", err)
		}
		for s.left(one(1)) > 0 {
			take(t, s, one(1))
		}
		before := below.net()
		below.seen()
		below.set(always(fault{before: 100 * time.Millisecond, after: 100 * time.Millisecond}))
		// The contexts of the first caller, which sends the request, and of the third end. The second and
		// fourth caller get their tokens.
		errs := make([]error, 4)
		took := make([]time.Duration, 4)
		start := time.Now()
		done := make(chan int)
		for i := range errs {
			ctx, cancel := bg, func() {}
			if i%2 == 0 {
				ctx, cancel = context.WithTimeout(bg, 50*time.Millisecond)
			}
			go func() {
				defer cancel()
				d, err := s.Charge(ctx, one(1))
				if err == nil && d.Source != quota.FromLease {
					t.Errorf("call %d: got %+v, want it from the lease", i, d)
				}
				errs[i], took[i] = err, time.Since(start)
				done <- i
			}()
			synctest.Wait()
		}
		for range errs {
			<-done
		}
		for i, want := range []error{context.DeadlineExceeded, nil, context.DeadlineExceeded, nil} {
			if errs[i] != want {
				t.Errorf("call %d: got %v, want %v", i, errs[i], want)
			}
		}
		if took[0] != 50*time.Millisecond || took[1] != 200*time.Millisecond {
			t.Errorf("times of the calls: got %v, want 50ms and 200ms first", took)
		}
		if n := len(below.seen()); n != 1 {
			t.Errorf("requests: got %d, want 1", n)
		}
		if spent := below.net() - before - s.left(one(1)); spent != 2 {
			t.Errorf("spent: got %d, want 2", spent)
		}
	})
}

// TestErrors has the store below fail: callers that wait for one request share its error, and leased tokens
// are spent.
func TestErrors(t *testing.T) {
	for name, f := range map[string]fault{"refused": {refused: true, before: time.Millisecond}, "lost reply": {lost: true}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				s := open(t, below, Options{})
				took := warm(t, s, one(1), 50)
				below.set(always(f))
				for ; s.left(one(1)) > 0; took++ {
					take(t, s, one(1))
				}
				charged := below.net()
				if charged != took {
					t.Fatalf("charged: got %d, want the %d admitted", charged, took)
				}
				f.before = 10 * time.Millisecond
				f.refused = false
				below.set(always(f))
				if name == "refused" {
					below.set(func(*quota.Charge) fault { return fault{refused: true} })
				}
				below.seen()
				errs := make(chan error)
				for range 5 {
					go func() {
						_, err := s.Charge(bg, one(1))
						errs <- err
					}()
				}
				trips := map[any]bool{}
				for range 5 {
					err := <-errs
					want := quota.ErrUnavailable
					if f.lost {
						want = quota.ErrIndeterminate
					}
					wantErr(t, err, want)
					var shared interface{ RoundTrip() any }
					if !errors.As(err, &shared) {
						t.Fatalf("error: got %v, want one with a RoundTrip", err)
					}
					trips[shared.RoundTrip()] = true
				}
				if n := len(below.seen()); n != len(trips) {
					t.Errorf("round trips in the errors: got %d, want the %d requests", len(trips), n)
				}
				if f.lost && len(trips) != 1 {
					t.Errorf("round trips: got %d, want 1", len(trips))
				}
				if f.lost && below.net() <= charged {
					t.Errorf("charged by the lost reply: got %d, want more than 0, else the test is void", below.net()-charged)
				}
				below.set(nil)
				if s.left(one(1)) != 0 {
					t.Errorf("leased after a lost reply: got %d, want 0", s.left(one(1)))
				}
				if d := take(t, s, one(1)); !d.Allowed {
					t.Errorf("take when the store is back: got %+v, want it allowed", d)
				}
			})
		})
	}
}

// TestOperations checks which charges the lease decides and which the store, while 50 tokens or more are
// leased.
func TestOperations(t *testing.T) {
	id := one(1)
	id.ID = "x"
	for name, test := range map[string]struct {
		charge quota.Charge
		asks   int   // of the store below
		spends int64 // of the lease
	}{
		"take":             {one(3), 0, 3},
		"debit":            {op(quota.OpDebit, 3), 0, 3},
		"ahead":            {op(quota.OpAhead, 3), 0, 3},
		"large ahead":      {op(quota.OpAhead, 3000), 1, 0},
		"up to":            {op(quota.OpUpTo, 3), 0, 3},
		"up to a lot":      {op(quota.OpUpTo, 3000), 1, 0},
		"large debit":      {op(quota.OpDebit, 3000), 1, 0},
		"peek":             {op(quota.OpPeek, 3), 0, 0},
		"large peek":       {op(quota.OpPeek, 3000), 1, 0},
		"nothing":          {one(0), 1, 0},
		"peek for nothing": {op(quota.OpPeek, 0), 1, 0},
		"request id":       {id, 1, 0},
		"floor":            {above(one(3)), 1, 0},
		"shadow":           {shadow(one(3)), 1, 0},
		"peek above":       {above(op(quota.OpPeek, 3)), 1, 0},
		"foreign refund":   {op(quota.OpRefund, 3), 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				s := open(t, below, Options{})
				warm(t, s, one(1), 50)
				left := s.left(one(1))
				below.seen()
				d := take(t, s, test.charge)
				if !d.Allowed || (test.asks == 0) != (d.Source == quota.FromLease) {
					t.Errorf("decision: got %+v, want it allowed, from the lease %v", d, test.asks == 0)
				}
				if n := len(below.seen()); n != test.asks {
					t.Errorf("requests to the store below: got %d, want %d", n, test.asks)
				}
				if n := left - s.left(one(1)); n != test.spends {
					t.Errorf("spent of the lease: got %d, want %d", n, test.spends)
				}
				if test.asks == 0 && d.Remaining < s.left(one(1)) {
					t.Errorf("decision: got %+v, want at least the lease's %d remaining", d, s.left(one(1)))
				}
				if c := test.charge; (c.Op != quota.OpPeek && c.Op != quota.OpRefund) != (d.Charged == c.Cost && c.Cost > 0) && c.Cost > 0 {
					t.Errorf("decision on a %s: got %+v, want it charged %d unless it is a peek or refund", c.Op, d, c.Cost)
				}
			})
		})
	}
}

// TestLargeTake pays for a take with the whole lease and a charge of exactly the missing tokens.
func TestLargeTake(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		took := warm(t, s, one(1), 50)
		left := s.left(one(1))
		below.seen()
		all := one(6400 - took)
		all.Cost++
		d := take(t, s, all)
		if d.Allowed || d.Remaining != 6400-took || s.left(one(1)) != left {
			t.Fatalf("take of one token too many: got %+v, leased %d; want it denied, remaining %d, leased %d", d, s.left(one(1)), 6400-took, left)
		}
		below.set(always(fault{refused: true}))
		if _, err := s.Charge(bg, all); err == nil || s.left(one(1)) != left {
			t.Fatalf("take while the store refuses: got %v, leased %d; want an error, leased %d", err, s.left(one(1)), left)
		}
		below.set(nil)
		all.Cost--
		d = take(t, s, all)
		if !d.Allowed || d.Charged != all.Cost || d.Source != quota.FromLease || s.left(one(1)) != 0 {
			t.Fatalf("take of all tokens: got %+v, leased %d; want it allowed, charged %d from the lease, leased 0", d, s.left(one(1)), all.Cost)
		}
		if d = take(t, below, op(quota.OpPeek, 1)); d.Remaining != 0 {
			t.Errorf("remaining in the store: got %+v, want 0", d)
		}
		never := take(t, s, one(6401))
		if never.Allowed || never.RetryAfter != quota.Never {
			t.Errorf("take of more than the capacity: got %+v, want it denied for ever", never)
		}
	})
}

func TestRefund(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		warm(t, s, one(1), 50)
		d := take(t, s, one(20))
		left := s.left(one(1))
		below.seen()
		if r := take(t, s, one(20).Refund(d, 15)); r.Source != quota.FromLease || s.left(one(1)) != left+15 || r.Charged != -15 {
			t.Errorf("refund: got %+v, leased %d; want it from the lease, leased %d", r, s.left(one(1)), left+15)
		}
		if n := len(below.seen()); n > 0 {
			t.Errorf("requests to the store: got %d, want 0", n)
		}
		// More than the chunk lacks is the store's business.
		if r := take(t, s, one(20).Refund(d, 6400)); r.Source != quota.FromStore || s.left(one(1)) != left+15 {
			t.Errorf("refund of too many tokens: got %+v, leased %d; want it from the store, leased %d", r, s.left(one(1)), left+15)
		}
		// A receipt of another chunk goes to the store.
		d = take(t, s, one(1))
		for k := s.held(one(1)); s.held(one(1)) == k; {
			time.Sleep(time.Microsecond)
			take(t, s, one(1))
		}
		left = s.left(one(1))
		below.seen()
		if r := take(t, s, one(1).Refund(d, 1)); r.Source != quota.FromStore || s.left(one(1)) != left {
			t.Errorf("refund to another chunk: got %+v, leased %d; want it from the store, leased %d", r, s.left(one(1)), left)
		}
		if calls := below.seen(); len(calls) != 1 || calls[0].Op != quota.OpRefund || calls[0].MadeAt != d.At {
			t.Errorf("requests to the store: got %+v, want one refund at %d", calls, d.At)
		}
	})
}

func TestReset(t *testing.T) {
	for name, reset := range map[string]func(s *Store) error{
		"single": func(s *Store) error { _, err := s.Charge(bg, op(quota.OpReset, 0)); return err },
		"list": func(s *Store) error {
			return s.ChargeAll(bg, []quota.Charge{{Limit: slow, Key: "other"}, op(quota.OpReset, 0)}, make([]quota.Decision, 2))
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				below := newRemote(t)
				s := open(t, below, Options{})
				warm(t, s, one(1), 50)
				if err := reset(s); err != nil {
					t.Fatal(err)
				}
				if n := s.left(one(1)); n != 0 {
					t.Errorf("leased after a reset: got %d, want 0", n)
				}
				total := int64(0)
				for take(t, s, one(1)).Allowed {
					total++
				}
				if total != 6400 {
					t.Errorf("admitted after the reset: got %d, want 6400", total)
				}
			})
		})
	}
}

// TestLists has lists decided by the store, which gets the leases back where it would deny.
func TestLists(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		take(t, s, one(4000))
		took := 4000 + warm(t, s, one(1), 50)
		left := s.left(one(1))
		other := quota.Charge{Limit: slow, Key: "other", Cost: 1}
		out := make([]quota.Decision, 2)
		below.seen()
		if err := s.ChargeAll(bg, []quota.Charge{one(5), other}, out); err != nil || !quota.Granted(out) || out[0].Source != quota.FromStore {
			t.Fatalf("list: got %v, %+v; want it granted by the store", err, out)
		}
		took += 5
		if n := len(below.seen()); n != 2 || s.left(one(1)) != left {
			t.Errorf("got %d charges at the store, leased %d; want 2, leased %d", n, s.left(one(1)), left)
		}
		if err := s.ChargeAll(bg, []quota.Charge{one(6400 - took), other}, out); err != nil || !quota.Granted(out) {
			t.Fatalf("list of all tokens: got %v, %+v; want it granted", err, out)
		}
		if s.left(one(1)) != 0 {
			t.Errorf("leased: got %d, want 0", s.left(one(1)))
		}
		if err := s.ChargeAll(bg, []quota.Charge{one(1), other}, out); err != nil || quota.Granted(out) || out[0].Allowed || !out[1].Allowed {
			t.Fatalf("list of one token too many: got %v, %+v; want only the second charge allowed", err, out)
		}
	})
}

// TestOtherLimits leases the limits of Options, and passes charges to other limits on.
func TestOtherLimits(t *testing.T) {
	window := quota.NewLimit("window", algorithm.FixedWindow(6400, time.Hour))
	other := quota.NewLimit("other", slow.Algorithm())
	for name, test := range map[string]struct {
		limits []*quota.Limit
		charge *quota.Limit
		leased bool
	}{
		"any":           {nil, other, true},
		"a window":      {nil, window, false},
		"the one named": {[]*quota.Limit{other}, other, true},
		"another":       {[]*quota.Limit{slow}, other, false},
		"none":          {[]*quota.Limit{}, other, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := open(t, newRemote(t), Options{Limits: test.limits})
				leased := false
				for range 100 {
					leased = take(t, s, quota.Charge{Limit: test.charge, Key: "k", Cost: 1}).Source == quota.FromLease || leased
				}
				if leased != test.leased {
					t.Errorf("leased: got %v, want %v", leased, test.leased)
				}
			})
		})
	}
}

// TestHolds passes holds on to the store below, with their renewals and spends, also where the key has a lease of the limit as it was
// without holds; and it leases no tokens of a limit with holds.
func TestHolds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		warm(t, s, one(1), 50)
		for _, l := range []*quota.Limit{quota.NewLimit(slow.Name(), algorithm.Held(slow.Algorithm(), time.Minute)), quota.NewLimit("slots", algorithm.Concurrency(100, time.Minute))} {
			of := quota.Charge{Limit: l, Key: "team/agent"}
			want := func(c quota.Charge, more int64) quota.Decision {
				t.Helper()
				peek := of
				peek.Op = quota.OpPeek
				before := take(t, s, peek).Remaining
				d := take(t, s, c)
				if left := take(t, s, peek).Remaining; !d.Allowed || d.Source != quota.FromStore || left != before+more {
					t.Errorf("%v of %v: got %v, and %d left; want the store's, and %d", c.Op, l, d, left, before+more)
				}
				return d
			}
			hold := of
			hold.Op, hold.Cost = quota.OpHold, 10
			d := want(hold, -10)
			d = want(hold.Renew(d), 0)
			want(hold.Settle(d, 0), 10)
			for range 100 {
				hold.Op, hold.Cost = quota.OpTake, 1
				want(hold, -1)
				time.Sleep(time.Microsecond)
			}
		}
	})
}

// TestChangedLimit does not pay for a charge under new numbers with a lease under the old ones.
func TestChangedLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, newRemote(t), Options{})
		warm(t, s, one(1), 50)
		same := one(1)
		same.Limit = bucket(6400, 1, time.Second)
		if d := take(t, s, same); d.Source != quota.FromLease {
			t.Errorf("take under an equal limit: got %+v, want it from the lease", d)
		}
		small := one(20)
		small.Limit = bucket(10, 1, time.Second)
		if d := take(t, s, small); d.Allowed || d.RetryAfter != quota.Never {
			t.Errorf("take of more than the new capacity: got %+v, want it denied for ever", d)
		}
	})
}

// TestPolicyBelow does not lease a chunk that a policy below granted in the store's place, and refunds it
// there.
func TestPolicyBelow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, &disguise{below}, Options{})
		took := int64(0)
		for range 200 {
			if d := take(t, s, one(1)); !d.Allowed || d.Source != quota.FromOpen {
				t.Fatalf("take: got %+v, want it allowed, from %v", d, quota.FromOpen)
			}
			took++
			time.Sleep(time.Millisecond)
		}
		for _, c := range below.seen() {
			if c.Op == quota.OpRefund && c.From != quota.FromOpen {
				t.Fatalf("receipt of a refund: got one from %v, want %v", c.From, quota.FromOpen)
			}
		}
	})
}

// disguise says of every decision that it was made without the store.
type disguise struct{ *remote }

func (d *disguise) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	v, err := d.remote.Charge(ctx, c)
	v.Source = quota.FromOpen
	return v, err
}

func TestInstances(t *testing.T) {
	for n, want := range map[int64]int64{-3: 800, 0: 800, 1: 800, 2: 400, 100: 8, 1000: 1} {
		synctest.Test(t, func(t *testing.T) {
			below := newRemote(t)
			s := open(t, below, Options{Instances: instances(n)})
			limit := bucket(6400, 64_000_000, time.Second)
			for range 5000 {
				take(t, s, quota.Charge{Limit: limit, Key: "k", Cost: 1})
				time.Sleep(time.Microsecond)
			}
			most := int64(0)
			for _, c := range below.seen() {
				most = max(most, c.Cost)
			}
			if most > want || most < want*9/10 {
				t.Errorf("largest chunk with %d instances: got %d, want %d to %d", n, most, want*9/10, want)
			}
		})
	}
}

// TestMaxKeys charges more keys than MaxKeys.
func TestMaxKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{MaxKeys: 10})
		key := func(i int) quota.Charge {
			c := one(1)
			c.Key = strings.Repeat("k", i+1)
			return c
		}
		for i := range 10 {
			warm(t, s, key(i), 20)
		}
		for range 20 { // no room, but decided
			if d := take(t, s, key(10)); d.Source != quota.FromStore || !d.Allowed {
				t.Fatalf("take of a key without room: got %+v, want it allowed by the store", d)
			}
		}
		if s.keys() != 10 {
			t.Errorf("keys: got %d, want 10", s.keys())
		}
		time.Sleep(2 * time.Second)
		warm(t, s, key(10), 20)
		if s.keys() != 1 {
			t.Errorf("keys: got %d, want 1", s.keys())
		}
		// Keys that were charged once make room for others as soon as the keeper came by.
		for i := range 9 {
			take(t, s, key(i))
		}
		if s.keys() != 10 {
			t.Fatalf("keys: got %d, want 10", s.keys())
		}
		time.Sleep(260 * time.Millisecond)
		for i := range 9 {
			take(t, s, key(20+i))
			take(t, s, key(10))
		}
		added := 0
		for i := range 9 {
			c := key(20 + i)
			if s.table.find(driver.Hash(s.seed, &c), &c) != nil {
				added++
			}
		}
		if s.keys() > 10 || added < 5 {
			t.Errorf("keys: got %d, with %d new ones; want 10 at most, with 5 new ones or more", s.keys(), added)
		}
	})
}

func TestDeclared(t *testing.T) {
	s := open(t, graded{newRemote(t)}, Options{})
	if s.Atomicity() != driver.OneGroup || !s.Prompt() {
		t.Errorf("atomicity and prompt: got %v, %v; want %v, true", s.Atomicity(), s.Prompt(), driver.OneGroup)
	}
	s = open(t, plain{newRemote(t)}, Options{})
	if s.Atomicity() != driver.AnyKeys || s.Prompt() {
		t.Errorf("atomicity and prompt: got %v, %v; want %v, false", s.Atomicity(), s.Prompt(), driver.AnyKeys)
	}
	if _, ok := s.Unwrap().(plain); !ok {
		t.Errorf("Unwrap: got a %T, want the store below", s.Unwrap())
	}
}

type graded struct{ *remote }

func (graded) Atomicity() driver.Atomicity { return driver.OneGroup }

type plain struct{ quota.Store }

func TestNoAllocation(t *testing.T) {
	s := open(t, local.New(), Options{})
	c := quota.Charge{Limit: plenty, Key: "k", Cost: 1}
	for range 200_000 {
		take(t, s, c)
	}
	if n := testing.AllocsPerRun(1000, func() { s.Charge(bg, c) }); n > 0 {
		t.Errorf("allocations of a decision: got %v, want 0", n)
	}
}

func TestClosedChunk(t *testing.T) {
	k := &chunk{limit: slow, size: 10}
	k.left.Store(6)
	if n := k.close(); n != 6 {
		t.Errorf("close of a chunk: got %d tokens, want 6", n)
	}
	if n := k.close(); n != 0 {
		t.Errorf("second close: got %d tokens, want 0", n)
	}
	if _, ok := k.spend(1); ok || k.claim(1) != 0 {
		t.Error("spend of a closed chunk: got a token, want none")
	}
	if _, ok := k.put(1); ok {
		t.Error("put into a closed chunk: got true, want false")
	}
}

// TestRemovedEntry has a charge that found an entry before its removal use the entry that replaced it.
func TestRemovedEntry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := open(t, newRemote(t), Options{})
		c := one(1)
		take(t, s, c)
		old := s.table.find(driver.Hash(s.seed, &c), &c)
		time.Sleep(2 * time.Second)
		if s.table.find(driver.Hash(s.seed, &c), &c) != nil {
			t.Fatal("entry after two seconds without use: got one, want it removed")
		}
		for range 100 {
			if _, err := s.ask(bg, &c, driver.Hash(s.seed, &c), old); err != nil {
				t.Fatal(err)
			}
		}
		if old.lease.Load() != nil || s.held(c) == nil {
			t.Errorf("lease: got %v in the removed entry, %v in the table; want it in the table", old.lease.Load(), s.held(c))
		}
	})
}

// TestRefunding requests no chunk while one is given back, so that a process never holds more than two.
func TestRefunding(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, below, Options{})
		take(t, s, one(4000))
		warm(t, s, one(1), 50)
		below.set(func(c *quota.Charge) fault {
			if c.Op == quota.OpRefund {
				return fault{before: 90 * time.Millisecond}
			}
			return fault{}
		})
		for len(below.seen()) == 0 || s.held(one(1)) != nil { // until the give-back is in flight
			time.Sleep(time.Millisecond)
		}
		for range 50 {
			if d := take(t, s, one(1)); d.Source != quota.FromStore {
				t.Fatalf("take while a chunk is given back: got %+v, want it from the store", d)
			}
		}
		time.Sleep(100 * time.Millisecond)
		warm(t, s, one(1), 50)
	})
}

// TestNotSent: where a request was not sent in time, its callers get an error that was not charged.
func TestNotSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		below := newRemote(t)
		s := open(t, &stuck{remote: below}, Options{})
		warm(t, s, one(1), 50)
		for s.left(one(1)) > 0 {
			take(t, s, one(1))
		}
		s.inner.(*stuck).on.Store(true)
		_, err := s.Charge(bg, one(1))
		wantErr(t, err, quota.ErrUnavailable, "500ms")
	})
}

// stuck sends no request, and waits until the context ends.
type stuck struct {
	*remote
	on atomic.Bool
}

func (s *stuck) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	if s.on.Load() {
		<-ctx.Done()
		return quota.Decision{}, ctx.Err()
	}
	return s.remote.Charge(ctx, c)
}

// A limit that keeps no state is not leased, and its charges leave the lease that another rule of its name holds.
func TestBesideLimitsWithoutState(t *testing.T) {
	for _, rule := range []quota.Algorithm{algorithm.Unlimited, algorithm.DenyAll} {
		synctest.Test(t, func(t *testing.T) {
			plan := quota.NewLimit(slow.Name(), rule)
			s := open(t, newRemote(t), Options{Instances: instances(1), Limits: []*quota.Limit{slow, plan}})
			warm(t, s, one(1), 100)
			held := s.left(one(1))
			for _, c := range []quota.Charge{{Cost: 1 << 40}, {Cost: 0, Op: quota.OpPeek}, {Cost: 5, Op: quota.OpDebit}, {Op: quota.OpRefund}, {Op: quota.OpReset}} {
				c.Limit, c.Key = plan, one(1).Key
				if d := take(t, s, c); d.Allowed != (rule == algorithm.Unlimited || c.Op != quota.OpTake) || d.Source != quota.FromStore || d.Remaining != plan.Spec().Capacity {
					t.Errorf("%v by %v: got %+v, want the store's answer by this rule", c, plan, d)
				}
				list := []quota.Charge{c, {Limit: slow, Key: "team/other", Cost: 0}}
				if err := s.ChargeAll(t.Context(), list, make([]quota.Decision, 2)); err != nil {
					t.Errorf("list with %v: got %v, want decisions", c, err)
				}
			}
			// A denied list gives the leases of its denied keys back.
			if got := s.left(one(1)); got != held && rule == algorithm.Unlimited {
				t.Errorf("leased: got %d, want %d as before", got, held)
			}
		})
	}
}
