package lease

import (
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// chunk is quota of one limit and key that was charged to the store below. All fields but left are immutable.
// A chunk fills one cache line, which every decision writes.
type chunk struct {
	left      atomic.Int64 // tokens that may be spent; negative when the chunk is closed
	limit     *quota.Limit
	size      int64        // tokens that were charged for this chunk
	sent      int64        // before the request was sent
	until     int64        // it may be spent before this time
	at        quota.Micros // the store's time of the charge
	remaining int64        // tokens that the store had left after the charge
	whole     int64        // when the quota is whole again, by the store's answer
}

// The values of left of a chunk that is closed; of a worthless one no token may be given back.
const (
	closedChunk    = -1 << 62
	worthlessChunk = closedChunk - 1
)

// decide answers a charge of at least one token out of the chunk, or reports that it cannot.
func (k *chunk) decide(c *quota.Charge, now int64, d *quota.Decision) bool {
	if now >= k.until || k.limit != c.Limit && *k.limit.Spec() != *c.Limit.Spec() {
		return false
	}
	var left int64
	ok := false
	switch c.Op {
	case quota.OpTake, quota.OpAhead, quota.OpDebit, quota.OpUpTo:
		if left, ok = k.spend(c.Cost); ok {
			d.Charged = c.Cost
		}
	case quota.OpPeek:
		left = k.left.Load()
		ok = left >= c.Cost
	case quota.OpRefund:
		if c.From == quota.FromLease && c.MadeAt == k.at {
			if left, ok = k.put(c.Cost); ok {
				d.Charged = -c.Cost
			}
		}
	}
	if ok {
		k.describe(d, left, now)
	}
	return ok
}

// describe fills in a decision that was allowed, after which the chunk has left tokens.
func (k *chunk) describe(d *quota.Decision, left, now int64) {
	d.Allowed, d.Source = true, quota.FromLease
	d.Capacity = k.limit.Spec().Capacity
	d.Remaining = left + max(k.remaining, 0)
	d.ResetAfter = time.Duration(max(k.whole-now, 0))
	d.At = k.at
}

// spend takes n tokens, if the chunk has as many.
func (k *chunk) spend(n int64) (left int64, ok bool) {
	for {
		left = k.left.Load()
		if left < n {
			return left, false
		}
		if k.left.CompareAndSwap(left, left-n) {
			return left - n, true
		}
	}
}

// claim takes up to n tokens and returns how many.
func (k *chunk) claim(n int64) int64 {
	for {
		left := k.left.Load()
		if left <= 0 {
			return 0
		}
		most := min(n, left)
		if k.left.CompareAndSwap(left, left-most) {
			return most
		}
	}
}

// put returns n tokens that were spent, unless the chunk is closed or would exceed its size.
func (k *chunk) put(n int64) (left int64, ok bool) {
	for {
		left = k.left.Load()
		if left < 0 || n > k.size-left {
			return left, false
		}
		if k.left.CompareAndSwap(left, left+n) {
			return left + n, true
		}
	}
}

// close ends the chunk and returns the tokens that it had left.
func (k *chunk) close() int64 { return max(k.left.Swap(closedChunk), 0) }

// slack returns how many tokens refill may have repaid since the charge while every token of the chunk can
// still be given back. A full bucket forgets refill, so a give-back is too much once the bucket could have
// been full without it. Right after the charge the bucket lacks capacity - remaining tokens; all processes
// together hold at most a quarter of the capacity, and the lack beyond that quarter is the slack.
func (k *chunk) slack() int64 {
	capacity := k.limit.Spec().Capacity
	return max(capacity-k.remaining-1-(capacity+3)/4, 0)
}

// refundable returns how many of n tokens may be given back by a request that has taken effect by the time then.
func (k *chunk) refundable(n, then int64) int64 {
	return max(n-max(refill(k.limit, then-k.sent)+1-k.slack(), 0), 0)
}

// refill returns the tokens that a limit gains in span ns, rounded down.
func refill(l *quota.Limit, span int64) int64 {
	capacity, a := l.Spec().Capacity, l.Algorithm()
	s, _ := a.Decide(quota.State{}, quota.Request{Op: quota.OpDebit, Cost: capacity}, 0)
	_, v := a.Decide(s, quota.Request{Op: quota.OpPeek}, quota.Micros(max(span, 0)/int64(time.Microsecond)))
	return v.Remaining
}
