package conformance

import (
	"cmp"
	"fmt"
	"math/big"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

var realtimeCases = []testCase{
	{rule: s5, name: "own clock", needs: []Feature{Exact}, run: remembered},
	{rule: s5, name: "long lives", needs: []Feature{Exact}, provisional: "1.1", run: longLives},
	{rule: c3, name: "own clock", needs: []Feature{IDs}, provisional: "1.1", run: longIDs},
	{rule: c5, name: "rate", needs: []Feature{Exact}, run: rate},
	{rule: c5, name: "retry after", needs: []Feature{Exact}, run: retryAfter},
	{rule: c5, name: "refunds", needs: []Feature{Exact}, run: refunds},
	{rule: c5, name: "even pace", needs: []Feature{Exact, Clock}, run: evenPace},
}

// remembered uses limits up and goes on asking while they recover, in real time: for more than a second, so that a
// lifetime that was rounded to whole seconds shows.
func remembered(t *trial) {
	periods := []time.Duration{120 * time.Millisecond, 700 * time.Millisecond, 1900 * time.Millisecond}
	t.together(len(kinds), func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		t.within(func(in *recorder) {
			p := t.player(in, false)
			var limits []*quota.Limit
			for _, period := range periods {
				limits = append(limits, t.named(fmt.Sprint("every", period), kinds[i], numbers{5, 5, period}))
			}
			var trace []step
			play := func(wait time.Duration, op quota.Op, cost int64, n int) bool {
				s := step{id: 1 + len(trace), wait: wait, other: rng.IntN(2) == 0, list: rng.IntN(2) == 0,
					charges: []charge{{Charge: quota.Charge{Limit: limits[n], Key: "k", Op: op, Cost: cost}}}}
				trace = append(trace, s)
				if wrong := p.play(&s); wrong != "" {
					t.refute(trace, wrong, false)
					return false
				}
				return p.unsure == nil && !t.hasFailed()
			}
			for n := range periods {
				if !play(0, quota.OpTake, 5, n) || !play(0, quota.OpDebit, int64(n), n) {
					return
				}
			}
			for start := time.Now(); time.Since(start) < 2200*time.Millisecond; {
				op := quota.OpPeek
				if rng.IntN(8) == 0 {
					op = quota.OpTake
				}
				if !play(time.Duration(rng.IntN(40))*time.Millisecond, op, 1+rng.Int64N(5), rng.IntN(len(periods))) {
					return
				}
			}
		})
	})
}

// rate has goroutines take all they can from a bucket, and compares the grants of every interval with the bound
// capacity + rate × length. It does not use the kernel.
func rate(t *trial) {
	const capacity, perSecond, callers = 20, 400, 4
	l := t.named("tokens", tokenBucket, numbers{capacity, perSecond, time.Second})
	hs := t.handles(t.root, callers)
	type grant struct {
		at   quota.Micros
		cost int64
	}
	var mu sync.Mutex
	var grants []grant
	var unsure, denied atomic.Int64
	var back atomic.Bool
	t.together(callers, func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		last := quota.Micros(0)
		for start := time.Now(); time.Since(start) < 300*time.Millisecond && !t.hasFailed(); {
			c := quota.Charge{Limit: l, Key: "k", Cost: 1 + rng.Int64N(3)}
			ds, unknown := t.persist(hs[i], false, c)
			if unknown {
				unsure.Add(1)
				continue
			}
			if ds[0].At < last {
				back.Store(true)
			}
			switch last = ds[0].At; {
			case ds[0].Allowed:
				mu.Lock()
				grants = append(grants, grant{ds[0].At, c.Cost})
				mu.Unlock()
			case denied.Add(1)%8 == 0: // let some tokens come back
				time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
			}
		}
	})
	if back.Load() { // a clock that steps back passes one time twice
		t.skipf("not judged, because the store's clock stepped back")
	}
	// With S the sum until t, S - rate·t never exceeds its least value before by more than the capacity. All in
	// token-microseconds.
	slices.SortStableFunc(grants, func(a, b grant) int { return cmp.Compare(a.at, b.at) })
	sum, least := new(big.Int), new(big.Int)
	for i, g := range grants {
		level := new(big.Int).Sub(new(big.Int).Mul(sum, big.NewInt(1e6)), new(big.Int).Mul(big.NewInt(perSecond), big.NewInt(int64(g.at))))
		if i == 0 || level.Cmp(least) < 0 {
			least = level
		}
		sum.Add(sum, big.NewInt(g.cost))
		level = new(big.Int).Sub(new(big.Int).Mul(sum, big.NewInt(1e6)), new(big.Int).Mul(big.NewInt(perSecond), big.NewInt(int64(g.at))))
		if over := new(big.Int).Sub(level, least); over.Cmp(big.NewInt(capacity*1e6)) > 0 {
			t.fatalf("got: up to %d, more was granted of %s than %d and %d a second in some interval; want: no more in any", g.at, t.describe(l), capacity, perSecond)
		}
	}
	if len(grants) == 0 && unsure.Load() == 0 {
		t.fatalf("got: no token was granted of %s; want: the bucket's tokens", t.describe(l))
	}
}

