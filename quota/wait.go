package quota

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
	"unique"
)

const (
	// giveBackTimeout bounds the refund of a grant whose caller has gone.
	giveBackTimeout = time.Second
	// leastPause is how long a waiter pauses after a denial that does not say how long.
	leastPause = time.Millisecond
	// askAgain is how long the first waiter of a key pauses at most, for other processes may have given quota back. For
	// each key that is waited for askAgainForKey is added, so that a limiter asks a thousand times a second at most.
	askAgain       = time.Second
	askAgainForKey = time.Millisecond
	// holdsEndSooner is by how much shorter it pauses where a limit with holds denied: holds of other processes end at any time.
	holdsEndSooner = 4
)

// queueID names a queue. Its limit is zero for charges to the limit that LimitFor chooses for the key: it may choose one of
// another name while they wait, and they keep their places.
type queueID struct {
	limit unique.Handle[string]
	key   string
}

// queue holds the waiting callers of one limit and key: those with the lower floor first, and of one floor first come first
// served. The first one asks the store, the others wait for their turn. It is guarded by Charger.mu, and every step takes
// the same time in a queue of any length, and more with the number of different floors: other keys wait for that lock too.
type queue struct {
	first   *place
	classes []*class // by rank; none is empty
}

// class is the places in a queue of waiters with one floor, side by side.
type class struct {
	rank int64 // see waiter
	last *place
	// The tokens of all places that ever were, and of those that were left or that the store may have charged.
	joined, gone int64
}

// tokens returns the tokens of all places.
func (q *queue) tokens() (tokens int64) {
	for _, c := range q.classes {
		tokens += c.joined - c.gone
	}
	if q.first.waiter.asking {
		tokens += q.first.cost
	}
	return tokens
}

// ahead returns the tokens of the places before one, without those that the store may have charged. It is less where waiters
// behind have left, a bound that errs on the side of waiting.
func (q *queue) ahead(p *place) (tokens int64) {
	for _, c := range q.classes {
		if c == p.class {
			return tokens + max(p.ahead-c.gone, 0)
		}
		tokens += c.joined - c.gone
	}
	return tokens
}

// insert adds a place behind all places of its rank and lower ones.
func (q *queue) insert(p *place) {
	rank := p.waiter.rank
	n := 0
	for n < len(q.classes) && q.classes[n].rank <= rank {
		n++
	}
	if n > 0 {
		p.prev = q.classes[n-1].last
	}
	if n == 0 || q.classes[n-1].rank < rank {
		q.classes = slices.Insert(q.classes, n, &class{rank: rank})
		n++
	}
	p.class = q.classes[n-1]
	p.class.last, p.ahead = p, p.class.joined
	p.class.joined += p.cost
	if p.prev != nil {
		p.next, p.prev.next = p.prev.next, p
	} else {
		if p.next = q.first; p.next != nil {
			p.next.waiter.firsts--
		}
		q.first = p
		p.waiter.firsts++
	}
	if p.next != nil {
		p.next.prev = p
	}
}

// remove takes a place out.
func (q *queue) remove(p *place) {
	if p.class.last == p {
		if p.class.last = p.prev; p.prev == nil || p.prev.class != p.class {
			q.classes = slices.DeleteFunc(q.classes, func(c *class) bool { return c == p.class })
		}
	}
	if p.next != nil {
		p.next.prev = p.prev
	}
	if p.prev != nil {
		p.prev.next = p.next
	} else if q.first = p.next; p.next != nil {
		p.next.waiter.firsts++
		p.next.waiter.wake()
	}
}

// place is a waiter's place in a queue: it has one for each charge of its list, in the order of the charges.
type place struct {
	id         queueID
	queue      *queue
	class      *class
	waiter     *waiter
	cost       int64
	prev, next *place
	ahead      int64 // class.joined when the waiter joined
}

