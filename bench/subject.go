package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// A take asks for one token of a key.
type take func(ctx context.Context, key string) (allowed bool, err error)

// A subject is a library in one configuration, or a floor: something that does less than any library must.
type subject struct {
	name string
	kind kind
	// open makes a limiter of n at a target, which is nil for a local one. close ends it.
	open func(n numbers, at *target) (t take, close func(), err error)
}

type kind uint8

const (
	peer kind = iota
	ours
	leased // ours too, but most decisions do not travel
	floor
)

// numbers are those of a bucket: capacity tokens, and one more each period. A library that has only windows
// allows capacity a day.
type numbers struct {
	capacity int64
	period   time.Duration
}

const day = 24 * time.Hour

var (
	plenty = numbers{1 << 32, time.Millisecond} // one key cannot use it up
	// Many keys use some of theirs, and none becomes full again, so that every store keeps all of them.
	share = numbers{100_000, 30 * time.Minute}
	once  = numbers{1, day} // used up by the first charge
)

// bucket returns n as a limit of this library.
func bucket(n numbers) *quota.Limit {
	return quota.NewLimit("tokens", algorithm.TokenBucket(n.capacity, 1, n.period))
}

// throughLimiter is a store used as programs use it.
func throughLimiter(store quota.Store, n numbers) (take, error) {
	limiter, err := quota.NewLimiter(store, bucket(n), nil)
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, key string) (bool, error) {
		d, err := limiter.Take(ctx, key, 1)
		return d.Allowed, err
	}, nil
}

// keyset is the text of n keys on end: a slice of a million strings would be work for the garbage collector
// that no store has made.
type keyset string

const keyLength = len("agent-0000000000")

func newKeyset(n int) keyset {
	var b strings.Builder
	b.Grow(n * keyLength)
	for i := range n {
		fmt.Fprintf(&b, "agent-%010d", i)
	}
	return keyset(b.String())
}

func (k keyset) len() int        { return len(k) / keyLength }
func (k keyset) at(i int) string { return string(k[i*keyLength : (i+1)*keyLength]) }

// part returns the i-th of equal parts.
func (k keyset) part(i, parts int) keyset {
	n := k.len() / parts * keyLength
	return k[i*n : (i+1)*n]
}

// picker returns a function that returns keys in random order.
func (k keyset) picker() func() string {
	if k.len() == 1 {
		return func() string { return string(k) }
	}
	random := rand.NewPCG(rand.Uint64(), rand.Uint64())
	n := uint64(k.len())
	return func() string { return k.at(int(random.Uint64() % n)) }
}
