package driver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/fleetquota/fleetquota/quota"
)

// A Transactor is a database that reads and writes some keys in one transaction: a SQL database, or any that can run a
// function of Go between its reads and its commit. Authors of stores implement it; [NewTransactional] makes a Store of it and
// is its only caller. With a KV behind it the same Store loads and swaps, see [NewCAS].
type Transactor interface {
	// Transact reads the entries of a.Keys, calls decide on them, makes the changes that it returns, and commits them in one
	// step. It may be called concurrently.
	//
	// The entries are one consistent snapshot, in the order of the keys, and now is the store's time, read when the snapshot was
	// taken or later, and after any wait for a lock. An absent entry has an empty Value, and so has one that expired, even if the
	// database still has it.
	//
	// decide does no I/O and may be called again, on entries read again: if the transaction is repeated, or first on a
	// snapshot without locks. The last call counts. If it returns no change, there is nothing to write and nothing to commit: so
	// a call that is denied, or only peeks, may need no lock and one round trip. If it returns changes, no entry may
	// have changed between its reading and the commit: the store holds locks on the keys, absent ones too, or makes each change
	// conditional on Change.Old, those included whose Value equals the old one. An error of decide is to be returned as it is.
	//
	// If Transact returns nil, the changes are committed, and if it returns an error that carries one of package quota's errors but
	// ErrIndeterminate, nothing is: it must be such an error wherever the database answered that it rolled back, and must not be
	// where a commit was sent and not answered. Any other error means that the outcome is unknown, unless decide returned no
	// changes: then it is ErrUnavailable, or the context's own error. Where another transaction won, the error is
	// [quota.ErrConflict]: Transact is then called again, after a short pause.
	Transact(ctx context.Context, a *Access, decide Decide) error
}

// Decide decides on the entries of a transaction at the store's time, and returns the changes to make, see
// [Transactor]. A change has the Revision of the entry that it was given.
type Decide = func(entries []Entry, now quota.Micros) ([]Change, error)

// Access says what a transaction is about. It must not be modified, nor used after Transact returned.
type Access struct {
	// Keys are the keys that are read and may be written: 1 to MaxEntries, sorted by their bytes, each once. A store that
	// locks them in this order has no deadlocks of its own making.
	Keys []string
	// Peek says that nothing is to be charged: decide will return no changes, unless the store's clock stepped back. Then a
	// state that is ahead of the clock is written anew, and the transaction needs its locks all the same.
	Peek bool
}

// Options are the options of NewTransactional and NewCAS. The zero value, and nil, take the defaults.
type Options struct {
	// Atomicity says how many keys the database reaches in one step; a longer list is ErrCrossSlot.
	Atomicity Atomicity
	// Attempts bounds the attempts that are made for one decision; 0 is 16. Then the decision is ErrConflict.
	Attempts int
}

// CASOptions are the options of NewCAS.
type CASOptions = Options

// NewTransactional returns a Store over a Transactor. It has every algorithm, lists of charges, request ids, and the
// classes of errors; it decides with [Apply]. A transaction that another one overtook is tried again after a short
// random pause. Close closes t if it is an [io.Closer].
func NewTransactional(t Transactor, o *Options) (quota.Store, error) {
	if t == nil {
		return nil, fmt.Errorf("quota: %w: t is nil; accepted: a Transactor", quota.ErrInvalid)
	}
	return newStore(t, t, o)
}

func newStore(t Transactor, given any, o *Options) (*store, error) {
	if o == nil {
		o = &Options{}
	}
	switch {
	case o.Attempts < 0:
		return nil, fmt.Errorf("quota: %w: Options.Attempts is %d; accepted: 0 or more", quota.ErrInvalid, o.Attempts)
	case o.Atomicity > OneKey:
		return nil, fmt.Errorf("quota: %w: Options.Atomicity is %d; accepted: AnyKeys, OneGroup or OneKey", quota.ErrInvalid, o.Atomicity)
	}
	s := &store{transactor: t, atomicity: o.Atomicity, attempts: o.Attempts}
	if s.attempts == 0 {
		s.attempts = 16
	}
	s.closer, _ = given.(io.Closer)
	return s, nil
}

// store is the Store of both adapters.
type store struct {
	transactor Transactor
	closer     io.Closer
	atomicity  Atomicity
	attempts   int
	gate       Gate
}

func (s *store) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	if err := s.TakeAll(ctx, []quota.Charge{c}, out[:]); err != nil {
		return quota.Decision{}, err
	}
	return out[0], nil
}

func (s *store) Close() error {
	if s.gate.Close() && s.closer != nil {
		return s.closer.Close()
	}
	return nil
}

// Atomicity says how far the store decides several keys in one step.
func (s *store) Atomicity() Atomicity { return s.atomicity }