// waiter is a caller that waits for a list of charges. It joins all of its queues in one step, so any two lists stand in the
// same order in every queue that they share, and no two wait for each other. It asks the store when it is the first in all
// of them. Its fields but turn are guarded by Charger.mu.
type waiter struct {
	places  []place
	rank    int64         // the largest floor of its charges as a part of the capacity: waiters of lower ranks go before it
	firsts  int           // how many of its places are the first
	turn    chan struct{} // gets an element when the waiter becomes the first in all, and when it must ask again; of size 1
	asking  bool          // the store may have charged the waiter, which is the first in all
	counted bool          // the waiter is counted in Charger.waiting
	one     [1]place
}

// waiting is the list of charges of a call of Wait or WaitAll.
type waiting struct {
	*waiter
	charges   []Charge
	decisions []Decision // the store's latest answers
	limit     *Limit     // the limiter's own; nil for none
	own       uint64     // the charges, by their bits, that named no limit
	observed  *observed
	holds     bool      // its takes become holds where the limits have them: a call of Acquire
	sent      time.Time // when the store was asked for the latest decisions; only for a call of Acquire
}

// wholeRank is the rank of a floor that is all of the capacity, or more.
const wholeRank = 1 << 32

// rank returns the rank of a charge that waits, by its floor.
func (c *Charge) rank() int64 {
	if c.Floor == 0 || c.Op > OpPeek && c.Op != OpHold {
		return 0
	}
	r, capacity := c.Request(), c.Limit.spec.Capacity
	return partOf(wholeRank, min(r.Floor, capacity), max(capacity, 1))
}

// Wait takes n tokens, waiting until they fit. A nil error means that the tokens were taken.
//
// The waiting callers of a limit and key are served in the order in which they came, and only the first of them asks
// the store. Where the limit's rule carries debt over (Spec.Ahead, as token buckets have it), it takes ahead, see
// [OpAhead]: its tokens are charged at once, and it waits until refill has repaid them. So it comes in bounded time:
// after the first callers of other processes that were charged before, and before all others; calls of Take are denied
// meanwhile. Under other rules the first caller asks until its tokens fit; it holds up neither other processes nor calls
// of Take, and may wait for ever for many tokens beside callers that take few.
//
// Quota that this limiter gives back, by Settle, Refund or Reset, is there for the first waiting caller at once. It sees
// other changes, such as those that other processes make and a limit that LimitFor raised, within a second, and a
// millisecond more for each further key that is waited for. LimitFor chooses the limit anew each time the caller asks.
//
// It fails at once, and charges nothing, with ErrInvalid where n can never fit, with ErrOverloaded where
// Options.MaxWaiters callers wait already, or 2^63 tokens of the key are waited for, and with an error that is
// [context.DeadlineExceeded] where the context's deadline comes before the quota; the queue ahead counts as far as
// the rule can tell, see [Forecaster]. A wait whose context ends gives the tokens back and fails with the context's
// error, which is an ErrIndeterminate too where the store did not take them back.
func (l *Limiter) Wait(ctx context.Context, key string, n int64) (Decision, error) {
	o := beginOne(&Charge{Limit: l.limit, Key: key, Cost: n})
	err := l.fill(l.limit, &o.charge[0])
	if err == nil {
		err = l.wait(ctx, &waiting{charges: o.Charges, decisions: o.Decisions, limit: l.limit, own: 1, observed: o})
	}
	d := o.decision[0]
	l.over(ctx, l.limit, o, err)
	if err != nil {
		return Decision{}, err
	}
	return d, nil
}

// WaitAll takes a list of charges all-or-nothing, waiting until it fits. A nil error means that all charges were made, as by
// ChargeAll, and the result is granted. Charges take or peek, and have no request id: any other list is ErrInvalid, and so are
// those that ChargeAll refuses.
//
// For each limit and key, waiting lists and callers of Wait are served in the order in which they came, but those with a
// lower floor go before all with a higher one; of a list the highest counts, as a part of its limit. A list asks the store
// when it is the first of this charger for all of its charges, and holds up those behind it until it is granted or leaves. Two
// lists never wait for each other. A list whose denied charges are all of rules that carry debt over takes ahead, as Wait
// does; where another rule denies too, it asks until that one admits.
//
// Whatever else is said of [Limiter.Wait] holds for each charge: the errors, the deadline that is known in advance, quota that
// comes back, MaxWaiters, of which a list is one, and the tokens of a caller that has gone.
func (ch *Charger) WaitAll(ctx context.Context, charges ...Charge) (Result, error) {
	return ch.waitAll(ctx, nil, charges)
}

