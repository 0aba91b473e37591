package goredis

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// go-redis drops the connection over which a server answers READONLY. The others of the pool still lead to the server
// that was demoted, and would carry peeks there. So a client made from a URL is replaced by a new one, and of a caller's
// client the idle connections to a replica are dropped. Neither needs a right.

// Connections are looked at in rounds, since some are in use or being made, until clearRounds in a row had all of them and
// found none to a replica.
const (
	clearRounds = 2
	maxRounds   = 20
	roundPause  = 50 * time.Millisecond
	roundLimit  = 300 * time.Millisecond
	roundLooks  = 10 // for connections that callers put back, one each ms
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
		if clear++; !dropReplicas(a.single.Load()) {
			clear = 0
		}
		time.Sleep(roundPause)
	}
}

// dropReplicas drops the connections of a pool that lead to a replica, and reports whether it saw that none is left. It takes
// connections like a caller and keeps them until it has all: the pool hands out the latest first, so one that was in use would
// stay hidden. It takes idle ones, for the pool would make new ones for more, unless it is full and has takers queue. It keeps
// them for a moment only, since callers make new ones meanwhile.
func dropReplicas(client *redis.Client) (none bool) {
	ctx, cancel := context.WithTimeout(context.Background(), roundLimit)
	defer cancel()
	var kept []*redis.Conn
	defer func() {
		for _, conn := range kept {
			conn.Close()
		}
	}()
	none = true
	for range roundLooks {
		stats := client.PoolStats()
		missing := int(stats.TotalConns) - len(kept)
		if missing <= 0 {
			return none
		}
		if int(stats.TotalConns) < client.Options().PoolSize {
			missing = int(stats.IdleConns)
		}
		if missing == 0 {
			time.Sleep(time.Millisecond)
		}
		taken := make([]*redis.Conn, missing)
		for i := range taken {
			taken[i] = client.Conn()
		}
		ofReplica := make([]bool, len(taken))
		engine.Each(len(taken), func(i int) error {
			if !ofPrimary(taken[i].Do(ctx, "HELLO")) {
				taken[i].Do(ctx, "QUIT")
				taken[i].Do(ctx, "HELLO") // finds the connection closed, and so the pool drops it
				taken[i].Close()
				ofReplica[i] = true
			}
			return nil
		})
		for i, conn := range taken {
			if ofReplica[i] {
				none = false
			} else {
				kept = append(kept, conn)
			}
		}
	}
	return false
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
