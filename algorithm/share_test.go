package algorithm_test

import (
	"errors"
	"math"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func share(t testing.TB, a quota.Algorithm, n int64) (quota.Algorithm, error) {
	t.Helper()
	return oneSharer(t, a).Share(n)
}

func oneSharer(t testing.TB, a quota.Algorithm) driver.OneSharer {
	t.Helper()
	s, ok := a.(driver.OneSharer)
	if !ok {
		t.Fatalf("rule %s: got a %T, want a driver.OneSharer", a.Spec().Rule, a)
	}
	return s
}

// bothShares runs a test with either way to share a rule, and the capacity that the shares have at least.
func bothShares(t *testing.T, test func(t *testing.T, share func(quota.Algorithm, int64) (quota.Algorithm, error), least int64)) {
	t.Run("Share", func(t *testing.T) {
		test(t, func(a quota.Algorithm, n int64) (quota.Algorithm, error) { return oneSharer(t, a).Share(n) }, 0)
	})
	t.Run("ShareAtLeastOne", func(t *testing.T) {
		test(t, func(a quota.Algorithm, n int64) (quota.Algorithm, error) { return oneSharer(t, a).ShareAtLeastOne(n) }, 1)
	})
}

// greedy returns the tokens that greedy one-token takes from fresh get in the µs that begin at base.
func greedy(r quota.Algorithm, us int64) (n int64) {
	var s quota.State
	for now := quota.Micros(base); now < quota.Micros(base+us); {
		next, v := r.Decide(s, quota.Request{Cost: 1}, now)
		if v.Write {
			s = next
		}
		if v.Allowed {
			n++
		} else if v.RetryAfter == quota.Forever {
			break
		} else {
			now += v.RetryAfter
		}
	}
	return n
}

func TestShareOfBucketGainsExactlyItsPart(t *testing.T) {
	bothShares(t, func(t *testing.T, share func(quota.Algorithm, int64) (quota.Algorithm, error), least int64) {
		rng := random(t)
		for range size(5000) {
			r := randomRule(rng, bucket)
			n := magnitude(rng, 12)
			s, err := share(r.Algorithm, n)
			if err != nil {
				if !errors.Is(err, quota.ErrInvalid) {
					t.Fatal(err)
				}
				if r.limit >= n && r.period*n <= 10*year.Microseconds() || r.limit < n && least == 0 {
					t.Fatalf("one share of %d of %+v: got %v, want nil", n, r, err)
				}
				continue
			}
			spec := s.Spec()
			if want := max(r.limit/n, least); spec.Capacity != want || spec.Rule != r.Spec().Rule {
				t.Fatalf("one share of %d of %+v: got %+v, want capacity %d", n, r, spec, want)
			}
			perTick, tick := spec.Params[0], spec.Params[3]
			if spec.Capacity == 0 && spec.Unit*tick == perTick*10*year.Microseconds() {
				continue // the slowest rate there is
			}
			// refill/period == n × (perTick/unit)/tick, as 128-bit products.
			if !equalProducts([]int64{r.refill, spec.Unit, tick}, []int64{perTick, n, r.period}) {
				t.Fatalf("one share of %d: got %d of %d credits each %d µs, want an n-th of %+v", n, perTick, spec.Unit, tick, r)
			}
		}
	})
}

// equalProducts compares products of positive numbers by cancelling common factors.
func equalProducts(a, b []int64) bool {
	a, b = append([]int64(nil), a...), append([]int64(nil), b...)
	for i := range a {
		for j := range b {
			x, y := a[i], b[j]
			for y != 0 {
				x, y = y, x%y
			}
			a[i] /= x
			b[j] /= x
		}
	}
	for i := range a {
		if a[i] != 1 || b[i] != 1 {
			return false
		}
	}
	return true
}

func TestShareOfBucketInTime(t *testing.T) {
	// 12 tokens and 7 a second, in 5 shares: 2 tokens, and 7 each 5 s.
	r := mustRule(t, bucket, 12, 7, time.Second)
	s := quota.Must(share(t, r.Algorithm, 5))
	for periods := range int64(20) {
		us := periods * 5 * second
		if got, want := greedy(s, us+1), 2+7*periods; got != want {
			t.Errorf("admitted by a share in %d s: got %d, want %d", us/second, got, want)
		}
	}
}

func TestShareOfWindowNeverExceedsItsPart(t *testing.T) {
	bothShares(t, func(t *testing.T, share func(quota.Algorithm, int64) (quota.Algorithm, error), least int64) {
		rng := random(t)
		for _, k := range kinds[1:] {
			for range size(1000) {
				r := randomRule(rng, k)
				n := magnitude(rng, 12)
				s, err := share(r.Algorithm, n)
				if err != nil {
					if !errors.Is(err, quota.ErrInvalid) {
						t.Fatal(err)
					}
					if r.limit >= n || least == 0 {
						t.Fatalf("%v: one share of %d of %+v: got %v, want nil", k, n, r, err)
					}
					continue
				}
				spec := s.Spec()
				window := spec.Unit
				if k == slidingLog {
					window = spec.Params[1]
				}
				if want := max(r.limit/n, least); spec.Rule != r.Spec().Rule || spec.Capacity != want {
					t.Fatalf("%v: one share of %d of %+v: got %+v, want the rule and capacity %d", k, n, r, spec, want)
				}
				longer := r.limit < n && least == 1
				if !longer && window != r.period {
					t.Fatalf("%v: window of one share of %d: got %d, want %d", k, n, window, r.period)
				}
				// n·capacity/window <= limit/period, and with a longer window one of 1 µs less would exceed it.
				whole, part := float64(r.limit)*float64(window), float64(n)*float64(spec.Capacity)*float64(r.period)
				if part > whole*(1+1e-12) {
					t.Fatalf("%v: %d shares: got %d in %d each, want no more than %d in %d together", k, n, spec.Capacity, window, r.limit, r.period)
				}
				if longer && part*(1+1e-12) < whole-float64(r.limit) {
					t.Fatalf("%v: %d shares: got %d in %d each, want about %d in %d together", k, n, spec.Capacity, window, r.limit, r.period)
				}
			}
		}
	})
}

func TestSharesTogetherAdmitNoMoreThanTheWhole(t *testing.T) {
	bothShares(t, func(t *testing.T, share func(quota.Algorithm, int64) (quota.Algorithm, error), least int64) {
		for _, k := range kinds {
			for _, n := range []int64{1, 2, 3, 5, 7, 12, 13, 40} {
				r := mustRule(t, k, 12, 12, time.Second)
				s := quota.Must(share(r.Algorithm, n))
				// From a second boundary, over whole seconds: each rule at its fastest.
				const seconds = 60
				got := n * greedy(s, seconds*second)
				want := greedy(r, seconds*second)
				if n > 12 && least == 0 {
					if got != 0 {
						t.Errorf("%v: admitted by %d shares of 12: got %d, want 0", k, n, got)
					}
					continue
				}
				if n > 12 && k == bucket {
					want += n - 12 // each share is at least 1
				} else if n > 12 {
					want += n // one at once, then one in the longer window
				}
				if got > want {
					t.Errorf("%v: admitted by %d shares in %d s: got %d, want %d at most", k, n, seconds, got, want)
				}
				if got < want/4 { // of 12 tokens, 7 shares round 5 away
					t.Errorf("%v: admitted by %d shares in %d s: got %d, want %d or more", k, n, seconds, got, want/4)
				}
			}
		}
	})
}

func TestShareOfOneIsTheWhole(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		r := mustRule(t, k, 12, 7, time.Minute)
		for _, n := range []int64{1, 0, -1, math.MinInt64} {
			if s, err := share(t, r.Algorithm, n); err != nil || s.Spec() != r.Spec() {
				t.Errorf("one share of %d: got %v, %v; want the whole", n, s, err)
			}
		}
	})
}

