package driver

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"time"

	"github.com/fleetquota/fleetquota/internal/panics"
	"github.com/fleetquota/fleetquota/quota"
)

// maxWork is how much work goes in one transaction, see work: less than a round trip to a database takes.
const maxWork = 1024

// pieceSize is how many numbers of a state's list count as much as a charge.
const pieceSize = 512

// call is a call of Charge or ChargeAll.
type call struct {
	cs       []quota.Charge
	out      []quota.Decision
	keys     []string // of the charges, then of their request id
	places   []int    // of the keys in access.Keys of the batch; set when the batch begins
	err      error    // of this call by itself
	*waiting          // nil of a call alone
	alone    batch    // of a call alone

	own   [1]string
	place [1]int
}

// waiting is the state of a call that waits. store.mu guards it, but for the channel.
type waiting struct {
	batch    *batch        // that it is in
	done     chan struct{} // closed when it has its answer
	deadline time.Time     // zero for none
	gone     bool          // it does not go: its caller left, or has no time for it
}

// owned returns the call with charges and decisions of its own, for the caller may leave, and use its own again.
func (k *call) owned() *call {
	return &call{cs: slices.Clone(k.cs), out: make([]quota.Decision, len(k.out)), keys: k.keys}
}

// work returns how much work a call is. The time of a decision grows with the state's list.
func (k *call) work() (n int32) {
	for i := range k.cs {
		n++
		if l, ok := k.cs[i].Limit.Algorithm().(Listed); ok {
			n += int32(l.MaxTail() / pieceSize)
		}
	}
	return n
}

// batch is calls that go in one transaction. Its address identifies the transaction.
type batch struct {
	store *store

	// Until the batch is in flight guarded by store.mu.
	calls   []*call // in the order in which they came
	access  Access
	work    int32
	batched bool // the calls waited; a call alone has its caller's context and goroutine

	// Guarded by store.mu.
	before []*batch // that end before this one is in flight
	after  []*batch // that wait for this one
	sent   bool     // the calls may be among changes that are being written
	lost   int32    // attempts that another process overtook
	// pace is how long an attempt may take, as far as is known of a key on which one was overtaken; else 0.
	pace time.Duration

	cells    []cell // of access.Keys
	attempts int32
	decided  bool  // decide was called in this attempt
	writes   bool  // its last call returned changes
	err      error // of the calls that have none of their own

	call [1]*call
	cell [1]cell
}

// enter has a call enter alone if its keys are free.
func (s *store) enter(k *call) (free bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false, errClosed
	}
	for _, key := range k.keys {
		if s.last[key] != nil {
			return false, nil
		}
	}
	b := &k.alone
	b.store, b.access.Keys = s, k.keys
	b.call[0] = k
	b.calls = b.call[:]
	for _, key := range k.keys {
		s.last[key] = b
	}
	return true, nil
}

// join adds a call to a batch that waits, or to a new one.
func (s *store) join(ctx context.Context, k *call) error {
	work := k.work()
	k.waiting = &waiting{done: make(chan struct{})}
	k.deadline, _ = ctx.Deadline()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return errClosed
	}
	b := s.batchFor(k, work)
	for _, key := range k.keys {
		if w := s.last[key]; w != b {
			if w != nil {
				b.follow(w)
			}
			s.last[key] = b
			b.access.Keys = append(b.access.Keys, key)
		}
	}
	k.batch = b
	b.calls = append(b.calls, k)
	b.work += work
	if len(b.before) > 0 {
		s.queue[b] = struct{}{}
	} else { // the keys became free meanwhile
		s.running.Go(func() { s.run(b) })
	}
	return nil
}

// batchFor returns a batch that waits and is the last one of each of the call's keys that has a batch which waits, or a new
// batch: so no two batches wait for each other, and calls of a key keep their order. A call whose keys are in several batches
// unites them, if they wait only for batches in flight and there is room. The caller holds store.mu.
func (s *store) batchFor(k *call, work int32) *batch {
	var of []*batch // those that wait
	keys, simple := 0, true
	for _, key := range k.keys {
		w := s.last[key]
		switch {
		case w == nil || len(w.before) == 0:
			keys++
		case !slices.Contains(of, w):
			of = append(of, w)
			work += w.work
			keys += len(w.access.Keys)
			simple = simple && !slices.ContainsFunc(w.before, func(p *batch) bool { return len(p.before) > 0 })
		}
	}
	if len(of) == 0 || len(of) > 1 && !simple || work > maxWork || keys > MaxEntries {
		return &batch{store: s, batched: true}
	}
	for _, w := range of[1:] {
		s.unite(of[0], w)
	}
	return of[0]
}

// unite moves the calls of a batch into another one. Both wait, and only for batches in flight. The caller holds store.mu.
func (s *store) unite(b, w *batch) {
	for _, key := range w.access.Keys {
		if s.last[key] == w {
			s.last[key] = b
		}
	}
	for _, k := range w.calls {
		k.batch = b
	}
	b.calls = append(b.calls, w.calls...)
	b.access.Keys = append(b.access.Keys, w.access.Keys...)
	b.work += w.work
	for _, p := range w.before {
		p.after = slices.DeleteFunc(p.after, func(a *batch) bool { return a == w })
		b.follow(p)
	}
	for _, a := range w.after {
		a.before = slices.DeleteFunc(a.before, func(p *batch) bool { return p == w })
		a.follow(b)
	}
	delete(s.queue, w)
}

