package driver

import (
	"context"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// A KV is a database that can load some keys and compare-and-swap them: etcd, DynamoDB, bbolt. Authors of stores implement
// it; [NewCAS] makes a Store of it and is its only caller. Methods may be called concurrently. A database with transactions
// is better served by a [Transactor], and so is a store that needs to know more of a call than its keys.
type KV interface {
	// Load returns the entries of the keys, in their order, as one consistent snapshot, and the store's time, read when
	// the snapshot was taken or later; see Entry.At for a database without a clock. An absent entry has an empty Value, and
	// so has one whose TTL has passed, even if the database still has it. There are 1 to MaxEntries keys, sorted, each once:
	// UTF-8 without ASCII spaces and control bytes, of MaxStoredKey bytes at most.
	Load(ctx context.Context, keys []string) ([]Entry, quota.Micros, error)
	// Swap makes all changes in one step if every Old is still as Load returned it, and reports whether it did. An error
	// means that the outcome is unknown, unless it carries an error of package quota: where the context ended and the
	// database wrote nothing, wrap quota.ErrUnavailable around the context's error, which the caller then gets.
	//
	// A client library must not repeat a swap whose reply was lost: the repeat finds the new values and reports false, and the
	// adapter then charges a second time. Turn its retries off, or store Change.Attempt with the value, and report true
	// where the database has it already.
	Swap(ctx context.Context, changes []Change) (swapped bool, err error)
}

// Entry is a database's content under a key.
type Entry struct {
	Key, Value string
	// Revision is for the author's own use, such as a version: it comes back in Change.Old.
	Revision string
	// At is the Change.At that the value was stored with, in a database that has no clock of its own; else 0. Then the time of
	// Load is that of a process, and processes differ. The decision is made at the latest of Load's time and the entries', so
	// that a key's time never goes back. An entry that is more than [MaxSkew] ahead of Load's time is ErrMisconfigured.
	At quota.Micros
}

// MaxSkew is the most by which the clocks of processes may differ that share a database without a clock, see Entry.At. A
// limit admits as much more as it gains in the time by which they do.
const MaxSkew = 5 * time.Second

// Change is one compare-and-swap. Where Value equals Old.Value the comparison still counts, and nothing is
// written: the entry keeps the TTL that it has.
type Change struct {
	Old   Entry
	Value string        // the new value; "" deletes
	TTL   time.Duration // the value must be kept for this time, and may be dropped after it; positive
	// At is the time of the decision, for databases without a clock, see Entry.At.
	At quota.Micros
	// Attempt is a text that all changes of a call of Swap, or of a transaction, have in common and no other ones have: up to 36
	// letters, digits and '-'. A database that is handed a write twice can tell by it, such as a ClientRequestToken.
	Attempt string
}

// ExpirySlack is how much longer than Decision.ResetAfter a store keeps a state.
const ExpirySlack = time.Second

// NewCAS returns a Store over a KV, with the properties of [NewTransactional]: it loads, decides, and swaps. Where the swap did
// not apply because an entry changed, it tries again. An error of Swap is ErrIndeterminate and is not tried again. Denials and
// peeks do not swap.
func NewCAS(kv KV, o *Options) (quota.Store, error) {
	if kv == nil {
		return nil, fmt.Errorf("quota: %w: kv is nil; accepted: a KV", quota.ErrInvalid)
	}
	return newStore(swapper{kv}, kv, o)
}

// swapper is a Transactor that commits by compare-and-swap.
type swapper struct{ kv KV }

func (s swapper) Transact(ctx context.Context, a *Access, decide Decide) error {
	entries, now, err := s.kv.Load(ctx, a.Keys)
	if err != nil {
		return err
	}
	if len(entries) != len(a.Keys) {
		return fmt.Errorf("quota: %w: Load returned %d entries for %d keys", quota.ErrMisconfigured, len(entries), len(a.Keys))
	}
	changes, err := decide(entries, now)
	if err != nil || len(changes) == 0 {
		return err
	}
	swapped, err := s.kv.Swap(ctx, changes)
	if err == nil && !swapped {
		err = errSwapLost
	}
	return err
}

var errSwapLost = fmt.Errorf("quota: %w: an entry changed between Load and Swap", quota.ErrConflict)

// ttl returns how long to keep a state that is as fresh after reset.
func ttl(reset time.Duration) time.Duration {
	return min(reset, quota.Never-ExpirySlack) + ExpirySlack
}

// appendGrant appends the record of a grant: a fingerprint of the charges, then the numbers of each decision. Only where a
// charge was delayed are there delays among them, only where a shadow was denied waits, which are 0 of the others, and only
// where there are holds their tokens and times of lapse.
func appendGrant(dst []byte, cs []quota.Charge, ds []quota.Decision) []byte {
	layout, numbers := "id1:", 5
	for i := range ds {
		switch {
		case ds[i].Until > 0:
			layout, numbers = "id4:", 9
		case !ds[i].Allowed && numbers < 9:
			layout, numbers = "id3:", 7
		case ds[i].Delay > 0 && numbers < 7:
			layout, numbers = "id2:", 6
		}
	}
	dst = append(dst, layout...)
	sum := Fingerprint(cs)
	dst = hex.AppendEncode(dst, sum[:])
	for i := range ds {
		d := &ds[i]
		all := [...]int64{d.Capacity, d.Remaining, d.Charged, int64(d.ResetAfter), int64(d.At), int64(d.Delay), int64(d.RetryAfter), d.Held, int64(d.Until)}
		for _, n := range all[:numbers] {
			dst = strconv.AppendInt(append(dst, ':'), n, 10)
		}
	}
	return dst
}

// parseGrant reads the decisions of a recorded grant; it fails with ErrInvalid if that was granted to other charges.
func parseGrant(text string, cs []quota.Charge, out []quota.Decision) error {
	fields := strings.Split(text, ":")
	numbers := map[string]int{"id1": 5, "id2": 6, "id3": 7, "id4": 9}[fields[0]]
	if len(fields) < 2 || numbers == 0 {
		return notState(text)
	}
	if sum := Fingerprint(cs); fields[1] != hex.EncodeToString(sum[:]) {
		return fmt.Errorf("quota: %w: request id %q was granted to other charges; accepted: a new id", quota.ErrInvalid, cs[0].ID)
	}
	fields = fields[2:]
	if len(fields) != numbers*len(cs) {
		return notState(text)
	}
	for i := range out {
		var n [9]int64
		for j := range numbers {
			var err error
			if n[j], err = strconv.ParseInt(fields[numbers*i+j], 10, 64); err != nil {
				return notState(text)
			}
		}
		out[i] = quota.Decision{Allowed: n[6] == 0, Shadow: cs[i].Shadow, Alternative: cs[i].Alternative, RetryAfter: time.Duration(n[6]), Replayed: true, Capacity: n[0], Remaining: n[1], Charged: n[2],
			ResetAfter: time.Duration(n[3]), At: quota.Micros(n[4]), Delay: time.Duration(n[5]), Held: n[7], Until: quota.Micros(n[8])}
	}
	return nil
}
