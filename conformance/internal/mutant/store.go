package mutant

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fleetquota/fleetquota/conformance"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Data is the data of one name, which its handles share: the server.
type Data struct {
	latest quota.Micros // of a store that goes by its clients\' clocks, and never back
	mu     sync.Mutex
	items  map[string]item
	grants map[string]grant
	opened atomic.Int64 // handles
	order  []string     // of items or grants, for mutants that forget the oldest
}

type item struct {
	driver.Item
	until quota.Micros
}

type grant struct {
	charges   []quota.Charge
	decisions []quota.Decision
	until     quota.Micros
}

// NewData returns empty data.
func NewData() *Data { return &Data{items: map[string]item{}, grants: map[string]grant{}} }

// parts are the parts of a store. A mutant is a sound store with one part replaced.
type parts struct {
	fault bool // whether the mutant has its fault, or is the repaired twin
	// In the client: the check before a call, the answer, and the transport.
	ready func(s *Handle, ctx context.Context) error
	reply func(cs []quota.Charge, out []quota.Decision, err error) error
	send  func(s *Handle, ctx context.Context, cs []quota.Charge, out []quota.Decision) error
	// On the server.
	now    func(s *Handle) quota.Micros
	key    func(c *quota.Charge) string
	id     func(s *Handle, c *quota.Charge) string
	load   func(s *Handle, it item, now quota.Micros) driver.Item
	apply  func(cs []quota.Charge, items []driver.Item, now quota.Micros, out []quota.Decision) error
	life   func(reset time.Duration) time.Duration
	gap    func(d *Data)                      // between reading and writing
	begin  func(cs []quota.Charge)            // when a call begins, under the lock
	done   func(s *Handle, cs []quota.Charge) // when a call was decided, under the lock
	recall func(s *Handle, g grant, cs []quota.Charge, out []quota.Decision) error
	record func(cs []quota.Charge, out []quota.Decision) (grant, bool)
	window time.Duration // in which ids are remembered
	// lifetime is how long the id of a call is remembered beyond that.
	lifetime func(cs []quota.Charge, now quota.Micros) time.Duration
	close    func(s *Handle) error
	// names are the keys in their order from which a listing with a prefix takes pages, and page is the page behind a key.
	names func(s *Handle, l *driver.Listing) []driver.ListedKey
	page  func(names []driver.ListedKey, after string, size int) (page []driver.ListedKey, next string)
}

// sound returns the parts of a correct store.
func sound() parts {
	return parts{
		ready: func(s *Handle, ctx context.Context) error { return s.gate.Ready(ctx) },
		reply: func(_ []quota.Charge, _ []quota.Decision, err error) error { return err },
		send:  (*Handle).once,
		now:   func(s *Handle) quota.Micros { return quota.Micros(s.clock().UnixMicro()) },
		key:   func(c *quota.Charge) string { return string(driver.AppendKey(nil, c.Limit.Name(), c.Key)) },
		id: func(_ *Handle, c *quota.Charge) string {
			return string(driver.AppendIDKey(nil, quota.Group(c.Key), c.ID))
		},
		load: func(_ *Handle, it item, now quota.Micros) driver.Item {
			if it.until < now {
				return driver.Item{}
			}
			return it.Item
		},
		apply: driver.Apply,
		life: func(reset time.Duration) time.Duration {
			return min(reset, quota.Never-driver.ExpirySlack) + driver.ExpirySlack
		},
		gap:   func(*Data) {},
		begin: func([]quota.Charge) {},
		done:  func(*Handle, []quota.Charge) {},
		recall: func(_ *Handle, g grant, cs []quota.Charge, out []quota.Decision) error {
			if !slices.EqualFunc(g.charges, cs, driver.SameCharge) {
				return fmt.Errorf("mutant: %w: the id was granted to other charges", quota.ErrInvalid)
			}
			copy(out, g.decisions)
			for i := range out {
				out[i].Replayed = true
			}
			return nil
		},
		record: func(cs []quota.Charge, out []quota.Decision) (grant, bool) {
			return grant{charges: slices.Clone(cs), decisions: slices.Clone(out)}, quota.Granted(out) && !driver.OnlyPeeks(cs)
		},
		window: quota.IDWindow,
		lifetime: func(cs []quota.Charge, now quota.Micros) time.Duration {
			return driver.IDLifetime(cs, now) - quota.IDWindow
		},
		close: func(s *Handle) error { s.gate.Close(); return nil },
		names: (*Handle).named,
		page:  pageBehind,
	}
}