// refunds takes from a bucket, and later gives half of the charges back. The tokens that were charged, less those that came
// back, both by the decisions, must stay within the bound. The kernel is not used.
func refunds(t *trial) {
	const capacity, perSecond = 20, 400
	l := t.named("tokens", tokenBucket, numbers{capacity, perSecond, time.Second})
	h := t.open(Opening{})
	var receipts []quota.Decision
	// The tokens gained, less refill, never exceed their least value before by more than the capacity. All in
	// token-microseconds since the first decision.
	var begin, last quota.Micros
	var sum, least, back int64
	for start := time.Now(); time.Since(start) < 300*time.Millisecond; {
		c := quota.Charge{Limit: l, Key: "k", Cost: 1 + t.rng.Int64N(8)}
		if n := len(receipts); n > 0 && t.rng.IntN(2) == 0 {
			i := t.rng.IntN(n)
			c.Op, c.Cost, c.MadeAt = quota.OpRefund, receipts[i].Charged, receipts[i].At
			receipts[i] = receipts[n-1]
			receipts = receipts[:n-1]
		}
		ds, unknown := t.persist(h, false, c)
		if unknown {
			return
		}
		d := ds[0]
		if begin == 0 {
			begin, last = d.At, d.At
		}
		if d.At < last {
			t.skipf("not judged, because the store's clock stepped back")
		}
		last = d.At
		refill := perSecond * int64(d.At-begin)
		least = min(least, sum-refill)
		if sum += d.Charged * 1e6; sum-refill-least > capacity*1e6 {
			t.fatalf("got: up to %d, more was charged of %s than %d and %d a second in some interval, less the tokens that came back by refunds; want: no more in any",
				d.At, t.describe(l), capacity, perSecond)
		}
		switch {
		case c.Op == quota.OpRefund && d.Charged > 0:
			t.fatalf("%s:\n%s\n\twant Charged 0 or less, for tokens that came back", show([]quota.Charge{c}), answer(ds, nil))
		case c.Op == quota.OpRefund:
			back -= d.Charged
		case d.Allowed:
			receipts = append(receipts, d)
		}
	}
	if back == 0 {
		t.fatalf("got: no token came back by refunds of charges of %s, by Decision.Charged; want: some, for the bucket was never full since", t.describe(l))
	}
}

// evenPace takes one token at a time at an even pace within the limit. No take is denied.
func evenPace(t *trial) {
	for _, k := range builtIn {
		for _, n := range []int64{1, 2, 7, 10} {
			period := oneOf(t.rng, []time.Duration{time.Second, time.Minute, 999_983 * time.Microsecond})
			l := t.named(fmt.Sprintf("%s-%d", k.name, n), k, numbers{n, n, period})
			p := t.player(t.root, true)
			pace := (period/time.Duration(n) + time.Microsecond).Truncate(time.Microsecond)
			p.clock.add(time.Duration(t.rng.Int64N(int64(period))))
			var trace []step
			for i := range 4 * int(n) {
				s := step{id: 1 + i, wait: pace, charges: []charge{{Charge: quota.Charge{Limit: l, Key: "k", Cost: 1}}}}
				trace = append(trace, s)
				if wrong := p.play(&s); wrong != "" {
					t.refute(trace, wrong, true)
					return
				}
				if p.unsure != nil { // the next pace, when the store answers again
					t.ask(p.first, quota.Charge{Limit: l, Key: "idle", Op: quota.OpPeek})
					break
				}
				if !p.last[0].Allowed {
					t.fatalf("take %d of one each %v, of %s:\n%s\n\twant a grant of every take", i+1, pace, t.describe(l), answer(p.last, nil))
				}
			}
		}
	}
}

// retryAfter asks again before and after the wait that a denial tells, by the store's own clock.
func retryAfter(t *trial) {
	h := t.open(Opening{})
	l := t.named("tokens", tokenBucket, numbers{3, 50, time.Second})
	take := func(cost int64) (quota.Decision, bool) {
		ds, unknown := t.persist(h, false, quota.Charge{Limit: l, Key: "k", Cost: cost})
		if unknown {
			return quota.Decision{}, false
		}
		return ds[0], true
	}
	if d, ok := take(3); ok && !d.Allowed {
		t.fatalf("the whole of a fresh key, of %s:\n%s\n\twant a grant", t.describe(l), answer([]quota.Decision{d}, nil))
	}
	t.rounds(5, func(int) {
		cost := 1 + t.rng.Int64N(3)
		d, ok := take(cost)
		if !ok || d.Allowed {
			return
		}
		due := after(d.At, d.RetryAfter)
		if d.RetryAfter <= 0 || d.RetryAfter > time.Second {
			t.fatalf("%d of %s:\n%s\n\twant a wait of no more than a bucket takes to fill", cost, t.describe(l), answer([]quota.Decision{d}, nil))
		}
		for before := d.At; ; {
			d, ok = take(cost)
			if !ok || d.At < before { // a clock that steps back begins again
				return
			}
			if before = d.At; d.Allowed != (d.At >= due) {
				t.fatalf("%d of %s, after a denial that said it would fit from %d on:\n%s\n\twant a grant from then on, and no sooner", cost, t.describe(l), due, answer([]quota.Decision{d}, nil))
			}
			if d.Allowed {
				return
			}
			time.Sleep(time.Duration(t.rng.IntN(5)) * time.Millisecond)
		}
	})
}

