package backend

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// Env is the configuration that FromEnv reads: a store, and the numbers of a token bucket, which
// algorithm.TokenBucket accepts.
type Env struct {
	Store    quota.Store   // the caller must close it
	Capacity int64         // tokens, 1 to 2^52-1
	Refill   int64         // tokens gained each Per, 1 or more
	Per      time.Duration // whole seconds, 1s or more
}

const (
	maxCapacity int64 = 1<<52 - 1
	maxRate     int64 = 1_000_000_000 // tokens a second
	maxDecimals       = 8             // 10^8 seconds are less than the ten years that a period may last
)

// FromEnv reads the configuration from environment variables, and opens the store. Each variable may be
// absent or empty, for the default.
//
//	REDIS_URL          a URL that Open opens; default memory://
//	TOKEN_BUCKET_SIZE  capacity in tokens, 1 to 2^52-1; default 1000
//	TOKEN_REFILL_RATE  tokens a second, up to 10^9, with up to 8 decimals; default 10.0
//
// FromEnv reads the rate exactly: 10.5 is 21 tokens every two seconds. A value that is not accepted is
// [quota.ErrInvalid], and the error names the variable; FromEnv then opens no store. It also fails where
// [Open] does.
func FromEnv(ctx context.Context) (Env, error) {
	var e Env
	var err error
	if e.Capacity, e.Refill, e.Per, _, err = bucket(); err != nil {
		return Env{}, err
	}
	if e.Store, err = Open(ctx, env("REDIS_URL", "memory://")); err != nil {
		return Env{}, fmt.Errorf("backend: REDIS_URL: %w", err)
	}
	return e, nil
}

// BucketFromEnv returns the token bucket of TOKEN_BUCKET_SIZE and TOKEN_REFILL_RATE alone, which it reads as [FromEnv] does.
func BucketFromEnv() (quota.Algorithm, error) {
	_, _, _, b, err := bucket()
	return b, err
}

// bucket reads the variables of the bucket.
func bucket() (capacity, refill int64, per time.Duration, b quota.Algorithm, err error) {
	size, rate := env("TOKEN_BUCKET_SIZE", "1000"), env("TOKEN_REFILL_RATE", "10.0")
	if capacity, err = parseSize(size); err != nil {
		return 0, 0, 0, nil, err
	}
	if refill, per, err = parseRate(rate); err != nil {
		return 0, 0, 0, nil, err
	}
	b = algorithm.TokenBucket(capacity, refill, per)
	if err = quota.NewLimit("tokens", b).Err(); err != nil {
		return 0, 0, 0, nil, fmt.Errorf("backend: TOKEN_BUCKET_SIZE %s with TOKEN_REFILL_RATE %s: %w", size, rate, err)
	}
	return capacity, refill, per, b, nil
}

func env(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}

func parseSize(s string) (int64, error) {
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 1 || n > maxCapacity || !digits(s) {
		return 0, invalid("TOKEN_BUCKET_SIZE is %s; accepted: a whole number of tokens from 1 to %d", bounded(s), maxCapacity)
	}
	return n, nil
}

// parseRate reads a decimal number of tokens a second as a reduced fraction, without rounding.
func parseRate(s string) (refill int64, per time.Duration, err error) {
	bad := invalid("TOKEN_REFILL_RATE is %s; accepted: tokens a second above 0 and up to %d, with up to %d digits after the point, "+
		"such as 10 or 10.5", bounded(s), maxRate, maxDecimals)
	whole, fraction, point := strings.Cut(s, ".")
	if !digits(whole) || point && !digits(fraction) {
		return 0, 0, bad
	}
	fraction = strings.TrimRight(fraction, "0")
	whole = strings.TrimLeft(whole, "0")
	if len(fraction) > maxDecimals || len(whole) > len(strconv.FormatInt(maxRate, 10)) {
		return 0, 0, bad
	}
	seconds := int64(1)
	for range fraction {
		seconds *= 10
	}
	// At most 10 and 8 digits: below 2^63.
	n, err := strconv.ParseInt("0"+whole+fraction, 10, 64)
	if err != nil || n == 0 || n > maxRate*seconds {
		return 0, 0, bad
	}
	for _, prime := range [...]int64{2, 5} {
		for n%prime == 0 && seconds%prime == 0 {
			n, seconds = n/prime, seconds/prime
		}
	}
	return n, time.Duration(seconds) * time.Second, nil
}

// digits reports whether s is one or more of the digits 0 to 9.
func digits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}
