package engine

import (
	"cmp"
	"context"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// Charges that come while enough scripts are in flight wait for one to land, and then go together in the
// next: no timer, and no wait where there is no load.
const (
	maxFlying = 4  // scripts in flight for one lane
	maxBatch  = 64 // charges in one script
)

// A lane is what gathers: a server, or a slot of a cluster. Its lock is never held across I/O.
type lane struct {
	mu      sync.Mutex
	flying  int
	waiting []*batch
	closed  bool
}

// A batch is charges that go in one script.
type batch struct {
	units []unit
	sent  bool          // units are the sender's from now on
	done  chan struct{} // closed when units hold their answers

	until   time.Time // the latest deadline of those who wait
	endless bool      // one of them has none
}

// unit is one charge of a batch and its answer.
type unit struct {
	plan     *plan
	charge   quota.Charge
	gone     bool  // withdrawn: not sent
	next     *unit // of the same key
	decision quota.Decision
	err      error
}

// lane returns the lane of a key.
func (s *Store) lane(key string) *lane {
	if !s.cluster {
		return &s.lanes[0]
	}
	var buf [128]byte
	return &s.lanes[slot(quota.AppendEscaped(buf[:0], quota.Group(key)))]
}

// gather decides a charge, alone if its lane is free, else with others.
func (s *Store) gather(ctx context.Context, p *plan, c *quota.Charge) (quota.Decision, error) {
	l := s.lane(c.Key)
	l.mu.Lock()
	switch {
	case l.closed:
		l.mu.Unlock()
		return quota.Decision{}, errClosed
	case l.flying < maxFlying:
		l.flying++
		l.mu.Unlock()
		defer s.landed(l)
		return s.alone(ctx, p, c)
	}
	b, i := l.join(ctx, p, c)
	l.mu.Unlock()
	if ctx.Done() == nil {
		<-b.done
		return b.units[i].decision, b.units[i].err
	}
	select {
	case <-b.done:
		return b.units[i].decision, b.units[i].err
	case <-ctx.Done():
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !b.sent {
		b.units[i].gone = true
		return quota.Decision{}, ctx.Err()
	}
	select {
	case <-b.done:
		return b.units[i].decision, b.units[i].err
	default:
		return quota.Decision{}, b.shared(TransportError(ctx.Err()))
	}
}

// join adds a charge to the last batch that waits, or to a new one.
func (l *lane) join(ctx context.Context, p *plan, c *quota.Charge) (*batch, int) {
	var b *batch
	if n := len(l.waiting); n > 0 && len(l.waiting[n-1].units) < maxBatch {
		b = l.waiting[n-1]
	} else {
		b = &batch{done: make(chan struct{}), units: make([]unit, 0, 8)}
		l.waiting = append(l.waiting, b)
	}
	if end, set := ctx.Deadline(); !set {
		b.endless = true
	} else if end.After(b.until) {
		b.until = end
	}
	b.units = append(b.units, unit{plan: p, charge: *c})
	return b, len(b.units) - 1
}

// landed is called when a script has landed: the next batch takes its place.
func (s *Store) landed(l *lane) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.next(); b != nil {
		s.flights.Go(func() { s.flyAll(l, b) })
	}
}

// flyAll sends a batch, and those that follow it in its place.
func (s *Store) flyAll(l *lane, b *batch) {
	for b != nil {
		s.fly(b)
		l.mu.Lock()
		b = l.next()
		l.mu.Unlock()
	}
}

// next returns the batch that goes now; without one, a place is free.
func (l *lane) next() *batch {
	if len(l.waiting) == 0 {
		l.flying--
		return nil
	}
	b := l.waiting[0]
	l.waiting[0] = nil
	if l.waiting = l.waiting[1:]; len(l.waiting) == 0 {
		l.waiting = nil
	}
	b.sent = true
	return b
}

// close ends what waits; what is in flight lands.
func (l *lane) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, b := range l.waiting {
		b.sent = true
		for i := range b.units {
			b.units[i].err = errClosed
		}
		close(b.done)
	}
	l.waiting = nil
}

// fly sends a batch under a deadline of its own: the latest of those who wait for it.
func (s *Store) fly(b *batch) {
	defer close(b.done)
	ctx := context.Background()
	if !b.endless {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, b.until)
		defer cancel()
	}
	left := make([]*unit, 0, len(b.units))
	for i := range b.units {
		if !b.units[i].gone {
			left = append(left, &b.units[i])
		}
	}
	for len(left) > 0 {
		left = s.send(ctx, b, left)
	}
}

// Together decides charges as a batch, each alone: what becomes of those that wait, for tests.
func Together(ctx context.Context, s *Store, cs []quota.Charge) ([]quota.Decision, []error) {
	l, b := &lane{}, (*batch)(nil)
	decisions, errs := make([]quota.Decision, len(cs)), make([]error, len(cs))
	for i := range cs {
		p, err := s.plan(cs[i].Limit)
		if err != nil {
			return nil, []error{err}
		}
		b, _ = l.join(ctx, p, &cs[i])
	}
	s.fly(b)
	for i, u := range b.units {
		decisions[i], errs[i] = u.decision, u.err
	}
	return decisions, errs
}

