package quota_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// TestStrings is for the values that programs print while they are being written.
func TestStrings(t *testing.T) {
	tokens := testkit.Bucket("tokens", 1000, time.Minute)
	granted := quota.Decision{Allowed: true, Capacity: 1000, Remaining: 750, Charged: 250, ResetAfter: 15 * time.Second, At: testkit.Epoch}
	denied := quota.Decision{Source: quota.FromFallback, Capacity: 10, Remaining: -3, RetryAfter: quota.Never, ResetAfter: time.Minute, Split: true, Replayed: true}
	for _, test := range []struct {
		value fmt.Stringer
		want  string
	}{
		{tokens, "tokens: 1000 burst 1000/m bucket"},
		{quota.NewLimit("n", testkit.Counter{Capacity: 7}), "n: ct1, capacity 7"},
		{(*quota.Limit)(nil), "no limit"},
		{&quota.Limit{}, "no limit"},
		{quota.Charge{Limit: tokens, Key: "team-7/a", Cost: 250}, `take 250 of tokens for "team-7/a"`},
		{quota.Charge{Key: "k\n", Op: quota.OpPeek, ID: "i"}, `peek 0 of the limiter's limit for "k\n", id "i"`},
		{granted, "allowed by the store: charged 250, 750 of 1000 left, whole after 15s, at 2026-11-23T09:45:41.791724Z"},
		{denied, "denied by the fallback: -3 of 10 left, retry never, whole after 1m0s, split, replayed"},
		{quota.Decision{RetryAfter: time.Second}, "denied by the store: 0 of 0 left, retry after 1s"},
		{quota.Result{Granted: true, Decisions: []quota.Decision{{Allowed: true, Capacity: 2, Remaining: 1, Charged: 1}}},
			"granted, decided by charge 0 of [allowed by the store: charged 1, 1 of 2 left]"},
		{quota.Result{Decider: 1, Decisions: []quota.Decision{{Allowed: true}, {}}},
			"denied, decided by charge 1 of [allowed by the store: 0 of 0 left; denied by the store: 0 of 0 left]"},
	} {
		if got := test.value.String(); got != test.want {
			t.Errorf("String: got %q, want %q", got, test.want)
		}
	}
}
