package driver

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// A KV is a database that can load some keys and compare-and-swap them: a SQL database, etcd, DynamoDB, bbolt. Authors
// of stores implement it; [NewCAS] makes a Store of it and is its only caller. Methods may be called concurrently.
type KV interface {
	// Load returns the entries of the keys, in their order, as one consistent snapshot, and the store's time, read when
	// the snapshot was taken or later. An absent entry has an empty Value, and so has one whose TTL has passed, even if
	// the database still has it. There are 1 to MaxCharges + 1 keys, each once: UTF-8 without ASCII spaces and control
	// bytes, some 2000 bytes at most.
	Load(ctx context.Context, keys []string) ([]Entry, quota.Micros, error)
	// Swap makes all changes in one step if every Old is still as Load returned it, and reports whether it did. An error
	// means that the outcome is unknown, unless it carries an error of package quota: where the context ended and the
	// database wrote nothing, wrap quota.ErrUnavailable around the context's error.
	Swap(ctx context.Context, changes []Change) (swapped bool, err error)
}

// Entry is a KV's content under a key.
type Entry struct {
	Key, Value string
	// Revision is for the KV's own use, such as a version: it comes back in Change.Old.
	Revision string
}

// Change is one compare-and-swap. Where Value equals Old.Value the comparison still counts, and nothing is
// written: the entry keeps the TTL that it has.
type Change struct {
	Old   Entry
	Value string        // the new value; "" deletes
	TTL   time.Duration // the value must be kept for this time, and may be dropped after it; positive
}

// ExpirySlack is how much longer than Decision.ResetAfter a store keeps a state.
const ExpirySlack = time.Second

// CASOptions are the options of NewCAS. The zero value, and nil, take the defaults.
type CASOptions struct {
	// Atomicity says how many keys Load and Swap reach in one step; a longer list is ErrCrossSlot.
	Atomicity Atomicity
	// Attempts bounds the swaps that are tried for one decision; 0 is 16. Then the decision is ErrConflict.
	Attempts int
}

// NewCAS returns a Store over a KV. It loads, decides with [Apply], and swaps; where the swap did not apply because an
// entry changed, it tries again after a short random pause. An error of Swap is ErrIndeterminate and is not tried
// again. Denials and peeks do not swap. Close closes the KV if it is an [io.Closer]. A database with transactions may
// make a KV of each transaction, and call NewCAS on it.
func NewCAS(kv KV, o *CASOptions) (quota.Store, error) {
	if o == nil {
		o = &CASOptions{}
	}
	switch {
	case kv == nil:
		return nil, fmt.Errorf("quota: %w: kv is nil; accepted: a KV", quota.ErrInvalid)
	case o.Attempts < 0:
		return nil, fmt.Errorf("quota: %w: CASOptions.Attempts is %d; accepted: 0 or more", quota.ErrInvalid, o.Attempts)
	case o.Atomicity > OneKey:
		return nil, fmt.Errorf("quota: %w: CASOptions.Atomicity is %d; accepted: AnyKeys, OneGroup or OneKey", quota.ErrInvalid, o.Atomicity)
	}
	s := &casStore{kv: kv, atomicity: o.Atomicity, attempts: o.Attempts}
	if s.attempts == 0 {
		s.attempts = 16
	}
	return s, nil
}

type casStore struct {
	kv        KV
	atomicity Atomicity
	attempts  int
	gate      Gate
}

func (s *casStore) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	var out [1]quota.Decision
	if err := s.TakeAll(ctx, []quota.Charge{c}, out[:]); err != nil {
		return quota.Decision{}, err
	}
	return out[0], nil
}

func (s *casStore) Close() error {
	if !s.gate.Close() {
		return nil
	}
	if c, ok := s.kv.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// Atomicity says how far the store decides several keys in one step.
func (s *casStore) Atomicity() Atomicity { return s.atomicity }

func (s *casStore) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	if err := s.gate.Ready(ctx); err != nil {
		return err
	}
	keys, err := s.keys(cs)
	if err != nil {
		return err
	}
	for attempt := 0; attempt < s.attempts; attempt++ {
		if attempt > 0 {
			if err := pause(ctx, attempt); err != nil {
				return err
			}
		}
		done, err := s.try(ctx, keys, cs, out)
		if done || err != nil {
			return err
		}
	}
	return fmt.Errorf("quota: %w: %d swaps of %s lost", quota.ErrConflict, s.attempts, cs[0].Limit.Name())
}

