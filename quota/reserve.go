package quota

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

// A Reservation is quota that is set aside for work whose cost is known when the work ends: [Limiter.Reserve], [Limiter.Acquire]
// and [Limiter.Resume] make one. It is open until Settle or Release has finished it, and should always be finished: an open one
// is kept for as long as the process lives. Methods may be called concurrently.
//
//	r, err := limiter.Reserve(ctx, quota.Charge{Key: "team-7/agent-123", Cost: 1500}) // an estimate
//	switch {
//	case err != nil:
//		return err
//	case !r.Granted: // denied: the same reservation fits after r.RetryAfter(), if no hold ends before
//	}
//	defer r.Release(ctx) // has no effect after Settle
//	used, err := work(ctx)
//	return r.Settle(ctx, used)
//
// On a limit with holds ([Limit.TTL]) the cost is held, and not charged: see [OpHold]. The limiter renews the hold in the
// background, so it lapses only where the process dies, loses the store for longer than the limit's TTL, or closes the limiter;
// the tokens then come back by themselves. On any other limit the cost is charged at once and corrected at the end, and does not
// lapse.
//
// Finishing has effect once, from whichever process: each finish carries a request id, which is the reservation's own. A repeat,
// here or in another process, gets the outcome of the first, and never touches the hold of another reservation.
type Reservation struct {
	// Result is the answer to the charges of the reservation, in their order. Nothing is reserved unless it is Granted.
	Result

	ch      *Charger
	own     *Limit // the limiter's, for charges that named none; nil of a Charger
	charges []Charge
	unnamed uint64 // the charges, by their bits, that named no limit
	parts   []part
	lost    chan struct{}
	busy    chan struct{} // of size 1: an element is in it while a call works on the parts

	// Guarded by keeper.mu.
	isLost   bool
	opened   bool    // counted as open, once
	lapsed   bool    // counted as such
	actual   []int64 // nil while the reservation is open
	released bool    // by Release
}

// part is the charges of a reservation to the keys of one group, which are finished in one step.
type part struct {
	r       *Reservation
	id      string // the request ids of this part begin with it
	charges []int  // their indexes in Reservation.charges
	holds   []hold

	// For the call that holds Reservation.busy.
	over    bool // it is finished, with err
	err     error
	unknown bool          // a finish may have been made
	until   time.Time     // until when it is repeated; zero if it was made at once
	pause   time.Duration // before the next repeat

	// Guarded by keeper.mu.
	task               // repeats the finish
	owed      bool     // its finish is, to the store
	shared    bool     // other processes may know of it: its renewals have ids of the part
	turn      int      // how often it was renewed while shared
	next      *renewal // while shared
	replayed  bool     // the latest renewal was made by another process
	elsewhere bool     // another process finished it
}

// hold is a charge of a reservation whose tokens are held. All but charge, part and held is guarded by keeper.mu.
type hold struct {
	part    *part
	charge  int // index in Reservation.charges
	held    int64
	until   Micros    // when it lapses by the store's time
	at      Micros    // the store's time of a decision; 0 for none
	sent    time.Time // and the time of the process when it was asked for
	lapse   time.Time // when it lapses by the time of the process, or up to a round trip before that
	gone    bool      // the store said that it is not there any more
	renewal *renewal  // the renewal that it waits for; nil for none
	place   int       // in renewal.holds
}

// Reserve sets quota aside for all charges, or denies them all, as [Charger.ChargeAll] decides a list. Charges are takes, each
// of which becomes a hold ([OpHold]) where the limit has holds, or peeks; others are ErrInvalid. A request id makes the
// reservation itself repeatable; it must be the id of one reservation alone.
func (ch *Charger) Reserve(ctx context.Context, charges ...Charge) (*Reservation, error) {
	return ch.reserve(ctx, nil, charges)
}

// Reserve is [Charger.Reserve]; a charge without a limit goes to the limiter's own.
func (l *Limiter) Reserve(ctx context.Context, charges ...Charge) (*Reservation, error) {
	return l.reserve(ctx, l.limit, charges)
}

