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

// Bare returns a decision without its receipt, as a Store returns it.
func (d Decision) Bare() Decision {
	d.receipt = receipt{}
	return d
}

// Corrections returns how many corrections are remembered.
func (l *Limiter) Corrections() int {
	l.corrections.mu.Lock()
	defer l.corrections.mu.Unlock()
	return len(l.corrections.made)
}

// Limit returns the limiter's own limit.
func (l *Limiter) Limit() *Limit { return l.limit }
