package quota

import (
	"errors"
	"fmt"
	"hash/maphash"
	"math"
	"time"
	"unique"
)

// A Limit is a named rule. Stores keep consumption under the name, so limits with one name and different numbers share
// their consumption: a limit's numbers may change while it is in use, and each tenant may have numbers of its own.
// Limits are immutable and safe for concurrent use; [NewLimit] makes them. The zero Limit is not valid, see [Limit.Err].
type Limit struct {
	name      string
	handle    unique.Handle[string]
	hash      uint64
	algorithm Algorithm // nil in the zero Limit alone
	spec      Spec      // zero where err is not nil
	err       error
}

// maxLimitName is the longest name of a limit, in bytes.
const maxLimitName = 64

// maxTTL is the longest Spec.TTL.
const maxTTL = 10 * 365 * 24 * time.Hour

// NewLimit returns the limit called name, kept by the algorithm. A name must have 1 to 64 letters, digits, '.', '_'
// and '-', in ASCII. Any other name, a nil algorithm, and one whose constructor refused its numbers, make a limit that is
// not valid: it carries its ErrInvalid, see [Limit.Err], and so do all calls that name it, before any I/O. So a limiter is
// made in one expression, and NewLimiter returns the error:
//
//	limiter, err := quota.NewLimiter(store, quota.NewLimit("agent", algorithm.TokenBucket(1000, 10, time.Second)), nil)
//
// A limit of the same name with other numbers takes over each key's consumption, and the time since the key's last
// charge, which counts by the new numbers. With a rate of 100 a second in place of one a second, a key that was last
// charged ten seconds ago has gained up to 1000 tokens, and not 10.
func NewLimit(name string, algorithm Algorithm) *Limit {
	l := &Limit{name: name, handle: unique.Make(name), hash: maphash.String(nameSeed, name), algorithm: algorithm}
	if l.spec, l.err = specOf(name, algorithm); l.err != nil {
		l.algorithm = noAlgorithm{l.err}
	}
	return l
}

// specOf returns the spec of an algorithm, unless it or the limit's name is not valid.
func specOf(name string, algorithm Algorithm) (Spec, error) {
	if !validLimitName(name) {
		return Spec{}, invalid("limit name", name, "1 to 64 of the characters a-z A-Z 0-9 . _ -")
	}
	if algorithm == nil {
		return Spec{}, invalid("algorithm of limit "+name, "nil", "an algorithm, such as algorithm.TokenBucket gives")
	}
	if a, ok := algorithm.(interface{ Err() error }); ok {
		if err := a.Err(); errors.Is(err, ErrInvalid) {
			return Spec{}, err
		} else if err != nil {
			return Spec{}, fmt.Errorf("quota: %w: algorithm of limit %s: %w", ErrInvalid, name, err)
		}
	}
	spec := algorithm.Spec()
	if !spec.Rule.Valid() || spec.Unit < 0 || spec.Capacity < 0 || spec.Debt < 0 || spec.Window < 0 || spec.TTL < 0 || spec.TTL > maxTTL {
		return Spec{}, invalid("spec of limit "+name, spec, "a rule of letters, digits, '.', '_' and '-', a unit, a capacity, a debt and a window of at least 0, and a TTL of up to ten years")
	}
	return spec, nil
}

// noAlgorithm is the algorithm of a limit that is not valid.
type noAlgorithm struct{ err error }

func (n noAlgorithm) Err() error   { return n.err }
func (noAlgorithm) Spec() Spec     { return Spec{} }
func (noAlgorithm) String() string { return "not valid" }

// Decide denies, for ever.
func (noAlgorithm) Decide(s State, _ Request, _ Micros) (State, Verdict) {
	return s, Verdict{RetryAfter: Forever}
}

// Err returns nil, or the ErrInvalid of a limit that is not valid: NewLimit refused its name or its algorithm, or did not make
// it, as the zero Limit and nil. A program that makes limits of numbers from outside may ask it early; limiters, and all stores
// and policies, do so anyway.
func (l *Limit) Err() error {
	switch {
	case l == nil:
		return invalid("limit", "nil", "a limit that NewLimit made")
	case l.algorithm == nil:
		return invalid("limit", "the zero Limit", "a limit that NewLimit made")
	}
	return l.err
}

// Must returns v, and panics if err is not nil. Use it where only the program's own constants can be wrong:
//
//	var tokens = quota.Must(algorithm.ParseLimit("tokens: 1000 burst 10/s bucket"))
func Must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Name returns the limit's name.
func (l *Limit) Name() string { return l.name }

// String returns the limit's name and rule, such as "tokens: 1000 burst 10/s bucket", from which algorithm.ParseLimit
// makes the limit again. Where the algorithm has no String method the text has the rule's name and capacity, such as
// "tokens: tally-1, capacity 1000", and "tokens: not valid" where the limit has an Err.
func (l *Limit) String() string {
	if l == nil || l.algorithm == nil {
		return "no limit"
	}
	if s, ok := l.algorithm.(fmt.Stringer); ok {
		return l.name + ": " + s.String()
	}
	return fmt.Sprintf("%s: %s, capacity %d", l.name, l.spec.Rule, l.spec.Capacity)
}

// MarshalText returns the text of String, which is how a limit stands in JSON. It fails with Err.
func (l *Limit) MarshalText() ([]byte, error) {
	if err := l.Err(); err != nil {
		return nil, err
	}
	return []byte(l.String()), nil
}

// Capacity returns the most tokens that one request can take.
func (l *Limit) Capacity() int64 { return l.spec.Capacity }

// Window returns the time in which the whole capacity comes back: the window of a rule that has one, and the time in
// which a bucket fills. It is 0 where the rule has no such time, or does not tell.
func (l *Limit) Window() time.Duration { return l.spec.Window }

// TTL returns how long a hold of the limit's tokens lasts, see [OpHold]; 0 where the limit has no holds.
func (l *Limit) TTL() time.Duration { return l.spec.TTL }

// Rate returns how many tokens a second the limit admits in the long run: Capacity in each Window. It is 0 for a capacity
// of 0, +Inf for a rule that admits every cost, and NaN where the rule does not tell its window.
func (l *Limit) Rate() float64 {
	switch {
	case l.spec.Capacity == 0:
		return 0
	case l.spec.Window > 0:
		return float64(l.spec.Capacity) / l.spec.Window.Seconds()
	case l.spec.Capacity == math.MaxInt64:
		return math.Inf(1)
	}
	return math.NaN()
}

// Handle returns the limit's name as a handle: limits with one name have one handle.
func (l *Limit) Handle() unique.Handle[string] { return l.handle }

// Hash returns a hash of the limit's name. It differs from process to process.
func (l *Limit) Hash() uint64 { return l.hash }

var nameSeed = maphash.MakeSeed()

// Algorithm returns the limit's algorithm; of a limit that is not valid, one that denies.
func (l *Limit) Algorithm() Algorithm { return l.algorithm }

// Spec returns the algorithm's spec, which must not be modified.
func (l *Limit) Spec() *Spec { return &l.spec }

func validLimitName(name string) bool {
	if len(name) == 0 || len(name) > maxLimitName {
		return false
	}
	for i := 0; i < len(name); i++ {
		if !nameByte(name[i]) {
			return false
		}
	}
	return true
}

// nameByte reports whether names of limits and rules may have c: none of them is special to any store.
func nameByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '_' || c == '-'
}
