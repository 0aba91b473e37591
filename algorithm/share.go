package algorithm

import (
	"math/bits"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var (
	_ driver.OneSharer = (*tokenBucket)(nil)
	_ driver.OneSharer = (*fixedWindow)(nil)
	_ driver.OneSharer = (*slidingWindow)(nil)
	_ driver.OneSharer = (*slidingLog)(nil)
	_ driver.Sharer    = (*calendar)(nil)
)

// Share is exact: n shares together gain as many tokens as the whole bucket. It fails with ErrInvalid where
// the share has a capacity above 0 and its period, up to n times the bucket's, exceeds ten years. A share
// with a capacity of 0 repays debt at that rate too, or at one token in ten years where that is faster.
func (b *tokenBucket) Share(n int64) (quota.Algorithm, error) { return b.share(n, 0) }

// ShareAtLeastOne is Share, with a capacity of at least 1. It fails with ErrInvalid where the share's period,
// or the time in which the share fills, exceeds ten years.
func (b *tokenBucket) ShareAtLeastOne(n int64) (quota.Algorithm, error) { return b.share(n, 1) }

func (b *tokenBucket) share(n, least int64) (quota.Algorithm, error) {
	if n <= 1 || b.tokens == 0 {
		return b, nil
	}
	capacity := max(b.tokens/n, least)
	// perTick tokens come in unit ticks; a share gains them in n times as long.
	g := gcd(b.perTick, n)
	refill := b.perTick / g
	per, fits := product(b.unit*b.tick, n/g)
	switch {
	case capacity > 0 && !fits:
		return nil, invalid("one share of %d gains %d tokens in %d × %d µs; accepted: periods up to ten years (87600h)",
			n, refill, n/g, b.unit*b.tick)
	case capacity > 0:
		return newTokenBucket(capacity, capacity, refill, per)
	case !fits:
		refill, per = 1, maxSpan
	}
	return newTokenBucket(0, b.tokens, refill, per)
}

// Share counts in the same windows.
func (f *fixedWindow) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return f, nil
	}
	share := *f
	share.limit /= n
	return &share, nil
}

// ShareAtLeastOne counts in the same windows. A limit below n becomes 1 in a window that is longer as needed;
// it fails with ErrInvalid where that exceeds ten years.
func (f *fixedWindow) ShareAtLeastOne(n int64) (quota.Algorithm, error) {
	if f.limit == 0 || f.limit >= n {
		return f.Share(n)
	}
	window, err := oneIn(f.limit, f.window, n)
	if err != nil {
		return nil, err
	}
	return newFixedWindow(1, window, time.Duration(f.offset)*time.Microsecond, f.fromFirst)
}

// Share counts in the same windows.
func (w *slidingWindow) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return w, nil
	}
	share := *w
	share.limit /= n
	return &share, nil
}

// ShareAtLeastOne counts in the same windows. A limit below n becomes 1 in a window that is longer as needed;
// it fails with ErrInvalid where that exceeds ten years.
func (w *slidingWindow) ShareAtLeastOne(n int64) (quota.Algorithm, error) {
	if w.limit == 0 || w.limit >= n {
		return w.Share(n)
	}
	window, err := oneIn(w.limit, w.window, n)
	if err != nil {
		return nil, err
	}
	return makeSlidingWindow(1, window)
}

// Share counts in the same window.
func (l *slidingLog) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return l, nil
	}
	share := *l
	share.limit /= n
	return &share, nil
}

// ShareAtLeastOne counts in the same window. A limit below n becomes 1 in a window that is longer as needed;
// it fails with ErrInvalid where that exceeds ten years.
func (l *slidingLog) ShareAtLeastOne(n int64) (quota.Algorithm, error) {
	if l.limit == 0 || l.limit >= n {
		return l.Share(n)
	}
	window, err := oneIn(l.limit, l.window, n)
	if err != nil {
		return nil, err
	}
	return makeSlidingWindowLog(1, window)
}

// oneIn returns the shortest window, in whole microseconds, in which each of n instances may have 1 token of
// a limit below n in a window of so many µs.
func oneIn(limit, window, n int64) (time.Duration, error) {
	// ceil(window·n/limit)
	hi, lo := bits.Mul64(uint64(window), uint64(n))
	if hi == 0 {
		us, rest := lo/uint64(limit), lo%uint64(limit)
		if rest > 0 {
			us++
		}
		if us <= maxSpan {
			return time.Duration(us) * time.Microsecond, nil
		}
	}
	return 0, invalid("one share of %d of a limit of %d in %v is too slow; accepted: at least 1 token in ten years (87600h)",
		n, limit, time.Duration(window)*time.Microsecond)
}

// product returns a*b, for a and b of at least 1, unless it exceeds the longest period.
func product(a, b int64) (int64, bool) {
	if !atMost(a, b, maxSpan) {
		return 0, false
	}
	return a * b, true
}
