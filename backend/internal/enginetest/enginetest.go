// Package enginetest has the tests that every client of the engine passes, on real servers. Each adapter
// runs them from its own tests, so that what is said of Redis is said once.
package enginetest

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/internal/redisserver"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Connect makes a client for a single server, or for a cluster, which it closes with the test, and
// returns how to make stores over it.
type Connect func(tb testing.TB, cluster bool, addrs ...string) func(engine.Options) (*engine.Store, error)

var bg = context.Background()

const year = 365 * 24 * time.Hour

// single starts a server and returns it with stores on it.
func single(t testing.TB, connect Connect, args ...string) (*server, func(engine.Options) *engine.Store) {
	t.Helper()
	s := redisserver.Start(t, args...)
	raw := redis.NewClient(&redis.Options{Addr: s.Addr()})
	t.Cleanup(func() { raw.Close() })
	return &server{raw}, opener(t, connect(t, false, s.Addr()))
}

// cluster starts a cluster and returns it with stores on it.
func cluster(t testing.TB, connect Connect) (*server, func(engine.Options) *engine.Store) {
	t.Helper()
	c := redisserver.StartCluster(t)
	raw := redis.NewClusterClient(&redis.ClusterOptions{Addrs: c.Addrs()})
	t.Cleanup(func() { raw.Close() })
	return &server{raw}, opener(t, connect(t, true, c.Addrs()...))
}

func opener(t testing.TB, open func(engine.Options) (*engine.Store, error)) func(engine.Options) *engine.Store {
	return func(o engine.Options) *engine.Store {
		t.Helper()
		s, err := open(o)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
}

// server looks at what a server, or a cluster, holds, past the store.
type server struct{ redis.UniversalClient }

// held returns the state that stores of the default prefix keep for a limit and key.
func (s *server) held(t testing.TB, c quota.Charge) string {
	t.Helper()
	v, err := s.Get(bg, place(c)).Result()
	if err != nil && err != redis.Nil {
		t.Error(err)
	}
	return v
}

// expires returns when the server drops a key, in ms since the epoch; below 0 for no key.
func (s *server) expires(t testing.TB, key string) int64 {
	t.Helper()
	at, err := s.PExpireTime(bg, key).Result()
	if err != nil {
		t.Error(err)
	}
	if at < 0 {
		return -1
	}
	return at.Milliseconds()
}

// stats are a server's counts of one command.
type stats struct{ calls, failed int }

// count returns the counts of commands since the last CONFIG RESETSTAT.
func (s *server) count(t testing.TB) map[string]stats {
	t.Helper()
	info, err := s.Info(bg, "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	counts := map[string]stats{}
	for line := range strings.Lines(info) {
		head, fields, _ := strings.Cut(strings.TrimSpace(line), ":")
		name, ok := strings.CutPrefix(head, "cmdstat_")
		if !ok {
			continue
		}
		var c stats
		for field := range strings.SplitSeq(fields, ",") {
			if n, ok := strings.CutPrefix(field, "calls="); ok {
				c.calls, _ = strconv.Atoi(n)
			}
			if n, ok := strings.CutPrefix(field, "failed_calls="); ok {
				c.failed, _ = strconv.Atoi(n)
			}
		}
		counts[name] = c
	}
	return counts
}

func (s *server) resetCounts(t testing.TB) {
	t.Helper()
	if err := s.ConfigResetStat(bg).Err(); err != nil {
		t.Fatal(err)
	}
}

// place returns the key of a charge's state under the default prefix.
func place(c quota.Charge) string {
	return string(driver.AppendKey([]byte(engine.DefaultPrefix), c.Limit.Name(), c.Key))
}

// packed returns the bytes that the server must hold for an item: the length and name of the rule, then
// seven bytes a number, the highest first: the unit, A, B and, unless all are zero, C and the tail. It is
// written down here a second time, so that nobody changes what other releases have stored.
func packed(it *driver.Item) string {
	s := &it.State
	if s.IsZero() {
		return ""
	}
	numbers := []int64{s.Unit, s.A, s.B}
	if s.C != 0 || len(s.Tail) > 0 {
		numbers = append(append(numbers, s.C), s.Tail...)
	}
	name := it.Rule.String()
	text := []byte{byte(len(name))}
	text = append(text, name...)
	for _, n := range numbers {
		for shift := 48; shift >= 0; shift -= 8 {
			text = append(text, byte(n>>shift))
		}
	}
	return string(text)
}

// seed returns a seed that a failing test prints.
var seed = testenv.Seed

// sized returns the size of a test: whole with FLEETQUOTA_FULL=1, and a quarter under the race detector
// without, which is slow.
func sized(usual, whole int) int {
	switch {
	case testenv.Full():
		return whole
	case raceEnabled:
		return usual / 4
	}
	return usual
}

func limitOf(name string, a quota.Algorithm) *quota.Limit { return quota.Must(quota.NewLimit(name, a)) }

// yearly returns a limit whose counts stay while a test runs.
func yearly(name string, n int64) *quota.Limit {
	return limitOf(name, quota.Must(algorithm.FixedWindow(n, year)))
}

// hidden is an algorithm whose Lua the store does not see. Its spec is another, by a parameter that means
// nothing: a store plans for a spec once.
type hidden struct{ quota.Algorithm }

func (h hidden) Spec() quota.Spec {
	s := h.Algorithm.Spec()
	s.Params[5] = 1
	return s
}

// take decides one charge and fails the test on an error.
func take(t testing.TB, s quota.Store, c quota.Charge) quota.Decision {
	t.Helper()
	d, err := s.Take(bg, c)
	if err != nil {
		t.Fatalf("%s of %d from %s: %v", c.Op, c.Cost, c.Limit.Name(), err)
	}
	return d
}

// takeAll decides a list and fails the test on an error.
func takeAll(t testing.TB, s quota.Store, cs ...quota.Charge) []quota.Decision {
	t.Helper()
	out := make([]quota.Decision, len(cs))
	if err := s.TakeAll(bg, cs, out); err != nil {
		t.Fatal(err)
	}
	return out
}

func show(cs []quota.Charge) string {
	var b strings.Builder
	for i := range cs {
		c := &cs[i]
		fmt.Fprintf(&b, "\n  %s %d (at %d) of %s %+v for %q", c.Op, c.Cost, c.At, c.Limit.Name(), *c.Limit.Spec(), c.Key)
	}
	return b.String()
}
