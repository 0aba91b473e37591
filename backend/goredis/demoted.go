package goredis

import (
	"context"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// go-redis drops the connection over which a server answers READONLY. The others of the pool still lead to the server
// that was demoted, and would carry peeks there. So a client made from a URL is replaced by a new one, and the idle
// connections of a caller's client are dropped.

// rounds are how often the idle connections are dropped, with a pause between: some are in use the first time.
const (
	rounds     = 3
	roundPause = 50 * time.Millisecond
	roundLimit = time.Second
)

// leave leaves the connections that lead to a replica.
func (a *adapter) leave() {
	if a.renew != nil {
		a.mu.Lock()
		defer a.mu.Unlock()
		if !a.closed {
			old := a.single.Swap(a.renew())
			a.retired.Go(func() { a.retire(old) })
		}
		return
	}
	for range rounds {
		dropIdle(a.single.Load())
		time.Sleep(roundPause)
	}
}

// dropIdle drops the idle connections of a pool. It takes each like a caller, who could not use it meanwhile.
func dropIdle(client *redis.Client) {
	ctx, cancel := context.WithTimeout(context.Background(), roundLimit)
	defer cancel()
	var taken []*redis.Conn
	var wg sync.WaitGroup
	for range client.PoolStats().IdleConns {
		conn := client.EphemeralConn()
		taken = append(taken, conn)
		wg.Go(func() { conn.Do(ctx, "HELLO") }) // needs no right
	}
	wg.Wait()
	for _, conn := range taken {
		conn.Close()
	}
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
