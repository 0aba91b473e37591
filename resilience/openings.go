package resilience

import (
	"math/rand/v2"
	"sync"
	"time"
)

// openings makes the times for which a breaker stays open: each opening takes twice as long as the one before
// it, until the breaker has closed and has stayed closed for twice the last opening.
type openings struct {
	first  time.Duration
	jitter float64 // the random part of each

	mu     sync.Mutex
	next   time.Duration // the longest time of the next opening; 0 is first
	last   time.Duration // the time of the last one
	closed time.Time     // when the breaker last closed
}

// open returns the time of an opening that begins now, at most most. again says that a probe failed.
func (o *openings) open(most time.Duration, again bool) time.Duration {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.next == 0 || !again && time.Since(o.closed) >= 2*o.last {
		o.next = o.first
	}
	longest := min(o.next, most)
	if o.next = most; longest < most/2 {
		o.next = 2 * longest
	}
	o.last = longest - time.Duration(rand.Float64()*o.jitter*float64(longest))
	return o.last
}

// close notes that the breaker closed.
func (o *openings) close() {
	o.mu.Lock()
	o.closed = time.Now()
	o.mu.Unlock()
}
