package goredis_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// TestBusyConnectionToReplica has a connection to a demoted primary in use when the others are dropped: it is dropped too,
// once the caller's client has it back.
func TestBusyConnectionToReplica(t *testing.T) {
	t.Parallel()
	old, fresh := redisserver.Start(t), redisserver.Start(t)
	proxy := redisserver.StartProxy(t, old.Addr())
	const name = "caller"
	client := redis.NewClient(&redis.Options{Addr: proxy.Addr(), ClientName: name, ContextTimeoutEnabled: true})
	defer client.Close()
	store := quota.Must(goredis.New(client, nil))
	defer store.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	charge := quota.Charge{Limit: quota.NewLimit("requests", algorithm.FixedWindow(10, time.Hour)), Key: "k", Cost: 1}
	if _, err := store.Charge(ctx, charge); err != nil {
		t.Fatal(err)
	}
	var busy [3]*redis.Conn
	for i := range busy {
		busy[i] = client.Conn()
		if err := busy[i].Ping(ctx).Err(); err != nil {
			t.Fatal(err)
		}
	}
	busy[2].Close()
	if _, err := old.Do("REPLICAOF", "127.0.0.1", "1"); err != nil {
		t.Fatal(err)
	}
	proxy.Lead(fresh.Addr())
	if _, err := store.Charge(ctx, charge); !errors.Is(err, quota.ErrUnavailable) {
		t.Fatalf("a charge over an old connection: got error %v, want ErrUnavailable", err)
	}
	connections := func() int {
		list, err := old.Do("CLIENT", "LIST")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Count(list.(string), " name="+name+" ")
	}
	for i, conn := range busy[:2] {
		time.Sleep(300 * time.Millisecond) // the others are looked at meanwhile
		conn.Close()
		for connections() > 1-i {
			if ctx.Err() != nil {
				t.Fatalf("connections to the demoted primary: got %d, want %d", connections(), 1-i)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
}
