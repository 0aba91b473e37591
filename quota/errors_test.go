package quota_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/fleetquota/fleetquota/quota"
)

func TestCharged(t *testing.T) {
	for _, test := range []struct {
		err  error
		want quota.ChargeState
	}{
		{nil, quota.WasCharged},
		{quota.ErrInvalid, quota.NotCharged},
		{quota.ErrDenied, quota.NotCharged},
		{&quota.Denial{}, quota.NotCharged},
		{quota.ErrUnavailable, quota.NotCharged},
		{quota.ErrConflict, quota.NotCharged},
		{quota.ErrCrossSlot, quota.NotCharged},
		{quota.ErrOverloaded, quota.NotCharged},
		{quota.ErrMisconfigured, quota.NotCharged},
		{quota.ErrClosed, quota.NotCharged},
		{context.Canceled, quota.NotCharged},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), quota.NotCharged},
		{fmt.Errorf("redis: %w: %w", quota.ErrUnavailable, context.DeadlineExceeded), quota.NotCharged},
		{quota.ErrIndeterminate, quota.ChargeUnknown},
		{fmt.Errorf("redis: %w: %w", quota.ErrIndeterminate, context.DeadlineExceeded), quota.ChargeUnknown},
		{errors.Join(quota.ErrMisconfigured, quota.ErrIndeterminate), quota.ChargeUnknown},
		{errors.New("another library's error"), quota.ChargeUnknown},
	} {
		if got := quota.Charged(test.err); got != test.want {
			t.Errorf("Charged(%v): got %v, want %v", test.err, got, test.want)
		}
	}
	for state, want := range map[quota.ChargeState]string{quota.NotCharged: "no", quota.WasCharged: "yes", quota.ChargeUnknown: "unknown", 9: "invalid"} {
		if got := state.String(); got != want {
			t.Errorf("ChargeState(%d): got %q, want %q", state, got, want)
		}
	}
}