func TestShareOfFarTooManyFails(t *testing.T) {
	// 10^6 µs times this is 10^6 µs again, modulo 2^64.
	const n = 1<<58 + 1
	forEach(t, func(t *testing.T, k kind) {
		r := mustRule(t, k, 1, 1, time.Second)
		if s, err := oneSharer(t, r.Algorithm).ShareAtLeastOne(n); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("one share of %d, of at least 1: got %v, %v; want ErrInvalid", int64(n), s, err)
		}
	})
}

func TestShareFails(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		slow := mustRule(t, k, 1, 1, 10*year)
		for _, n := range []int64{2, 1 << 40, math.MaxInt64} {
			if s, err := oneSharer(t, slow.Algorithm).ShareAtLeastOne(n); !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("one %d-th a decade, of at least 1: got %v, %v; want ErrInvalid", n, s, err)
			}
		}
		quick := mustRule(t, k, 1, 1, time.Second)
		if s, err := oneSharer(t, quick.Algorithm).ShareAtLeastOne(1 << 20); err != nil || s.Spec().Capacity != 1 {
			t.Errorf("one 2^20-th a second, of at least 1: got %v, want a capacity of 1", err)
		}
	})
	if s, err := share(t, mustRule(t, bucket, 10, 1, year).Algorithm, 11); err != nil || s.Spec().Capacity != 0 {
		t.Errorf("one 11-th of one token a year: got %v, %v; want a share of 0", s, err)
	}
	if s, err := share(t, mustRule(t, bucket, 22, 7, year).Algorithm, 11); !errors.Is(err, quota.ErrInvalid) {
		t.Errorf("one 11-th of seven tokens a year: got %v, %v; want ErrInvalid", s, err)
	}
}