func (s *store) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	keys, err := s.keys(cs)
	if err != nil {
		return err
	}
	t := &transaction{cs: cs, out: out, access: Access{Keys: slices.Clone(keys), Peek: OnlyPeeks(cs)}}
	slices.Sort(t.access.Keys)
	t.access.Keys = slices.Compact(t.access.Keys) // alternatives may have keys in common
	t.places = make([]int, len(keys))
	for i, key := range keys {
		t.places[i], _ = slices.BinarySearch(t.access.Keys, key)
	}
	for attempt := 0; attempt < s.attempts; attempt++ {
		if attempt > 0 {
			if err := pause(ctx, attempt); err != nil {
				return err
			}
		}
		if err = t.run(ctx, s.transactor); !errors.Is(err, quota.ErrConflict) || errors.Is(err, quota.ErrIndeterminate) {
			return err
		}
	}
	return fmt.Errorf("quota: %w: %d attempts at %s lost, the last one with: %w", quota.ErrConflict, s.attempts, cs[0].Limit.Name(), err)
}

// keys returns the keys of the charges, and as the last one the key of their request id if they carry one.
func (s *store) keys(cs []quota.Charge) ([]string, error) {
	keys := make([]string, 0, len(cs)+1)
	for i := range cs {
		if i > 0 && (s.atomicity == OneKey || s.atomicity == OneGroup && quota.Group(cs[i].Key) != quota.Group(cs[0].Key)) {
			return nil, fmt.Errorf("quota: %w: this store decides fewer keys in one step", quota.ErrCrossSlot)
		}
		keys = append(keys, string(AppendKey(nil, cs[i].Limit.Name(), cs[i].Key)))
	}
	if id := cs[0].ID; id != "" {
		if s.atomicity == OneKey {
			return nil, fmt.Errorf("quota: %w: a request id needs a store that decides two keys in one step", quota.ErrCrossSlot)
		}
		keys = append(keys, string(AppendIDKey(nil, quota.Group(cs[0].Key), id)))
	}
	return keys, nil
}

// transaction is one transaction of a store.
type transaction struct {
	access  Access
	cs      []quota.Charge
	out     []quota.Decision
	places  []int // of the charges' keys in access.Keys, then of the request id's
	decided bool
	writes  bool // decide returned changes
}

// run makes one attempt.
func (t *transaction) run(ctx context.Context, by Transactor) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	t.decided, t.writes = false, false
	err := by.Transact(ctx, &t.access, t.decide)
	switch {
	case err == nil && !t.decided:
		return fmt.Errorf("quota: %w: Transact returned nil and did not call decide", quota.ErrMisconfigured)
	case err == nil:
		return nil
	case t.writes:
		return Classify(err, quota.ErrIndeterminate)
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return Classify(err, quota.ErrUnavailable)
}

// decide is the Decide of the transaction.
func (t *transaction) decide(entries []Entry, now quota.Micros) ([]Change, error) {
	t.decided, t.writes = true, false
	if len(entries) != len(t.access.Keys) {
		return nil, fmt.Errorf("quota: %w: decide got %d entries for %d keys", quota.ErrMisconfigured, len(entries), len(t.access.Keys))
	}
	withID := len(t.places) > len(t.cs)
	if withID {
		if record := entries[t.places[len(t.cs)]].Value; record != "" {
			return nil, parseGrant(record, t.cs, t.out)
		}
	}
	items := make([]Item, len(t.cs))
	for i := range items {
		var err error
		if items[i], err = ParseItem(entries[t.places[i]].Value); err != nil {
			return nil, err
		}
	}
	if err := Apply(t.cs, items, now, t.out); err != nil {
		return nil, err
	}
	changes := make([]Change, 0, len(entries))
	written := false
	for i := range items {
		if again(t.cs, i) {
			if !items[i].Write {
				continue
			}
			changes = slices.DeleteFunc(changes, func(c Change) bool { return c.Old.Key == entries[t.places[i]].Key })
		}
		old := entries[t.places[i]]
		c := Change{Old: old, Value: old.Value, TTL: ttl(t.out[i].ResetAfter)}
		if items[i].Write {
			written = true
			c.Value = ""
			if !items[i].State.IsZero() {
				c.Value = string(items[i].AppendText(nil))
			}
		}
		changes = append(changes, c)
	}
	if withID && quota.Granted(t.out) && !t.access.Peek {
		written = true
		changes = append(changes, Change{Old: entries[t.places[len(t.cs)]], Value: string(appendGrant(nil, t.cs, t.out)), TTL: quota.IDWindow})
	}
	if !written {
		return nil, nil
	}
	slices.SortFunc(changes, func(a, b Change) int { return strings.Compare(a.Old.Key, b.Old.Key) })
	t.writes = true
	return changes, nil
}
