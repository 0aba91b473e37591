package algorithm_test

import (
	"errors"
	"math"
	"math/big"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

func TestAccepted(t *testing.T) {
	for _, n := range extremeBuckets {
		if r, err := newRule(bucket, n.limit, n.refill, n.period); err != nil {
			t.Errorf("bucket of %d that gains %d each %v: got %v, want nil", n.limit, n.refill, n.period, err)
		} else {
			checkSpec(t, r)
		}
	}
	for _, n := range extremeWindows {
		for _, k := range kinds[1:] {
			if r, err := newRule(k, n.limit, 0, n.period); err == nil {
				checkSpec(t, r)
			} else if k != sliding {
				t.Errorf("%v: %d in %v: got %v, want nil", k, n.limit, n.period, err)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	const µs = time.Microsecond
	windows := kinds[1:]
	tests := []struct {
		name          string
		kinds         []kind
		limit, refill int64
		period        time.Duration
		says          []string // the field, the value and the accepted ones
	}{
		{"negative capacity", kinds[:1], -1, 1, time.Second, []string{"capacity is -1", "0 to 2^52-1 (4503599627370495)"}},
		{"capacity of 2^52", kinds[:1], 1 << 52, 1_000_000_000, time.Second, []string{"capacity is 4503599627370496", "0 to 2^52-1 (4503599627370495)"}},
		{"no refill", kinds[:1], 1, 0, time.Second, []string{"refill is 0", "at least 1"}},
		{"least refill", kinds[:1], 1, math.MinInt64, time.Second, []string{"refill is -9223372036854775808", "at least 1"}},
		{"no period", kinds[:1], 1, 1, 0, []string{"period is 0s", "1µs to ten years"}},
		{"negative period", kinds[:1], 1, 1, -time.Second, []string{"period is -1s", "1µs to ten years"}},
		{"half a microsecond", kinds[:1], 1, 1, µs + 500, []string{"period is 1.5µs", "whole microseconds"}},
		{"over ten years", kinds[:1], 1, 1, 10*year + µs, []string{"period is 87600h0m0.000001s", "ten years"}},
		{"over 10^13 a second", kinds[:1], 1, 10_000_000_000_001, time.Second, []string{"rate is 10000000000001 in 1s", "10^13 a second"}},
		{"most refill", kinds[:1], 1, math.MaxInt64, time.Second, []string{"rate is", "10^13 a second"}},
		{"fills in over ten years", kinds[:1], 11, 1, year, []string{"bucket of 11", "gains 1", "8760h0m0s", "over ten years", "capacity of up to 10,"}},
		{"needs large numbers", kinds[:1], 1 << 40, 1<<40 - 87, (1<<43 - 57) * µs, []string{"2^52", "capacity of up to 512,", "rounder period"}},

		{"negative limit", windows, math.MinInt64, 0, time.Second, []string{"limit is -9223372036854775808", "0 to 2^52-1 (4503599627370495)"}},
		{"limit of 2^52", windows, 1 << 52, 0, 10 * year, []string{"limit is 4503599627370496", "0 to 2^52-1 (4503599627370495)"}},
		{"no window", windows, 1, 0, 0, []string{"window is 0s", "1µs to ten years"}},
		{"window over ten years", windows, 1, 0, 10*year + µs, []string{"window is 87600h0m0.000001s", "ten years"}},
		{"window of no whole microseconds", windows, 1, 0, time.Nanosecond, []string{"window is 1ns", "whole microseconds"}},
		{"10000001 a microsecond", windows, 10_000_001, 0, µs, []string{"rate is 10000001 in 1µs", "10^13 a second"}},
		{"2^51", []kind{sliding}, 1 << 20, 0, (1<<31 + 1) * µs, []string{"limit is 1048576", "35m47.483649s", "2^51", "limit of up to 1048575,", "shorter or rounder window"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, k := range test.kinds {
				_, err := newRule(k, test.limit, test.refill, test.period)
				if !errors.Is(err, quota.ErrInvalid) {
					t.Errorf("%v: got %v, want ErrInvalid", k, err)
					continue
				}
				for _, say := range test.says {
					if !strings.Contains(err.Error(), say) {
						t.Errorf("%v: got %q, want it to say %q", k, err, say)
					}
				}
			}
		})
	}
}

func TestTick(t *testing.T) {
	const µs = time.Microsecond
	tests := []struct {
		name string
		rule rule
		tick int64
	}{
		{"microseconds", mustRule(t, bucket, 1000, 10, time.Second), 1},
		{"one a year", mustRule(t, bucket, 10, 1, year), 1},
		{"large capacity at a simple rate", mustRule(t, bucket, 1<<40, 1_000_000_000, time.Second), 1},
		{"prime rate, large capacity", mustRule(t, bucket, 1_000_000_000, 1_000_000_007, time.Hour), 10_000},
		{"no room for debt in any tick", mustRule(t, bucket, 1<<21, 1<<21, (1<<31-1)*µs), 1},
		{"no finer one fits", mustRule(t, sliding, 1<<20, 0, 5000*time.Second), 10},
		{"just below 2^51", mustRule(t, sliding, 1<<20-1, 0, (1<<31-1)*µs), 1},
	}
	for _, test := range tests {
		if test.rule.tick != test.tick {
			t.Errorf("%s: tick in µs: got %d, want %d", test.name, test.rule.tick, test.tick)
		}
	}
}

// checkSpec computes, without bound, the largest numbers that a decision by this rule can meet.
func checkSpec(t *testing.T, r rule) {
	t.Helper()
	const spanMax = 10 * 365 * 24 * 3600 * second
	spec := r.Spec()
	below := func(name string, bits uint, factors ...int64) {
		t.Helper()
		product := integer(1)
		for _, f := range factors {
			if f < 0 {
				t.Errorf("%v: %s: got %d, want 0 or more", spec, name, f)
			}
			product.Mul(product, integer(f))
		}
		if product.Cmp(new(big.Int).Lsh(integer(1), bits)) >= 0 {
			t.Errorf("%v: %s: got %v, want less than 2^%d", spec, name, product, bits)
		}
	}
	if spec.Capacity != r.limit || spec.Unit < 1 || spec.Debt < 0 || spec.Rule == (quota.Rule{}) {
		t.Errorf("spec: got %+v, want capacity %d, a unit, a rule and no negative debt", spec, r.limit)
	}
	below("capacity and debt", 52, spec.Capacity+spec.Debt)
	switch r.kind {
	case bucket:
		unit, each, most, fill := spec.Unit, spec.Params[0], spec.Params[2], spec.Params[4]
		if unit != perTick(r).Denom().Int64() || each != perTick(r).Num().Int64() {
			t.Errorf("%+v: rate: got %d/%d a tick, want %v", spec, each, unit, perTick(r))
		}
		below("most", 52, most)
		below("a credit", 52, each)
		below("deficit and cost", 53, most+unit*r.limit)
		below("refill", 53, fill-1, each)
		below("the deficit of capacity and debt", 52, unit, spec.Capacity+spec.Debt)
		if r.period%r.tick != 0 || fill*r.tick > spanMax || new(big.Int).Mul(integer(fill), integer(each)).Cmp(integer(most)) < 0 {
			t.Errorf("%+v: ticks that repay a full debt: got %d, want enough, within ten years", spec, fill)
		}
	case sliding:
		ticks := spec.Params[3]
		below("weighed count", 52, spec.Params[1], ticks)
		below("weighed limit", 52, r.limit, ticks)
		if ticks*r.tick != r.period {
			t.Errorf("%+v: got %d ticks of %d µs, want %d µs together", spec, ticks, r.tick, r.period)
		}
	}
}

func TestGCRAIsTokenBucket(t *testing.T) {
	a := algorithm.GCRA(50, 21, 2*time.Second)
	b := mustRule(t, bucket, 50, 21, 2*time.Second)
	if a.Spec() != b.Spec() {
		t.Errorf("spec of GCRA: got %+v, want %+v", a.Spec(), b.Spec())
	}
}

func TestRandomSpecs(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		for range size(5000) {
			checkSpec(t, randomRule(rng, k))
		}
	})
}

// A refusal says how much would be accepted, and that is accepted, and no more.
func TestBoundsInErrors(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		rng := random(t)
		refused := 0
		for range size(20_000) {
			refill, period := magnitude(rng, 50), time.Duration(magnitude(rng, 40))*time.Microsecond
			_, err := newRule(k, 1<<52-1, refill, period)
			if err == nil || strings.Contains(err.Error(), "rate is") {
				continue
			}
			_, after, _ := strings.Cut(err.Error(), " of up to ")
			number, _, _ := strings.Cut(after, ",")
			most, e := strconv.ParseInt(number, 10, 64)
			if e != nil {
				t.Fatalf("error: got %q, want one that says up to how much is accepted", err)
			}
			refused++
			if _, err := newRule(k, most, refill, period); err != nil {
				t.Fatalf("%d, refill %d, in %v: got %v, want it accepted: an error says so", most, refill, period, err)
			}
			if _, err := newRule(k, most+1, refill, period); err == nil {
				t.Fatalf("%d, refill %d, in %v: got it accepted, want an error: another error says %d at most", most+1, refill, period, most)
			}
		}
		if refused == 0 && (k == bucket || k == sliding) {
			t.Error("refusals: got none, want some, or the test is void")
		}
	})
}

