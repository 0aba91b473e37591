package driver_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

func TestSentinel(t *testing.T) {
	for _, s := range []error{quota.ErrInvalid, quota.ErrUnavailable, quota.ErrIndeterminate, quota.ErrConflict, quota.ErrCrossSlot,
		quota.ErrOverloaded, quota.ErrMisconfigured, quota.ErrClosed} {
		err := fmt.Errorf("store: %w: %w", s, context.Canceled)
		if got := driver.Sentinel(err); got != s {
			t.Errorf("Sentinel(%v): got %v, want %v", err, got, s)
		}
		if got := driver.Classify(err, quota.ErrUnavailable); got != err {
			t.Errorf("Classify(%v): got %v, want the error as it is", err, got)
		}
	}
	for _, err := range []error{nil, context.Canceled, errors.New("driver: bad connection")} {
		if got := driver.Sentinel(err); got != nil {
			t.Errorf("Sentinel(%v): got %v, want nil", err, got)
		}
	}
	if err := errors.Join(quota.ErrMisconfigured, quota.ErrIndeterminate); driver.Sentinel(err) != quota.ErrIndeterminate {
		t.Errorf("Sentinel of two: got %v, want the one that may have been charged, %v", driver.Sentinel(err), quota.ErrIndeterminate)
	}
	cause := errors.New("driver: bad connection")
	if err := driver.Classify(cause, quota.ErrIndeterminate); !errors.Is(err, quota.ErrIndeterminate) || !errors.Is(err, cause) {
		t.Errorf("Classify(%v): got %v, want one that is ErrIndeterminate and wraps its cause", cause, err)
	}
}

func TestShare(t *testing.T) {
	batch := new(int)
	err := fmt.Errorf("caller: %w", driver.WithRoundTrip(fmt.Errorf("redis: %w", quota.ErrIndeterminate), batch))
	shared, ok := errors.AsType[driver.RoundTripError](err)
	if !ok || shared.RoundTrip() != batch {
		t.Errorf("round trip of %v: got %v, want the one it was shared with", err, shared)
	}
	if !errors.Is(err, quota.ErrIndeterminate) || err.Error() != "caller: redis: outcome unknown" {
		t.Errorf("error: got %q, want the shared error's text and sentinel", err)
	}
}

func TestGate(t *testing.T) {
	var g driver.Gate
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, closed := range []bool{false, true} {
		if closed {
			if !g.Close() {
				t.Error("first Close: got false, want true")
			}
			if g.Close() {
				t.Error("second Close: got true, want false")
			}
		}
		if err := g.Ready(ended); err != context.Canceled {
			t.Errorf("closed %v: Ready with an ended context: got %v, want the context's own error", closed, err)
		}
		for name, err := range map[string]error{"Ready": g.Ready(t.Context()), "Open": g.Open()} {
			if got := errors.Is(err, quota.ErrClosed); got != closed {
				t.Errorf("closed %v: %s: got %v, want ErrClosed: %v", closed, name, err, closed)
			}
		}
	}
}

func TestAtNode(t *testing.T) {
	inner := driver.WithRoundTrip(fmt.Errorf("lost: %w", quota.ErrUnavailable), 7)
	err := fmt.Errorf("outer: %w", driver.AtNode(inner, "127.0.0.1:7001"))
	if got, want := driver.NodeOf(err), "127.0.0.1:7001"; got != want {
		t.Errorf("NodeOf: got %q, want %q", got, want)
	}
	if got, want := driver.Sentinel(err), quota.ErrUnavailable; got != want {
		t.Errorf("Sentinel: got %v, want %v", got, want)
	}
	if shared, ok := errors.AsType[driver.RoundTripError](err); !ok || shared.RoundTrip() != 7 {
		t.Errorf("Shared: got %v, %v, want round trip 7", shared, ok)
	}
	if got, want := err.Error(), "outer: "+inner.Error()+" (node 127.0.0.1:7001)"; got != want {
		t.Errorf("text: got %q, want %q", got, want)
	}
	if got := driver.AtNode(inner, ""); got != inner {
		t.Errorf("AtNode without a name: got %v, want the error itself", got)
	}
	if got := driver.AtNode(nil, "a"); got != nil {
		t.Errorf("AtNode of no error: got %v, want nil", got)
	}
	if got := driver.NodeOf(inner); got != "" {
		t.Errorf("NodeOf an error without a node: got %q, want none", got)
	}
}

// Each error of package quota and of a context has a word.
func TestClass(t *testing.T) {
	for word, err := range map[string]error{
		"": nil, "invalid": quota.ErrInvalid, "indeterminate": quota.ErrIndeterminate, "unavailable": quota.ErrUnavailable, "overloaded": quota.ErrOverloaded,
		"misconfigured": quota.ErrMisconfigured, "conflict": quota.ErrConflict, "cross_slot": quota.ErrCrossSlot, "closed": quota.ErrClosed,
		"canceled": context.Canceled, "deadline": context.DeadlineExceeded, "other": errors.New("else"),
	} {
		if err != nil {
			err = fmt.Errorf("caller: %w", err)
		}
		if got := driver.Class(err); got != word {
			t.Errorf("class of %v: got %q, want %q", err, got, word)
		}
	}
	if got := driver.Class(fmt.Errorf("%w: %w", quota.ErrMisconfigured, quota.ErrIndeterminate)); got != "indeterminate" {
		t.Errorf("class of two errors: got %q, want indeterminate", got)
	}
}
