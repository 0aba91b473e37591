package quota

import (
	"container/heap"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	mathrand "math/rand/v2"
	"sync"
	"time"
	"unique"
)

const (
	// maxRenewals bounds the calls of the background that are under way.
	maxRenewals = 32
	// repeatTime is how long a finish is repeated where no hold lapses.
	repeatTime = 2 * time.Minute
	// A call of the background that failed is repeated after leastRepeat to mostRepeat.
	leastRepeat, mostRepeat = 20 * time.Millisecond, time.Second
)

// keeper renews the holds of a charger's open reservations, and repeats the finishes that the store could not take. It has one
// goroutine while there are any, which starts one more for each call that is due, maxRenewals at most at a time. The zero value
// is ready to use, but for ch.
//
// The holds of a limit and key that lapse together are renewed together, in one call with a request id, however many there are.
type keeper struct {
	ch *Charger

	mu      sync.Mutex
	pools   map[poolID]*renewal // those that were not sent yet
	tasks   tasks
	running bool
	closed  bool
	started bool            // the fields below are made
	ctx     context.Context // of the background's calls, until Close
	stop    context.CancelFunc
	changed chan struct{} // of size 1: gets an element when the first task is another one
	slots   chan struct{} // of size maxRenewals
	all     sync.WaitGroup
	counts  struct{ Open, Owed, Settled, Released, Lost, Lapsed int64 } // see Charger.Reservations
}

// Reservations returns numbers of the reservations of this charger and its limiters: how many are Open, which no call of Settle or
// Release has finished, with those of processes that [Charger.Resume] continues here; and how many finishes are Owed to the store,
// which could not take them and is asked again. The others count since the charger was made: reservations that were Settled and
// Released, as the store has it; those that were Lost while they were open, see [Reservation.Lost]; and those that Lapsed before the
// store could be told how they ended, so that what they used is not charged.
func (ch *Charger) Reservations() struct{ Open, Owed, Settled, Released, Lost, Lapsed int64 } {
	k := &ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.counts
}

// open counts a reservation that is open from now on. The caller must hold k.mu.
func (k *keeper) open(r *Reservation) {
	k.counts.Open++
	if r.opened = true; r.isLost {
		k.counts.Lost++
	}
}

// owes notes whether the finish of a part is owed to the store. The caller must hold k.mu.
func (k *keeper) owes(p *part, owed bool) {
	if owed && !p.owed {
		k.counts.Owed++
	} else if !owed && p.owed {
		k.counts.Owed--
	}
	p.owed = owed
}

// lapsed counts a reservation that lapsed before a part could be finished. The caller must hold k.mu.
func (k *keeper) lapsed(p *part) {
	if k.owes(p, false); !p.r.lapsed {
		p.r.lapsed = true
		k.counts.Lapsed++
	}
}

// finished counts a reservation whose parts are all finished. The caller must hold k.mu and Reservation.busy.
func (k *keeper) finished(r *Reservation) {
	for i := range r.parts {
		if p := &r.parts[i]; !p.over || p.err != nil {
			return
		}
	}
	if r.released {
		k.counts.Released++
	} else {
		k.counts.Settled++
	}
}

// task is the next thing to do for a renewal, or for a part whose finish is repeated.
type task struct {
	due   time.Time
	place int // in keeper.tasks; -1 for none
	of    interface{ do(context.Context) }
}

// tasks is a heap by time.
type tasks []*task

func (t tasks) Len() int           { return len(t) }
func (t tasks) Less(i, j int) bool { return t[i].due.Before(t[j].due) }
func (t tasks) Swap(i, j int) {
	t[i], t[j] = t[j], t[i]
	t[i].place, t[j].place = i, j
}
func (t *tasks) Push(x any) {
	x.(*task).place = len(*t)
	*t = append(*t, x.(*task))
}
func (t *tasks) Pop() any {
	n := len(*t) - 1
	last := (*t)[n]
	(*t)[n], *t = nil, (*t)[:n]
	last.place = -1
	return last
}

