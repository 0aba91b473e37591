package engine

import (
	"fmt"
	"runtime"
	"strings"
	"sync"

	"github.com/fleetquota/fleetquota/quota"
)

// Code of others runs within a store: a client with its hooks, algorithms, receivers of notices. In a goroutine of the
// store a panic of such code would end the process, and in a batch it would leave other callers without an answer. So it
// becomes an error of the calls that it concerns, which says ErrIndeterminate if a script may have charged. The other
// calls of a batch are decided. Only where a caller's own goroutine has sent nothing yet, as in Scripted.Lua or
// Options.Clock, does the panic reach the caller. It never finds a lock held.

// panicError is a panic as an error: an ErrMisconfigured, and an ErrIndeterminate if a charge may have been made.
type panicError struct {
	text    string
	unknown bool
}

func (e *panicError) Error() string {
	if e.unknown {
		return fmt.Sprintf("redis: %v: %v: %s", quota.ErrIndeterminate, quota.ErrMisconfigured, e.text)
	}
	return fmt.Sprintf("redis: %v: %s", quota.ErrMisconfigured, e.text)
}

func (e *panicError) Unwrap() []error {
	if e.unknown {
		return []error{quota.ErrIndeterminate, quota.ErrMisconfigured}
	}
	return []error{quota.ErrMisconfigured}
}

// panicked returns a recovered value as an error. whose names the code that panicked.
func panicked(v any, whose string, unknown bool) error {
	return &panicError{fmt.Sprintf("%s panicked: %v (%s)", whose, v, panicPlace()), unknown}
}

// panicPlace returns the function that panicked. A deferred function that recovered calls it.
func panicPlace() string {
	var pcs [64]uintptr
	frames := runtime.CallersFrames(pcs[:runtime.Callers(1, pcs[:])])
	for panicking := false; ; {
		f, more := frames.Next()
		if panicking && !strings.HasPrefix(f.Function, "runtime.") {
			return fmt.Sprintf("in %s, line %d", f.Function, f.Line)
		}
		panicking = panicking || f.Function == "runtime.gopanic"
		if !more {
			return "in a function that is not known"
		}
	}
}

// isPanic reports whether an error is of a panic.
func isPanic(err error) bool {
	_, is := err.(*panicError)
	return is
}

// Catch calls f, in which code of others runs, and returns a panic as an error. unknown says that f may have charged.
func Catch(whose string, unknown bool, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = panicked(v, whose, unknown)
		}
	}()
	return f()
}

// Each calls f for 0 to n-1, concurrently, and returns their errors when all calls have returned. A panic is an error.
func Each(n int, f func(int) error) []error {
	errs := make([]error, n)
	call := func(i int) {
		errs[i] = errEnded
		errs[i] = Catch("a function", true, func() error { return f(i) })
	}
	var wg sync.WaitGroup
	for i := 1; i < n; i++ {
		wg.Go(func() { call(i) })
	}
	if n > 0 {
		call(0)
	}
	wg.Wait()
	return errs
}

// errEnded is the error of a call whose goroutine ended by runtime.Goexit in code of others.
var errEnded error = &panicError{"a function ended the goroutine that called it", true}
