package redisurl_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// What a user may do must suffice and be no more than it takes. The README has the same lines.
var (
	rights        = []string{"+evalsha", "+eval", "+time", "+get", "+set", "+del"}
	rueidisRights = []string{"+ping"}
	clusterRights = []string{"+cluster|slots"}
	databaseRight = "+select"
	healthRight   = "+info"
)

func rightsOf(client string, cluster bool) []string {
	list := append([]string{}, rights...)
	if client == "rueidis" {
		list = append(list, rueidisRights...)
	}
	if cluster {
		list = append(list, clusterRights...)
	}
	return list
}

// hosted hides an algorithm's Lua, so that a store hosts it by compare-and-swap.
type hosted struct{ quota.Algorithm }

// use does everything a store can do, and returns the first error.
func use(s quota.Store, group string) error {
	bucket := quota.Must(algorithm.TokenBucket(10, 1, time.Hour))
	one := quota.Must(quota.NewLimit("one", bucket))
	two := quota.Must(quota.NewLimit("two", quota.Must(algorithm.SlidingWindowLog(10, time.Hour))))
	cas := quota.Must(quota.NewLimit("cas", hosted{bucket}))
	ctx := context.Background()
	for i := range 4 {
		key := fmt.Sprint(group, i)
		list := []quota.Charge{{Limit: one, Key: key, Cost: 1}, {Limit: two, Key: key, Cost: 1}, {Limit: cas, Key: key, Cost: 1}}
		for _, c := range list {
			for _, op := range []quota.Op{quota.OpTake, quota.OpPeek, quota.OpDebit, quota.OpRefund, quota.OpReset} {
				c.Op = op
				if _, err := s.Take(ctx, c); err != nil {
					return fmt.Errorf("%s %v: %w", c.Limit.Name(), op, err)
				}
			}
			c.Op, c.ID = quota.OpTake, c.Limit.Name()
			if _, err := s.Take(ctx, c); err != nil {
				return fmt.Errorf("%s with an id: %w", c.Limit.Name(), err)
			}
		}
		for _, n := range []int{2, 3} {
			if err := s.TakeAll(ctx, list[:n], make([]quota.Decision, n)); err != nil {
				return fmt.Errorf("a list: %w", err)
			}
		}
	}
	return nil
}

func TestRights(t *testing.T) {
	for _, kind := range []string{"single", "cluster"} {
		t.Run(kind, func(t *testing.T) {
			clustered := kind == "cluster"
			var servers []*redisserver.Server
			if clustered {
				for _, n := range redisserver.StartCluster(t).Nodes {
					servers = append(servers, n.Server)
				}
			} else {
				servers = append(servers, redisserver.Start(t))
			}
			all := func(args ...string) {
				t.Helper()
				for _, s := range servers {
					if _, err := s.Do(args...); err != nil {
						t.Fatal(err)
					}
				}
			}
			grant := func(rights []string) {
				t.Helper()
				all(append([]string{"ACL", "SETUSER", "fleet", "reset", "on", ">secret", "~quota:*"}, rights...)...)
				all("ACL", "LOG", "RESET")
				all("SCRIPT", "FLUSH")
			}
			url := "redis://fleet:secret@" + servers[0].Addr()
			if clustered {
				url = "redis+cluster://fleet:secret@" + servers[0].Addr()
			}
			with(t, func(t *testing.T, open func(testing.TB, string) quota.Store) {
				client := t.Name()[strings.LastIndex(t.Name(), "/")+1:]
				list := rightsOf(client, clustered)
				grant(list)
				s := open(t, url)
				if err := use(s, plain(t)); err != nil {
					t.Errorf("with %v: %v", list, err)
				}
				time.Sleep(1500 * time.Millisecond) // rueidis looks after its connections
				if err := use(s, plain(t)); err != nil {
					t.Errorf("later, with %v: %v", list, err)
				}
				for _, server := range servers {
					if v, err := server.Do("ACL", "LOG"); err != nil || len(v.([]any)) > 0 {
						t.Errorf("the user was refused: %v, %v", v, err)
					}
				}
				health := func(s quota.Store) error {
					_, err := s.(interface {
						Health(context.Context) (driver.Health, error)
					}).Health(context.Background())
					return err
				}
				if err := health(s); !errors.Is(err, quota.ErrMisconfigured) {
					t.Errorf("Health without the right: %v", err)
				}
				grant(append(list, healthRight))
				if err := health(open(t, url)); err != nil {
					t.Error(err)
				}
				for i, right := range list {
					rest := append(append([]string{}, list[:i]...), list[i+1:]...)
					grant(rest)
					if right == "+ping" { // it is not told that it was refused, but the server's log is
						if err := use(open(t, url), plain(t)); err != nil {
							t.Error(err)
						}
						time.Sleep(1500 * time.Millisecond)
						refused := 0
						for _, server := range servers {
							v, err := server.Do("ACL", "LOG")
							if err != nil {
								t.Fatal(err)
							}
							refused += strings.Count(fmt.Sprint(v), "object ping")
						}
						if refused == 0 {
							t.Errorf("nothing is refused without %s", right)
						}
						continue
					}
					if err := use(open(t, url), plain(t)); !errors.Is(err, quota.ErrMisconfigured) {
						t.Errorf("without %s: %v", right, err)
					}
				}
				if !clustered {
					grant(list)
					if err := use(open(t, url+"/1"), plain(t)); !errors.Is(err, quota.ErrMisconfigured) {
						t.Errorf("a database without %s: %v", databaseRight, err)
					}
					grant(append(list, databaseRight))
					if err := use(open(t, url+"/1"), plain(t)); err != nil {
						t.Error(err)
					}
				}
				if _, err := take(open(t, url+"?prefix=other:"), "k"); !errors.Is(err, quota.ErrMisconfigured) {
					t.Errorf("keys of another prefix: %v", err)
				}
			})
		})
	}
}
