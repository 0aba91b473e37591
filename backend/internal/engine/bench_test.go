package engine_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"
	rueidisclient "github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/rueidis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/resilience"
)

// floorText does what any decision with the server's clock must: read the time, read, write with a lifetime.
const floorText = "redis.call('TIME') redis.call('GET', KEYS[1]) redis.call('SET', KEYS[1], ARGV[1], 'PX', 60000) return 1"

// BenchmarkDecision compares a decision with the floor through the same bare client, in one run: go test
// -bench Decision -count 5. The keys are 100 000; g256 is 256 goroutines on two cores.
func BenchmarkDecision(b *testing.B) {
	server := redisserver.Start(b)
	ctx := context.Background()
	value := "0123456789012345678901234"

	plain := goredisclient.NewClient(&goredisclient.Options{Addr: server.Addr(), ContextTimeoutEnabled: true})
	defer plain.Close()
	sha, err := plain.ScriptLoad(ctx, floorText).Result()
	if err != nil {
		b.Fatal(err)
	}
	piped, err := rueidisclient.NewClient(rueidisclient.ClientOption{InitAddress: []string{server.Addr()}, DisableCache: true, AlwaysPipelining: true})
	if err != nil {
		b.Fatal(err)
	}
	defer piped.Close()

	overGoRedis := quota.Must[quota.Store](goredis.New(plain, nil))
	overRueidis := quota.Must[quota.Store](rueidis.New(piped, nil))
	grants := quota.NewLimit("tokens", algorithm.TokenBucket(1<<30, 1_000_000, time.Second))
	denials := quota.NewLimit("daily", algorithm.TokenBucket(10, 10, 365*24*time.Hour))

	decide := func(s quota.Store, l *quota.Limit, allowed bool) func(string) error {
		return func(key string) error {
			d, err := s.Charge(ctx, quota.Charge{Limit: l, Key: key, Cost: 1})
			if err == nil && d.Allowed != allowed {
				err = fmt.Errorf("allowed is %v", d.Allowed)
			}
			return err
		}
	}
	works := []struct {
		name string
		do   func(key string) error
	}{
		{"goredis/floor", func(key string) error {
			return plain.EvalSha(ctx, sha, []string{"floor:{" + key + "}:tokens"}, value).Err()
		}},
		{"goredis/grant", decide(overGoRedis, grants, true)},
		{"goredis/denial", decide(overGoRedis, denials, false)},
		{"rueidis/floor", func(key string) error {
			return piped.Do(ctx, piped.B().Evalsha().Sha1(sha).Numkeys(1).Key("floor:{"+key+"}:tokens").Arg(value).Build()).Error()
		}},
		{"rueidis/grant", decide(overRueidis, grants, true)},
		{"rueidis/denial", decide(overRueidis, denials, false)},
	}
	const keys = 100_000
	names := make([]string, keys)
	for i := range names {
		names[i] = fmt.Sprintf("agent-%010d", i) // 16 bytes
	}
	drained := make([]quota.Decision, 1)
	for _, name := range names {
		if err := overRueidis.ChargeAll(ctx, []quota.Charge{{Limit: denials, Key: name, Cost: 10, Op: quota.OpDebit}}, drained); err != nil {
			b.Fatal(err)
		}
	}
	for _, load := range []struct {
		name    string
		g, keys int
	}{{"g1", 1, keys}, {"g64", 64, keys}, {"g256", 256, keys}, {"hot/g1", 1, 1}, {"hot/g64", 64, 1}, {"hot/g256", 256, 1}} {
		for _, w := range works {
			b.Run(load.name+"/"+w.name, func(b *testing.B) {
				g, keys := load.g, load.keys
				b.ReportAllocs()
				if g == 1 {
					for b.Loop() {
						if err := w.do(names[rand.IntN(keys)]); err != nil {
							b.Fatal(err)
						}
					}
					return
				}
				b.SetParallelism(g / 2)
				var failed atomic.Pointer[error]
				b.RunParallel(func(pb *testing.PB) {
					for pb.Next() {
						if err := w.do(names[rand.IntN(keys)]); err != nil {
							failed.Store(&err)
						}
					}
				})
				if err := failed.Load(); err != nil {
					b.Fatal(*err)
				}
			})
		}
	}
	usage, err := server.Do("MEMORY", "USAGE", "quota:{"+names[1]+"}:daily")
	if err != nil {
		b.Fatal(err)
	}
	b.Logf("MEMORY USAGE of a token bucket with a 16-byte key: %v bytes", usage)
}

// late is a store that does not say that it is prompt, so that a timeout hands its calls over to goroutines.
type late struct{ quota.Store }

func (s late) Unwrap() quota.Store { return s.Store }
func (late) Prompt() bool          { return false }

// BenchmarkStandard compares decisions through the usual policies, with stores from a URL that are called directly and
// with the same stores where each call is handed over.
func BenchmarkStandard(b *testing.B) {
	server := redisserver.Start(b)
	limit := quota.NewLimit("tokens", algorithm.TokenBucket(1<<30, 1_000_000, time.Second))
	stores := map[string]quota.Store{}
	for _, client := range []string{"goredis", "rueidis"} {
		s := quota.Must(backend.Open(b.Context(), "redis://"+server.Addr()+"?client="+client))
		for name, inner := range map[string]quota.Store{"direct": s, "handoff": late{s}} {
			stores[client+"/"+name] = quota.Must(resilience.Standard(inner, resilience.FailWithError(), &resilience.StandardOptions{Timeout: 5 * time.Second}))
		}
	}
	const keys = 10_000
	names := make([]string, keys)
	for i := range names {
		names[i] = fmt.Sprintf("agent-%010d", i)
	}
	for _, g := range []int{1, 32} {
		for _, client := range []string{"goredis", "rueidis"} {
			for _, name := range []string{"handoff", "direct"} {
				s := stores[client+"/"+name]
				b.Run(fmt.Sprintf("g%d/%s/%s", g, client, name), func(b *testing.B) {
					var next atomic.Int64
					var failed atomic.Pointer[error]
					var all sync.WaitGroup
					b.ResetTimer()
					for range g {
						all.Go(func() {
							for next.Add(1) <= int64(b.N) {
								if _, err := s.Charge(context.Background(), quota.Charge{Limit: limit, Key: names[rand.IntN(keys)], Cost: 1}); err != nil {
									failed.Store(&err)
								}
							}
						})
					}
					all.Wait()
					if err := failed.Load(); err != nil {
						b.Fatal(*err)
					}
				})
			}
		}
	}
}
