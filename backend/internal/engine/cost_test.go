package engine_test

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	goredisclient "github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// ttl is that of the holds whose costs are measured, and slot the time of which they are one sum.
const ttl, slot = time.Hour, time.Hour / 16

// holdsOver has n tokens held, of a key's limit, by one hold or two in each of so many live slots.
func holdsOver(tb testing.TB, client *goredisclient.Client, l *quota.Limit, key string, slots, n int64) {
	tb.Helper()
	now := time.Now()
	at := now
	s := quota.Must[quota.Store](goredis.New(client, &goredis.Options{Clock: func() time.Time { return at }}))
	for i := range slots {
		at = now.Add(time.Duration(i-slots+1) * slot)
		in := n / slots
		if i == slots-1 {
			in += n % slots
		}
		for _, cost := range []int64{1, in - 1} {
			if cost == 0 {
				continue
			}
			c := quota.Charge{Limit: l, Key: key, Cost: cost, Op: quota.OpHold}
			if d, err := s.Charge(context.Background(), c); err != nil || !d.Allowed {
				tb.Fatalf("a hold of %d: got %v, error %v; want a grant", c.Cost, d, err)
			}
		}
	}
}

// serverTime returns the µs that the server took for its scripts since it was asked last, per call.
func serverTime(tb testing.TB, server *redisserver.Server) float64 {
	tb.Helper()
	info, err := server.Do("INFO", "commandstats")
	if err == nil {
		_, err = server.Do("CONFIG", "RESETSTAT")
	}
	if err != nil {
		tb.Fatal(err)
	}
	m := regexp.MustCompile(`cmdstat_evalsha:calls=(\d+),usec=(\d+)`).FindStringSubmatch(info.(string))
	if m == nil {
		return 0
	}
	calls, _ := strconv.ParseFloat(m[1], 64)
	us, _ := strconv.ParseFloat(m[2], 64)
	return us / calls
}

// BenchmarkHeldOnServer compares the server's time in the script of a charge that goes alone: of a take from a bucket, and of
// takes and holds where the bucket has holds, by live slots. A row is the median of its rounds over that of the
// bucket's take: go test -run '^$' -bench HeldOnServer -benchtime 20x. The last figure is the median of the rounds' ratios of a take
// beside 100 000 held tokens to one beside 10, in as many slots.
func BenchmarkHeldOnServer(b *testing.B) {
	server := redisserver.Start(b)
	client := goredisclient.NewClient(&goredisclient.Options{Addr: server.Addr()})
	defer client.Close()
	s := quota.Must[quota.Store](goredis.New(client, &goredis.Options{Batching: goredis.BatchNone}))
	rule := algorithm.TokenBucket(1_000_000_000, 1_000_000, time.Second)
	type row struct {
		name   string
		charge quota.Charge
		times  []float64
	}
	rows := []*row{{name: "take", charge: quota.Charge{Limit: quota.NewLimit("plain", rule), Key: "k", Cost: 1}}}
	add := func(name string, slots, n int64, op quota.Op) {
		c := quota.Charge{Limit: quota.NewLimit(name, algorithm.Held(rule, ttl)), Key: "k", Cost: 1, Op: op}
		holdsOver(b, client, c.Limit, c.Key, slots, n)
		rows = append(rows, &row{name: name, charge: c})
	}
	for _, slots := range []int64{0, 1, 4, 17} {
		add(fmt.Sprintf("take-%d-slots", slots), slots, slots, quota.OpTake)
		if slots > 0 {
			add(fmt.Sprintf("hold-%d-slots", slots), slots, slots, quota.OpHold)
		}
	}
	add("take-10-slots-10-holds", 10, 10, quota.OpTake)
	add("take-10-slots-100000-holds", 10, 100_000, quota.OpTake)
	few, many := rows[len(rows)-2], rows[len(rows)-1]
	play := func(r *row, calls int) float64 {
		serverTime(b, server)
		for range calls {
			if d, err := s.Charge(b.Context(), r.charge); err != nil || !d.Allowed {
				b.Fatalf("%s: got %v, error %v; want a grant", r.name, d, err)
			}
		}
		return serverTime(b, server)
	}
	var ratios []float64
	for b.Loop() {
		for _, r := range rows {
			r.times = append(r.times, play(r, 400))
		}
		for range 10 { // short, so that what else the machine does seldom falls on one of two only
			before, beside, after := play(few, 50), play(many, 100), play(few, 50)
			ratios = append(ratios, 2*beside/(before+after))
		}
	}
	median := func(all []float64) float64 {
		slices.Sort(all)
		return all[len(all)/2]
	}
	base := median(rows[0].times)
	b.ReportMetric(0, "ns/op") // of a round
	b.ReportMetric(base, "µs/take")
	for _, r := range rows[1:] {
		b.ReportMetric(median(r.times)/base, "x/"+r.name)
	}
	b.ReportMetric(median(ratios), "x/100000-holds-to-10")
}

// The memory of holds on a server is that of their slots, however many are open: one in each slot takes as much as two, and as
// 100 000 over the same slots, and no slot takes more than two numbers of a state.
func TestHeldMemory(t *testing.T) {
	server := redisserver.Start(t)
	client := goredisclient.NewClient(&goredisclient.Options{Addr: server.Addr()})
	defer client.Close()
	l := quota.NewLimit("tokens", algorithm.Held(algorithm.TokenBucket(1_000_000_000, 1_000_000, time.Second), ttl))
	size := func(slots, n int64) int {
		t.Helper()
		key := fmt.Sprintf("%d-%d", slots, n)
		holdsOver(t, client, l, key, slots, n)
		v, err1 := client.Get(t.Context(), "quota:{"+key+"}:tokens").Result()
		usage, err2 := client.MemoryUsage(t.Context(), "quota:{"+key+"}:tokens").Result()
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		t.Logf("%d live slots, %d holds: %d bytes, MEMORY USAGE %d", slots, n, len(v), usage)
		return len(v)
	}
	const none = 12 + 3*7 // header, A, B and C
	for _, slots := range []int64{1, 4, 16, 17} {
		for _, n := range []int64{slots, 2 * slots, 100_000} {
			if got, want := size(slots, n), none+7*(2+2*int(slots)); got != want {
				t.Errorf("bytes of %d holds in %d slots: got %d, want %d", n, slots, got, want)
			}
		}
	}
}