// Bytes and small units of money have large numbers.
func TestLargeCapacities(t *testing.T) {
	const terabytes, nanoDollars = 5 << 40, 10_000_000_000_000
	forEach(t, func(t *testing.T, k kind) {
		for _, n := range []numbers{
			{terabytes, terabytes, time.Hour}, {terabytes, terabytes, 30 * 24 * time.Hour},
			{nanoDollars, nanoDollars, time.Hour}, {2 << 40, 2 << 40, time.Second}, {nanoDollars, nanoDollars, 30 * 24 * time.Hour},
			{1<<52 - 1, 1_000_000_000_000, time.Second}, {1<<52 - 1, 1<<52 - 1, 1000 * 24 * time.Hour},
		} {
			r, err := newRule(k, n.limit, n.refill, n.period)
			if k == sliding {
				if fits := n.limit <= 1<<51/2592; (err == nil) != fits && n.period == 30*24*time.Hour {
					t.Errorf("%d in %v: got %v, want it accepted: %v", n.limit, n.period, err, fits)
				}
				if err != nil {
					continue
				}
			}
			if err != nil {
				if n.limit == 1<<52-1 && (n.period == time.Second) == (k != bucket) {
					continue // more than 10^13 a second; and a rate that is no simple fraction
				}
				t.Errorf("%d, refill %d, in %v: got %v, want it accepted", n.limit, n.refill, n.period, err)
				continue
			}
			checkSpec(t, r)
			var c cell
			if v := c.take(r, n.limit-1, base); !v.Allowed || v.Remaining != 1 {
				t.Errorf("take of %d of %d: got %+v, want remaining 1", n.limit-1, n.limit, v)
			}
			if v := c.take(r, 2, base); v.Allowed || v.RetryAfter <= 0 || v.RetryAfter == quota.Forever {
				t.Errorf("take of 2 with 1 of %d left: got %+v, want a denial and a time", n.limit, v)
			}
		}
	})
}