// keys returns the keys of the charges, and as the last one the key of their request id if they carry one.
func (s *casStore) keys(cs []quota.Charge) ([]string, error) {
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

// try loads, decides and swaps once. It is done unless the swap was not applied.
func (s *casStore) try(ctx context.Context, keys []string, cs []quota.Charge, out []quota.Decision) (done bool, err error) {
	if err := ctx.Err(); err != nil {
		return false, err
	}
	entries, now, err := s.kv.Load(ctx, keys)
	if err != nil {
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		return false, Classify(err, quota.ErrUnavailable)
	}
	if len(entries) != len(keys) {
		return false, fmt.Errorf("quota: %w: Load returned %d entries for %d keys", quota.ErrMisconfigured, len(entries), len(keys))
	}
	if len(keys) > len(cs) && entries[len(cs)].Value != "" {
		return true, parseGrant(entries[len(cs)].Value, cs, out)
	}
	items := make([]Item, len(cs))
	for i := range items {
		if items[i], err = ParseItem(entries[i].Value); err != nil {
			return false, err
		}
	}
	if err := Apply(cs, items, now, out); err != nil {
		return false, err
	}
	changes := make([]Change, 0, len(keys))
	written := false
	for i := range items {
		c := Change{Old: entries[i], Value: entries[i].Value, TTL: ttl(out[i].ResetAfter)}
		if items[i].Write {
			written = true
			c.Value = ""
			if !items[i].State.IsZero() {
				c.Value = string(items[i].AppendText(nil))
			}
		}
		changes = append(changes, c)
	}
	if len(keys) > len(cs) && quota.Granted(out) && !OnlyPeeks(cs) {
		written = true
		changes = append(changes, Change{Old: entries[len(cs)], Value: string(appendGrant(nil, cs, out)), TTL: quota.IDWindow})
	}
	if !written {
		return true, nil
	}
	done, err = s.kv.Swap(ctx, changes)
	if err != nil {
		return false, Classify(err, quota.ErrIndeterminate)
	}
	return done, nil
}

// ttl returns how long to keep a state that is as fresh after reset.
func ttl(reset time.Duration) time.Duration {
	return min(reset, quota.Never-ExpirySlack) + ExpirySlack
}

// pause waits before another attempt: longer and more spread out each time, up to some 64 ms.
func pause(ctx context.Context, attempt int) error {
	timer := time.NewTimer(rand.N(time.Millisecond << min(attempt, 6)))
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// appendGrant appends the record of a grant: a fingerprint of the charges, then the numbers of each decision. Only where a
// charge was delayed are there delays among them.
func appendGrant(dst []byte, cs []quota.Charge, ds []quota.Decision) []byte {
	layout, numbers := "id1:", 5
	for i := range ds {
		if ds[i].Delay > 0 {
			layout, numbers = "id2:", 6
		}
	}
	dst = append(dst, layout...)
	sum := Fingerprint(cs)
	dst = hex.AppendEncode(dst, sum[:])
	for i := range ds {
		d := &ds[i]
		all := [...]int64{d.Limit, d.Remaining, d.Charged, int64(d.ResetAfter), int64(d.At), int64(d.Delay)}
		for _, n := range all[:numbers] {
			dst = strconv.AppendInt(append(dst, ':'), n, 10)
		}
	}
	return dst
}

// parseGrant reads the decisions of a recorded grant; it fails with ErrInvalid if that was granted to other charges.
func parseGrant(text string, cs []quota.Charge, out []quota.Decision) error {
	fields := strings.Split(text, ":")
	numbers := 5
	if fields[0] == "id2" {
		numbers = 6
	}
	if len(fields) < 2 || fields[0] != "id1" && fields[0] != "id2" {
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
		var n [6]int64
		for j := range numbers {
			var err error
			if n[j], err = strconv.ParseInt(fields[numbers*i+j], 10, 64); err != nil {
				return notState(text)
			}
		}
		out[i] = quota.Decision{Allowed: true, Replayed: true, Limit: n[0], Remaining: n[1], Charged: n[2],
			ResetAfter: time.Duration(n[3]), At: quota.Micros(n[4]), Delay: time.Duration(n[5])}
	}
	return nil
}