// WaitAll is [Charger.WaitAll]; a charge without a limit goes to the limiter's own.
func (l *Limiter) WaitAll(ctx context.Context, charges ...Charge) (Result, error) {
	return l.waitAll(ctx, l.limit, charges)
}

func (ch *Charger) waitAll(ctx context.Context, limit *Limit, charges []Charge) (Result, error) {
	cs := slices.Clone(charges)
	ds := make([]Decision, len(cs))
	o := begin(cs, ds)
	own, err := ch.fillAll(limit, cs)
	if err == nil {
		err = ch.wait(ctx, &waiting{charges: cs, decisions: ds, limit: limit, own: own, observed: o})
	}
	ch.over(ctx, limit, o, err)
	if err != nil {
		return Result{}, err
	}
	return Result{Granted: true, Decider: Decider(ds), Decisions: ds}, nil
}

// wait joins the queues of the list, and takes its tokens when its turn comes.
func (ch *Charger) wait(ctx context.Context, w *waiting) error {
	for i := range w.charges {
		c := &w.charges[i]
		switch most := c.Limit.spec.Capacity; {
		case c.Op != OpTake && c.Op != OpPeek && !(c.Op == OpHold && w.holds):
			return invalid("operation of a charge that waits", c.Op, "OpTake or OpPeek")
		case c.Alternative != 0:
			return invalid("alternative of a charge that waits", c.Alternative, "0: a wait is for one list")
		case c.ID != "":
			return invalid("request id of a charge that waits", c.ID, "none, for a wait that ends early gives its tokens back")
		case c.Shadow:
		case c.Cost > most:
			return invalid("cost", c.Cost, fmt.Sprintf("up to %d, the capacity of limit %q: more never fits", most, c.Limit))
		case c.neverFits():
			r := c.Request()
			return invalid("cost above a floor of "+strconv.FormatInt(r.Floor, 10), c.Cost, fmt.Sprintf("up to %d together, the capacity of limit %q: more never fits", most, c.Limit))
		}
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := ch.join(w); err != nil {
		return err
	}
	defer ch.leave(w.waiter)
	select {
	case <-w.turn:
		return ch.waitFirst(ctx, w)
	default:
	}
	if err := ch.forecast(ctx, w); err != nil {
		return err
	}
	waited := w.observed.waits()
	select {
	case <-w.turn:
		waited()
		return ch.waitFirst(ctx, w)
	case <-ctx.Done():
		waited()
		return ctx.Err()
	}
}

// neverFits reports whether the cost and the floor are above the capacity.
func (c *Charge) neverFits() bool { r := c.Request(); return r.Need() > c.Limit.spec.Capacity }

// chooseAnew has LimitFor choose the limits of the list again.
func (ch *Charger) chooseAnew(w *waiting) error {
	if ch.limitFor == nil {
		return nil
	}
	changed := false
	for i := range w.charges {
		c := &w.charges[i]
		if w.own&(1<<i) == 0 {
			continue
		}
		limit, err := ch.limitOf(w.limit, c.Key)
		if err != nil {
			return err
		}
		changed = changed || limit != c.Limit
		if c.Limit = limit; w.holds {
			c.Op = OpTake
			c.holdWhereHeld()
		}
	}
	if changed {
		return Check(w.charges)
	}
	return nil
}

// waitFirst asks the store until it grants.
func (ch *Charger) waitFirst(ctx context.Context, w *waiting) error {
	for {
		if err := ch.awaitTurn(ctx, w); err != nil {
			return err
		}
		ch.ask(w.waiter)
		if err := ch.chooseAnew(w); err != nil {
			return err
		}
		if w.holds {
			w.sent = ch.time()
		}
		if err := ch.chargeAll(ctx, w.charges, w.decisions, w.observed); err != nil {
			return err
		}
		i := Decider(w.decisions)
		after := w.decisions[i].RetryAfter
		switch granted := Granted(w.decisions); {
		case granted && ctx.Err() == nil:
			return nil
		case granted:
			return ch.giveBack(ctx, w.charges, w.decisions, ctx.Err())
		case after == Never:
			c := &w.charges[i]
			return invalid("cost", c.Cost, fmt.Sprintf("a cost that limit %q can ever admit", c.Limit))
		}
		known, held := w.denied()
		if err := inTime(ctx, known); err != nil {
			return err
		}
		longest, err := ch.rest(w.waiter)
		if err != nil {
			return err
		}
		if held {
			longest /= holdsEndSooner
		}
		if after > 0 && w.canTakeAhead() {
			if taken, err := ch.waitAhead(ctx, w, longest); err != nil || taken {
				return err
			}
			after = w.decisions[Decider(w.decisions)].RetryAfter
		}
		if !ch.pause(ctx, w, ch.timeOf(&w.decisions[0]), after, longest) {
			return ctx.Err()
		}
	}
}

// awaitTurn waits while a waiter is not the first in all of its queues, where others with lower floors came before it.
func (ch *Charger) awaitTurn(ctx context.Context, w *waiting) error {
	for {
		ch.mu.Lock()
		first := w.firsts == len(w.places)
		ch.mu.Unlock()
		if first {
			return nil
		}
		waited := w.observed.waits()
		select {
		case <-w.turn:
			waited()
		case <-ctx.Done():
			waited()
			return ctx.Err()
		}
	}
}

// denied returns how long the denials last at least, and whether one of them is of a limit with holds: these end at any time.
func (w *waiting) denied() (least time.Duration, held bool) {
	for i := range w.charges {
		switch d := &w.decisions[i]; {
		case d.Allowed || d.Shadow:
		case w.charges[i].Limit.TTL() > 0:
			held = true
		default:
			least = max(least, d.RetryAfter)
		}
	}
	return least, held
}

// canTakeAhead reports whether each charge that was denied may be taken ahead.
func (w *waiting) canTakeAhead() bool {
	for i := range w.charges {
		if !w.decisions[i].Allowed && !w.charges[i].Shadow && !w.charges[i].aheadOfRefill() {
			return false
		}
	}
	return true
}

// aheadOfRefill reports whether a charge that waits may be taken ahead: one with a floor takes no tokens that are not there,
// a shadow waits for none, and one on a limit with holds waits for those more than for refill.
func (c *Charge) aheadOfRefill() bool {
	return c.Op == OpTake && c.Limit.spec.Ahead && c.Floor == 0 && !c.Shadow && c.Limit.TTL() == 0
}

// waitAhead takes ahead for a list that is the first, and waits until it may use its tokens. It reports false where the list
// must be asked for anew: the store denied it, or a key has another limit or rule.
func (ch *Charger) waitAhead(ctx context.Context, w *waiting, longest time.Duration) (taken bool, err error) {
	within := Never
	if deadline, ok := ctx.Deadline(); ok {
		within = max(time.Until(deadline), 0)
	}
	cs, ds := slices.Clone(w.charges), w.decisions
	for i := range cs {
		if cs[i].aheadOfRefill() {
			cs[i].Op, cs[i].Within = OpAhead, within
		}
	}
	ch.ask(w.waiter)
	if err := ch.chargeAll(ctx, cs, ds, w.observed); err != nil {
		return false, err
	}
	if !Granted(ds) {
		ch.rest(w.waiter)
		return false, nil
	}
	left := time.Duration(0)
	for i := range ds {
		left = max(left, ds[i].Delay)
	}
	for from := ch.timeOf(&ds[0]); left > 0; {
		if err = inTime(ctx, left); err != nil || !ch.pause(ctx, w, from, left, longest) {
			break
		}
		at := ch.time()
		left -= at.Sub(from)
		if from = at; left <= 0 {
			break
		}
		if err = ch.chooseAnew(w); err != nil {
			break
		}
		for i := range cs {
			if was, is := cs[i].Limit, w.charges[i].Limit; was.handle != is.handle || was.spec.Rule != is.spec.Rule {
				ch.rest(w.waiter)
				err := ch.giveBack(ctx, cs, ds, nil)
				clear(ds)
				return false, err
			}
		}
		left = min(left, ch.untilRepaid(ctx, w, cs))
	}
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return false, ch.giveBack(ctx, cs, ds, err)
	}
	for i := range ds {
		ds[i].Delay = 0
	}
	return true, nil
}

