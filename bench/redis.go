package main

import (
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/go-redis/redis_rate/v10"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/throttled/throttled/v2/store/goredisstore.v9"
	ululeredis "github.com/ulule/limiter/v3/drivers/store/redis"

	"github.com/fleetquota/fleetquota"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/lease"
	fleetrueidis "github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// The names of subjects that targets refer to.
const (
	onGoRedis       = "fleetquota on go-redis"
	onRueidis       = "fleetquota on rueidis"
	standardGoRedis = "fleetquota on go-redis, through Standard"
	standardRueidis = "fleetquota on rueidis, through Standard"
	leasedRueidis   = "fleetquota, leases on rueidis"
	goRedisINCR     = "floor: go-redis INCR"
	rueidisINCR     = "floor: rueidis INCR"
	goRedisScript   = "floor: go-redis, a script of TIME, GET and SET"
	rueidisScript   = "floor: rueidis, a script of TIME, GET and SET"
	redisRateAuto   = "redis_rate, auto-pipelined"
	ululeAuto       = "ulule/limiter, auto-pipelined"
)

// pairs are subjects that are compared with another one count by count: with the least that a decision needs on the
// client below, or with charges that have no request id.
var pairs = map[string]string{
	onGoRedis: goRedisScript, standardGoRedis: goRedisScript,
	onRueidis: rueidisScript, standardRueidis: rueidisScript,
	localIDs: localNoIDs, goRedisIDs: goRedisNoIDs, rueidisIDs: rueidisNoIDs,
}

// Where a client has settings, a peer is there once with each that can be the best for it.
var redisSubjects = []subject{
	{onGoRedis, ours, func(n numbers, at *target) (take, func(), error) {
		store, end, err := goRedisStore(at)
		return opened(store, err, n, end)
	}},
	{onRueidis, ours, func(n numbers, at *target) (take, func(), error) {
		store, end, err := rueidisStore(at)
		return opened(store, err, n, end)
	}},
	{leasedRueidis, leased, func(n numbers, at *target) (take, func(), error) {
		below, end, err := rueidisStore(at)
		if err != nil {
			return nil, nil, err
		}
		store, err := lease.New(below, &lease.Options{Instances: func() int64 { return 1 }})
		return opened(store, err, n, end)
	}},
	{"redis_rate", peer, func(n numbers, at *target) (take, func(), error) {
		client := goRedis(at)
		return redisRate(redis_rate.NewLimiter(client), n), func() { client.Close() }, nil
	}},
	{redisRateAuto, peer, func(n numbers, at *target) (take, func(), error) {
		client, auto, err := autoPipelined(at)
		if err != nil {
			return nil, nil, err
		}
		return redisRate(redis_rate.NewLimiter(auto), n), func() { client.Close() }, nil
	}},
	{"ulule/limiter", peer, func(n numbers, at *target) (take, func(), error) {
		client := goRedis(at)
		store, err := ululeredis.NewStore(client)
		return ululeTake(store, n), func() { client.Close() }, err
	}},
	{ululeAuto, peer, func(n numbers, at *target) (take, func(), error) {
		client, auto, err := autoPipelined(at)
		if err != nil {
			return nil, nil, err
		}
		store, err := ululeredis.NewStore(auto)
		return ululeTake(store, n), func() { client.Close() }, err
	}},
	{"throttled", peer, func(n numbers, at *target) (take, func(), error) { // takes no auto-pipelining client
		client := goRedis(at)
		store, err := goredisstore.NewCtx(client, "throttled:")
		if err != nil {
			return nil, nil, err
		}
		t, _, err := throttledTake(store, n)
		return t, func() { client.Close() }, err
	}},
	{goRedisINCR, floor, func(_ numbers, at *target) (take, func(), error) {
		client := goRedis(at)
		return func(ctx context.Context, key string) (bool, error) {
			return true, client.Incr(ctx, key).Err()
		}, func() { client.Close() }, nil
	}},
	{"floor: go-redis INCR, auto-pipelined", floor, func(_ numbers, at *target) (take, func(), error) {
		client, auto, err := autoPipelined(at)
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, key string) (bool, error) {
			return true, auto.Incr(ctx, key).Err()
		}, func() { client.Close() }, nil
	}},
	{rueidisINCR, floor, rueidisFloor(func(c rueidis.Client, key string) rueidis.Completed {
		return c.B().Incr().Key(key).Build()
	})},
	{"floor: rueidis, a script that returns 1", floor, rueidisScripted("return 1")},
	{rueidisScript, floor, rueidisScripted(timeGetSet)},
	{goRedisScript, floor, func(_ numbers, at *target) (take, func(), error) {
		client, script := goRedis(at), redis.NewScript(timeGetSet)
		return func(ctx context.Context, key string) (bool, error) {
			return true, script.Run(ctx, client, []string{key}).Err()
		}, func() { client.Close() }, nil
	}},
}

