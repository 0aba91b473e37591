package main

import (
	"context"
	"errors"
	"sync"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	"github.com/throttled/throttled/v2"
	"github.com/throttled/throttled/v2/store/goredisstore.v9"
	ulule "github.com/ulule/limiter/v3"
	ululeredis "github.com/ulule/limiter/v3/drivers/store/redis"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/quota"
)

// The main job is one request of an agent: an estimate is taken of the agent's quota, its team's and its fleet's, of all
// three or of none, and when the actual cost is known, the three charges are settled.
const estimate, actual = 2, 1

// inSequence ends the names of peers whose calls for a job come one after the other.
const inSequence = ", in sequence"

// owners are the keys of a job: those of an agent, its team and its fleet.
type owners [3]string

// grouping is a way to name them. Charges of one group may have a request id.
type grouping struct {
	name   string
	owners func(agent string) owners
	ids    bool
}

// Ten agents are a team, and ten teams a fleet: the first digits of an agent's number are those of its team, and of its
// fleet.
var groupings = []grouping{
	{"one group", func(agent string) owners {
		n := agent[len("agent-"):]
		fleet := "fleet-" + n[:len(n)-2]
		team := fleet + "/team-" + n[:len(n)-1]
		return owners{team + "/" + agent, team, fleet}
	}, true},
	{"three groups", func(agent string) owners {
		n := agent[len("agent-"):]
		return owners{agent, "team-" + n[:len(n)-1], "fleet-" + n[:len(n)-2]}
	}, false},
}

// ofOwners are the numbers of an agent, its team and its fleet: where an agent has quota left, so have the others.
func ofOwners(n numbers) [3]numbers {
	return [3]numbers{n, {n.capacity * 10, n.period / 10}, {n.capacity * 100, n.period / 100}}
}

// jobSubjects do the main job. The peers have no lists, no receipts and no request ids. Their job charges the three keys in
// sequence or at once, and refunds its charges where a key denies. It is not atomic: a program that ends in between has
// charged a part.
func jobSubjects(g grouping) []subject {
	plain := func(at *target) (redis.UniversalClient, scripter, error) {
		client := goRedis(at)
		return client, client, nil
	}
	auto := func(at *target) (redis.UniversalClient, scripter, error) { return autoPipelined(at) }
	return []subject{
		{onGoRedis, ours, fleetquotaJob("goredis", g)},
		{onRueidis, ours, fleetquotaJob("rueidis", g)},
		{"redis_rate" + inSequence, peer, peerJob(g, plain, redisRateCharge, oneByOne)},
		{redisRateAuto + inSequence, peer, peerJob(g, auto, redisRateCharge, oneByOne)},
		{redisRateAuto + ", at once", peer, peerJob(g, auto, redisRateCharge, allAtOnce)},
		{"ulule/limiter" + inSequence, peer, peerJob(g, plain, ululeCharge, oneByOne)},
		{ululeAuto + inSequence, peer, peerJob(g, auto, ululeCharge, oneByOne)},
		{ululeAuto + ", at once", peer, peerJob(g, auto, ululeCharge, allAtOnce)},
		{"throttled" + inSequence, peer, peerJob(g, plain, throttledCharge, oneByOne)}, // takes no auto-pipelining client
	}
}

func fleetquotaJob(client string, g grouping) func(numbers, *target) (take, func(), error) {
	return func(n numbers, at *target) (take, func(), error) {
		var limits [3]*quota.Limit
		for i, n := range ofOwners(n) {
			limits[i] = quota.NewLimit([]string{"agent", "team", "fleet"}[i], algorithm.TokenBucket(n.capacity, 1, n.period))
		}
		limiter, err := frontDoor(client, at, limits[0])
		if err != nil {
			return nil, nil, err
		}
		newID := newIDs()
		return func(ctx context.Context, agent string) (bool, error) {
			var charges [3]quota.Charge
			for i, key := range g.owners(agent) {
				charges[i] = quota.Charge{Limit: limits[i], Key: key, Cost: estimate}
			}
			if g.ids {
				id := newID()
				for i := range charges {
					charges[i].ID = id
				}
			}
			r, err := limiter.ChargeAll(ctx, charges[:]...)
			if err != nil {
				return false, err
			}
			if err := ofStore(r.Decisions[0]); err != nil || !r.Granted {
				return false, err
			}
			for i := range charges {
				charges[i] = charges[i].Settle(r.Decisions[i], actual)
			}
			_, err = limiter.ChargeAll(ctx, charges[:]...)
			return true, err
		}, func() { limiter.Close() }, nil
	}
}