// untilRepaid returns how long it takes until refill has repaid the debt of all charges that were taken ahead: until a cost
// of 0 fits. Where the store fails it does not know, and the tokens are charged all the same.
func (ch *Charger) untilRepaid(ctx context.Context, w *waiting, taken []Charge) (left time.Duration) {
	peeks := make([]Charge, 0, len(taken))
	for i := range taken {
		if taken[i].Op == OpAhead {
			peeks = append(peeks, Charge{Limit: w.charges[i].Limit, Key: taken[i].Key, Op: OpPeek})
		}
	}
	ds := make([]Decision, len(peeks))
	if ch.askStore(ctx, peeks, ds) != nil {
		return Never
	}
	for i := range ds {
		left = max(left, ds[i].RetryAfter)
	}
	return left
}

// pause waits for a time after from, at most longest and with some jitter, or until the waiter must ask again. It reports
// false if the context ended.
func (ch *Charger) pause(ctx context.Context, w *waiting, from time.Time, after, longest time.Duration) bool {
	defer w.observed.waits()()
	if after <= 0 {
		after = leastPause
	}
	longest -= rand.N(longest / 2).Truncate(time.Microsecond) // the store counts whole ones
	after = min(after, longest)
	due, stop := ch.after(from, after)
	defer stop()
	select {
	case <-due:
	case <-w.turn:
	case <-ctx.Done():
		return false
	}
	return true
}