func (ch *Charger) reserve(ctx context.Context, own *Limit, charges []Charge) (*Reservation, error) {
	cs := slices.Clone(charges)
	ds := make([]Decision, len(cs))
	o := ch.observe(cs, ds)
	sent := ch.time()
	unnamed, err := ch.fillHolds(own, cs)
	if err == nil {
		err = ch.chargeAll(ctx, cs, ds, o)
	}
	ch.over(ctx, own, o, err)
	if err != nil {
		return nil, err
	}
	return ch.reservation(own, unnamed, cs, ds, sent), nil
}

// Acquire reserves n tokens of the key, such as one of the slots of algorithm.Concurrency, and waits until they are there. A nil
// error means that they are reserved; the reservation gives them back by Release.
//
// Callers are served in the order in which they came, as by [Limiter.Wait], whose errors and MaxWaiters hold for it too. On a
// limit with holds the first caller asks at once when this limiter releases a hold of the key, and about every quarter of a
// second for holds that other processes release; it never sleeps until holds lapse. Since holds end at any time, it does not fail
// early where the context's deadline comes before they lapse.
func (l *Limiter) Acquire(ctx context.Context, key string, n int64) (*Reservation, error) {
	return l.acquire(ctx, l.limit, []Charge{{Key: key, Cost: n}})
}

// AcquireAll reserves quota for a list of charges, all-or-nothing, and waits until it is there: [Limiter.Acquire] for several limits
// or keys. Lists wait as those of [Limiter.WaitAll] do, and hold nothing meanwhile. Charges are as of [Charger.Reserve], without
// request ids.
func (ch *Charger) AcquireAll(ctx context.Context, charges ...Charge) (*Reservation, error) {
	return ch.acquire(ctx, nil, slices.Clone(charges))
}

// AcquireAll is [Charger.AcquireAll]; a charge without a limit goes to the limiter's own.
func (l *Limiter) AcquireAll(ctx context.Context, charges ...Charge) (*Reservation, error) {
	return l.acquire(ctx, l.limit, slices.Clone(charges))
}

func (ch *Charger) acquire(ctx context.Context, own *Limit, cs []Charge) (*Reservation, error) {
	ds := make([]Decision, len(cs))
	o := begin(cs, ds)
	unnamed, err := ch.fillHolds(own, cs)
	w := &waiting{charges: cs, decisions: ds, limit: own, own: unnamed, observed: o, holds: true}
	if err == nil {
		err = ch.wait(ctx, w)
	}
	ch.over(ctx, own, o, err)
	if err != nil {
		return nil, err
	}
	return ch.reservation(own, unnamed, cs, ds, w.sent), nil
}

// fillHolds fills in the limits of a list, makes holds of its takes where the limits have them, and checks the list.
func (ch *Charger) fillHolds(own *Limit, cs []Charge) (unnamed uint64, err error) {
	for i := range cs {
		if op := cs[i].Op; op != OpTake && op != OpHold && op != OpPeek {
			return 0, invalid("operation of a charge to reserve", op, "OpTake, OpHold or OpPeek")
		}
		if cs[i].Alternative != 0 {
			return 0, invalid("alternative of a charge to reserve", cs[i].Alternative, "0: a reservation is one list")
		}
	}
	if unnamed, err = ch.fillAll(own, cs); err != nil {
		return 0, err
	}
	for i := range cs {
		cs[i].holdWhereHeld()
	}
	return unnamed, nil
}

// holdWhereHeld makes a hold of a take on a limit with holds.
func (c *Charge) holdWhereHeld() {
	if c.Op == OpTake && c.Limit.TTL() > 0 {
		c.Op = OpHold
	}
}

// reservation returns the reservation of a list that was decided, by a call that began at the time sent.
func (ch *Charger) reservation(own *Limit, unnamed uint64, cs []Charge, ds []Decision, sent time.Time) *Reservation {
	r := &Reservation{Result: Result{Granted: Granted(ds), Decider: Decider(ds), Decisions: ds}}
	if !r.Granted {
		return r
	}
	r.ch, r.own, r.charges, r.unnamed = ch, own, cs, unnamed
	id := "reserve/" + cs[0].ID
	if cs[0].ID == "" {
		id = "reserve:" + rand.Text() // an id of a program cannot be mistaken for it: that would have a slash
	} else if len(id) > maxReservationID {
		id = "reserve/" + correctionID(cs[0].ID)
	}
	r.divide(id)
	k := &ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open(r)
	for i := range r.parts {
		p := &r.parts[i]
		p.shared = cs[0].ID != "" // a repeat makes the same reservation once more
		for j := range p.holds {
			h := &p.holds[j]
			if h.sent = sent; !ds[h.charge].Replayed {
				h.at = ds[h.charge].At
			}
			k.join(h, h.due())
		}
	}
	return r
}

