package algorithm

import (
	"math/bits"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

var (
	_ driver.Sharer = (*tokenBucket)(nil)
	_ driver.Sharer = (*fixedWindow)(nil)
	_ driver.Sharer = (*slidingWindow)(nil)
	_ driver.Sharer = (*slidingLog)(nil)
)

// Share is exact: n shares together gain as many tokens as the whole bucket. It fails with ErrInvalid where
// the share's period, up to n times the bucket's, or the time in which the share fills, which a capacity
// below n lengthens, exceeds ten years.
func (b *tokenBucket) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return b, nil
	}
	// perTick tokens come in unit ticks; a share gains them in n times as long.
	g := gcd(b.perTick, n)
	per, fits := product(b.unit*b.tick, n/g)
	if !fits {
		return nil, invalid("one share of %d gains %d tokens in %d × %d µs; accepted: periods up to ten years (87600h)",
			n, b.perTick/g, n/g, b.unit*b.tick)
	}
	return TokenBucket(max(b.tokens/n, 1), b.perTick/g, time.Duration(per)*time.Microsecond)
}

// Share counts in the same windows. A limit below n becomes 1 in a window that is longer as needed; it fails
// with ErrInvalid where that exceeds ten years.
func (f *fixedWindow) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return f, nil
	}
	limit, window, err := shareWindow(f.limit, f.window, n)
	if err != nil {
		return nil, err
	}
	return newFixedWindow(limit, window, f.fromFirst)
}

// Share counts in the same windows. A limit below n becomes 1 in a window that is longer as needed; it fails
// with ErrInvalid where that exceeds ten years.
func (w *slidingWindow) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return w, nil
	}
	limit, window, err := shareWindow(w.limit, w.window, n)
	if err != nil {
		return nil, err
	}
	return SlidingWindow(limit, window)
}

// Share counts in the same window. A limit below n becomes 1 in a window that is longer as needed; it fails with
// ErrInvalid where that exceeds ten years.
func (l *slidingLog) Share(n int64) (quota.Algorithm, error) {
	if n <= 1 {
		return l, nil
	}
	limit, window, err := shareWindow(l.limit, l.window, n)
	if err != nil {
		return nil, err
	}
	return SlidingWindowLog(limit, window)
}

// shareWindow returns the limit and window of one share in n; window is in µs. n shares never admit more than
// the whole.
func shareWindow(limit, window, n int64) (int64, time.Duration, error) {
	if limit >= n {
		return limit / n, time.Duration(window) * time.Microsecond, nil
	}
	// 1 in ceil(window·n/limit).
	hi, lo := bits.Mul64(uint64(window), uint64(n))
	if hi == 0 {
		us, rest := lo/uint64(limit), lo%uint64(limit)
		if rest > 0 {
			us++
		}
		if us <= maxSpan {
			return 1, time.Duration(us) * time.Microsecond, nil
		}
	}
	return 0, 0, invalid("one share of %d of a limit of %d in %v is too slow; accepted: at least 1 token in ten years (87600h)",
		n, limit, time.Duration(window)*time.Microsecond)
}

// product returns a*b, for a and b of at least 1, unless it exceeds the longest period.
func product(a, b int64) (int64, bool) {
	if !atMost(a, b, maxSpan) {
		return 0, false
	}
	return a * b, true
}
