package quota

// Unexported parts that the external tests read.

// Less is the comparison of products under Decider.
func Less(a, b, c, d int64) bool { return less(a, b, c, d) }

// Queues returns how many keys have waiters, and how many calls are counted as waiting.
func (l *Limiter) Queues() (keys, waiting int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queues), l.waiting
}

// Limit returns the limiter's own limit.
func (l *Limiter) Limit() *Limit { return l.limit }