// poolID tells which holds are renewed together.
type poolID struct {
	limit unique.Handle[string]
	key   string
	until Micros
	from  Source
}

// renewal is the next renewal of some holds: of all that this charger has of a limit and key and that lapse together, or of
// those of a shared part, in one list.
type renewal struct {
	task    // when it is sent
	k       *keeper
	pool    poolID
	part    *part // nil of a pool
	holds   []*hold
	id      string        // request id of the call that was sent and whose outcome is not known; "" for none
	charges []Charge      // of that call
	unknown bool          // an attempt of that call may have been made
	sent    time.Time     // when it was sent first
	sending chan struct{} // closed when the call ends that is under way; nil for none
}

func (k *keeper) newRenewal(p *part) *renewal {
	n := &renewal{k: k, part: p}
	n.task = task{place: -1, of: n}
	return n
}

// due returns when a hold should be renewed: when a third of its time has passed, and some time before that, so that processes
// that began together do not go on together. It sets the time of lapse. A hold of which all that is known was said in an
// earlier call is renewed at once. The caller must hold keeper.mu.
func (h *hold) due() time.Time {
	h.lapse = h.sent.Add((h.until - h.at).Duration())
	if h.at == 0 {
		h.lapse = h.sent
		return h.sent
	}
	ttl := h.part.r.charges[h.charge].Limit.TTL()
	return h.lapse.Add(-ttl*2/3 - mathrand.N(ttl/16+1))
}

// join has a hold wait for its next renewal. The caller must hold k.mu.
func (k *keeper) join(h *hold, due time.Time) {
	if k.closed {
		h.part.r.lose()
		return
	}
	p := h.part
	var n *renewal
	if p.shared {
		if n = p.next; n == nil {
			n = k.newRenewal(p)
			p.next = n
		}
	} else {
		c := &p.r.charges[h.charge]
		id := poolID{c.Limit.handle, c.Key, h.until, p.r.Decisions[h.charge].Source}
		if n = k.pools[id]; n == nil {
			n = k.newRenewal(nil)
			n.pool = id
			if k.pools == nil {
				k.pools = make(map[poolID]*renewal)
			}
			k.pools[id] = n
		}
	}
	h.renewal, h.place = n, len(n.holds)
	n.holds = append(n.holds, h)
	if n.place < 0 || due.Before(n.due) {
		k.schedule(&n.task, due)
	}
}

// leave takes a hold out of its renewal, which has not been sent. The caller must hold k.mu.
func (k *keeper) leave(h *hold) {
	n := h.renewal
	last := len(n.holds) - 1
	n.holds[h.place] = n.holds[last]
	n.holds[h.place].place = h.place
	n.holds[last], n.holds = nil, n.holds[:last]
	h.renewal = nil
	if last == 0 {
		k.forget(n)
	}
}

// forget takes a renewal out of the tables. The caller must hold k.mu.
func (k *keeper) forget(n *renewal) {
	k.cancel(&n.task)
	if n.part != nil && n.part.next == n {
		n.part.next = nil
	} else if k.pools[n.pool] == n {
		delete(k.pools, n.pool)
	}
}

// schedule has a task be done at a time. The caller must hold k.mu.
func (k *keeper) schedule(t *task, due time.Time) {
	t.due = due
	if t.place >= 0 {
		heap.Fix(&k.tasks, t.place)
	} else {
		heap.Push(&k.tasks, t)
	}
	switch {
	case k.closed:
	case !k.running:
		if !k.started {
			k.started = true
			k.ctx, k.stop = context.WithCancel(context.Background())
			k.changed, k.slots = make(chan struct{}, 1), make(chan struct{}, maxRenewals)
		}
		k.running = true
		k.all.Go(k.run)
	case t.place == 0:
		k.wake()
	}
}

// cancel has a task not be done. The caller must hold k.mu.
func (k *keeper) cancel(t *task) {
	if t.place < 0 {
		return
	}
	if heap.Remove(&k.tasks, t.place); len(k.tasks) == 0 && k.running {
		k.wake() // there is nothing left to run for
	}
}

