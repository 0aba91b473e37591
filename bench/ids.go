package main

import (
	"context"
	"math/rand/v2"
	"strconv"
	"sync/atomic"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// The names of subjects that targets refer to.
const (
	localIDs     = "fleetquota, with ids"
	localNoIDs   = "fleetquota, without ids"
	goRedisIDs   = "fleetquota on go-redis, with ids"
	goRedisNoIDs = "fleetquota on go-redis, without ids"
	rueidisIDs   = "fleetquota on rueidis, with ids"
	rueidisNoIDs = "fleetquota on rueidis, without ids"
)

var (
	localIDSubjects = []subject{
		{localIDs, ours, charged(openLocal, true)},
		{localNoIDs, ours, charged(openLocal, false)},
	}
	redisIDSubjects = []subject{
		{goRedisIDs, ours, charged(goRedisStore, true)},
		{goRedisNoIDs, ours, charged(goRedisStore, false)},
		{rueidisIDs, ours, charged(rueidisStore, true)},
		{rueidisNoIDs, ours, charged(rueidisStore, false)},
	}
)

func openLocal(*target) (quota.Store, func(), error) { return local.New(), func() {}, nil }

// charged makes an id for each charge, and sends it or not: the callers of both have one.
func charged(open func(*target) (quota.Store, func(), error), send bool) func(numbers, *target) (take, func(), error) {
	return func(n numbers, at *target) (take, func(), error) {
		store, end, err := open(at)
		if err != nil {
			return nil, nil, err
		}
		limit, id := bucket(n), newIDs()
		return func(ctx context.Context, key string) (bool, error) {
			c := quota.Charge{Limit: limit, Key: key, Cost: 1}
			if id := id(); send {
				c.ID = id
			}
			d, err := store.Charge(ctx, c)
			return d.Allowed, err
		}, func() { store.Close(); end() }, nil
	}
}

// newIDs returns a function that returns another request id each time.
func newIDs() func() string {
	var n atomic.Uint64
	n.Store(rand.Uint64())
	return func() string {
		var b [16]byte
		return string(strconv.AppendUint(b[:0], n.Add(1), 36))
	}
}
