package quota

import "testing"

// The work of a waiting caller does not grow with the queue: joining, the forecast, its turn, and leaving from any place. All
// of it happens under a lock that other keys need. So a step may look at no other callers than the first, the last and
// its own neighbors: here the others cannot be reached, and a step that looks for them panics or is wrong.
func TestAWaiterCostsTheSameInALongQueue(t *testing.T) {
	const key, callers = "k", 9
	// queueCut returns a queue of callers who wait for 1, 2, 4 … tokens.
	queueCut := func(i int) (l *Limiter, q *queue, all []*waiter) {
		l = &Limiter{maxWaiters: callers}
		for j := range callers {
			w, err := l.enqueue(key, 1<<j)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, w)
		}
		reached := func(j int) bool { return j == 0 || j == callers-1 || j >= i-1 && j <= i+1 }
		for j, w := range all {
			if j > 0 && !reached(j-1) {
				w.prev = nil
			}
			if j < callers-1 && !reached(j+1) {
				w.next = nil
			}
		}
		return l, l.queues[key], all
	}
	tokens := func(q *queue, step string, i int, want int64) {
		if got := q.tokens(); got != want {
			t.Errorf("%s of caller %d: tokens that are waited for: got %d, want %d", step, i, got, want)
		}
	}
	const everything = 1<<callers - 1
	for i := range callers {
		l, q, all := queueCut(i)
		w := all[i]
		if got, want := l.ahead(w), int64(1<<i-1); got != want {
			t.Errorf("tokens ahead of caller %d: got %d, want %d", i, got, want)
		}
		l.gaveBack(key)
		if i == 0 {
			l.ask(w)
			tokens(q, "asking", i, everything)
			if _, err := l.rest(w); err != nil {
				t.Errorf("rest: got error %v, want none", err)
			}
		}
		l.leave(w)
		tokens(q, "leaving", i, everything-w.cost)
		if i > 0 && w.prev.next != w.next || i < callers-1 && w.next.prev != w.prev {
			t.Errorf("neighbors of caller %d after it left: got %p and %p, want each the other", i, w.prev, w.next)
		}
		first, last := all[0], all[callers-1]
		switch i {
		case 0:
			first = all[1]
		case callers - 1:
			last = all[i-1]
		}
		if q.first != first || q.last != last {
			t.Errorf("ends of the queue after caller %d left: got %p and %p, want %p and %p", i, q.first, q.last, first, last)
		}

		l, q, all = queueCut(i)
		joined, err := l.enqueue(key, 1<<callers)
		if err != nil || q.last != joined || joined.prev != all[callers-1] || all[callers-1].next != joined || l.ahead(joined) != everything {
			t.Errorf("joining: got %p behind %p, error %v; want it behind the last, %p", joined, joined.prev, err, all[callers-1])
		}
		tokens(q, "joining", i, 2*everything+1)
	}
}