func (k *keeper) wake() {
	select {
	case k.changed <- struct{}{}:
	default:
	}
}

// run does the tasks as they become due, until there are none.
func (k *keeper) run() {
	for {
		k.mu.Lock()
		if k.closed || len(k.tasks) == 0 {
			k.running = false
			k.mu.Unlock()
			return
		}
		t, now := k.tasks[0], k.ch.time()
		left := t.due.Sub(now)
		if left <= 0 {
			heap.Pop(&k.tasks)
		}
		k.mu.Unlock()
		if left > 0 {
			k.sleep(now, left)
			continue
		}
		select {
		case k.slots <- struct{}{}:
			k.all.Go(func() {
				defer func() { <-k.slots }()
				t.of.do(k.ctx)
			})
		case <-k.ctx.Done():
			k.mu.Lock()
			k.schedule(t, t.due) // for Close
			k.mu.Unlock()
		}
	}
}

// sleep returns after a time, or when the first task is another one.
func (k *keeper) sleep(from time.Time, d time.Duration) {
	due, stop := k.ch.after(from, d)
	defer stop()
	select {
	case <-due:
	case <-k.changed:
	case <-k.ctx.Done():
	}
}

// do sends a renewal that is due, for at most half of the time that is left.
func (n *renewal) do(ctx context.Context) {
	n.k.mu.Lock()
	lapse := n.lapse()
	n.k.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, min(max(lapse.Sub(n.k.ch.time())/2, leastRepeat), correctionTime))
	defer cancel()
	_ = n.k.renew(ctx, n) // which has it be repeated
}

// lapse returns when the first of the holds lapses. The caller must hold keeper.mu.
func (n *renewal) lapse() (first time.Time) {
	for i, h := range n.holds {
		if i == 0 || h.lapse.Before(first) {
			first = h.lapse
		}
	}
	return first
}

// renew sends a renewal once. It fails while the outcome is not known; otherwise the holds have moved, or are lost.
func (k *keeper) renew(ctx context.Context, n *renewal) error {
	k.mu.Lock()
	if n.sending != nil || len(n.holds) == 0 { // another call sends it, or all its holds were finished
		k.mu.Unlock()
		return nil
	}
	if n.id == "" {
		k.forget(n)
		n.compose()
		n.sent = k.ch.time()
	}
	k.cancel(&n.task)
	n.sending = make(chan struct{})
	charges := n.charges
	k.mu.Unlock()

	ds, err := k.ch.send(ctx, charges)

	k.mu.Lock()
	defer k.mu.Unlock()
	close(n.sending)
	n.sending = nil
	return k.renewed(n, ds, err)
}

// compose makes the call of a renewal. The caller must hold keeper.mu.
func (n *renewal) compose() {
	n.charges = n.charges[:0:0]
	if n.part != nil {
		n.id = n.part.turnID()
		for _, h := range n.holds {
			n.charges = append(n.charges, h.renew(h.held, n.id))
		}
		return
	}
	sum := int64(0)
	for _, h := range n.holds {
		sum += h.held
	}
	n.id = "renew:" + rand.Text()
	n.charges = append(n.charges, n.holds[0].renew(sum, n.id))
}

// renew returns the charge that renews so many tokens of the key that lapse with the hold.
func (h *hold) renew(tokens int64, id string) Charge {
	r := h.part.r
	c := r.charge(h.charge)
	return Charge{Limit: c.Limit, Key: c.Key, Op: OpRenew, Held: tokens, Until: h.until, From: r.Decisions[h.charge].Source, ID: id}
}

