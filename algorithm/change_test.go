package algorithm_test

import (
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// What was consumed stays consumed when the numbers of a limit change.
func TestChange(t *testing.T) {
	const minute = 60 * second
	start := down(base, 24*60*minute) // of a day, hour and minute
	tests := []struct {
		name      string
		from, to  rule
		used      int64
		wait      int64 // µs between the charge and the change
		remaining int64
	}{
		{"bucket grows", mustRule(t, bucket, 10, 1, time.Second), mustRule(t, bucket, 20, 1, time.Second), 7, 0, 13},
		{"bucket shrinks", mustRule(t, bucket, 10, 1, time.Second), mustRule(t, bucket, 5, 1, time.Second), 7, 0, -2},
		{"another unit, whole tokens", mustRule(t, bucket, 10, 1, time.Second), mustRule(t, bucket, 10, 4, time.Second), 7, 0, 3},
		{"another unit, refilled by the new rate", mustRule(t, bucket, 10, 1, time.Second), mustRule(t, bucket, 10, 4, time.Second), 7, second, 7},
		{"a higher rate, also for the time since the last charge", mustRule(t, bucket, 10_000, 1, time.Second), mustRule(t, bucket, 10_000, 100, time.Second), 10_000, 10 * second, 1000},
		{"a lower rate, also for the time since the last charge", mustRule(t, bucket, 10_000, 100, time.Second), mustRule(t, bucket, 10_000, 1, time.Second), 10_000, 10 * second, 10},
		{"another tick", mustRule(t, bucket, 10, 1, time.Second), mustRule(t, bucket, 1_000_000_000, 1_000_000_007, 1000*time.Hour), 7, 0, 999_999_993},
		{"window's limit grows", mustRule(t, fixed, 10, 0, time.Minute), mustRule(t, fixed, 20, 0, time.Minute), 7, 0, 13},
		{"window's limit shrinks", mustRule(t, fixed, 10, 0, time.Minute), mustRule(t, fixed, 5, 0, time.Minute), 7, 0, -2},
		{"shorter window, the old one holds", mustRule(t, fixed, 10, 0, time.Hour), mustRule(t, fixed, 10, 0, time.Minute), 7, 59 * minute, 3},
		{"shorter window, the old one over", mustRule(t, fixed, 10, 0, time.Hour), mustRule(t, fixed, 10, 0, time.Minute), 7, 60 * minute, 10},
		{"longer window, the old one over", mustRule(t, fixed, 10, 0, time.Minute), mustRule(t, fixed, 10, 0, time.Hour), 7, minute, 10},
		{"shorter from first", mustRule(t, first, 10, 0, time.Hour), mustRule(t, first, 10, 0, time.Minute), 7, 60*minute - 1, 3},
		{"sliding, shorter", mustRule(t, sliding, 10, 0, time.Hour), mustRule(t, sliding, 10, 0, time.Minute), 7, 60 * minute, 3},
		{"sliding, shorter, all over", mustRule(t, sliding, 10, 0, time.Hour), mustRule(t, sliding, 10, 0, time.Minute), 7, 120 * minute, 10},
		{"log, longer", mustRule(t, slidingLog, 10, 0, time.Minute), mustRule(t, slidingLog, 5, 0, time.Hour), 7, 59 * minute, -2},
		{"log, shorter", mustRule(t, slidingLog, 10, 0, time.Hour), mustRule(t, slidingLog, 10, 0, time.Minute), 7, minute, 10},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var c cell
			c.take(test.from, test.used, start)
			if v := c.peek(test.to, 0, start+test.wait); v.Remaining != test.remaining {
				t.Errorf("remaining: got %d, want %d", v.Remaining, test.remaining)
			}
		})
	}
}

// A remainder of a token counts as one token where the unit changes.
func TestChangeRoundsUp(t *testing.T) {
	from, to := mustRule(t, bucket, 10, 1, time.Second), mustRule(t, bucket, 10, 4, time.Second)
	var c cell
	c.take(from, 7, base)
	c.take(from, 1, base+second/2) // 7.5 are consumed
	if v := c.peek(to, 0, base+second/2); v.Remaining != 2 {
		t.Errorf("remaining: got %d, want 2", v.Remaining)
	}
}

// A charge moves the old window's count into a new window; a refund leaves it where it is.
func TestChangeOfWindowMoves(t *testing.T) {
	for _, k := range []kind{fixed, first} {
		t.Run(k.String(), func(t *testing.T) {
			hour, minute := mustRule(t, k, 10, 0, time.Hour), mustRule(t, k, 10, 0, time.Minute)
			start := down(base, 3600*second)
			var c cell
			c.take(hour, 7, start)
			v := c.do(minute, quota.Request{Op: quota.OpRefund, Cost: 2, Arg: quota.Micros(start)}, start+second)
			if v.Remaining != 5 || v.ResetAfter != 3599*second {
				t.Errorf("refund: got %+v, want remaining 5, reset after %d", v, int64(3599*second))
			}
			v = c.take(minute, 1, start+second)
			end := start + 60*second
			if k == first {
				end += second
			}
			if v.Remaining != 4 || int64(v.ResetAfter) != end-start-second {
				t.Errorf("charge: got %+v, want remaining 4, reset after %d", v, end-start-second)
			}
			if v = c.peek(minute, 0, end); v.Remaining != 10 {
				t.Errorf("remaining after the new window: got %d, want 10", v.Remaining)
			}
		})
	}
}

// A refund for a charge that was made before the window does nothing, also where the window was shorter.
func TestChangeOfWindowAndOldRefund(t *testing.T) {
	minute, hour := mustRule(t, fixed, 10, 0, time.Minute), mustRule(t, fixed, 10, 0, time.Hour)
	start := down(base, 3600*second) + 600*second
	var c cell
	c.take(minute, 3, start-60*second)
	c.take(minute, 7, start)
	v := c.do(hour, quota.Request{Op: quota.OpRefund, Cost: 3, Arg: quota.Micros(start - 60*second)}, start+second)
	if v.Remaining != 3 || v.Write {
		t.Errorf("refund: got %+v, want remaining 3 and no write", v)
	}
}

// No change of limits frees consumed tokens: not more remains than the new capacity less the whole tokens
// that the old rule counted. (A log counts anew, for it knows when each charge was.)
func TestChangeFreesNothing(t *testing.T) {
	for _, k := range []kind{bucket, fixed, first, sliding} {
		t.Run(k.String(), func(t *testing.T) {
			rng := random(t)
			for range size(2000) {
				from, to := randomRule(rng, k), randomRule(rng, k)
				var c cell
				now := int64(base) + rng.Int64N(1e13)
				used := 1 + rng.Int64N(from.limit)
				c.take(from, used, now)
				if v := c.peek(to, 0, now); v.Remaining > to.limit-min(used, to.limit+to.debt) {
					if at := c.state.B; k == bucket && down(now, to.tick) > at {
						continue // a finer tick may be due at once
					}
					t.Fatalf("remaining of %d after %d of %d were used: got %d, want %d at most",
						to.limit, used, from.limit, v.Remaining, to.limit-min(used, to.limit+to.debt))
				}
			}
		})
	}
}