// after returns a timer that is due when a time has passed since from, by the clock that waiting callers follow.
func (ch *Charger) after(from time.Time, d time.Duration) (due <-chan time.Time, stop func()) {
	if ch.clock != nil {
		return ch.clock.After(from, d)
	}
	timer := time.NewTimer(d)
	return timer.C, func() { timer.Stop() }
}

// clocked is driver.Clocked: a store of tests, whose time waiting callers follow.
type clocked interface {
	Now() time.Time
	After(from time.Time, d time.Duration) (due <-chan time.Time, stop func())
}

// clockOf returns the clock of a store or of one inside it, or nil.
func clockOf(s Store) clocked {
	for s != nil {
		if c, ok := s.(clocked); ok {
			return c
		}
		w, wraps := s.(interface{ Unwrap() Store })
		if !wraps {
			break
		}
		s = w.Unwrap()
	}
	return nil
}

// time returns the time that waiting callers go by.
func (ch *Charger) time() time.Time {
	if ch.clock != nil {
		return ch.clock.Now()
	}
	return time.Now()
}

// timeOf returns the time of a decision that came just now.
func (ch *Charger) timeOf(d *Decision) time.Time {
	if ch.clock != nil && d.At != 0 {
		return d.At.Time()
	}
	return ch.time()
}

// forecast fails if the deadline comes before the tokens ahead in the queues and the list's own are admitted.
func (ch *Charger) forecast(ctx context.Context, w *waiting) error {
	if _, ok := ctx.Deadline(); !ok {
		return nil
	}
	w.observed.ask()
	const tries = 3
	for range tries {
		ahead := ch.ahead(w.waiter)
		err := ch.forecastAll(ctx, w.charges, ahead)
		if err == nil {
			return nil
		}
		// A waiter that left a queue in between may have been counted twice: as waiting, and as charged.
		left := false
		for i, tokens := range ch.ahead(w.waiter) {
			left = left || tokens < ahead[i]
		}
		if !left {
			return err
		}
	}
	return nil
}

