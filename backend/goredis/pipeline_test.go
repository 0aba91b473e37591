package goredis_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/goredis"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// counting counts the commands that came in pipelines.
type counting struct{ piped atomic.Int64 }

func (*counting) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (*counting) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }
func (c *counting) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		c.piped.Add(int64(len(cmds)))
		return next(ctx, cmds)
	}
}

// losing is a connection that dies at every 50th read of all: its commands run, and their replies are lost.
type losing struct {
	net.Conn
	reads *atomic.Int64
}

func (c losing) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.reads.Add(1)%50 == 0 {
		c.Close()
		return 0, &net.OpError{Op: "read", Net: "tcp", Err: syscall.ECONNRESET}
	}
	return n, err
}

// Calls to the nodes of a cluster are written together, and each is charged at most once, even if replies are
// lost.
func TestPipelines(t *testing.T) {
	addrs := redisserver.StartCluster(t).Addrs()
	const keys, takes = 128, 20
	limit := quota.NewLimit("n", algorithm.FixedWindow(1000, 24*time.Hour))
	for _, test := range []struct {
		name     string
		lossy    bool
		batching goredis.Batching
	}{{"all well", false, goredis.BatchAuto}, {"replies lost", true, goredis.BatchAuto}, {"without batching", false, goredis.BatchNone}} {
		t.Run(test.name, func(t *testing.T) {
			var reads atomic.Int64
			hook := &counting{}
			o := &redis.ClusterOptions{Addrs: addrs, ContextTimeoutEnabled: true}
			if test.lossy {
				o.Dialer = func(ctx context.Context, network, addr string) (net.Conn, error) {
					conn, err := (&net.Dialer{}).DialContext(ctx, network, addr)
					return losing{conn, &reads}, err
				}
			}
			client := redis.NewClusterClient(o)
			defer client.Close()
			client.OnNewNode(func(node *redis.Client) { node.AddHook(hook) })
			store := quota.Must(goredis.New(client, &goredis.Options{Prefix: "p:", Batching: test.batching}))
			defer store.Close()

			charge := func(i int) quota.Charge {
				return quota.Charge{Limit: limit, Key: fmt.Sprint(test.name, i), Cost: 1}
			}
			var granted, unknown [keys]int64
			var shared atomic.Int64
			var wg sync.WaitGroup
			for i := range keys {
				wg.Go(func() {
					for range takes {
						d, err := store.Charge(t.Context(), charge(i))
						switch {
						case err == nil && d.Allowed:
							granted[i]++
						case test.lossy && errors.Is(err, quota.ErrIndeterminate):
							unknown[i]++
							var trip interface{ RoundTrip() any }
							if errors.As(err, &trip) && trip.RoundTrip() != nil {
								shared.Add(1)
							}
						case test.lossy && errors.Is(err, quota.ErrUnavailable):
						default:
							t.Errorf("Charge: got %v, error %v; want a grant, or a lost reply if lossy is %v", d, err, test.lossy)
						}
					}
				})
			}
			wg.Wait()
			together := test.batching != goredis.BatchNone
			if piped := hook.piped.Load(); piped > keys != together {
				t.Errorf("commands written with others: got %d of %d, want more than %d: %v", piped, keys*takes, keys, together)
			}
			sound := redis.NewClusterClient(&redis.ClusterOptions{Addrs: addrs})
			defer sound.Close()
			plain := quota.Must(goredis.New(sound, &goredis.Options{Prefix: "p:"}))
			lost := int64(0)
			for i := range keys {
				c := charge(i)
				c.Op = quota.OpPeek
				d, err := plain.Charge(t.Context(), c)
				if err != nil {
					t.Fatal(err)
				}
				lost += unknown[i]
				if charged := 1000 - d.Remaining; charged < granted[i] || charged > granted[i]+unknown[i] {
					t.Errorf("key %d: got %d charged, want %d that were granted and at most %d of unknown outcome more", i, charged, granted[i], unknown[i])
				}
			}
			if n := shared.Load(); (lost > 0) != test.lossy || (n > 0) != test.lossy {
				t.Errorf("got %d of unknown outcome and %d in a shared round trip, want some of both: %v", lost, n, test.lossy)
			}
		})
	}
}
