package quota_test

import (
	"slices"
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
	// The median of batches: while other programs run, some batches take as long as these please.
	const batch = 64
	took := func(n int) time.Duration {
		var all []time.Duration
		for range many / n {
			times := make([]time.Duration, n/batch)
			leave := make([]func(), n)
			for b := range times {
				start := time.Now()
				for i := range batch {
					leave[b*batch+i] = lim.Enqueue("k", 1)
				}
				times[b] = time.Since(start)
			}
			for b := range times {
				start := time.Now()
				for i := b * batch; i < (b+1)*batch; i++ { // from both ends and the middle
					leave[[...]int{i, n - i}[i%2]]()
				}
				times[b] += time.Since(start)
			}
			all = append(all, times...)
			if keys, waiting := lim.Queues(); keys != 0 || waiting != 0 {
				t.Fatalf("after all left: got %d queues and %d waiters, want none", keys, waiting)
			}
		}
		slices.Sort(all)
		return all[len(all)/2] / batch
	}
	short, long := took(few), took(many)
	t.Logf("each of %d: %v, each of %d: %v", few, short, many, long)
	if long > 10*short {
		t.Errorf("time for each of %d waiters: got %v, want about the %v that each of %d takes", many, long, short, few)
	}
}