// forecastAll fails if the deadline comes before the tokens ahead of each charge, and then its own, are admitted.
func (ch *Charger) forecastAll(ctx context.Context, cs []Charge, ahead []int64) error {
	peeks, ds := slices.Clone(cs), make([]Decision, len(cs))
	for i := range peeks {
		c := &peeks[i]
		r := c.Request()
		c.Op, c.Cost = OpPeek, min(ahead[i]+c.Cost, c.Limit.spec.Capacity-r.Floor)
		if c.Shadow {
			c.Cost = 0
		}
	}
	if err := ch.askStore(ctx, peeks, ds); err != nil {
		return err
	}
	alone := peeks[:0]
	for i := range ds {
		if cs[i].Shadow || cs[i].Limit.TTL() > 0 { // holds end at any time
			continue
		}
		after, all := ds[i].RetryAfter, ahead[i]+cs[i].Cost
		if f, ok := cs[i].Limit.algorithm.(Forecaster); ok {
			least := f.Forecast(ds[i], all)
			if err := inTime(ctx, least); err != nil {
				return err
			}
			after = max(after, least)
		}
		if err := inTime(ctx, after); err != nil && ahead[i] == 0 {
			return err
		} else if err != nil {
			// All tokens fit at once only later, and yet may be admitted one after the other by then: a rule may forget
			// some of them on the way. But the charge's own tokens must fit.
			c := cs[i]
			c.Op = OpPeek
			alone = append(alone, c)
		}
	}
	if len(alone) == 0 {
		return nil
	}
	if err := ch.askStore(ctx, alone, ds[:len(alone)]); err != nil {
		return err
	}
	for i := range alone {
		if err := inTime(ctx, ds[i].RetryAfter); err != nil {
			return err
		}
	}
	return nil
}

// inTime fails if the context's deadline comes before the span after has passed.
func inTime(ctx context.Context, after time.Duration) error {
	deadline, ok := ctx.Deadline()
	if left := time.Until(deadline); ok && left < after {
		return fmt.Errorf("quota: the quota comes in %v, the deadline in %v: %w", after, left, context.DeadlineExceeded)
	}
	return nil
}

// giveBack refunds a grant that came too late for its caller, who gets the error why. If the refund fails, so that the
// tokens come back by refill, the error says so and is an ErrIndeterminate too.
func (ch *Charger) giveBack(ctx context.Context, cs []Charge, ds []Decision, why error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), giveBackTimeout)
	defer cancel()
	refunds := make([]Charge, 0, len(cs))
	for i := range cs {
		if n := max(ds[i].Charged, ds[i].Held); n > 0 {
			r := cs[i].Refund(ds[i], n)
			r.receipt = receipt{} // no caller has the receipt
			refunds = append(refunds, r)
		}
	}
	if len(refunds) == 0 {
		return why
	}
	err := ch.chargeAll(ctx, refunds, make([]Decision, len(refunds)), nil)
	if err == nil {
		return why
	}
	err = fmt.Errorf("quota: %w: the tokens of limit %q may stay charged, for giving them back failed: %w", ErrIndeterminate, refunds[0].Limit, err)
	if why != nil {
		err = fmt.Errorf("%w; %w", why, err)
	}
	return err
}

// join has a list join its queues.
func (ch *Charger) join(w *waiting) error {
	t := &waiter{turn: make(chan struct{}, 1)}
	if t.places = t.one[:]; len(w.charges) != 1 {
		t.places = make([]place, len(w.charges))
	}
	for i := range t.places {
		c, p := &w.charges[i], &t.places[i]
		p.id, p.waiter = queueID{c.Limit.handle, c.Key}, t
		if chosen, err := ch.limitOf(nil, c.Key); err != nil {
			return err
		} else if chosen != nil && (w.own&(1<<i) != 0 || chosen.handle == c.Limit.handle) {
			p.id.limit = unique.Handle[string]{}
		}
		if slices.ContainsFunc(t.places[:i], func(q place) bool { return q.id == p.id }) { // LimitFor chose another limit just now
			return invalid("key of a second charge to limit "+c.Limit.name, c.Key, "each limit and key once in a call")
		}
		if c.Op != OpPeek {
			p.cost = c.Cost
		}
		t.rank = max(t.rank, c.rank())
	}
	w.waiter = t
	return ch.enqueue(t)
}