// A capacity of 0, whatever the rule, denies every cost above 0, and so does DenyAll.
func TestZeroDenies(t *testing.T) {
	all := map[string]quota.Algorithm{"DenyAll": algorithm.DenyAll, "GCRA": algorithm.GCRA(0, 1, time.Second)}
	for _, k := range kinds {
		all[k.String()] = mustRule(t, k, 0, 1, time.Minute).Algorithm
	}
	for name, a := range all {
		if got := a.Spec().Capacity; got != 0 {
			t.Errorf("%s: capacity: got %d, want 0", name, got)
		}
		for _, op := range []quota.Op{quota.OpTake, quota.OpPeek} {
			for _, cost := range []int64{1, 1 << 52, math.MaxInt64} {
				s, v := a.Decide(quota.State{}, quota.Request{Op: op, Cost: cost}, base)
				if want := (quota.Verdict{RetryAfter: quota.Forever}); v != want || !s.IsZero() {
					t.Errorf("%s: %v of %d: got %+v, want %+v", name, op, cost, v, want)
				}
			}
			if _, v := a.Decide(quota.State{}, quota.Request{Op: op}, base); !v.Allowed || v.Write || v.Remaining != 0 {
				t.Errorf("%s: %v of 0: got %+v, want it allowed", name, op, v)
			}
		}
	}
}

// Unlimited admits whatever is asked, and says so.
func TestUnlimited(t *testing.T) {
	for op := quota.OpTake; op <= quota.OpAhead; op++ {
		for _, cost := range []int64{0, 1, 1 << 52, math.MaxInt64} {
			s, v := algorithm.Unlimited.Decide(quota.State{}, quota.Request{Op: op, Cost: cost, Arg: base}, base)
			if want := (quota.Verdict{Outcome: quota.Outcome{Allowed: true}, Remaining: math.MaxInt64}); v != want || !s.IsZero() {
				t.Errorf("%v of %d: got %+v %+v, want %+v and no state", op, cost, v, s, want)
			}
		}
	}
}