// timeGetSet does the least that a decision by the server's clock must do.
const timeGetSet = `redis.call("TIME") local n = redis.call("GET", KEYS[1]) or 0 redis.call("SET", KEYS[1], n + 1, "PX", 3600000) return n`

// standardSubjects are as programs have them that use the front door.
var standardSubjects = []subject{
	{standardGoRedis, ours, throughStandard("goredis")},
	{standardRueidis, ours, throughStandard("rueidis")},
}

func throughStandard(client string) func(numbers, *target) (take, func(), error) {
	return func(n numbers, at *target) (take, func(), error) {
		limiter, err := frontDoor(client, at, bucket(n))
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, key string) (bool, error) {
			d, err := limiter.Take(ctx, key, 1)
			return d.Allowed, errors.Join(err, ofStore(d))
		}, func() { limiter.Close() }, nil
	}
}

// frontDoor opens a limiter as FromEnv does with FLEET_SIZE: with the policies of Standard, and around them Fallback. The
// timeout is longer, for machines that are busy.
func frontDoor(client string, at *target, limit *quota.Limit) (*fleetquota.Limiter, error) {
	return fleetquota.New(context.Background(), fleetquota.Config{
		URL: at.url(client), Limit: limit, Fleet: 10, Timeout: 5 * time.Second, Logger: slog.New(slog.DiscardHandler),
	})
}

// ofStore fails where the fallback decided.
func ofStore(d quota.Decision) error {
	if d.Source != quota.FromStore {
		return fmt.Errorf("the store did not decide: %v", d)
	}
	return nil
}

// opened uses a store as programs do; end closes the client under it.
func opened(store quota.Store, err error, n numbers, end func()) (take, func(), error) {
	if err != nil {
		return nil, nil, err
	}
	t, err := throughLimiter(store, n)
	return t, func() { store.Close(); end() }, err
}

func goRedis(at *target) redis.UniversalClient {
	if at.cluster {
		return redis.NewClusterClient(&redis.ClusterOptions{Addrs: at.addrs(), ContextTimeoutEnabled: true})
	}
	return redis.NewClient(&redis.Options{Addr: at.addrs()[0], ContextTimeoutEnabled: true})
}

func autoPipelined(at *target) (redis.UniversalClient, *redis.AutoPipeliner, error) {
	client := goRedis(at)
	auto, err := client.(interface {
		AutoPipeline() (*redis.AutoPipeliner, error)
	}).AutoPipeline()
	return client, auto, err
}

func newRueidis(at *target) (rueidis.Client, error) {
	o := rueidis.ClientOption{
		InitAddress: at.addrs(), AlwaysPipelining: true, DisableCache: true, ForceSingleClient: !at.cluster,
		ClusterOption: rueidis.ClusterOption{MaxMovedRedirections: 3},
	}
	if at.cluster {
		o.MaxFlushDelay = 20 * time.Microsecond // as backend/rueidis sets it, and better for the floor too
	}
	return rueidis.NewClient(o)
}

