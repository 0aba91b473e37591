package algorithm

import (
	"fmt"
	"math"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

const (
	maxHeld     = 1<<52 - 1                     // the largest number a state holds, and so the largest capacity
	maxSpan     = 10 * 365 * 24 * 60 * 60 * 1e6 // ten years in µs
	maxPerMicro = 10_000_000                    // 10^13 a second
	ahead       = quota.Micros(1_000_000)       // a state may be ahead of the clock by this
	forever     = quota.Forever
)

func invalid(format string, args ...any) error {
	return fmt.Errorf("algorithm: %w: "+format, append([]any{quota.ErrInvalid}, args...)...)
}

// refused is the algorithm of numbers that a constructor refused: [quota.NewLimit] asks for the error. A store that meets it
// finds a Spec without a Rule.
type refused struct{ err error }

// carry returns a constructor's rule, or one that carries its error.
func carry(a quota.Algorithm, err error) quota.Algorithm {
	if err != nil {
		return &refused{err}
	}
	return a
}

// Err returns why the numbers were refused.
func (r *refused) Err() error { return r.err }

// Spec returns the zero Spec.
func (r *refused) Spec() quota.Spec { return quota.Spec{} }

// Decide denies, for ever.
func (r *refused) Decide(s quota.State, _ quota.Request, _ quota.Micros) (quota.State, quota.Verdict) {
	return s, quota.Verdict{RetryAfter: forever}
}

// String returns the error's text.
func (r *refused) String() string { return r.err.Error() }

// MarshalText fails.
func (r *refused) MarshalText() ([]byte, error) { return nil, r.err }

// micros checks the arguments that all constructors have: a capacity, and a number of tokens in a time span, under
// their names. It returns the span in µs.
func micros(name string, capacity int64, rate string, tokens int64, span string, per time.Duration) (int64, error) {
	us := int64(per / time.Microsecond)
	switch {
	case capacity < 0 || capacity > maxHeld:
		return 0, invalid("%s is %d; accepted: 0 to 2^52-1 (%d)", name, capacity, int64(maxHeld))
	case tokens < 1:
		return 0, invalid("%s is %d; accepted: at least 1", rate, tokens)
	case per <= 0 || per%time.Microsecond != 0 || us > maxSpan:
		return 0, invalid("%s is %v; accepted: whole microseconds from 1µs to ten years (87600h)", span, per)
	case tokens/maxPerMicro > us || tokens/maxPerMicro == us && tokens%maxPerMicro > 0:
		return 0, invalid("rate is %d in %v; accepted: up to 10^13 a second", tokens, per)
	}
	return us, nil
}

// tick returns the finest power of ten that divides per and for which fits returns true; 0 if there is none.
func tick(per int64, fits func(tick int64) bool) int64 {
	for t := int64(1); t <= per && per%t == 0; t *= 10 {
		if fits(t) {
			return t
		}
	}
	return 0
}

// atMost reports whether a*b <= limit, for a and b of at least 0.
func atMost(a, b, limit int64) bool {
	return a == 0 || b <= limit/a
}

// clamp returns n, but at least 0 and at most limit.
func clamp(n, limit int64) int64 {
	return min(max(n, 0), limit)
}

func gcd(a, b int64) int64 {
	for b != 0 {
		a, b = b, a%b
	}
	return a
}

// ceil returns a/b rounded up, for a >= 0 and b > 0.
func ceil(a, b int64) int64 {
	if b == 1 { // as for most rates; the division is the most expensive step here
		return a
	}
	q := a / b
	if q*b < a {
		q++
	}
	return q
}

// floor returns a/b rounded down, for b > 0.
func floor(a, b int64) int64 {
	q := a / b
	if q*b > a {
		q--
	}
	return q
}

// span returns a number of ticks as a duration, or Never where that is too long; tick is in µs.
func span(ticks, tick int64) time.Duration {
	if !atMost(ticks, tick, math.MaxInt64/1000) {
		return quota.Never
	}
	return quota.Micros(ticks * tick).Duration()
}
