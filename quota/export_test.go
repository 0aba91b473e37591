package quota

// Unexported parts that the external tests read.

// Less is the comparison of products under Decider.
func Less(a, b, c, d int64) bool { return less(a, b, c, d) }

// Queues returns how many limits and keys have waiters, and how many calls are counted as waiting.
func (l *Limiter) Queues() (keys, waiting int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.queues), l.waiting
}

// Enqueue joins the queue of a key and makes the forecast's sum. It returns the function that leaves the queue.
func (l *Limiter) Enqueue(key string, n int64) (leave func()) {
	w := &waiting{charges: []Charge{{Limit: l.limit, Key: key, Cost: n}}, own: 1}
	if err := l.join(w); err != nil {
		panic(err)
	}
	l.ahead(w.waiter)
	return func() { l.leave(w.waiter) }
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
