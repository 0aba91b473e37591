package engine

import (
	"sync"

	"github.com/fleetquota/fleetquota/internal/panics"
)

// Code of others runs within a store: a client with its hooks, algorithms, receivers of notices. In a goroutine of the
// store a panic of such code would end the process, and in a batch it would leave other callers without an answer. So it
// becomes an error of the calls that it concerns, which says ErrIndeterminate if a script may have charged. The other
// calls of a batch are decided. Only where a caller's own goroutine has sent nothing yet, as in Scripted.Lua or
// Options.Clock, does the panic reach the caller. It never finds a lock held.

// Catch calls f, in which code of others runs, and returns a panic as an error. unknown says that f may have charged.
func Catch(whose string, unknown bool, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = panics.Error("redis", whose, v, unknown)
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
var errEnded = panics.Ended("redis")