func goRedisStore(at *target) (quota.Store, func(), error) {
	client := goRedis(at)
	store, err := goredis.New(client, nil)
	return store, func() { client.Close() }, err
}

func rueidisStore(at *target) (quota.Store, func(), error) {
	client, err := newRueidis(at)
	if err != nil {
		return nil, nil, err
	}
	store, err := fleetrueidis.New(client, nil)
	return store, client.Close, err
}

func redisRateLimit(n numbers) redis_rate.Limit {
	return redis_rate.Limit{Rate: 1, Period: n.period, Burst: int(n.capacity)}
}

func redisRate(l *redis_rate.Limiter, n numbers) take {
	limit := redisRateLimit(n)
	return func(ctx context.Context, key string) (bool, error) {
		r, err := l.Allow(ctx, key, limit)
		return err == nil && r.Allowed > 0, err
	}
}

func rueidisFloor(command func(c rueidis.Client, key string) rueidis.Completed) func(numbers, *target) (take, func(), error) {
	return func(_ numbers, at *target) (take, func(), error) {
		client, err := newRueidis(at)
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, key string) (bool, error) {
			return true, client.Do(ctx, command(client, key)).Error()
		}, client.Close, nil
	}
}

func rueidisScripted(text string) func(numbers, *target) (take, func(), error) {
	script := rueidis.NewLuaScript(text)
	return func(_ numbers, at *target) (take, func(), error) {
		client, err := newRueidis(at)
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context, key string) (bool, error) {
			return true, script.Exec(ctx, client, []string{key}, nil).Error()
		}, client.Close, nil
	}
}

// target is where subjects do their work: one Redis server, the masters of a cluster, or PostgreSQL.
type target struct {
	masters  []*redisserver.Server
	cluster  bool
	postgres string // the URL
}

// launchServer starts a server for the time of the measurements.
func launchServer(dir string) (*target, func(), error) {
	s, err := redisserver.Launch(dir, redisserver.Config{})
	if err != nil {
		return nil, nil, err
	}
	return &target{masters: []*redisserver.Server{s}}, s.Stop, nil
}

// launchCluster starts a cluster of three masters. Its replicas are ended and forgotten: they would take their
// part of the few processors.
func launchCluster(dir string) (*target, func(), error) {
	c, err := redisserver.LaunchCluster(dir)
	if err != nil {
		return nil, nil, err
	}
	at := &target{cluster: true}
	for _, n := range c.Nodes[:3] {
		at.masters = append(at.masters, n.Server)
	}
	for _, replica := range c.Nodes[3:] {
		replica.Stop()
		for _, m := range at.masters {
			if _, err := m.Do("CLUSTER", "FORGET", replica.ID); err != nil {
				c.Stop()
				return nil, nil, err
			}
		}
	}
	return at, c.Stop, nil
}

func (t *target) addrs() []string {
	var list []string
	for _, s := range t.masters {
		list = append(list, s.Addr())
	}
	return list
}

// url is the target for the front door.
func (t *target) url(client string) string {
	addrs := t.addrs()
	if !t.cluster {
		return "redis://" + addrs[0] + "?client=" + client
	}
	return "redis+cluster://" + addrs[0] + "?addr=" + strings.Join(addrs[1:], "&addr=") + "&client=" + client
}

// processes returns the numbers of the servers' processes.
func (t *target) processes() ([]int, error) {
	var list []int
	for _, s := range t.masters {
		info, err := s.Info("server")
		if err != nil {
			return nil, err
		}
		n, err := strconv.Atoi(info["process_id"])
		if err != nil {
			return nil, fmt.Errorf("INFO server: process_id: %w", err)
		}
		list = append(list, n)
	}
	return list, nil
}

