// Package panics turns panics of code of others, which runs within a store, into errors of the calls that they concern.
package panics

import (
	"fmt"
	"runtime"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
)

// asError is a panic as an error: an ErrMisconfigured, and an ErrIndeterminate if a charge may have been made.
type asError struct {
	store, text string
	unknown     bool
}

func (e *asError) Error() string {
	if e.unknown {
		return fmt.Sprintf("%s: %v: %v: %s", e.store, quota.ErrIndeterminate, quota.ErrMisconfigured, e.text)
	}
	return fmt.Sprintf("%s: %v: %s", e.store, quota.ErrMisconfigured, e.text)
}

func (e *asError) Unwrap() []error {
	if e.unknown {
		return []error{quota.ErrIndeterminate, quota.ErrMisconfigured}
	}
	return []error{quota.ErrMisconfigured}
}

// Error returns a recovered value as an error of a store. whose names the code that panicked, and unknown says that a
// charge may have been made. It must be called by the deferred function that recovered.
func Error(store, whose string, v any, unknown bool) error {
	return &asError{store, fmt.Sprintf("%s panicked: %v (%s)", whose, v, place()), unknown}
}

// Ended returns the error of a call whose goroutine ended by runtime.Goexit in code of others.
func Ended(store string) error {
	return &asError{store, "a function ended the goroutine that called it", true}
}

// Is reports whether err was made by this package.
func Is(err error) bool {
	_, is := err.(*asError)
	return is
}

// place returns the function that panicked.
func place() string {
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