// scripter has the methods of a client that redis_rate and ulule/limiter call.
type scripter interface {
	redis.Scripter
	ululeredis.Client
}

// A charge takes n tokens of the key of the owner i, and gives them back where n is below 0. A denial takes none.
type charge func(ctx context.Context, i int, key string, n int) (allowed bool, err error)

func redisRateCharge(client scripter, of [3]numbers) (charge, error) {
	l := redis_rate.NewLimiter(client)
	var limits [3]redis_rate.Limit
	for i, n := range of {
		limits[i] = redisRateLimit(n)
	}
	return func(ctx context.Context, i int, key string, n int) (bool, error) {
		r, err := l.AllowN(ctx, key, limits[i], n)
		return err == nil && r.Allowed == n, err
	}, nil
}

func ululeCharge(client scripter, of [3]numbers) (charge, error) {
	store, err := ululeredis.NewStore(client)
	if err != nil {
		return nil, err
	}
	var limiters [3]*ulule.Limiter
	for i, n := range of {
		limiters[i] = ululeLimiter(store, n)
	}
	return func(ctx context.Context, i int, key string, n int) (bool, error) {
		c, err := limiters[i].Increment(ctx, key, int64(n))
		denied := n > 0 && c.Reached
		if err == nil && denied { // it has charged all the same
			_, err = limiters[i].Increment(ctx, key, -int64(n))
		}
		return !denied, err
	}, nil
}

func throttledCharge(client scripter, of [3]numbers) (charge, error) {
	store, err := goredisstore.NewCtx(client.(redis.UniversalClient), "throttled:")
	if err != nil {
		return nil, err
	}
	var limiters [3]*throttled.GCRARateLimiterCtx
	for i, n := range of {
		if limiters[i], err = throttledLimiter(store, n); err != nil {
			return nil, err
		}
	}
	return func(ctx context.Context, i int, key string, n int) (bool, error) {
		limited, _, err := limiters[i].RateLimitCtx(ctx, key, n)
		return !limited, err
	}, nil
}

// peerJob does the job in calls for one key each.
func peerJob(g grouping, open func(*target) (redis.UniversalClient, scripter, error), of func(scripter, [3]numbers) (charge, error), charges charges) func(numbers, *target) (take, func(), error) {
	return func(n numbers, at *target) (take, func(), error) {
		client, through, err := open(at)
		if err != nil {
			return nil, nil, err
		}
		charge, err := of(through, ofOwners(n))
		return byKeys(g, charges, charge), func() { client.Close() }, err
	}
}

// charges charges those keys that are chosen, and returns which were granted.
type charges func(ctx context.Context, charge charge, keys owners, chosen [3]bool, n int) (granted [3]bool, err error)

func byKeys(g grouping, charges charges, charge charge) take {
	return func(ctx context.Context, agent string) (bool, error) {
		keys, all := g.owners(agent), [3]bool{true, true, true}
		taken, err := charges(ctx, charge, keys, all, estimate)
		if err != nil {
			return false, err
		}
		surplus := estimate - actual
		if taken != all {
			surplus = estimate
		}
		_, err = charges(ctx, charge, keys, taken, -surplus)
		return taken == all, err
	}
}

// oneByOne stops at the first denial.
func oneByOne(ctx context.Context, charge charge, keys owners, chosen [3]bool, n int) (granted [3]bool, err error) {
	for i, key := range keys {
		if !chosen[i] {
			continue
		}
		if granted[i], err = charge(ctx, i, key, n); err != nil || !granted[i] {
			return granted, err
		}
	}
	return granted, nil
}

// allAtOnce lets the client put its calls into one pipeline.
func allAtOnce(ctx context.Context, charge charge, keys owners, chosen [3]bool, n int) (granted [3]bool, err error) {
	var errs [3]error
	var wg sync.WaitGroup
	for i, key := range keys {
		if chosen[i] {
			wg.Go(func() { granted[i], errs[i] = charge(ctx, i, key, n) })
		}
	}
	wg.Wait()
	return granted, errors.Join(errs[:]...)
}
