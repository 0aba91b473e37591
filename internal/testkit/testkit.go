// Package testkit has the parts that the tests of quota and of quota/driver have in common: a clock to set, limits of
// every rule, and checks.
package testkit

import (
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
	"github.com/fleetquota/fleetquota/quota"
)

// Main runs the tests of a package and fails if they leave a goroutine behind.
func Main(m *testing.M) {
	flag.Parse()
	if fuzzing := flag.Lookup("test.fuzz").Value.String() != ""; fuzzing {
		os.Exit(m.Run()) // the fuzzer keeps goroutines of its own
	}
	goleak.VerifyTestMain(m)
}

// Epoch is a time at which windows of any length used here are in progress; it is not aligned to them.
const Epoch quota.Micros = 1_795_427_141_791_724

// Clock is a clock that tests move. It is safe for concurrent use.
type Clock struct {
	mu  sync.Mutex
	now quota.Micros
}

// NewClock returns a clock that stands at Epoch.
func NewClock() *Clock { return &Clock{now: Epoch} }

// Micros returns the clock's time.
func (c *Clock) Micros() quota.Micros {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// Time returns the clock's time, as options of stores want it.
func (c *Clock) Time() time.Time { return c.Micros().Time() }

// Add moves the clock.
func (c *Clock) Add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now += quota.Micros(d / time.Microsecond)
}

// Rules are one constructor of each rule: limit tokens in a period.
var Rules = []struct {
	Name string
	Make func(limit int64, per time.Duration) quota.Algorithm
}{
	{"tb1", func(limit int64, per time.Duration) quota.Algorithm {
		return algorithm.TokenBucket(limit, limit, per)
	}},
	{"sw1", algorithm.SlidingWindow},
	{"sl1", algorithm.SlidingWindowLog},
	{"fw1", algorithm.FixedWindow},
	{"ff1", algorithm.FixedWindowFromFirst},
}

// EachRule runs a test with a limit of each rule.
func EachRule(t *testing.T, tokens int64, per time.Duration, test func(t *testing.T, l *quota.Limit)) {
	for _, r := range Rules {
		t.Run(r.Name, func(t *testing.T) { test(t, LimitOf(r.Name, r.Name, tokens, per)) })
	}
}

// LimitOf returns a limit kept by the named rule.
func LimitOf(name, rule string, tokens int64, per time.Duration) *quota.Limit {
	for _, r := range Rules {
		if r.Name == rule {
			return quota.NewLimit(name, r.Make(tokens, per))
		}
	}
	panic("no rule " + rule)
}

// Bucket returns a limit kept by a token bucket that fills in a period.
func Bucket(name string, tokens int64, per time.Duration) *quota.Limit {
	return LimitOf(name, "tb1", tokens, per)
}

// WantInvalid fails unless err is ErrInvalid and its text names all of parts and the accepted values.
func WantInvalid(t *testing.T, err error, parts ...string) {
	t.Helper()
	if !errors.Is(err, quota.ErrInvalid) {
		t.Fatalf("error: got %v, want ErrInvalid", err)
	}
	for _, p := range append(parts, "accepted: ") {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error: got %q, want one that names %q", err, p)
		}
	}
}

// Show renders a list of charges for a failure's text.
func Show(cs []quota.Charge) string {
	var b strings.Builder
	for _, c := range cs {
		fmt.Fprintf(&b, "[%s %s of %d to %s]", c.Op, c.Limit.Name(), c.Cost, c.Key)
	}
	return b.String()
}

// Distinct fails if another source gave the same text before, and notes it in seen.
func Distinct(t *testing.T, seen map[string]string, text, source string) {
	t.Helper()
	if other, twice := seen[text]; twice && other != source {
		t.Errorf("text of %s: got %q, want one that %s does not have", source, text, other)
	}
	seen[text] = source
}
