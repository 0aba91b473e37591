package driver

import (
	"context"
	"fmt"

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

// Access describes a transaction. It must not be modified, nor used after Transact returned.
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
	// Atomicity says how many keys the database reaches in one step; a longer list is ErrCrossSlot, unless it is split.
	Atomicity Atomicity
	// Split has a list that the database does not decide in one step decided in several, as the stores on Redis Cluster do: by
	// groups with OneGroup, by keys with OneKey. If one part denies, the charges of the others are given back, so a
	// denied list may have held tokens for a moment, see Decision.Split. A list with a request id is not split, nor are
	// alternatives: a [quota.Limiter] asks for them one after the other, each as a list.
	Split bool
	// Attempts bounds the attempts that are made for one decision; 0 is 16. Then the decision is ErrConflict.
	Attempts int
}

// NewTransactional returns a Store over a Transactor. It has every algorithm, lists of charges, request ids, and the
// classes of errors; it decides with [Apply].
//
// A key has one transaction at a time. Calls that come meanwhile wait, and go together in the next transaction: they are decided
// on one reading, in the order in which they came, and written at once. A caller waits no longer than its context: one that
// leaves before its charge was decided is not charged, and after that its outcome is unknown. A call that finds its keys
// free waits for none, and its Transact has its own context; the transaction of calls that waited has one of its own, which
// ends at the latest of their deadlines. The same holds for Load and Swap of a KV.
//
// A transaction that another process overtook is tried again after a short random pause, until it has been tried
// Options.Attempts times, or the deadline leaves no time for another attempt. Then the error is [quota.ErrConflict].
//
// A panic of an algorithm is the error of the call that it decided; the other calls of the transaction are decided. One of t
// is the error of all calls of the transaction.
//
// The Store is a [Graded], and a [StatsReporter]; it is [Prompt] if t says so, and a [HealthReporter] if t is one. Close
// waits for the refunds of lists that were split, refuses the calls that wait, closes t if it is an [io.Closer], and waits for
// the transactions of calls that waited.
func NewTransactional(t Transactor, o *Options) (quota.Store, error) {
	if t == nil {
		return nil, fmt.Errorf("quota: %w: t is nil; accepted: a Transactor", quota.ErrInvalid)
	}
	return newStore(t, t, o)
}