// maxReservationID is the longest id of a reservation, in bytes: request ids add the number of a turn.
const maxReservationID = maxID - len("/9223372036854775807")

// divide makes the parts of a reservation, with one id for all: ids count within their group.
func (r *Reservation) divide(id string) {
	r.lost, r.busy = make(chan struct{}), make(chan struct{}, 1)
	groups := make([]string, 0, 1)
	for i := range r.charges {
		if g := Group(r.charges[i].Key); !slices.Contains(groups, g) {
			groups = append(groups, g)
		}
	}
	r.parts = make([]part, len(groups)) // neither parts nor holds move: renewals point to them
	for n, g := range groups {
		p := &r.parts[n]
		p.r, p.id, p.task = r, id, task{place: -1, of: p}
		holds := 0
		for i := range r.charges {
			if Group(r.charges[i].Key) == g {
				p.charges = append(p.charges, i)
				if r.Decisions[i].Until != 0 {
					holds++
				}
			}
		}
		p.holds = make([]hold, 0, holds)
		for _, i := range p.charges {
			if d := &r.Decisions[i]; d.Until != 0 {
				p.holds = append(p.holds, hold{part: p, charge: i, held: d.Held, until: d.Until})
			}
		}
	}
}

// Settle finishes the reservation with the tokens that were really used: actual has one number for each charge, in their order,
// and charges beyond the last number used the cost that was reserved. Holds end, and the actual costs are charged, into debt if
// need be, also where a hold has lapsed; slots of algorithm.Concurrency come back whatever the number.
//
// It outlives the context, by up to ten seconds. Where the store cannot take it now, it fails with ErrIndeterminate, and the
// limiter repeats it until the hold lapses, or for two minutes where no limit has holds; then Options.Notice is told. A settle
// that comes later than [IDWindow] after the lapse is ErrExpired: it was not charged, and the caller may Debit.
//
// A second Settle with the same numbers returns the outcome of the first, and tries again where that is not known; with other
// numbers, after Release, and after another process finished the reservation differently, it is ErrInvalid.
func (r *Reservation) Settle(ctx context.Context, actual ...int64) error {
	switch {
	case r.parts == nil:
		return invalid("reservation", "denied", "one that was granted")
	case len(actual) > len(r.charges):
		return invalid("number of actual costs", len(actual), "up to one for each of the "+strconv.Itoa(len(r.charges))+" charges")
	}
	all := make([]int64, len(r.charges))
	for i := range all {
		if i >= len(actual) {
			all[i] = r.reserved(i)
		} else if all[i] = actual[i]; actual[i] < 0 {
			return invalid("actual cost", actual[i], "0 or more")
		}
	}
	return r.finish(ctx, all, false)
}

// Release finishes the reservation as one of which no token was used. Else it does as Settle, with the same errors; but after
// Settle, and on a reservation that was denied, it has no effect and returns nil, so that it can be deferred.
func (r *Reservation) Release(ctx context.Context) error {
	if r.parts == nil {
		return nil
	}
	return r.finish(ctx, make([]int64, len(r.charges)), true)
}

// Lost returns a channel that is closed when a hold of the reservation ends before Settle or Release: it lapsed, because the store could
// not be reached or the limiter was closed, the store has lost it, or another process finished the reservation. Work that goes
// on uses quota that others may take. A Settle is charged all the same. Where no limit has holds it is never closed.
func (r *Reservation) Lost() <-chan struct{} { return r.lost }

// reserved returns the tokens that are reserved by a charge.
func (r *Reservation) reserved(i int) int64 {
	d := &r.Decisions[i]
	return d.Held + d.Charged
}

