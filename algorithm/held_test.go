package algorithm_test

import (
	"errors"
	"math/big"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// trial decides one request after another on one state.
type trial struct {
	s quota.State
	t *testing.T
}

func (x *trial) do(a quota.Algorithm, r quota.Request, now quota.Micros) quota.Verdict {
	next, v := a.Decide(x.s, r, now)
	if v.Write {
		x.s = next
	}
	return v
}

// want makes a request and compares what is allowed and remains.
func (x *trial) want(text string, a quota.Algorithm, r quota.Request, now quota.Micros, allowed bool, remaining int64) quota.Verdict {
	x.t.Helper()
	v := x.do(a, r, now)
	if v.Allowed != allowed || v.Remaining != remaining {
		x.t.Errorf("%s: got allowed %v, remaining %d; want %v, %d", text, v.Allowed, v.Remaining, allowed, remaining)
	}
	return v
}

func holdOf(n int64) quota.Request { return quota.Request{Op: quota.OpHold, Cost: n} }
func spendOf(cost, held int64, until quota.Micros) quota.Request {
	return quota.Request{Op: quota.OpSpend, Cost: cost, Floor: held, Arg: until}
}
func renewalOf(held int64, until quota.Micros) quota.Request {
	return quota.Request{Op: quota.OpRenew, Floor: held, Arg: until}
}

func lapseOf(a quota.Algorithm, now quota.Micros) quota.Micros {
	s := a.Spec()
	return s.Lapse(now)
}

// What a state of sums can tell and what it cannot, as the documentation of Held says: without a request id or a Limiter a hold that
// is ended or renewed twice is another's.
func TestHeldMisuse(t *testing.T) {
	a := algorithm.Held(algorithm.TokenBucket(10, 1, time.Hour), 16*time.Second)
	other := algorithm.Held(algorithm.TokenBucket(10, 1, time.Hour), 64*time.Second)
	const now = base + 1
	until := lapseOf(a, now)
	x := &trial{t: t}
	x.want("two holds of 5", a, holdOf(5), now, true, 5)
	x.want("two holds of 5", a, holdOf(5), now+1, true, 0)
	x.want("a third", a, holdOf(1), now+2, false, 0)
	x.want("a release", a, spendOf(0, 5, until), now+3, true, 5)
	x.want("a second release of the same hold, which ends the other", a, spendOf(0, 5, until), now+4, true, 10)

	x = &trial{t: t}
	x.want("a hold", a, holdOf(5), now, true, 5)
	x.want("a spend when it has lapsed", a, spendOf(3, 5, until), until, true, 7)
	x.want("the same again", a, spendOf(3, 5, until), until+1, true, 4)
	if v := x.want("a renewal when it has lapsed", a, renewalOf(5, until), until+2, false, 4); v.RetryAfter != quota.Forever {
		t.Errorf("a renewal when the hold has lapsed: got retry after %d, want never", v.RetryAfter)
	}

	// The receipt is the time of lapse, so it is good under another ttl, also of another process.
	x = &trial{t: t}
	x.want("a hold", a, holdOf(5), now, true, 5)
	x.want("a hold of another ttl", other, holdOf(2), now+1, true, 3)
	x.want("a release by the other ttl", other, spendOf(0, 5, until), now+2, true, 8)
	x.want("a renewal by the first ttl", a, renewalOf(2, lapseOf(other, now+1)), now+3, true, 8)
	x.want("what was renewed lapses by the first ttl", a, quota.Request{Op: quota.OpPeek}, lapseOf(a, now+3), true, 10)

	x = &trial{t: t}
	x.want("a hold", a, holdOf(5), now, true, 5)
	x.want("a reset drops holds", a, quota.Request{Op: quota.OpReset}, now+1, true, 10)
	x.want("a spend after a reset", a, spendOf(4, 5, until), now+2, true, 6)
}

// Holds of the clock's time before it was set back keep the time that they have left; a receipt of then finds none.
func TestHeldClockBack(t *testing.T) {
	a := algorithm.Held(algorithm.TokenBucket(10, 1, time.Hour), 16*time.Second)
	const now, back = base + 7, 100 * second
	until := lapseOf(a, now)
	x := &trial{t: t}
	x.want("a hold", a, holdOf(5), now, true, 5)
	x.want("a release when the clock was set back", a, spendOf(0, 5, until), now-back, true, 5)
	x.want("the last moment of the hold", a, quota.Request{Op: quota.OpPeek}, until-back-1, true, 5)
	x.want("its lapse", a, quota.Request{Op: quota.OpPeek}, until-back, true, 10)
	x.want("a renewal by the old receipt", a, renewalOf(5, until), now-back+1, false, 5)
	x.want("a second back or less changes nothing", a, spendOf(0, 5, until-back), now-back-second/2, true, 10)
}

// A limit of a rule becomes one of the rule with holds: its states are legal ones, and so are those without holds of the other.
func TestHeldTakesOver(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		plain := quota.Must(newRule(k, 10, 10, time.Minute)).Algorithm
		held := algorithm.Held(plain, time.Second)
		x := &trial{t: t}
		x.want("a take without holds", plain, quota.Request{Cost: 4}, base, true, 6)
		x.want("a hold on its state", held, holdOf(3), base+1, true, 3)
		x.want("a spend", held, spendOf(1, 3, lapseOf(held, base+1)), base+2, true, 5)
		if v := x.do(plain, quota.Request{Op: quota.OpPeek}, base+2); v.Remaining != 5 {
			t.Errorf("the state without holds, by the rule inside: got %d remaining, want 5", v.Remaining)
		}
		in, out := plain.Spec(), held.Spec()
		if out.Reads != in.Rule || out.Rule == in.Rule || out.Ahead || out.TTL != time.Second || out.Capacity != 10 {
			t.Errorf("spec: got %+v, want that of the rule inside, %+v, that reads its states", out, in)
		}
	})
}

