package goredis_test

import (
	"context"
	"testing"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/internal/enginetest"
)

// connect is an enginetest.Connect.
func connect(tb testing.TB, cluster bool, addrs ...string) func(engine.Options) (*engine.Store, error) {
	var client redis.UniversalClient = redis.NewClient(&redis.Options{Addr: addrs[0], PoolSize: 32})
	if cluster {
		client.Close()
		client = redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs})
	}
	tb.Cleanup(func() { client.Close() })
	return func(o engine.Options) (*engine.Store, error) {
		options := goredis.Options(o)
		s, err := goredis.New(client, &options)
		if err != nil {
			return nil, err
		}
		return s.Engine(), nil
	}
}

func TestDifferential(t *testing.T) { enginetest.Differential(t, connect) }

func TestBatches(t *testing.T) { enginetest.Batches(t, connect) }

func TestBatchCalls(t *testing.T) { enginetest.BatchCalls(t, connect) }

func TestExpiry(t *testing.T) { enginetest.Expiry(t, connect) }

func TestForeign(t *testing.T) { enginetest.Foreign(t, connect) }

func TestNoScript(t *testing.T) { enginetest.NoScript(t, connect) }

func TestAllocs(t *testing.T) {
	enginetest.Allocs(t, connect, func(tb testing.TB, addr string) func(sha, key, value string) error {
		client := redis.NewClient(&redis.Options{Addr: addr, PoolSize: 32})
		tb.Cleanup(func() { client.Close() })
		return func(sha, key, value string) error {
			return client.EvalSha(context.Background(), sha, []string{key}, value, "60000").Err()
		}
	})
}

func TestKernels(t *testing.T) { enginetest.Kernels(t, connect) }

func TestReplies(t *testing.T) { enginetest.Replies(t, connect) }