// enqueue has a waiter join its queues, all in one step.
func (ch *Charger) enqueue(w *waiter) error {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	ready := true
	for i := range w.places {
		p := &w.places[i]
		q := ch.queues[p.id]
		if q == nil {
			continue
		}
		ready = false
		if q.tokens() > math.MaxInt64-p.cost {
			return fmt.Errorf("quota: %w: callers wait for as many tokens of %q already as can be counted, with these %d", ErrOverloaded, p.id.key, p.cost)
		}
	}
	if !ready {
		if err := ch.count(w); err != nil {
			return err
		}
	}
	for i := range w.places {
		p := &w.places[i]
		if p.queue = ch.queues[p.id]; p.queue == nil {
			if ch.queues == nil {
				ch.queues = make(map[queueID]*queue)
			}
			p.queue = &queue{}
			ch.queues[p.id] = p.queue
			ch.queued.Add(1)
		}
		p.queue.insert(p)
	}
	w.wake()
	return nil
}

// ahead returns, for each charge of a list, the tokens of the waiters before it, see queue.ahead.
func (ch *Charger) ahead(w *waiter) []int64 {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	tokens := make([]int64, len(w.places))
	for i := range w.places {
		tokens[i] = w.places[i].queue.ahead(&w.places[i])
	}
	return tokens
}

// wake has a waiter ask the store, or ask again, if it is the first in all of its queues. The caller must hold Charger.mu.
func (w *waiter) wake() {
	if w.firsts < len(w.places) {
		return
	}
	select {
	case w.turn <- struct{}{}:
	default: // it is about to ask
	}
}

// gaveBack wakes the first waiting caller of a limit and key to which tokens came back.
func (ch *Charger) gaveBack(c *Charge) {
	if ch.queued.Load() == 0 { // a caller that begins to wait now asks after this give-back
		return
	}
	ch.mu.Lock()
	defer ch.mu.Unlock()
	for _, id := range [...]queueID{{key: c.Key}, {c.Limit.handle, c.Key}} {
		if q := ch.queues[id]; q != nil {
			q.first.waiter.wake()
		}
	}
}

// leave quits the queues, and lets those waiters ask the store that are the first now.
func (ch *Charger) leave(w *waiter) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	for i := range w.places {
		p := &w.places[i]
		if p.queue.remove(p); p.queue.first == nil {
			delete(ch.queues, p.id)
			ch.queued.Add(-1)
		}
		if !w.asking {
			p.class.gone += p.cost
		}
	}
	if w.counted {
		ch.waiting--
	}
}

// ask notes that the first waiter is about to ask the store, which may charge it.
func (ch *Charger) ask(w *waiter) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if !w.asking {
		w.asking = true
		for i := range w.places {
			w.places[i].class.gone += w.places[i].cost
		}
	}
	select {
	case <-w.turn: // for all that happened so far
	default:
	}
}

// rest notes that the first waiter was denied, and counts it among the waiting callers. It returns how long the waiter may
// pause.
func (ch *Charger) rest(w *waiter) (longest time.Duration, err error) {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	if w.asking {
		w.asking = false
		for i := range w.places {
			w.places[i].class.gone -= w.places[i].cost
		}
	}
	return askAgain + time.Duration(len(ch.queues)-1)*askAgainForKey, ch.count(w)
}

// Waiting returns how many calls of Wait and WaitAll wait at this moment, see Options.MaxWaiters.
func (ch *Charger) Waiting() int {
	ch.mu.Lock()
	defer ch.mu.Unlock()
	return ch.waiting
}

// count counts a waiter, once, if there is room for it. The caller must hold Charger.mu.
func (ch *Charger) count(w *waiter) error {
	if w.counted {
		return nil
	}
	if ch.waiting >= ch.maxWaiters {
		return fmt.Errorf("quota: %w: %d calls wait already, as many as MaxWaiters allows", ErrOverloaded, ch.maxWaiters)
	}
	ch.waiting++
	w.counted = true
	return nil
}
