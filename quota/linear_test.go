package quota_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/internal/testkit"
	"github.com/fleetquota/fleetquota/quota"
)

// The work of a waiting caller does not grow with the queue ahead of it: joining, the forecast, and leaving from any place.
// All of it happens under a lock that other keys need.
func TestAWaiterCostsTheSameInALongQueue(t *testing.T) {
	const few, many = 1 << 10, 1 << 15
	lim := newLimiter(t, local.New(), testkit.Bucket("n", 1, time.Second), &quota.Options{MaxWaiters: many})
	took := func(n int) (best time.Duration) {
		for range 3 {
			leave := make([]func(), n)
			start := time.Now()
			for i := range leave {
				leave[i] = lim.Enqueue("k", 1)
			}
			for i := range leave { // from both ends and the middle
				leave[[...]int{i, n - i}[i%2]]()
			}
			if d := time.Since(start) / time.Duration(n); best == 0 || d < best {
				best = d
			}
			if keys, waiting := lim.Queues(); keys != 0 || waiting != 0 {
				t.Fatalf("after all left: got %d queues and %d waiters, want none", keys, waiting)
			}
		}
		return best
	}
	short, long := took(few), took(many)
	t.Logf("each of %d: %v, each of %d: %v", few, short, many, long)
	if long > 10*short {
		t.Errorf("time for each of %d waiters: got %v, want about the %v that each of %d takes", many, long, short, few)
	}
}
