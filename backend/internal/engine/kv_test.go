package engine

import (
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/quota"
)

// A swap compares a state that does not change, and leaves its lifetime alone, even if a limit with shorter
// times asks.
func TestSwapKeepsLifetimes(t *testing.T) {
	client := redis.NewClient(&redis.Options{Addr: redisserver.Start(t).Addr()})
	defer client.Close()
	s := newStore(t, false, sender(client, new(int)))
	log := func(window time.Duration) *quota.Limit {
		return limitOf("log", hidden{algorithm.SlidingWindowLog(10, window)})
	}
	take := quota.Charge{Limit: log(time.Hour), Key: "k", Cost: 1}
	if _, err := s.Charge(bg, take); err != nil {
		t.Fatal(err)
	}
	peek := quota.Charge{Limit: log(time.Millisecond), Key: "k", Op: quota.OpPeek}
	other := quota.Charge{Limit: limitOf("other", window(10)), Key: "k", Cost: 1}
	if err := s.ChargeAll(bg, []quota.Charge{peek, other}, make([]quota.Decision, 2)); err != nil {
		t.Fatal(err)
	}
	var to target
	s.locate(&to, &take)
	if got := client.PTTL(bg, to.key).Val(); got < time.Hour {
		t.Errorf("lifetime of a state that did not change: got %v, want at least an hour", got)
	}
}