// Of more than three ttls at once, those that lapse first do so with the next: no more tokens than are held come back early,
// and the state does not grow.
func TestHeldManyTTLs(t *testing.T) {
	x := &trial{t: t}
	rng := random(t)
	type one struct{ n, until int64 }
	var holds []one
	now := quota.Micros(base)
	for i := range 400 {
		a := algorithm.Held(algorithm.FixedWindow(1_000_000, time.Hour), time.Duration(1000+i%7*137)*time.Millisecond)
		now += quota.Micros(rng.Int64N(40_000))
		n := 1 + rng.Int64N(9)
		if v := x.do(a, holdOf(n), now); !v.Allowed {
			t.Fatalf("hold %d: got it denied, want it allowed", i)
		}
		holds = append(holds, one{n, int64(lapseOf(a, now))})
		least := int64(0)
		for _, h := range holds {
			if h.until > int64(now) {
				least += h.n
			}
		}
		if got := 1_000_000 - x.do(a, quota.Request{Op: quota.OpPeek}, now).Remaining; got < least {
			t.Fatalf("held after %d holds: got %d, want at least %d", i+1, got, least)
		}
		if len(x.s.Tail) > 2+2*63 {
			t.Fatalf("numbers of the tail: got %d, want %d at most", len(x.s.Tail), 2+2*63)
		}
	}
	last := int64(0)
	for _, h := range holds {
		last = max(last, h.until)
	}
	if v := x.do(algorithm.Held(algorithm.FixedWindow(1_000_000, time.Hour), time.Second), quota.Request{Op: quota.OpPeek}, quota.Micros(last)); v.Remaining != 1_000_000 {
		t.Errorf("when the last has lapsed: got %d remaining, want all", v.Remaining)
	}
}

func TestConcurrency(t *testing.T) {
	a := algorithm.Concurrency(2, time.Minute)
	const now = base + 5
	until := lapseOf(a, now)
	x := &trial{t: t}
	x.want("the first", a, holdOf(1), now, true, 1)
	x.want("a take is a hold", a, quota.Request{Cost: 1}, now+1, true, 0)
	if v := x.want("a third", a, holdOf(1), now+2, false, 0); v.RetryAfter != until-now-2 {
		t.Errorf("retry after: got %d, want the lapse of the first, %d", v.RetryAfter, until-now-2)
	}
	x.want("more than there are", a, holdOf(3), now+2, false, 0)
	x.want("a refund of the take", a, quota.Request{Op: quota.OpRefund, Cost: 1, Arg: now + 1}, now+3, true, 1)
	x.want("as many as there are", a, quota.Request{Op: quota.OpUpTo, Cost: 5, Arg: 1}, now+4, true, 0)
	x.want("a spend gives all back, whatever it costs", a, spendOf(7, 1, until), now+5, true, 1)
	x.want("a debit does not ask", a, quota.Request{Op: quota.OpDebit, Cost: 4}, now+6, true, -3)
	x.want("all lapse", a, quota.Request{Op: quota.OpPeek}, until+quota.Micros(time.Minute.Microseconds())/16, true, 2)

	sharer := a.(driver.OneSharer)
	if s, err := sharer.Share(4); err != nil || s.Spec().Capacity != 0 {
		t.Errorf("a share for one of 4: got %v, %v; want one of 0, or 2 would be 4", s, err)
	}
	if _, err := sharer.ShareAtLeastOne(4); !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), "accepted: as many tokens as instances") {
		t.Errorf("a share of one for each of 4: got %v, want ErrInvalid", err)
	}
	if s, err := sharer.ShareAtLeastOne(2); err != nil || s.Spec().Capacity != 1 {
		t.Errorf("a share for one of 2: got %v, %v; want one of 1", s, err)
	}
}

