package main

import (
	"context"
	"sync"
	"time"

	"github.com/go-chi/httprate"
	"github.com/sethvargo/go-limiter/memorystore"
	"github.com/throttled/throttled/v2"
	"github.com/throttled/throttled/v2/store/memstore"
	ulule "github.com/ulule/limiter/v3"
	ululememory "github.com/ulule/limiter/v3/drivers/store/memory"
	"golang.org/x/time/rate"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
)

// The names of subjects that targets refer to.
const (
	localStore   = "fleetquota, store"
	localLimiter = "fleetquota, limiter"
	xtimeKeyed   = "x/time/rate in a sync.Map"
	sethvargo    = "sethvargo/go-limiter"
)

var localSubjects = []subject{
	{localStore, ours, openLocalStore},
	{localLimiter, ours, func(n numbers, _ *target) (take, func(), error) {
		t, err := throughLimiter(local.New(), n)
		return t, func() {}, err
	}},
	{xtimeKeyed, peer, openXTime},
	{sethvargo, peer, openSethvargo},
	{"ulule/limiter", peer, func(n numbers, _ *target) (take, func(), error) {
		return ululeTake(ululememory.NewStore(), n), func() {}, nil
	}},
	{"throttled", peer, func(n numbers, _ *target) (take, func(), error) {
		store, err := memstore.NewCtx(0)
		if err != nil {
			return nil, nil, err
		}
		return throttledTake(store, n)
	}},
	{"httprate's counter", peer, openHTTPRate},
}

func openLocalStore(n numbers, _ *target) (take, func(), error) {
	limit, store := bucket(n), local.New()
	return func(ctx context.Context, key string) (bool, error) {
		d, err := store.Charge(ctx, quota.Charge{Limit: limit, Key: key, Cost: 1})
		return d.Allowed, err
	}, func() {}, nil
}

// openXTime keeps a rate.Limiter for each key in a sync.Map, as programs do that need one for each client.
func openXTime(n numbers, _ *target) (take, func(), error) {
	var limiters sync.Map // of *rate.Limiter, by key
	return func(_ context.Context, key string) (bool, error) {
		l, ok := limiters.Load(key)
		if !ok {
			l, _ = limiters.LoadOrStore(key, rate.NewLimiter(rate.Every(n.period), int(n.capacity)))
		}
		return l.(*rate.Limiter).Allow(), nil
	}, func() {}, nil
}

func openSethvargo(n numbers, _ *target) (take, func(), error) {
	store, err := memorystore.New(&memorystore.Config{
		Tokens: uint64(n.capacity), Interval: time.Duration(n.capacity) * n.period,
		SweepInterval: day, SweepMinTTL: day,
	})
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context, key string) (bool, error) {
		_, _, _, ok, err := store.Take(ctx, key)
		return ok, err
	}, func() { store.Close(context.Background()) }, nil
}

func ululeLimiter(store ulule.Store, n numbers) *ulule.Limiter {
	return ulule.New(store, ulule.Rate{Period: day, Limit: n.capacity})
}

func ululeTake(store ulule.Store, n numbers) take {
	l := ululeLimiter(store, n)
	return func(ctx context.Context, key string) (bool, error) {
		c, err := l.Get(ctx, key)
		return !c.Reached, err
	}
}

func throttledLimiter(store throttled.GCRAStoreCtx, n numbers) (*throttled.GCRARateLimiterCtx, error) {
	l, err := throttled.NewGCRARateLimiterCtx(store, throttled.RateQuota{
		MaxRate: throttled.PerDuration(1, n.period), MaxBurst: int(n.capacity - 1),
	})
	if err != nil {
		return nil, err
	}
	// It tries again when another caller was faster, ten times unless told: on one key it would mostly fail.
	l.SetMaxCASAttemptsLimit(1 << 20)
	return l, nil
}

func throttledTake(store throttled.GCRAStoreCtx, n numbers) (take, func(), error) {
	l, err := throttledLimiter(store, n)
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context, key string) (bool, error) {
		limited, _, err := l.RateLimitCtx(ctx, key, 1)
		return !limited, err
	}, func() {}, nil
}

// openHTTPRate uses the counter as httprate's OnLimit does, without the headers.
func openHTTPRate(n numbers, _ *target) (take, func(), error) {
	var mu sync.Mutex
	counter := httprate.NewLocalLimitCounter(day)
	return func(_ context.Context, key string) (bool, error) {
		now := time.Now().UTC()
		window := now.Truncate(day)
		mu.Lock()
		defer mu.Unlock()
		current, previous, err := counter.Get(key, window, window.Add(-day))
		if err != nil {
			return false, err
		}
		used := float64(current) + float64(previous)*(1-float64(now.Sub(window))/float64(day))
		if used+1 > float64(n.capacity) {
			return false, nil
		}
		return true, counter.IncrementBy(key, window, 1)
	}, func() {}, nil
}