// finish finishes all parts, with one number for each charge. Its first call decides the numbers.
func (r *Reservation) finish(ctx context.Context, actual []int64, release bool) error {
	k := &r.ch.keeper
	k.mu.Lock()
	first := r.actual == nil
	if first {
		r.actual, r.released = actual, release
		k.counts.Open--
	}
	same := slices.Equal(r.actual, actual)
	released := r.released
	k.mu.Unlock()
	switch {
	case release && !released:
		return nil
	case !release && released:
		return invalid("reservation", "released already", "one Settle or Release")
	case !same:
		return invalid("actual costs", "others than those of the first Settle", "the same again")
	}
	ctx, cancel := outlive(ctx)
	defer cancel()
	if err := r.lock(ctx); err != nil {
		return fmt.Errorf("quota: %w: another call finishes the reservation: %w", ErrIndeterminate, err)
	}
	defer r.unlock()
	var failed error
	for i := range r.parts {
		if err := r.parts[i].finish(ctx); err != nil && failed == nil {
			failed = err
		}
	}
	return failed
}

// lock waits until no other call works on the parts.
func (r *Reservation) lock(ctx context.Context) error {
	select {
	case r.busy <- struct{}{}:
		return nil
	default:
	}
	select {
	case r.busy <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (r *Reservation) unlock() { <-r.busy }

// lose closes the channel of Lost. The caller must hold keeper.mu.
func (r *Reservation) lose() {
	if !r.isLost && r.actual == nil {
		if r.isLost = true; r.opened {
			r.ch.keeper.counts.Lost++
		}
		close(r.lost)
	}
}

// errElsewhere is the error of a reservation that another process finished differently.
var errElsewhere = fmt.Errorf("quota: %w: reservation is finished by another process; accepted: one Settle or Release", ErrInvalid)

// finish finishes a part, unless it is finished. A part that the store cannot finish now is repeated later.
func (p *part) finish(ctx context.Context) error {
	for !p.over {
		if err := p.withdraw(ctx); err != nil {
			return p.postpone(err)
		}
		cs := p.last()
		if len(cs) == 0 {
			p.end(nil)
			break
		}
		ds, err := p.r.ch.send(ctx, cs)
		switch {
		case err == nil && Granted(ds):
			p.end(nil)
		case err == nil:
			p.end(fmt.Errorf("quota: %w: the hold lapsed more than %v before, and nothing was charged", ErrExpired, IDWindow))
		case errors.Is(err, ErrInvalid) && p.isShared():
			if followed, err := p.follow(ctx); err != nil {
				return p.postpone(err)
			} else if !followed {
				p.end(errElsewhere)
			}
		case final(err):
			p.end(err)
		default:
			return p.postpone(err)
		}
	}
	return p.err
}

// final reports whether an error stays the same however often the call is repeated.
func final(err error) bool {
	if errors.Is(err, ErrIndeterminate) {
		return false
	}
	for _, e := range [...]error{ErrInvalid, ErrCrossSlot, ErrMisconfigured, ErrClosed} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// end notes that a part is finished.
func (p *part) end(err error) {
	k := &p.r.ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	p.over, p.err = true, p.perhaps(err)
	k.cancel(&p.task)
	if k.owes(p, false); errors.Is(err, ErrExpired) {
		k.lapsed(p)
	} else {
		k.finished(p.r)
	}
}

// perhaps returns err as the error of a finish that may have been made by an earlier attempt.
func (p *part) perhaps(err error) error {
	if err == nil || !p.unknown || errors.Is(err, ErrIndeterminate) {
		return err
	}
	return fmt.Errorf("quota: %w: an earlier attempt to finish the reservation may have succeeded: %w", ErrIndeterminate, err)
}

func (p *part) isShared() bool {
	k := &p.r.ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	return p.shared
}

// withdraw takes the holds of a part out of their renewals. The outcome of a renewal that was sent must be known first, for the
// holds may have moved.
func (p *part) withdraw(ctx context.Context) error {
	k := &p.r.ch.keeper
	for i := range p.holds {
		h := &p.holds[i]
		for {
			k.mu.Lock()
			n := h.renewal
			if n == nil {
				k.mu.Unlock()
				break
			}
			if n.id == "" {
				k.leave(h)
				k.mu.Unlock()
				break
			}
			sending := n.sending
			k.mu.Unlock()
			if sending == nil {
				if err := k.renew(ctx, n); err != nil {
					return err
				}
				continue
			}
			select {
			case <-sending:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// last returns the charges that finish a part.
func (p *part) last() []Charge {
	k := &p.r.ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	cs := make([]Charge, 0, len(p.charges))
	holds := p.holds
	for _, i := range p.charges {
		c, d, actual := p.r.charge(i), &p.r.Decisions[i], p.r.actual[i]
		switch {
		case c.Op == OpPeek || d.Shadow && !d.Allowed:
			continue
		case d.Until != 0:
			h := &holds[0]
			holds = holds[1:]
			c = Charge{Limit: c.Limit, Key: c.Key, Op: OpSpend, Cost: actual, Held: h.held, Until: h.until, From: d.Source}
			if h.gone {
				c.Held = 0 // others may hold as many until then
			}
		case c.Op == OpHold: // a policy granted it, and no store: see FromOpen
			c = Charge{Limit: c.Limit, Key: c.Key, Op: OpDebit, Cost: actual, From: d.Source}
		default:
			c = Charge{Limit: c.Limit, Key: c.Key}.Settle(*d, actual)
			c.receipt = receipt{}
		}
		if c.Op != OpSpend && c.Cost == 0 && !p.shared {
			continue
		}
		c.ID = p.turnID()
		cs = append(cs, c)
	}
	return cs
}

// turnID returns the request id of the next renewal of a shared part, or of its finish. Both have the same, so that of two
// processes one does what the other learns of.
func (p *part) turnID() string { return p.id + "/" + strconv.Itoa(p.turn) }

// charge returns a charge with its limit, or with the one that LimitFor chooses now if it is of the same name and has holds
// where the old one had.
func (r *Reservation) charge(i int) Charge {
	c := r.charges[i]
	if r.ch.limitFor != nil && r.unnamed&(1<<i) != 0 {
		if now, err := r.ch.limitOf(r.own, c.Key); err == nil && now != nil && now.handle == c.Limit.handle && (now.TTL() > 0) == (c.Limit.TTL() > 0) {
			c.Limit = now
		}
	}
	return c
}

// postpone has the limiter repeat a finish that the store could not take, until the holds lapse.
func (p *part) postpone(cause error) error {
	k := &p.r.ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	now := p.r.ch.time()
	if p.until.IsZero() {
		p.until = now.Add(repeatTime)
		for i := range p.holds {
			if i == 0 || p.holds[i].lapse.After(p.until) {
				p.until = p.holds[i].lapse
			}
		}
	}
	p.unknown = p.unknown || Charged(cause) == ChargeUnknown
	if k.closed || !now.Before(p.until) {
		k.lapsed(p)
		return p.perhaps(cause)
	}
	k.owes(p, true)
	if p.task.place < 0 {
		p.pause = min(max(2*p.pause, leastRepeat), mostRepeat)
		k.schedule(&p.task, now.Add(jitter(p.pause)))
	}
	return fmt.Errorf("quota: %w: the store cannot finish the reservation now, and the limiter repeats it for up to %v: %w",
		ErrIndeterminate, p.until.Sub(now).Round(time.Millisecond), cause)
}

// do finishes a part that was postponed. It runs in the background.
func (p *part) do(ctx context.Context) {
	k := &p.r.ch.keeper
	ctx, cancel := context.WithTimeout(ctx, correctionTime)
	defer cancel()
	if p.r.lock(ctx) != nil {
		return // the other call postpones the part again, or ends it
	}
	defer p.r.unlock()
	err := p.finish(ctx)
	k.mu.Lock()
	pending := p.task.place >= 0
	k.mu.Unlock()
	if err != nil && !pending && ctx.Err() == nil {
		p.r.ch.unfinished(err)
	}
}

// unfinished tells the operator of a reservation whose finish was given up.
func (ch *Charger) unfinished(err error) {
	ch.tell(Notice{Name: "unfinished", Text: "a reservation could not be settled or released before its hold lapsed: its tokens come back by themselves, and the tokens that it used are not charged", Err: err})
}
