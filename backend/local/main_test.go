package local

import (
	"context"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var bg = context.Background()

// sized returns the size of a test.
var sized = testenv.Sized

// withoutRace skips a test of one goroutine under the race detector, which is slow and has nothing to see there: ./test runs it
// without it.
func withoutRace(t *testing.T) {
	t.Helper()
	if testenv.Race && !testenv.Full() {
		t.Skip("this test runs without the race detector, and with it at full size")
	}
}

// random returns a generator whose seed a failing test prints.
var random = testenv.Random

// clock is a clock that tests move.
type clock struct{ micros atomic.Int64 }

func newClock() *clock {
	c := &clock{}
	c.micros.Store(1_795_427_141_791_724)
	return c
}

func (c *clock) time() time.Time     { return time.UnixMicro(c.micros.Load()) }
func (c *clock) now() quota.Micros   { return quota.Micros(c.micros.Load()) }
func (c *clock) add(d time.Duration) { c.micros.Add(int64(d / time.Microsecond)) }

// withClock returns a store on a clock of its own.
func withClock(maxKeys int) (*Store, *clock) {
	c := newClock()
	return quota.Must(NewWithOptions(Options{MaxKeys: maxKeys, Clock: c.time})), c
}

func bucket(name string, tokens int64, per time.Duration) *quota.Limit {
	return quota.NewLimit(name, algorithm.TokenBucket(tokens, tokens, per))
}

// everyRule returns a limit of each rule, named by it.
func everyRule(tokens int64, per time.Duration) (ls []*quota.Limit) {
	for _, a := range []quota.Algorithm{
		algorithm.TokenBucket(tokens, tokens, per),
		algorithm.SlidingWindow(tokens, per),
		algorithm.SlidingWindowLog(tokens, per),
		algorithm.FixedWindow(tokens, per),
		algorithm.FixedWindowFromFirst(tokens, per),
	} {
		ls = append(ls, quota.NewLimit(a.Spec().Rule.String(), a))
	}
	return ls
}

func take(t testing.TB, s quota.Store, c quota.Charge) quota.Decision {
	t.Helper()
	d, err := s.Charge(bg, c)
	if err != nil {
		t.Fatal(err)
	}
	return d
}
