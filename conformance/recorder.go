package conformance

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
)

// recorder is the testing.TB that Harness.Open gets. Failures, skips and clean-ups belong to the case, or to a part of
// it, and not to the author's test.
type recorder struct {
	testing.TB
	t      *trial
	ctx    context.Context
	cancel context.CancelFunc

	mu       sync.Mutex
	cleanups []func()
}

func newRecorder(t *trial) *recorder {
	r := &recorder{TB: t.tb, t: t}
	r.ctx, r.cancel = context.WithCancel(context.Background())
	return r
}

// end runs the registered clean-ups, the last one first.
func (r *recorder) end() {
	r.cancel()
	for {
		r.mu.Lock()
		n := len(r.cleanups)
		if n == 0 {
			r.mu.Unlock()
			return
		}
		f := r.cleanups[n-1]
		r.cleanups = slices.Delete(r.cleanups, n-1, n)
		r.mu.Unlock()
		func() {
			defer r.t.rescue()
			f()
		}()
		r.t.progress.Add(1)
	}
}

func (r *recorder) Cleanup(f func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.cleanups = append(r.cleanups, f)
}

func (r *recorder) Context() context.Context { return r.ctx }
func (r *recorder) Helper()                  {}
func (r *recorder) Log(...any)               {}
func (r *recorder) Logf(string, ...any)      {}

func (r *recorder) Fail()        { r.t.record("Harness: Fail") }
func (r *recorder) Failed() bool { return r.t.hasFailed() }
func (r *recorder) FailNow()     { r.t.fatalf("Harness: FailNow") }

func (r *recorder) Error(args ...any)                 { r.t.record("Harness: %s", fmt.Sprintln(args...)) }
func (r *recorder) Errorf(format string, args ...any) { r.t.record("Harness: "+format, args...) }
func (r *recorder) Fatal(args ...any)                 { r.t.fatalf("Harness: %s", fmt.Sprintln(args...)) }
func (r *recorder) Fatalf(format string, args ...any) { r.t.fatalf("Harness: "+format, args...) }

func (r *recorder) Skip(args ...any)                 { r.t.skipf("Harness: %s", fmt.Sprintln(args...)) }
func (r *recorder) Skipf(format string, args ...any) { r.t.skipf("Harness: "+format, args...) }
func (r *recorder) SkipNow()                         { r.t.skipf("Harness: SkipNow") }
func (r *recorder) Skipped() bool {
	r.t.mu.Lock()
	defer r.t.mu.Unlock()
	return r.t.skipped != ""
}
