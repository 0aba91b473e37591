package quotaprom_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/observe/quotaprom"
	"github.com/fleetquota/fleetquota/quota"
)

// TestReservations: a scrape tells of reservations what their holders saw: of those that are open, settled and released, and in
// outages, of those that the store is owed, that were lost, and that lapsed.
func TestReservations(t *testing.T) {
	t.Run("local", func(t *testing.T) { reservations(t, local.New()) })
	t.Run("redis", func(t *testing.T) {
		redisServer := redisserver.Start(t)
		client := redis.NewClient(&redis.Options{Addr: redisServer.Addr(), ContextTimeoutEnabled: true})
		t.Cleanup(func() { client.Close() })
		reservations(t, quota.Must(goredis.New(client, nil)))
	})
}

func reservations(t *testing.T, primary quota.Store) {
	store := &switched{Store: primary}
	m := quotaprom.New(nil)
	registry := registered(t, m)
	unfinished := make(chan quota.Notice, 1)
	charger := quota.Must(quota.NewCharger(store, &quota.Options{Observers: []func(context.Context, *quota.Call){m.Observe}, Notice: func(n quota.Notice) { unfinished <- n }}))
	defer charger.Close()
	m.Watch(charger)
	long, short := quota.NewLimit("long", algorithm.Concurrency(100, time.Hour)), quota.NewLimit("short", algorithm.Concurrency(100, 100*time.Millisecond))
	reserve := func(limit *quota.Limit) *quota.Reservation {
		r, err := charger.Reserve(bg, quota.Charge{Limit: limit, Key: "k", Cost: 1})
		if err != nil {
			t.Error(err)
			return &quota.Reservation{}
		}
		return r
	}
	want := map[string]float64{}
	check := func(when string) {
		t.Helper()
		got := scrape(t, registry)
		for _, name := range []string{"open{}", "owed{}", "settled_total{}", "released_total{}", "lost_total{}", "lapsed_total{}"} {
			if n, told := got["reservations_"+name]; n != want[name] || !told {
				t.Errorf("reservations_%s %s: got %v, want %v", name, when, n, want[name])
			}
		}
	}

	var mu sync.Mutex
	var open []*quota.Reservation
	var callers sync.WaitGroup
	for range 8 {
		callers.Go(func() {
			for range 40 {
				r, end := reserve(long), rand.IntN(5)
				if !r.Granted {
					continue
				}
				var err error
				switch end {
				case 0:
					err = errors.Join(r.Settle(bg), r.Release(bg), r.Settle(bg))
				case 1, 2:
					err = r.Settle(bg, 0)
				case 3:
					err = errors.Join(r.Release(bg), r.Release(bg))
				}
				mu.Lock()
				switch {
				case err != nil:
					t.Error(err)
				case end < 3:
					want["settled_total{}"]++
				case end == 3:
					want["released_total{}"]++
				default:
					want["open{}"]++
					open = append(open, r)
				}
				mu.Unlock()
			}
		})
	}
	callers.Wait()
	if len(open) < 5 {
		t.Fatalf("open reservations: got %d, want some", len(open))
	}
	check("under load")

	store.off.Store(true)
	for _, r := range open[:5] {
		if err := r.Settle(bg); !errors.Is(err, quota.ErrIndeterminate) {
			t.Errorf("settle in an outage: got %v, want ErrIndeterminate", err)
		}
	}
	want["open{}"] -= 5
	want["owed{}"] += 5
	check("in an outage")
	store.off.Store(false)
	for _, r := range open[:5] {
		if err := r.Settle(bg); err != nil {
			t.Error(err)
		}
	}
	want["owed{}"] -= 5
	want["settled_total{}"] += 5
	check("after the outage")

	lost, lapsed := reserve(short), reserve(short)
	store.off.Store(true)
	if err := lapsed.Settle(bg); err == nil {
		t.Error("settle in an outage: got nil, want an error")
	}
	<-lost.Lost()
	if n := <-unfinished; n.Name != "unfinished" {
		t.Errorf("notice: got %s, want unfinished", n.Name)
	}
	store.off.Store(false)
	want["open{}"]++
	want["lost_total{}"]++
	want["lapsed_total{}"]++
	check("after an outage that was longer than the limit's TTL")
}
