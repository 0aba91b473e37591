package rueidis_test

import (
	"context"
	"testing"

	"github.com/redis/rueidis"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/backend/internal/enginetest"
	fleetrueidis "github.com/fleetquota/fleetquota/backend/rueidis"
)

// connect is an enginetest.Connect.
func connect(tb testing.TB, cluster bool, addrs ...string) func(engine.Options) (*engine.Store, error) {
	client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: addrs, ForceSingleClient: !cluster})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(client.Close)
	return func(o engine.Options) (*engine.Store, error) {
		options := fleetrueidis.Options(o)
		s, err := fleetrueidis.New(client, &options)
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
		client, err := rueidis.NewClient(rueidis.ClientOption{InitAddress: []string{addr}, ForceSingleClient: true})
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(client.Close)
		return func(sha, key, value string) error {
			_, err := client.Do(context.Background(), client.B().Evalsha().Sha1(sha).Numkeys(1).Key(key).Arg(value, "60000").Build()).ToArray()
			return err
		}
	})
}

func TestKernels(t *testing.T) { enginetest.Kernels(t, connect) }

func TestReplies(t *testing.T) { enginetest.Replies(t, connect) }