// span is how long states and ids are looked at in real time: six seconds, and less in a run that searches for less time.
func (s *suite) span() time.Duration { return 6 * time.Second * s.search / enough }

// longLives uses limits up that recover within seconds, and looks at each again and again until just before it has recovered:
// a store that keeps states for half of their time, or by a wrong unit, has lost some by then. The waits are those of all
// limits together. ExpirySlack hides a lifetime that is too short by less than a second, so the longest recover in six.
func longLives(t *trial) {
	span := t.suite.span()
	var periods []time.Duration
	for _, part := range []time.Duration{10, 20, 35, 60} {
		periods = append(periods, (span * part / 60).Truncate(time.Millisecond))
	}
	t.together(len(kinds), func(i int) {
		rng := t.suite.random(fmt.Sprint(t.of.path(), i))
		t.within(func(in *recorder) {
			p := t.player(in, false)
			var trace []step
			play := func(wait time.Duration, l *quota.Limit, op quota.Op, cost int64) bool {
				s := step{id: 1 + len(trace), wait: wait, other: rng.IntN(2) == 0, list: rng.IntN(2) == 0,
					charges: []charge{{Charge: quota.Charge{Limit: l, Key: "k", Op: op, Cost: cost}}}}
				trace = append(trace, s)
				if wrong := p.play(&s); wrong != "" {
					t.refute(trace, wrong, false)
					return false
				}
				return p.unsure == nil && !t.hasFailed()
			}
			type life struct {
				l     *quota.Limit
				looks []time.Duration // since the start
			}
			var all []life
			start := time.Now()
			for n, period := range periods {
				// One token is left, so that the state is not at its limit; a debt makes the longest life longer than a period.
				l := t.named(fmt.Sprint("every", period), kinds[i], numbers{5, 5, period})
				if !play(0, l, quota.OpTake, 4) {
					return
				}
				if n == 0 && !play(0, l, quota.OpDebit, 3) {
					return
				}
				reset := period
				if kinds[i].name == goOnly.name {
					reset = span
				} else if len(p.last) > 0 {
					reset = p.last[0].ResetAfter
				}
				at := life{l: l}
				for _, part := range []int64{40, 60, 80, 90, 97} {
					at.looks = append(at.looks, time.Since(start)+time.Duration(int64(min(reset, span))*part/100))
				}
				all = append(all, at)
			}
			for {
				next := -1
				for n := range all {
					if len(all[n].looks) > 0 && (next < 0 || all[n].looks[0] < all[next].looks[0]) {
						next = n
					}
				}
				if next < 0 {
					return
				}
				at := all[next].looks[0]
				all[next].looks = all[next].looks[1:]
				if !play(max(at-time.Since(start), 0), all[next].l, quota.OpPeek, 1) {
					return
				}
			}
		})
	})
}

// longIDs grants ids and repeats them for some seconds. States under the keys end meanwhile, and other ids are granted.
func longIDs(t *trial) {
	o := Opening{Data: t.data()}
	h := t.open(o)
	other := h
	if !t.lacks(Shared) {
		other = t.open(o)
	}
	short, long := t.named("short", tokenBucket, numbers{1000, 1000, 500 * time.Millisecond}), t.named("long", fromFirst, numbers{limit: 1 << 40, period: year})
	type grant struct {
		c quota.Charge
		d quota.Decision
	}
	var grants []grant
	add := func(n int) {
		for i, l := range []*quota.Limit{short, long} {
			for _, key := range []string{"g", fmt.Sprintf("u%d.%d", n, i)} {
				c := quota.Charge{Limit: l, Key: key, Cost: int64(1 + n%3), ID: fmt.Sprintf("%s.%d.%d", key, n, i)}
				if ds, unknown := t.persist(h, n%2 == 0, c); !unknown && ds[0].Allowed {
					grants = append(grants, grant{c, ds[0]})
				}
			}
		}
	}
	start := time.Now()
	for n := 0; ; n++ {
		add(n)
		over := time.Since(start) > t.suite.span()
		for i, g := range grants {
			if !over && i > 64 && t.rng.IntN(4) > 0 {
				continue
			}
			by := h
			if (i+n)%2 == 0 {
				by = other
			}
			want := g.d
			want.Replayed = true
			if ds, unknown := t.persist(by, i%2 == 0, g.c); !unknown && ds[0] != want {
				t.fatalf("Charge%s, up to %v after it was granted:\n%s\n%s", show([]quota.Charge{g.c}), time.Since(start).Round(time.Millisecond), answer(ds, nil), expectation([]quota.Decision{want}))
			}
		}
		if over {
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}