// follow has b wait for p. The caller holds store.mu.
func (b *batch) follow(p *batch) {
	if !slices.Contains(b.before, p) {
		b.before, p.after = append(b.before, p), append(p.after, b)
	}
}

// wait returns when a call has its answer, or with an error when the context ends.
func (s *store) wait(ctx context.Context, k *call) error {
	select {
	case <-k.done:
		return k.err
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-k.done:
		return k.err
	default:
	}
	k.gone = true
	err := ctx.Err()
	switch {
	case k.batch.sent:
		err = fmt.Errorf("quota: %w: the context ended while the charge was made: %w", quota.ErrIndeterminate, err)
	case errors.Is(err, context.DeadlineExceeded) && k.batch.contended():
		err = fmt.Errorf("quota: %w: attempts lost, and the time was over: %w", quota.ErrConflict, err)
	}
	return WithRoundTrip(err, k.batch)
}

// contended reports whether the batch waits because of attempts that others overtook. The caller holds store.mu.
func (b *batch) contended() bool {
	return b.lost > 0 || slices.ContainsFunc(b.before, (*batch).contended)
}

// run makes the transaction of a batch that waited, and then of the batches that its end sends.
func (s *store) run(b *batch) {
	for b != nil {
		b = s.next(b)
	}
}

// next makes the transaction of a batch, and returns one that its end sends.
func (s *store) next(b *batch) (next *batch) {
	returned := false
	defer func() {
		s.answer(b)
		if returned {
			runtime.Gosched() // callers that this woke come again together, and go in the next transaction
		}
		next = s.leave(b, returned)
	}()
	ctx, cancel := b.context()
	defer cancel()
	s.decide(ctx, b)
	returned = true
	return nil
}

// context returns the context of a batch's transaction: it ends at the latest deadline of its calls.
func (b *batch) context() (context.Context, context.CancelFunc) {
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	var latest time.Time
	for _, k := range b.calls {
		if k.deadline.IsZero() {
			return context.Background(), func() {}
		}
		if k.deadline.After(latest) {
			latest = k.deadline
		}
	}
	return context.WithDeadline(context.Background(), latest)
}

// answer gives the calls of a batch their answers. Those that have one already, and those whose callers left, are gone.
func (s *store) answer(b *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, k := range b.stayed() {
		s.end(k, b.err)
	}
}

// end gives a call that waits its answer: err if it has no error of its own. The caller holds store.mu.
func (s *store) end(k *call, err error) {
	if k.err == nil && err != nil {
		k.err = WithRoundTrip(err, k.batch)
	}
	k.gone = true
	close(k.done)
}

// leave ends a batch and sends those that waited for it alone. It returns the first of them where the caller stays to make its
// transaction.
func (s *store) leave(b *batch, stays bool) (next *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range b.access.Keys {
		if s.last[key] == b {
			delete(s.last, key)
		}
	}
	for _, w := range b.after {
		w.before = slices.DeleteFunc(w.before, func(p *batch) bool { return p == b })
		w.pace = max(w.pace, b.pace)
		if len(w.before) > 0 || s.closed {
			continue
		}
		delete(s.queue, w)
		if stays && next == nil {
			next = w
			continue
		}
		s.running.Go(func() { s.run(w) })
	}
	return next
}

// lose notes that another process overtook an attempt, which took some time: nothing was written.
func (s *store) lose(b *batch, took time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b.lost++
	b.sent = false
	b.pace = 1 + took + took/2
}

// hasten ends the calls of a batch with ErrConflict whose deadlines come before an attempt can have been made, where others
// overtake attempts: if such a call were sent, its outcome would be unknown. It reports whether calls are left.
func (s *store) hasten(ctx context.Context, b *batch, pause time.Duration) (left bool) {
	if !b.batched && pause == 0 {
		return true
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if b.pace == 0 {
		return len(b.stayed()) > 0
	}
	end := time.Now().Add(pause + b.pace)
	if !b.batched {
		deadline, bounded := ctx.Deadline()
		return !bounded || deadline.After(end)
	}
	for _, k := range b.stayed() {
		if k.err = nil; !k.deadline.IsZero() && k.deadline.Before(end) {
			s.end(k, b.conflict(errNoTime))
		}
	}
	return len(b.stayed()) > 0
}

// refuse ends the calls that wait, and those to come, with ErrClosed.
func (s *store) refuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	for b := range s.queue {
		for _, k := range b.stayed() {
			s.end(k, errClosed)
		}
	}
	clear(s.queue)
}

// conflict returns the error of a batch whose attempts were all overtaken, or which has no time for one.
func (b *batch) conflict(cause error) error {
	return fmt.Errorf("quota: %w: %d attempts at %s lost: %w", quota.ErrConflict, b.lost, b.calls[0].cs[0].Limit.Name(), cause)
}