// renewed notes the outcome of a renewal. The caller must hold k.mu.
func (k *keeper) renewed(n *renewal, ds []Decision, err error) error {
	now := k.ch.time()
	for i := range ds {
		if err == nil && ds[i].Source != n.charges[i].From {
			err = fmt.Errorf("quota: %w: a policy answered in place of the store", ErrUnavailable)
		}
	}
	switch {
	case err == nil:
		k.settled(n, ds)
		return nil
	case errors.Is(err, ErrInvalid) && n.part != nil: // the id is that of a finish
		n.part.elsewhere = true
		k.lose(n)
		return nil
	case final(err):
		k.lose(n)
		return nil
	}
	lapse := n.lapse()
	left := lapse.Sub(now)
	if n.unknown = n.unknown || Charged(err) == ChargeUnknown; !n.unknown { // the next attempt is a new call
		n.id = ""
	}
	if left <= 0 {
		for _, h := range n.holds {
			h.part.r.lose()
		}
		if n.id == "" {
			k.lose(n)
		}
		return err // a finish sends it again, to learn where the holds are
	}
	due := now.Add(jitter(min(max(left/8, leastRepeat), mostRepeat)))
	if n.id != "" {
		k.schedule(&n.task, due)
		return err
	}
	holds := n.holds
	n.holds = nil
	for _, h := range holds {
		h.renewal = nil
		k.join(h, due)
	}
	return err
}

// settled notes the decisions on a renewal. The caller must hold k.mu.
func (k *keeper) settled(n *renewal, ds []Decision) {
	granted := Granted(ds)
	holds := n.holds
	n.holds, n.id, n.unknown = nil, "", false
	if granted && n.part != nil {
		n.part.turn++
		n.part.replayed = ds[0].Replayed
	}
	for i, h := range holds {
		h.renewal = nil
		d := &ds[0]
		if n.part != nil {
			d = &ds[i]
		}
		switch {
		case granted:
			if !d.Replayed || n.part == nil {
				h.at, h.sent = d.At, n.sent
			}
			h.until = d.Until
			k.join(h, h.due())
		case d.Allowed: // another hold of the list is gone
			k.join(h, k.ch.time())
		default:
			h.gone = true
			h.part.r.lose()
		}
	}
}

// lose notes that the holds of a renewal are not renewed any more. The caller must hold k.mu.
func (k *keeper) lose(n *renewal) {
	for _, h := range n.holds {
		h.renewal = nil
		h.part.r.lose()
	}
	n.holds, n.id, n.unknown = nil, "", false
}

// close ends the goroutines. Finishes that wait to be repeated are tried once more.
func (k *keeper) close() {
	k.mu.Lock()
	if k.closed || !k.started {
		k.closed = true
		k.mu.Unlock()
		return
	}
	k.closed = true
	k.stop()
	k.mu.Unlock()
	k.all.Wait()

	k.mu.Lock()
	left := k.tasks
	k.tasks, k.pools = nil, nil
	for _, t := range left {
		t.place = -1
		if n, ok := t.of.(*renewal); ok {
			for _, h := range n.holds {
				h.part.r.lose()
			}
		}
	}
	k.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), giveBackTimeout)
	defer cancel()
	for _, t := range left {
		p, ok := t.of.(*part)
		if !ok {
			continue
		}
		err := p.r.lock(ctx)
		if err == nil {
			err = p.finish(ctx)
			p.r.unlock()
		}
		if err != nil {
			k.ch.unfinished(err)
		}
	}
}

// send has a list decided, in a call of its own that observers are told of.
func (ch *Charger) send(ctx context.Context, cs []Charge) (ds []Decision, err error) {
	ds = make([]Decision, len(cs))
	o := ch.observe(cs, ds)
	func() {
		defer func() {
			if v := recover(); v != nil {
				err = fmt.Errorf("%w: %v", errPanicked, v)
			}
		}()
		if err = Check(cs); err == nil {
			err = ch.chargeAll(ctx, cs, ds, o)
		}
	}()
	ch.over(ctx, nil, o, err)
	return ds, err
}

// tell tells the operator of a notice.
func (ch *Charger) tell(n Notice) {
	if ch.notice == nil {
		slog.Error("quota: "+n.Text, "err", n.Err)
		return
	}
	ch.notice(n)
}

// jitter returns between half of a span and all of it.
func jitter(d time.Duration) time.Duration { return d - mathrand.N(d/2+1) }
