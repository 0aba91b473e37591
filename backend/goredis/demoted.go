package goredis

import (
	"context"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// go-redis drops the connection over which a server answers READONLY. The others of the pool still lead to the server
// that was demoted, and would carry peeks there. So a client made from a URL is replaced by a new one, and of a caller's
// client the idle connections to a replica are dropped. Neither needs a right.

// Connections are looked at in rounds, since some are in use, until clearRounds in a row found none to a replica.
const (
	clearRounds = 3
	maxRounds   = 20
	roundPause  = 50 * time.Millisecond
	roundLimit  = time.Second
)

// leave leaves the connections that lead to a replica.
func (a *adapter) leave() {
	if a.renew != nil {
		client := a.renew()
		ctx, cancel := context.WithTimeout(context.Background(), a.longest)
		defer cancel()
		a.warm(ctx, client, *a.refused.Load()) // calls will tell an error
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.closed {
			client.Close()
			return
		}
		old := a.single.Swap(client)
		a.retired.Go(func() { a.retire(old) })
		return
	}
	for round, clear := 0, 0; round < maxRounds && clear < clearRounds; round++ {
		if clear++; dropReplicas(a.single.Load()) > 0 {
			clear = 0
		}
		time.Sleep(roundPause)
	}
}

// dropReplicas drops the idle connections of a pool that lead to a replica, and returns their number. It takes each like
// a caller, and as many as there are in all: the pool hands out the latest first, and one that comes back meanwhile would
// hide the oldest.
func dropReplicas(client *redis.Client) int64 {
	ctx, cancel := context.WithTimeout(context.Background(), roundLimit)
	defer cancel()
	taken := make([]*redis.Conn, client.PoolStats().TotalConns)
	for i := range taken {
		taken[i] = client.Conn()
	}
	var dropped atomic.Int64
	engine.Each(len(taken), func(i int) error {
		if !ofPrimary(taken[i].Do(ctx, "HELLO")) {
			taken[i].Do(ctx, "QUIT")
			taken[i].Do(ctx, "HELLO") // finds the connection closed, and so the pool drops it
			dropped.Add(1)
		}
		return nil
	})
	for _, conn := range taken {
		conn.Close()
	}
	return dropped.Load()
}

// ofPrimary reports whether the server that answered HELLO is a primary.
func ofPrimary(answer *redis.Cmd) bool {
	switch fields := answer.Val().(type) {
	case map[any]any:
		return fields["role"] == "master"
	case []any: // in the older protocol
		for i := 0; i+1 < len(fields); i += 2 {
			if fields[i] == "role" {
				return fields[i+1] == "master"
			}
		}
	}
	return false
}

// retire closes a client once no call can be in flight.
func (a *adapter) retire(client *redis.Client) {
	wait := time.NewTimer(a.longest)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-a.life:
	}
	client.Close()
}