// TestShareOfZeroDenies: a share of a capacity below n admits no token, at any time, whatever its state.
func TestShareOfZeroDenies(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		for _, slow := range []time.Duration{time.Second, year} {
			r := mustRule(t, k, 5, 5, slow)
			for _, n := range []int64{6, 1 << 40, 1<<58 + 1, math.MaxInt64} {
				for _, a := range []quota.Algorithm{quota.Must(share(t, r.Algorithm, n)), mustRule(t, k, 0, 1, slow).Algorithm} {
					if c := a.Spec().Capacity; c != 0 {
						t.Fatalf("capacity of one share of %d: got %d, want 0", n, c)
					}
					_, v := a.Decide(quota.State{}, quota.Request{Cost: 1}, base)
					if v.Allowed || v.Write || v.Remaining != 0 || v.RetryAfter != quota.Forever || v.ResetAfter != 0 {
						t.Errorf("take of 1 of a share of 0: got %+v, want a denial for ever, remaining 0", v)
					}
					// A debit stays, and refill repays no more than that.
					debt := min(2, a.Spec().Debt)
					s, v := a.Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: debt}, base)
					if !v.Allowed || v.Remaining != -debt {
						t.Errorf("debit of %d: got %+v, want remaining %d", debt, v, -debt)
					}
					for _, later := range []quota.Micros{0, 1, v.ResetAfter / 2, v.ResetAfter} {
						if _, w := a.Decide(s, quota.Request{Cost: 1}, base+later); w.Allowed || w.Remaining > 0 {
							t.Errorf("take of 1 after a debit and %d µs: got %+v, want a denial", later, w)
						}
					}
					if _, w := a.Decide(s, quota.Request{Op: quota.OpRefund, Cost: debt, Arg: base}, base+1); w.Remaining != 0 {
						t.Errorf("refund of the debit, 1 µs later: got %+v, want remaining 0", w)
					}
					if f := a.(quota.Forecaster).Forecast(quota.Decision{At: base}, 1); f != quota.Never {
						t.Errorf("forecast of 1: got %v, want never", f)
					}
				}
			}
		}
	})
}

// TestShareCarriesStateOver: when the number of instances changes, the consumption of a share stays.
func TestShareCarriesStateOver(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		r := mustRule(t, k, 1000, 1000, time.Hour)
		var kept quota.State
		spent := int64(0)
		for _, n := range []int64{2, 5, 2000, 2, 10, 1001, 1, 10, 2} {
			s := quota.Must(share(t, r.Algorithm, n))
			_, v := s.Decide(kept, quota.Request{Op: quota.OpPeek}, base)
			if want := 1000/n - spent; v.Remaining != want {
				t.Fatalf("one share of %d: remaining: got %d, want %d", n, v.Remaining, want)
			}
			cost := max(v.Remaining, 0)
			next, v := s.Decide(kept, quota.Request{Cost: cost}, base)
			if v.Write {
				kept = next
			}
			if v.Allowed {
				spent += cost
			}
		}
		if spent != 1000 {
			t.Errorf("admitted: got %d, want 1000", spent)
		}
	})
}

var _ driver.Sharer = algorithm.GCRA(1, 1, time.Second).(driver.Sharer)
