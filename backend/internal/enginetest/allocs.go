package enginetest

import (
	"math"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
)

// maxAllocs is how many allocations a decision may cost beyond the bare client's call of a script.
const maxAllocs = 6

// bareScript does what no decision can do without: TIME, GET and SET.
const bareScript = `local t = redis.call('TIME')
local v = redis.call('GET', KEYS[1])
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return {t[1] * 1000000 + t[2], v}`

// Allocs: a decision allocates at most maxAllocs more than a bare script call through the same client,
// which bare makes: EVALSHA sha 1 key value 60000.
func Allocs(t *testing.T, connect Connect, bare func(tb testing.TB, addr string) func(sha, key, value string) error) {
	if raceEnabled {
		t.Skip("the race detector allocates on its own account")
	}
	server, open := single(t, connect)
	store := open(engine.Options{})
	sha, err := server.ScriptLoad(bg, bareScript).Result()
	if err != nil {
		t.Fatal(err)
	}
	call := bare(t, server.UniversalClient.(*redis.Client).Options().Addr)
	value := string(make([]byte, 25)) // as long as a bucket's state
	measure := func(f func()) int {
		f()
		least := math.Inf(1)
		for range 5 { // the client's goroutines allocate as well, now and then
			least = min(least, testing.AllocsPerRun(100, f))
		}
		return int(least)
	}
	floor := measure(func() {
		if err := call(sha, "bare", value); err != nil {
			t.Error(err)
		}
	})
	limit := limitOf("tokens", quota.Must(newRule(bucket, 1<<30, 1<<20, 1_000_000_000)))
	for name, c := range map[string]quota.Charge{
		"grant": {Cost: 1}, "grant of 1500": {Cost: 1500}, "denial": {Cost: 1 << 30}, "peek": {Op: quota.OpPeek, Cost: 1},
	} {
		c.Limit, c.Key = limit, "team-7/agent-123"
		n := measure(func() { take(t, store, c) })
		t.Logf("%s: %d allocations, bare %d", name, n, floor)
		if n > floor+maxAllocs {
			t.Errorf("%s: %d allocations; accepted: %d more than the bare client's %d", name, n, maxAllocs, floor)
		}
	}
}
