package quota

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"unicode/utf8"
)

// reservationText is the text of a reservation.
type reservationText struct {
	Version int          `json:"v"`
	ID      string       `json:"id"`
	Turns   []int        `json:"turns"` // of the parts
	Charges []chargeText `json:"charges"`
}

// chargeText is a charge of a reservation and the decision on it.
type chargeText struct {
	Limit   string `json:"limit"`
	Key     string `json:"key"`
	Unnamed bool   `json:"own,omitempty"` // the limiter's own limit, or that of LimitFor
	Op      Op     `json:"op,omitempty"`
	Cost    int64  `json:"cost,omitempty"`
	Shadow  bool   `json:"shadow,omitempty"`
	Denied  bool   `json:"denied,omitempty"` // a shadow
	Source  Source `json:"source,omitempty"`
	Charged int64  `json:"charged,omitempty"`
	Held    int64  `json:"held,omitempty"`
	Until   Micros `json:"until,omitempty"`
	At      Micros `json:"at,omitempty"`
}

const reservationVersion = 1

// MarshalText returns a text of an open reservation, with which [Limiter.Resume] continues it in another process: a worker that
// gets it with its job, or a process that settles when a callback comes. The reservation stays open here too, and is renewed by
// all processes that have it for as long as they live; the first that finishes it does so for all. From then on a renewal in
// another process, or here, closes Lost.
//
// The text is JSON and holds the keys. Whoever can change it can finish holds of other keys: keep it from those who must not. From
// the first text on, each renewal of the reservation is a call of its own, and no longer one with all others of the key.
//
// It fails with ErrInvalid on a reservation that is denied or finished, with the store's error where a renewal is under
// way whose outcome is not known, and with ErrUnavailable where a fallback holds the tokens, on this process's share: no other
// process can finish such a hold.
func (r *Reservation) MarshalText() ([]byte, error) {
	if r.parts == nil {
		return nil, invalid("reservation", "denied", "an open one")
	}
	ctx, cancel := outlive(context.Background())
	defer cancel()
	if err := r.lock(ctx); err != nil {
		return nil, err
	}
	defer r.unlock()
	k := &r.ch.keeper
	k.mu.Lock()
	finished := r.actual != nil
	k.mu.Unlock()
	if finished {
		return nil, invalid("reservation", "finished", "an open one")
	}
	for i := range r.Decisions {
		if d := &r.Decisions[i]; d.Until != 0 && d.Source == FromFallback {
			return nil, fmt.Errorf("quota: %w: tokens are held on this process's share of limit %s, where no other process can finish the reservation", ErrUnavailable, r.charges[i].Limit.name)
		}
	}
	for i := range r.parts {
		if err := r.parts[i].share(ctx); err != nil {
			return nil, err
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	t := reservationText{Version: reservationVersion, ID: r.parts[0].id}
	for i := range r.charges {
		c, d := &r.charges[i], &r.Decisions[i]
		t.Charges = append(t.Charges, chargeText{Limit: c.Limit.name, Key: c.Key, Unnamed: r.unnamed&(1<<i) != 0, Op: c.Op, Cost: c.Cost,
			Shadow: d.Shadow, Denied: !d.Allowed, Source: d.Source, Charged: d.Charged, Held: d.Held, Until: d.Until, At: d.At})
	}
	for i := range r.parts {
		p := &r.parts[i]
		t.Turns = append(t.Turns, p.turn)
		for j := range p.holds {
			t.Charges[p.holds[j].charge].Until = p.holds[j].until
		}
	}
	return json.Marshal(t)
}

// share has the renewals of a part be of its own from now on.
func (p *part) share(ctx context.Context) error {
	k := &p.r.ch.keeper
	if p.isShared() {
		return nil
	}
	err := p.withdraw(ctx)
	k.mu.Lock()
	defer k.mu.Unlock()
	p.shared = err == nil
	for i := range p.holds {
		if h := &p.holds[i]; h.renewal == nil && !h.gone {
			k.join(h, h.due())
		}
	}
	return err
}

// follow renews the holds of a shared part at once, or learns how another process has renewed them. It reports false where another
// process has finished the part.
func (p *part) follow(ctx context.Context) (followed bool, err error) {
	k := &p.r.ch.keeper
	k.mu.Lock()
	turn, n := p.turn, k.newRenewal(p)
	for i := range p.holds {
		if h := &p.holds[i]; !h.gone {
			h.renewal, h.place = n, len(n.holds)
			n.holds = append(n.holds, h)
		}
	}
	elsewhere := p.elsewhere
	k.mu.Unlock()
	if elsewhere || len(n.holds) == 0 {
		return false, nil
	}
	if err := k.renew(ctx, n); err != nil {
		return false, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	return p.turn > turn, nil
}

// Resume continues a reservation of a text that [Reservation.MarshalText] made, here or in another process. Its limits are found by
// their names: the limit that the limiter has for the key, or one of limits. It renews the holds at once, and so learns whether they
// are still there: where they lapsed, the reservation's Lost is closed, and a Settle is charged all the same. Where the
// reservation is finished the error is ErrInvalid. Other errors are the store's, and Resume may be repeated.
//
// The Result has the decisions as far as Settle needs them: what was charged and held.
func (ch *Charger) Resume(ctx context.Context, text []byte, limits ...*Limit) (*Reservation, error) {
	return ch.resume(ctx, nil, text, limits)
}

// Resume is [Charger.Resume], with the limiter's own limit too.
func (l *Limiter) Resume(ctx context.Context, text []byte, limits ...*Limit) (*Reservation, error) {
	return l.resume(ctx, l.limit, text, limits)
}

func (ch *Charger) resume(ctx context.Context, own *Limit, text []byte, limits []*Limit) (*Reservation, error) {
	var t reservationText
	if err := json.Unmarshal(text, &t); err != nil {
		return nil, fmt.Errorf("%w: %w", invalid("text of a reservation", "no JSON", "the text of MarshalText"), err)
	}
	if t.Version != reservationVersion {
		return nil, invalid("version of a reservation's text", t.Version, fmt.Sprint(reservationVersion))
	}
	if len(t.ID) > maxReservationID || !utf8.ValidString(t.ID) {
		return nil, invalid("id of a reservation's text", t.ID, "that of MarshalText")
	}
	r := &Reservation{Result: Result{Granted: true}, ch: ch, own: own}
	for i := range t.Charges {
		c, d, err := ch.parse(own, &t.Charges[i], limits)
		if err != nil {
			return nil, err
		}
		r.charges, r.Decisions = append(r.charges, c), append(r.Decisions, d)
		if t.Charges[i].Unnamed {
			r.unnamed |= 1 << i
		}
	}
	if err := Check(r.charges); err != nil {
		return nil, err
	}
	r.Decider = Decider(r.Decisions)
	r.divide(t.ID)
	if len(t.Turns) != len(r.parts) || slices.Min(t.Turns) < 0 {
		return nil, invalid("turns of a reservation's text", t.Turns, "those of MarshalText")
	}
	for i := range r.parts {
		p := &r.parts[i]
		p.shared, p.turn = true, t.Turns[i]
		if err := p.resume(ctx); err != nil {
			return nil, err
		}
	}
	k := &ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	k.open(r)
	return r, nil
}

// resume renews the holds of a part, after all renewals that other processes made.
func (p *part) resume(ctx context.Context) error {
	k := &p.r.ch.keeper
	for len(p.holds) > 0 {
		_, err := p.follow(ctx)
		k.mu.Lock()
		elsewhere, again := p.elsewhere, p.replayed
		k.mu.Unlock()
		switch {
		case err == nil && elsewhere:
			err = errElsewhere
		case err == nil && !again:
			return nil
		case err == nil:
			if err = p.withdraw(ctx); err == nil {
				continue
			}
		}
		p.r.abandon()
		return err
	}
	return nil
}

// abandon forgets a reservation that could not be resumed.
func (r *Reservation) abandon() {
	k := &r.ch.keeper
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range r.parts {
		for j := range r.parts[i].holds {
			if h := &r.parts[i].holds[j]; h.renewal != nil {
				k.leave(h)
			}
		}
	}
}

// parse returns a charge of a text, with its limit, and the decision on it.
func (ch *Charger) parse(own *Limit, t *chargeText, limits []*Limit) (c Charge, d Decision, err error) {
	c = Charge{Key: t.Key, Op: t.Op, Cost: t.Cost, Shadow: t.Shadow}
	if err := CheckKey(t.Key); err != nil {
		return c, d, err
	}
	if own, err = ch.limitOf(own, t.Key); err != nil {
		return c, d, err
	}
	for _, limit := range append([]*Limit{own}, limits...) {
		if limit.Err() == nil && limit.name == t.Limit && (t.Until == 0 || limit.TTL() > 0) {
			c.Limit = limit
			break
		}
	}
	switch {
	case c.Limit == nil && t.Until != 0:
		return c, d, invalid("limit of a reservation's text", t.Limit, "the name of a limit with holds that the limiter has for the key, or of one of limits")
	case c.Limit == nil:
		return c, d, invalid("limit of a reservation's text", t.Limit, "the name of the limit that the limiter has for the key, or of one of limits")
	case t.Op != OpTake && t.Op != OpHold && t.Op != OpPeek, min(t.Cost, t.Charged, t.Held, int64(t.Until), int64(t.At)) < 0, max(t.Until, t.At) > MaxNumber,
		t.Until != 0 && t.Source == FromFallback:
		return c, d, invalid("charge of a reservation's text", fmt.Sprintf("%+v", *t), "one of MarshalText")
	}
	d = Decision{Allowed: !t.Denied, Shadow: t.Shadow, Source: t.Source, Capacity: c.Limit.spec.Capacity, Charged: t.Charged, Held: t.Held, Until: t.Until, At: t.At}
	return c, d, nil
}
