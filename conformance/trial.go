package conformance

import (
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// trial is one run of a case.
type trial struct {
	suite    *suite
	of       *testCase
	tb       testing.TB // the author's test
	rng      *rand.Rand // of the case's own goroutine
	root     *recorder
	until    time.Time // the end of random searches, if they did enough
	traced   time.Time // the end of random traces, which is sooner under go test -short
	progress atomic.Int64
	own      atomic.Int64 // above 0 while the suite works without the store, which a busy machine may make take long
	finished atomic.Bool

	mu       sync.Mutex
	over     bool // the result is made, and later failures are dropped
	failure  string
	skipped  string
	excused  bool                 // whether the case was skipped because the rule does not concern the store
	calls    map[*string]struct{} // the calls that have not returned
	limits   map[*quota.Limit]string
	recipes  map[*quota.Limit]recipe
	apart    bool // whether second handles are opened in another process
	refuting bool // whether a trace is being shortened
}

func newTrial(s *suite, tb testing.TB, c *testCase) *trial {
	t := &trial{suite: s, of: c, tb: tb, rng: s.random(c.path()), calls: map[*string]struct{}{}, limits: map[*quota.Limit]string{}, recipes: map[*quota.Limit]recipe{}}
	t.root = newRecorder(t)
	now, search := time.Now(), time.Duration(s.sized(1))*s.search
	t.until, t.traced = now.Add(search), now.Add(search)
	if s.short {
		t.traced = now.Add(search / 3)
	}
	return t
}

// random returns a generator of its own for each name.
func (s *suite) random(name string) *rand.Rand {
	h := fnv.New64a()
	h.Write([]byte(name))
	return rand.New(rand.NewPCG(s.seed, h.Sum64()))
}

// sized returns n, or ten times as much in a full run.
func (s *suite) sized(n int) int {
	if s.full {
		return 10 * n
	}
	return n
}

// part returns n, or a part of it, at least 1, in a run that searches for less than the usual time.
func (s *suite) part(n int) int {
	if s.search < enough {
		n = max(int(time.Duration(n)*s.search/enough), 1)
	}
	return n
}

// rounds calls f n times, or 10n times in a full run, and fewer times, but at least once, if the time runs out.
func (t *trial) rounds(n int, f func(i int)) {
	for i := range t.suite.sized(n) {
		if i > 0 && (time.Now().After(t.until) || t.hasFailed()) {
			return
		}
		f(i)
	}
}

// record notes a failure; the first one counts.
func (t *trial) record(format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.over && t.failure == "" {
		t.failure = strings.TrimSpace(fmt.Sprintf(format, args...))
	}
}

// fatalf notes a failure and ends the goroutine.
func (t *trial) fatalf(format string, args ...any) {
	t.record(format, args...)
	runtime.Goexit()
}

// skipf ends a case that has not failed, with the reason why it is not tested.
func (t *trial) skipf(format string, args ...any) {
	t.mu.Lock()
	t.skipped = fmt.Sprintf(format, args...)
	t.mu.Unlock()
	runtime.Goexit()
}

// excusef ends the case with the reason why it does not concern the store.
func (t *trial) excusef(format string, args ...any) {
	t.mu.Lock()
	t.excused = true
	t.mu.Unlock()
	t.skipf(format, args...)
}

// pause sleeps. Calls that return meanwhile are not waited for.
func (t *trial) pause(d time.Duration) {
	t.own.Add(1)
	defer t.own.Add(-1)
	time.Sleep(d)
}

func (t *trial) hasFailed() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.failure != "" || t.over
}

// together runs f on n goroutines and returns when all have ended; it ends the case if it has failed.
func (t *trial) together(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			defer t.rescue()
			f(i)
		})
	}
	wg.Wait()
	if t.hasFailed() {
		runtime.Goexit()
	}
}

// lacks reports whether the backend lacks a feature.
func (t *trial) lacks(f Feature) bool { return t.suite.h.lacks(f) != "" }

// data returns a name of data that was not used before.
func (t *trial) data() string {
	return fmt.Sprintf("%s%06d", t.suite.run, t.suite.opened.Add(1))
}

// open opens a handle that is closed with the case. The zero Opening is new data by the store's own clock.
func (t *trial) open(o Opening) *handle { return t.openIn(t.root, o) }

// openIn opens a handle that is closed with a scope.
func (t *trial) openIn(in *recorder, o Opening) *handle {
	if o.Data == "" {
		o.Data = t.data()
	}
	text := "Harness.Open"
	returned := t.begun(&text)
	s := t.suite.h.Open(in, o)
	returned()
	if s == nil {
		t.fatalf("Harness.Open returned nil")
	}
	t.suite.grade.Store(uint32(driver.AtomicityOf(s)))
	t.suite.prompt.Store(driver.IsPrompt(s))
	return t.handle(in, s, o)
}

// handle returns a handle that is closed with a scope.
func (t *trial) handle(in *recorder, s quota.Store, o Opening) *handle {
	h := &handle{t: t, store: s, opening: o}
	in.Cleanup(func() { h.close() })
	return h
}

// within runs f with a scope of its own: stores that f opens in it are closed when f returns.
func (t *trial) within(f func(in *recorder)) {
	in := newRecorder(t)
	defer in.end()
	f(in)
}

// under returns the calls that have not returned.
func (t *trial) under() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	var b strings.Builder
	for text := range t.calls {
		fmt.Fprintf(&b, "\n\t%s", *text)
	}
	if b.Len() == 0 {
		return "none is under way"
	}
	return "under way are" + b.String()
}
