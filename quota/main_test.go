package quota_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testenv"
	"github.com/fleetquota/fleetquota/quota"
)

var raceEnabled bool

func TestMain(m *testing.M) {
	flag.Parse()
	if fuzzing := flag.Lookup("test.fuzz").Value.String() != ""; fuzzing {
		os.Exit(m.Run()) // the fuzzer keeps goroutines of its own
	}
	goleak.VerifyTestMain(m)
}

// sized returns the size of a test.
var sized = testenv.Sized

// random returns a generator whose seed a failing test prints.
var random = testenv.Random

var bg = context.Background()

// epoch is a time at which windows of any length used here are under way; it is not aligned to them.
const epoch quota.Micros = 1_795_427_141_791_724

// clock is a clock that tests move.
type clock struct {
	mu  sync.Mutex
	now quota.Micros
}

func newClock() *clock { return &clock{now: epoch} }

func (c *clock) micros() quota.Micros {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) time() time.Time { return c.micros().Time() }

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += quota.Micros(d / time.Microsecond)
}

// rules are one constructor of each rule: limit tokens in a period.
var rules = []struct {
	name string
	make func(limit int64, per time.Duration) (quota.Algorithm, error)
}{
	{"tb1", func(limit int64, per time.Duration) (quota.Algorithm, error) {
		return algorithm.TokenBucket(limit, limit, per)
	}},
	{"sw1", algorithm.SlidingWindow},
	{"sl1", algorithm.SlidingWindowLog},
	{"fw1", algorithm.FixedWindow},
	{"ff1", algorithm.FixedWindowFromFirst},
}

// eachRule runs a test with a limit of each rule.
func eachRule(t *testing.T, tokens int64, per time.Duration, test func(t *testing.T, l *quota.Limit)) {
	for _, r := range rules {
		t.Run(r.name, func(t *testing.T) { test(t, limitOf(r.name, r.name, tokens, per)) })
	}
}

// limitOf returns a limit kept by the named rule.
func limitOf(name, rule string, tokens int64, per time.Duration) *quota.Limit {
	for _, r := range rules {
		if r.name == rule {
			return quota.Must(quota.NewLimit(name, quota.Must(r.make(tokens, per))))
		}
	}
	panic("no rule " + rule)
}

func bucket(name string, tokens int64, per time.Duration) *quota.Limit {
	return limitOf(name, "tb1", tokens, per)
}

// newLocal returns a local store on a test's clock, or on the monotonic one.
func newLocal(t testing.TB, c *clock) *local.Store {
	o := &local.Options{}
	if c != nil {
		o.Clock = c.time
	}
	s := local.New(o)
	t.Cleanup(func() { s.Close() })
	return s
}

func newLimiter(t testing.TB, s quota.Store, l *quota.Limit, o *quota.Options) *quota.Limiter {
	t.Helper()
	lim, err := quota.NewLimiter(s, l, o)
	if err != nil {
		t.Fatal(err)
	}
	return lim
}

// recorder is a store that notes what reaches it and grants everything.
type recorder struct {
	mu    sync.Mutex
	calls [][]quota.Charge
}

func (r *recorder) Take(_ context.Context, c quota.Charge) (quota.Decision, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, []quota.Charge{c})
	return quota.Decision{Allowed: true, Limit: c.Limit.Spec().Capacity, Charged: c.Cost}, nil
}

func (r *recorder) TakeAll(_ context.Context, cs []quota.Charge, out []quota.Decision) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.calls = append(r.calls, append([]quota.Charge(nil), cs...))
	for i := range out {
		out[i] = quota.Decision{Allowed: true, Limit: 1}
	}
	return nil
}

func (r *recorder) Close() error { return nil }

// wantInvalid fails unless err is ErrInvalid and its text names all of parts.
func wantInvalid(t *testing.T, err error, parts ...string) {
	t.Helper()
	if !errors.Is(err, quota.ErrInvalid) {
		t.Fatalf("error is %v, want ErrInvalid", err)
	}
	for _, p := range append(parts, "accepted: ") {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error %q does not name %q", err, p)
		}
	}
}

func must[T any](t testing.TB) func(v T, err error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func show(cs []quota.Charge) string {
	var b strings.Builder
	for _, c := range cs {
		fmt.Fprintf(&b, "[%s %s of %d to %s]", c.Op, c.Limit.Name(), c.Cost, c.Key)
	}
	return b.String()
}