// Handle is a store on data. Its parts are sound, except for the part that the mutant replaces.
type Handle struct {
	parts
	data   *Data
	clock  func() time.Time
	grade  driver.Atomicity
	serial int64 // of the handles on the data, from 1
	gate   driver.Gate
	link   link
}

// Open returns a handle, with the fault or of the repaired twin. It uses a clock; nil stands for the machine's.
func (m *Store) Open(d *Data, clock func() time.Time, fault bool) *Handle {
	if clock == nil {
		clock = time.Now
	}
	s := &Handle{parts: sound(), grade: m.Grade, data: d, clock: clock, serial: d.opened.Add(1)}
	s.fault = fault
	if m.alter != nil {
		m.alter(&s.parts)
	}
	return s
}

// Charge decides one charge.
func (s *Handle) Charge(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	err := s.ChargeAll(ctx, []quota.Charge{c}, out[:])
	return out[0], err
}

// ChargeAll decides a list.
func (s *Handle) ChargeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.ready(s, ctx); err != nil {
		return err
	}
	return s.reply(cs, out, s.send(s, ctx, cs, out))
}

// Atomicity returns the mutant's Grade.
func (s *Handle) Atomicity() driver.Atomicity { return s.grade }

// Prompt declares that calls return by their deadline.
func (s *Handle) Prompt() bool { return true }

// Close ends the handle.
func (s *Handle) Close() error { return s.close(s) }

// once sends a request over the link, once.
func (s *Handle) once(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.link.request(ctx); err != nil {
		return err
	}
	err := s.serve(cs, out)
	if lost := s.link.response(); lost != nil {
		return lost
	}
	return err
}

// serve is the server's part of a call.
func (s *Handle) serve(cs []quota.Charge, out []quota.Decision) error {
	d := s.data
	d.mu.Lock()
	defer d.mu.Unlock()
	s.begin(cs)
	now := s.now(s)
	if g, ok := d.grants[s.id(s, &cs[0])]; ok && cs[0].ID != "" && now <= g.until {
		return s.recall(s, g, cs, out)
	}
	items := make([]driver.Item, len(cs))
	for i := range cs {
		items[i] = s.load(s, d.items[s.key(&cs[i])], now)
	}
	if err := s.apply(cs, items, now, out); err != nil {
		return err
	}
	s.gap(d)
	for i := range items {
		switch key := s.key(&cs[i]); {
		case !items[i].Write:
		case items[i].State.IsZero():
			delete(d.items, key)
		default:
			items[i].Write = false
			d.items[key] = item{items[i], later(now, s.life(out[i].ResetAfter))}
		}
	}
	if cs[0].ID != "" {
		if g, keep := s.record(cs, out); keep {
			g.until = later(now, s.window+s.lifetime(cs, now))
			d.grants[s.id(s, &cs[0])] = g
		}
	}
	s.done(s, cs)
	return nil
}

func later(now quota.Micros, span time.Duration) quota.Micros {
	return now + quota.Micros(span/time.Microsecond)
}

// link is the connection to the server.
type link struct {
	mu     sync.Mutex
	fault  conformance.Fault
	thawed chan struct{} // closed when a freeze ends
}

// Break sets the fault of the connection from now on.
func (s *Handle) Break(f conformance.Fault) {
	l := &s.link
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fault == conformance.Frozen && f != conformance.Frozen {
		close(l.thawed)
	}
	if f == conformance.Frozen && l.fault != conformance.Frozen {
		l.thawed = make(chan struct{})
	}
	l.fault = f
}

func (l *link) now() (conformance.Fault, chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.fault, l.thawed
}

func (l *link) request(ctx context.Context) error {
	switch f, thawed := l.now(); f {
	case conformance.Refused:
		return fmt.Errorf("mutant: %w: refused", quota.ErrUnavailable)
	case conformance.Frozen:
		select {
		case <-thawed:
			return fmt.Errorf("mutant: %w: the connection was frozen", quota.ErrIndeterminate)
		case <-ctx.Done():
			return fmt.Errorf("mutant: %w: %w", quota.ErrIndeterminate, ctx.Err())
		}
	}
	return nil
}

func (l *link) response() error {
	if f, _ := l.now(); f == conformance.LostReply {
		return fmt.Errorf("mutant: %w: the reply was lost", quota.ErrIndeterminate)
	}
	return nil
}