// foreign is a rule of another package.
type foreign struct {
	quota.Algorithm
	spec quota.Spec
}

func (f foreign) Spec() quota.Spec { return f.spec }

// Held is around any rule that leaves room, and no other.
func TestHeldRefuses(t *testing.T) {
	inner := algorithm.TokenBucket(10, 1, time.Second)
	alter := func(f func(s *quota.Spec)) quota.Algorithm {
		s := inner.Spec()
		f(&s)
		return foreign{inner, s}
	}
	for text, a := range map[string]quota.Algorithm{
		"rule tb1h has holds already": algorithm.Held(algorithm.Held(inner, time.Second), time.Second),
		"rule cc1 has holds already":  algorithm.Held(algorithm.Concurrency(1, time.Second), time.Second),
		"rule denyall keeps no state": algorithm.Held(algorithm.DenyAll, time.Second),
		"is nil":                      algorithm.Held(nil, time.Second),
		"name of 8 bytes":             algorithm.Held(alter(func(s *quota.Spec) { s.Rule = quota.Rule{'a', 'b', 'c', 'd', 'e', 'f', 'g', 'h'} }), time.Second),
		"in its eighth parameter":     algorithm.Held(alter(func(s *quota.Spec) { s.Params[7] = 1 }), time.Second),
		"ttl is 999µs":                algorithm.Held(inner, 999*time.Microsecond),
		"ttl is 1.0000001s":           algorithm.Held(inner, time.Second+100),
		"ttl is 87601h0m0s":           algorithm.Concurrency(1, 87601*time.Hour),
		"n is -1":                     algorithm.Concurrency(-1, time.Second),
		"capacity is -1":              algorithm.Held(algorithm.TokenBucket(-1, 1, time.Second), time.Second),
	} {
		err := quota.NewLimit("x", a).Err()
		if !errors.Is(err, quota.ErrInvalid) || !strings.Contains(err.Error(), text) {
			t.Errorf("got error %v, want ErrInvalid that says %q", err, text)
		}
	}
	a := algorithm.Held(alter(func(s *quota.Spec) { s.Rule = quota.Rule{'m', 'i', 'n', 'e'} }), time.Second)
	if err := quota.NewLimit("x", a).Err(); err != nil || a.Spec().Rule.String() != "mineh" {
		t.Errorf("around a rule of another package: got %v of %v, want the rule mineh", err, a.Spec())
	}
	if _, ok := a.(driver.Scripted); ok {
		t.Error("around a rule without Lua: got a driver.Scripted, want none")
	}
	if _, err := a.(driver.Sharer).Share(2); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("a share of a rule without shares: got %v, want ErrInvalid", err)
	}
}

// oneHold is a hold that knows its holder.
type oneHold struct {
	n, made, until int64
	open           bool
}

// heldOracle is a bucket with single holds, in rationals.
type heldOracle struct {
	capacity, refill, per, ttl int64
	level                      *big.Rat // tokens at the time last
	last                       int64
	holds                      []oneHold
}

func (o *heldOracle) at(t int64) *big.Rat {
	gained := new(big.Rat).Mul(big.NewRat(o.refill, o.per), big.NewRat(t-o.last, 1))
	level, full := gained.Add(gained, o.level), big.NewRat(o.capacity, 1)
	if level.Cmp(full) > 0 {
		return full
	}
	return level
}

// charge charges a cost at a time.
func (o *heldOracle) charge(t, cost int64) {
	o.level, o.last = o.at(t), t
	o.level.Sub(o.level, big.NewRat(cost, 1))
}

// held sums the holds that last beyond t where each ends at end.
func (o *heldOracle) held(t int64, end func(h *oneHold) int64) (n int64) {
	for i := range o.holds {
		if h := &o.holds[i]; h.open && end(h) > t {
			n += h.n
		}
	}
	return n
}

func untilOf(h *oneHold) int64 { return h.until }