// asked is a key of a batch and the charges to it, in order.
type asked struct {
	key         string
	plan        *plan
	first, last *unit
}

// send decides units in one script. It returns those that it left out: where the numbers of a key's limit
// changed, the charges with the other numbers go in a script of their own.
func (s *Store) send(ctx context.Context, b *batch, units []*unit) (left []*unit) {
	keys, left := s.byKey(units)
	s.sendKeys(ctx, b, keys)
	return left
}

// sendKeys decides what is asked of keys in one script. While a slot moves, some of its keys may be on either
// node: then every key goes alone.
func (s *Store) sendKeys(ctx context.Context, b *batch, keys []asked) {
	rules := make([]quota.Rule, 0, 4)
	args := make([]any, 3, 3+2*len(keys)+3*cap(rules)+1)
	for i := range keys {
		args = append(args, keys[i].key)
	}
	for i := 0; i < len(keys); {
		p := keys[i].plan
		n := 1
		for i+n < len(keys) && keys[i+n].plan == p {
			n++
		}
		args = append(args, p.header, p.params, text(n))
		for _, k := range keys[i : i+n] {
			args = append(args, k.todo())
		}
		rules = append(rules, p.rule)
		i += n
	}
	script := s.scripts.several(rules, batchText)
	args[0], args[1], args[2] = evalSHA, script.sha, text(len(keys))
	r, err := s.run(ctx, script, s.appendClock(args), len(keys))
	switch {
	case err == nil:
		err = conclude(keys, r)
	case len(keys) > 1 && isTryAgain(err):
		each(len(keys), func(i int) { s.sendKeys(ctx, b, keys[i:i+1]) })
		return
	}
	if err != nil {
		err = b.shared(err)
		for i := range keys {
			for u := keys[i].first; u != nil; u = u.next {
				u.err = err
			}
		}
	}
}

// byKey returns the keys of units, those with the same plan together, and the units that are left out.
func (s *Store) byKey(units []*unit) (keys []asked, left []*unit) {
	keys = make([]asked, 0, len(units))
	places := make(map[string]int, len(units))
	mixed, n := false, 0
	for i, u := range units {
		if i == 0 || u.charge.Limit != units[i-1].charge.Limit || u.charge.Key != units[i-1].charge.Key {
			key := s.key(&u.charge)
			var known bool
			if n, known = places[key]; !known {
				n = len(keys)
				places[key] = n
				mixed = mixed || n > 0 && keys[n-1].plan != u.plan
				keys = append(keys, asked{key: key, plan: u.plan})
			}
		}
		switch k := &keys[n]; {
		case k.plan != u.plan:
			left = append(left, u)
		case k.first == nil:
			k.first, k.last = u, u
		default:
			k.last.next = u
			k.last = u
		}
	}
	if mixed {
		slices.SortStableFunc(keys, func(a, b asked) int { return cmp.Compare(a.plan.serial, b.plan.serial) })
	}
	return keys, left
}

// todo is the argument that says what is asked of a key.
func (k *asked) todo() any {
	if k.first == k.last && k.first.charge.Op == quota.OpTake {
		return cost(&k.first.charge)
	}
	var dst []byte
	for u := k.first; u != nil; {
		c, times := &u.charge, int64(0)
		for ; u != nil && u.charge.Op == c.Op && u.charge.Cost == c.Cost && u.charge.At == c.At; u = u.next {
			times++
		}
		for _, n := range [...]int64{int64(c.Op), min(c.Cost, maxCost), int64(c.At), times} {
			dst = append(strconv.AppendInt(dst, n, 10), ' ')
		}
	}
	return string(dst)
}

// conclude decides the units again on what the script found. An error is about the call as a whole.
func conclude(keys []asked, r Reply) error {
	now, positive, ok := stamp(r)
	changes, counted := r.Int(1)
	if !ok || !positive || !counted || r.Len() != 2+len(keys) {
		return badReply(r)
	}
	for i := range keys {
		held, text := r.Text(2 + i)
		it, err := unpack(held)
		if !text {
			if n, ok := r.Int(2 + i); !ok || n != 0 {
				return badReply(r)
			}
			err = errState
		}
		for u := keys[i].first; u != nil; u = u.next {
			if u.err = err; err == nil {
				if u.decision, u.err = quota.ApplyOne(&u.charge, &it, now); u.err == nil && it.Write {
					changes--
				}
			}
		}
	}
	if changes != 0 {
		return differs(keys[0].first.charge.Limit)
	}
	return nil
}

// batchError is the error of a script that several calls shared. Policies know it as resilience.Shared.
type batchError struct {
	error
	batch *batch
}

func (e *batchError) Unwrap() error  { return e.error }
func (e *batchError) RoundTrip() any { return e.batch }

func (b *batch) shared(err error) error { return &batchError{err, b} }
