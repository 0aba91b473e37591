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
	s, ok := a.(driver.Sharer)
	if !ok {
		t.Fatalf("rule %s: got a %T, want a driver.Sharer", a.Spec().Rule, a)
	}
	return s.Share(n)
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
		} else {
			now += v.RetryAfter
		}
	}
	return n
}

func TestShareOfBucketGainsExactlyItsPart(t *testing.T) {
	rng := random(t)
	for range size(5000) {
		r := randomRule(rng, bucket)
		n := magnitude(rng, 12)
		s, err := share(t, r.Algorithm, n)
		if err != nil {
			if !errors.Is(err, quota.ErrInvalid) {
				t.Fatal(err)
			}
			if r.limit >= n && r.period*n <= 10*year.Microseconds() {
				t.Fatalf("one share of %d of %+v: got %v, want nil", n, r, err)
			}
			continue
		}
		spec := s.Spec()
		if want := max(r.limit/n, 1); spec.Capacity != want || spec.Rule != r.Spec().Rule {
			t.Fatalf("one share of %d of %+v: got %+v, want capacity %d", n, r, spec, want)
		}
		// refill/period == n × (perTick/unit)/tick, as 128-bit products.
		perTick, tick := spec.Params[0], spec.Params[3]
		if !equalProducts([]int64{r.refill, spec.Unit, tick}, []int64{perTick, n, r.period}) {
			t.Fatalf("one share of %d: got %d of %d credits each %d µs, want an n-th of %+v", n, perTick, spec.Unit, tick, r)
		}
	}
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
	rng := random(t)
	for _, k := range kinds[1:] {
		for range size(1000) {
			r := randomRule(rng, k)
			n := magnitude(rng, 12)
			s, err := share(t, r.Algorithm, n)
			if err != nil {
				if !errors.Is(err, quota.ErrInvalid) {
					t.Fatal(err)
				}
				if r.limit >= n {
					t.Fatalf("%v: one share of %d of %+v: got %v, want nil", k, n, r, err)
				}
				continue
			}
			spec := s.Spec()
			window := spec.Unit
			if k == slidingLog {
				window = spec.Params[1]
			}
			if spec.Rule != r.Spec().Rule {
				t.Fatalf("rule of a share: got %s, want %s", spec.Rule, r.Spec().Rule)
			}
			switch {
			case r.limit >= n && (spec.Capacity != r.limit/n || window != r.period):
				t.Fatalf("%v: one share of %d: got %d in %d, want %d in %d", k, n, spec.Capacity, window, r.limit/n, r.period)
			case r.limit < n && spec.Capacity != 1:
				t.Fatalf("%v: one share of %d of %d: got %d, want 1", k, n, r.limit, spec.Capacity)
			}
			// n·capacity/window <= limit/period, and with a limit below n a window of 1 µs less would exceed
			// it.
			whole, part := float64(r.limit)*float64(window), float64(n)*float64(spec.Capacity)*float64(r.period)
			if part > whole*(1+1e-12) {
				t.Fatalf("%v: %d shares: got %d in %d each, want no more than %d in %d together", k, n, spec.Capacity, window, r.limit, r.period)
			}
			if r.limit < n && part*(1+1e-12) < whole-float64(r.limit) {
				t.Fatalf("%v: %d shares: got %d in %d each, want about %d in %d together", k, n, spec.Capacity, window, r.limit, r.period)
			}
		}
	}
}

func TestSharesTogetherAdmitNoMoreThanTheWhole(t *testing.T) {
	for _, k := range kinds {
		for _, n := range []int64{1, 2, 3, 5, 7, 12, 13, 40} {
			r := mustRule(t, k, 12, 12, time.Second)
			s := quota.Must(share(t, r.Algorithm, n))
			// From a second boundary, over whole seconds: each rule at its fastest.
			const seconds = 60
			got := n * greedy(s, seconds*second)
			want := greedy(r, seconds*second)
			if k == bucket {
				want += max(n-12, 0) // each share is at least 1
			}
			if k != bucket && n > 12 {
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
		if s, err := share(t, r.Algorithm, n); !errors.Is(err, quota.ErrInvalid) {
			t.Errorf("one share of %d: got %v, %v; want ErrInvalid", int64(n), s, err)
		}
	})
}

func TestShareFails(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		slow := mustRule(t, k, 1, 1, 10*year)
		for _, n := range []int64{2, 1 << 40, math.MaxInt64} {
			if s, err := share(t, slow.Algorithm, n); !errors.Is(err, quota.ErrInvalid) {
				t.Errorf("one %d-th a decade: got %v, %v; want ErrInvalid", n, s, err)
			}
		}
		quick := mustRule(t, k, 1, 1, time.Second)
		if s, err := share(t, quick.Algorithm, 1<<20); err != nil || s.Spec().Capacity != 1 {
			t.Errorf("one 2^20-th a second: got %v, want a capacity of 1", err)
		}
	})
}

// TestShareCarriesStateOver: when the number of instances changes, the consumption of a share stays.
func TestShareCarriesStateOver(t *testing.T) {
	forEach(t, func(t *testing.T, k kind) {
		r := mustRule(t, k, 1000, 1000, time.Hour)
		var kept quota.State
		spent := int64(0)
		for _, n := range []int64{2, 5, 2, 10, 1, 10, 2} {
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

var _ driver.Sharer = quota.Must(algorithm.GCRA(1, 1, time.Second)).(driver.Sharer)