// flush removes all keys and scripts.
func (t *target) flush() error {
	for _, s := range t.masters {
		for _, command := range []string{"FLUSHALL", "SCRIPT FLUSH"} {
			if _, err := s.Do(strings.Fields(command)...); err != nil {
				return err
			}
		}
	}
	return nil
}

// sum adds numbers up from INFO of all masters.
func (t *target) sum(section string, names ...string) (float64, error) {
	total := 0.0
	for _, s := range t.masters {
		info, err := s.Info(section)
		if err != nil {
			return 0, err
		}
		for _, name := range names {
			n, err := strconv.ParseFloat(info[name], 64)
			if err != nil {
				return 0, fmt.Errorf("INFO %s: %s: %w", section, name, err)
			}
			total += n
		}
	}
	return total, nil
}

// cpu returns the processor time of the threads that execute commands.
func (t *target) cpu() (time.Duration, error) {
	seconds, err := t.sum("cpu", "used_cpu_sys_main_thread", "used_cpu_user_main_thread")
	return time.Duration(seconds * float64(time.Second)), err
}

func (t *target) usedMemory() (float64, error) { return t.sum("memory", "used_memory") }

// memoryUsage returns the MEMORY USAGE of some key, times the number of Redis keys that a limit's key has.
func (t *target) memoryUsage(keys int) (float64, error) {
	total := 0.0
	for _, s := range t.masters {
		n, err := s.Do("DBSIZE")
		if err != nil {
			return 0, err
		}
		total += float64(n.(int64))
	}
	if total == 0 { // the script that returns 1
		return 0, nil
	}
	key, err := t.masters[0].Do("RANDOMKEY")
	if err != nil {
		return 0, err
	}
	name, ok := key.(string)
	if !ok {
		return 0, errors.New("the server has no key any more")
	}
	bytes, err := t.masters[0].Do("MEMORY", "USAGE", name)
	if err != nil {
		return 0, err
	}
	n, ok := bytes.(int64)
	if !ok {
		return 0, errors.New("MEMORY USAGE of a key that is gone")
	}
	return float64(n) * max(1, float64(int(total/float64(keys)+0.5))), nil
}

// redisBenchmarks are runs of redis-benchmark with 50 connections, and a pipeline of 16 commands on each.
var redisBenchmarks = []struct {
	name    string
	command []string
}{
	{"redis-benchmark: INCR", []string{"INCR", "agent-__rand_int__"}},
	{"redis-benchmark: a script that returns 1", []string{"EVALSHA", "return 1", "1", "agent-__rand_int__"}},
	{"redis-benchmark: a script of TIME, GET and SET", []string{"EVALSHA", timeGetSet, "1", "agent-__rand_int__"}},
}

// redisBenchmark sends a command n times and returns how many a second. The second word of an EVALSHA is the
// script's text.
func redisBenchmark(ctx context.Context, at *target, n, keys int, command []string) (sample, error) {
	command = slices.Clone(command)
	if command[0] == "EVALSHA" {
		sha, err := at.masters[0].Do("SCRIPT", "LOAD", command[1])
		if err != nil {
			return nil, err
		}
		command[1] = sha.(string)
	}
	args := append([]string{"-h", "127.0.0.1", "-p", strconv.Itoa(at.masters[0].Port()), "-c", "50", "-P", "16",
		"-n", strconv.Itoa(n), "-r", strconv.Itoa(keys), "--csv"}, command...)
	before, err := at.cpu()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, "redis-benchmark", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, err
	}
	after, err := at.cpu()
	if err != nil {
		return nil, err
	}
	lines, err := csv.NewReader(strings.NewReader(string(out))).ReadAll()
	if err != nil || len(lines) == 0 || len(lines[len(lines)-1]) < 2 {
		return nil, fmt.Errorf("redis-benchmark prints %q", out)
	}
	perSecond, err := strconv.ParseFloat(lines[len(lines)-1][1], 64)
	if err != nil {
		return nil, err
	}
	return sample{decisions: perSecond, serverCPU: micros(after-before) / float64(n)}, nil
}