var errNoTime = errors.New("the deadline leaves no time for another one")

// stayed returns the calls whose callers have not left. The caller holds store.mu.
func (b *batch) stayed() []*call {
	return slices.DeleteFunc(slices.Clone(b.calls), func(k *call) bool { return k.gone })
}

// prepare completes the batch's Access, and finds the places of its calls' keys in it.
func (b *batch) prepare() {
	b.access.Peek = true
	b.cells = b.cell[:]
	if n := len(b.access.Keys); n > 1 {
		b.access.Keys = slices.Compact(slices.Sorted(slices.Values(b.access.Keys))) // alternatives may have keys in common
		b.cells = make([]cell, len(b.access.Keys))
	}
	for _, k := range b.calls {
		b.access.Peek = b.access.Peek && OnlyPeeks(k.cs)
		k.places = k.place[:0]
		for _, key := range k.keys {
			place, _ := slices.BinarySearch(b.access.Keys, key)
			k.places = append(k.places, place)
		}
	}
}

// cell is an entry of a transaction, as the calls leave it that were decided so far.
type cell struct {
	seen    bool // a decision depends on the entry
	parsed  bool // item is the entry's
	changed bool
	item    Item
	text    string        // of a changed item; or a record, if the key is of a request id
	ttl     time.Duration // of the text, or of the entry's
}

// decide is the Decide of the batch's transactions: it decides the calls in their order.
func (b *batch) decide(entries []Entry, now quota.Micros) ([]Change, error) {
	b.decided, b.writes = true, false
	if len(entries) != len(b.access.Keys) {
		return nil, fmt.Errorf("quota: %w: decide got %d entries for %d keys", quota.ErrMisconfigured, len(entries), len(b.access.Keys))
	}
	own := now
	for i := range entries {
		if now = max(now, entries[i].At); now-own > quota.Micros(MaxSkew/time.Microsecond) {
			return nil, fmt.Errorf("quota: %w: the clocks of two processes differ by %v; accepted: %v at most", quota.ErrMisconfigured, (now - own).Duration(), MaxSkew)
		}
	}
	clear(b.cells)
	calls := b.send()
	for _, k := range calls {
		k.err = b.decideCall(k, entries, now)
	}
	for i := range b.cells {
		c := &b.cells[i]
		if c.changed && c.parsed {
			c.text = textOf(&c.item)
		} else if !c.changed {
			c.text = entries[i].Value
		}
		b.writes = b.writes || c.text != entries[i].Value
	}
	if !b.writes {
		return nil, nil
	}
	changes := make([]Change, 0, len(b.cells))
	attempt := b.store.newAttempt()
	for i := range b.cells {
		if c := &b.cells[i]; c.seen {
			changes = append(changes, Change{Old: entries[i], Value: c.text, TTL: c.ttl, At: now, Attempt: attempt})
		}
	}
	return changes, nil
}

// send returns the calls whose callers have not left, of which from now on it is not known whether they are charged.
func (b *batch) send() []*call {
	if !b.batched {
		return b.calls
	}
	b.store.mu.Lock()
	defer b.store.mu.Unlock()
	b.sent = true
	return b.stayed()
}

// textOf returns the text that stands for an item in the database.
func textOf(it *Item) string {
	if it.State.IsZero() {
		return ""
	}
	var text [128]byte
	return string(it.AppendText(text[:0]))
}

// decideCall decides a call after those before it. A call that fails leaves the cells as they are.
func (b *batch) decideCall(k *call, entries []Entry, now quota.Micros) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = panics.Error("quota", "an algorithm", v, false)
		}
	}()
	n := len(k.cs)
	var record *cell
	if len(k.places) > n {
		record = &b.cells[k.places[n]]
		text := record.text
		if text == "" {
			text = entries[k.places[n]].Value
		}
		if text != "" {
			return parseGrant(text, k.cs, k.out)
		}
	}
	var few [4]Item
	items := few[:0]
	for _, place := range k.places[:n] {
		c := &b.cells[place]
		if !c.parsed {
			if c.item, err = ParseItem(entries[place].Value); err != nil {
				return err
			}
			c.parsed = true
		}
		items = append(items, c.item)
	}
	if n == 1 {
		err = ApplyOne(&k.cs[0], &items[0], now, &k.out[0])
	} else {
		err = Apply(k.cs, items, now, k.out)
	}
	if err != nil {
		return err
	}
	for i, place := range k.places[:n] {
		c := &b.cells[place]
		if items[i].Write {
			c.item, c.changed = items[i], true
		}
		if items[i].Write || !c.seen {
			c.ttl = ttl(k.out[i].ResetAfter)
		}
		c.seen = true
	}
	if record != nil && quota.Granted(k.out) && !OnlyPeeks(k.cs) {
		*record = cell{seen: true, changed: true, text: string(appendGrant(nil, k.cs, k.out)), ttl: IDLifetime(k.cs, now)}
	}
	return nil
}
