package driver

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/fleetquota/fleetquota/quota"
)

// sentinels are the errors that a store's error may carry. ErrIndeterminate is the first: an error that carries it and
// another may have been charged.
var sentinels = [...]error{
	quota.ErrIndeterminate, quota.ErrUnavailable, quota.ErrOverloaded, quota.ErrInvalid,
	quota.ErrMisconfigured, quota.ErrCrossSlot, quota.ErrConflict, quota.ErrClosed,
}

// Sentinel returns the error of package quota that err carries, such as [quota.ErrUnavailable], or nil if it carries
// none: then err is nil, a context's own error, or an error that was not classified.
func Sentinel(err error) error {
	for _, s := range sentinels {
		if errors.Is(err, s) {
			return s
		}
	}
	return nil
}

// Classify wraps err as the sentinel, unless it carries one already. err must not be nil.
func Classify(err, sentinel error) error {
	if Sentinel(err) != nil {
		return err
	}
	return fmt.Errorf("quota: %w: %w", sentinel, err)
}

// classes are the words of Class. An error is of the first whose error it carries.
var classes = [...]struct {
	err  error
	word string
}{
	{quota.ErrInvalid, "invalid"}, {quota.ErrIndeterminate, "indeterminate"}, {quota.ErrUnavailable, "unavailable"},
	{quota.ErrOverloaded, "overloaded"}, {quota.ErrMisconfigured, "misconfigured"}, {quota.ErrConflict, "conflict"},
	{quota.ErrCrossSlot, "cross_slot"}, {quota.ErrClosed, "closed"}, {context.Canceled, "canceled"}, {context.DeadlineExceeded, "deadline"},
}

// Class returns a word for an error, for logs and the labels of metrics: invalid, indeterminate, unavailable, overloaded,
// misconfigured, conflict, cross_slot, closed, canceled, deadline or other. Of nil it is "".
func Class(err error) string {
	if err == nil {
		return ""
	}
	for _, c := range classes {
		if errors.Is(err, c.err) {
			return c.word
		}
	}
	return "other"
}

// Classes yields the words of Class but "".
func Classes() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, c := range classes {
			if !yield(c.word) {
				return
			}
		}
		yield("other")
	}
}

// A RoundTripError is an error that several calls got from one round trip, such as the lost reply to a batch: a breaker
// counts it once. [WithRoundTrip] makes one.
type RoundTripError interface {
	error
	// RoundTrip identifies the round trip: a comparable value, such as a pointer to the batch. nil stands for a
	// round trip of its own.
	RoundTrip() any
}

// WithRoundTrip returns err as the error of a round trip, see [RoundTripError].
func WithRoundTrip(err error, roundTrip any) error { return &roundTripError{err, roundTrip} }

type roundTripError struct {
	error
	roundTrip any
}

func (e *roundTripError) Unwrap() error  { return e.error }
func (e *roundTripError) RoundTrip() any { return e.roundTrip }

// AtNode returns err as the error of a node, see [Placed]; NodeOf finds the name. A nil error stays nil, and an empty name
// adds none.
func AtNode(err error, node string) error {
	if err == nil || node == "" {
		return err
	}
	return &nodeError{err, node}
}

// NodeOf returns the name of the node that an error is about, or "" where it names none.
func NodeOf(err error) string {
	if e, ok := errors.AsType[*nodeError](err); ok {
		return e.node
	}
	return ""
}

type nodeError struct {
	error
	node string
}

func (e *nodeError) Error() string { return e.error.Error() + " (node " + e.node + ")" }
func (e *nodeError) Unwrap() error { return e.error }

// GettingReady is an error of a call that ended, by its context, while its store still connected to a server: nothing
// was sent, so the error carries [quota.ErrUnavailable]. A policy does not count it as a failure of the store, because
// the caller left early and the connecting goes on. Policies that decide in a store's place decide all the same.
type GettingReady interface {
	error
	// GettingReady reports whether the error is of this kind.
	GettingReady() bool
}