// fits returns the earliest time from t on at which n tokens fit beside those that are held then, or -1.
func (o *heldOracle) fits(t, n int64) int64 {
	times := map[int64]bool{t: true}
	for _, h := range o.holds {
		if h.open && h.until > t {
			times[h.until] = true
		}
	}
	best := int64(-1)
	for from := range times {
		need := n + o.held(from, untilOf)
		if need > o.capacity {
			continue
		}
		wait := new(big.Rat).Quo(new(big.Rat).Sub(big.NewRat(need, 1), o.level), big.NewRat(o.refill, o.per)) // µs since last
		up := new(big.Int).Add(wait.Num(), new(big.Int).Sub(wait.Denom(), big.NewInt(1)))
		at := max(o.last+up.Div(up, wait.Denom()).Int64(), from)
		if best < 0 || at < best {
			best = at
		}
	}
	return best
}

// The sums of a state decide as single holds do: what fits, what remains, and when what does not fit will, to the microsecond. A hold
// lapses when its ttl has passed, a sixteenth of it later at most.
func TestHeldOracle(t *testing.T) {
	steps, denials, byLapse := 0, 0, 0
	for seed := range uint64(size(60)) {
		rng := rand.New(rand.NewPCG(seed, 1))
		o := &heldOracle{capacity: 1 + rng.Int64N(50), refill: 1 + rng.Int64N(20), per: second * (1 + rng.Int64N(5)), ttl: 1000 * (1 + rng.Int64N(20000))}
		o.level = big.NewRat(o.capacity, 1)
		a := algorithm.Held(algorithm.TokenBucket(o.capacity, o.refill, time.Duration(o.per)*time.Microsecond), time.Duration(o.ttl)*time.Microsecond)
		now := base + rng.Int64N(1e9)
		o.last = now
		x := &trial{t: t}
		for range 300 {
			now += []int64{0, rng.Int64N(o.ttl/8 + 1), rng.Int64N(2000), rng.Int64N(o.per)}[rng.IntN(4)]
			cost := []int64{rng.Int64N(o.capacity + 2), rng.Int64N(3)}[rng.IntN(2)]
			when := now // at which the oracle allows it; -1 for never
			var v quota.Verdict
			op := rng.IntN(7)
			if op < 3 {
				r := quota.Request{Op: quota.OpTake, Cost: cost, Floor: []int64{0, 0, rng.Int64N(3)}[rng.IntN(3)]}
				if op > 0 {
					r.Op = quota.OpHold
				}
				if when = -1; r.Need() <= o.capacity {
					when = o.fits(now, r.Need())
				}
				v = x.do(a, r, quota.Micros(now))
				switch {
				case !v.Allowed:
				case op == 0:
					o.charge(now, cost)
				case cost > 0:
					o.holds = append(o.holds, oneHold{cost, now, int64(lapseOf(a, quota.Micros(now))), true})
				}
			} else {
				if len(o.holds) == 0 {
					continue
				}
				h := &o.holds[rng.IntN(len(o.holds))]
				if !h.open {
					continue
				}
				if op == 6 {
					if v = x.do(a, renewalOf(h.n, quota.Micros(h.until)), quota.Micros(now)); h.until <= now {
						when = -1
					} else {
						h.made, h.until = now, int64(lapseOf(a, quota.Micros(now)))
					}
				} else {
					actual := []int64{0, rng.Int64N(h.n + 3)}[rng.IntN(2)]
					v = x.do(a, spendOf(actual, h.n, quota.Micros(h.until)), quota.Micros(now))
					h.open = false
					o.charge(now, actual)
				}
			}
			steps++
			retry := now + int64(v.RetryAfter)
			if v.RetryAfter == quota.Forever {
				retry = -1
			}
			if v.Allowed != (when == now) || retry != when {
				t.Fatalf("seed %d, step of kind %d: got %+v at %d, want it to fit at %d", seed, op, v, now, when)
			}
			if !v.Allowed && op < 3 {
				denials++
				for _, h := range o.holds {
					if h.open && h.until == when {
						byLapse++
						break
					}
				}
			}
			level := o.at(now)
			left := new(big.Int).Div(level.Num(), level.Denom()).Int64()
			if want := left - o.held(now, untilOf); v.Remaining != want {
				t.Fatalf("seed %d: remaining: got %d, want %d", seed, v.Remaining, want)
			}
			early := o.held(now, func(h *oneHold) int64 { return h.made + o.ttl })
			late := o.held(now, func(h *oneHold) int64 { return h.made + o.ttl + o.ttl/16 })
			if got := left - v.Remaining; got < early || got > late {
				t.Fatalf("seed %d: held: got %d, want %d to %d", seed, got, early, late)
			}
			if n := len(x.s.Tail); n > 2+2*18 {
				t.Fatalf("seed %d: numbers of the tail: got %d, want %d at most", seed, n, 2+2*18)
			}
		}
	}
	if denials < steps/10 || byLapse < denials/10 {
		t.Errorf("got %d steps with %d denials, %d ended by a lapse, want more", steps, denials, byLapse)
	}
}
