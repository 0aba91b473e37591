package engine

import (
	"context"
	_ "embed"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

//go:embed load.lua
var loadText string

//go:embed swap.lua
var swapText string

// kv is a driver.KV for algorithms without Lua. It reads and writes the same states as the scripts.
type kv struct{ s *Store }

// isGrant reports whether a value is the record of a request id that driver.NewCAS wrote. Records are kept as text;
// states are packed.
func isGrant(value string) bool {
	return strings.HasPrefix(value, "id1:") || strings.HasPrefix(value, "id2:") || strings.HasPrefix(value, "id3:")
}

// maxLifetime is the longest lifetime of a key in ms. Some servers count it in nanoseconds, in 63 bits.
const maxLifetime = math.MaxInt64 / int64(time.Millisecond)

// Load returns the entries of keys and the server's time.
func (k *kv) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	if err := k.s.oneStep(len(keys), func(i int) string { return keys[i] }); err != nil {
		return nil, 0, err
	}
	args := make([]any, 0, 3+len(keys)+1)
	args = append(args, evalSHA, k.s.scripts.load.sha, text(len(keys)))
	for _, key := range keys {
		args = append(args, k.s.o.Prefix+key)
	}
	r, err := k.s.run(ctx, k.s.scripts.load, k.s.appendClock(args), len(keys), 0)
	if err != nil {
		return nil, 0, ofRead(err)
	}
	now, positive, ok := stamp(r.Int(0))
	if !ok || !positive || r.Len() != 1+len(keys) {
		return nil, 0, ofRead(badReply(r))
	}
	entries := make([]driver.Entry, len(keys))
	for i, key := range keys {
		held, ok := r.Text(1 + i)
		if !ok {
			return nil, 0, ofRead(badReply(r))
		}
		entries[i] = driver.Entry{Key: key, Value: held, Revision: held}
		if isGrant(held) {
			continue
		}
		it, err := unpack(held)
		if err != nil {
			return nil, 0, err
		}
		if entries[i].Value = ""; held != "" {
			entries[i].Value = string(it.AppendText(nil))
		}
	}
	return entries, now, nil
}

// Swap makes all changes if all entries still have their old values, and reports whether it did.
func (k *kv) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	if err := k.s.oneStep(len(changes), func(i int) string { return changes[i].Old.Key }); err != nil {
		return false, err
	}
	args := make([]any, 0, 3+4*len(changes))
	args = append(args, evalSHA, k.s.scripts.swap.sha, text(len(changes)))
	for _, c := range changes {
		args = append(args, k.s.o.Prefix+c.Old.Key)
	}
	for _, c := range changes {
		value := c.Value
		if value != "" && !isGrant(value) {
			it, err := driver.ParseItem(value)
			if err != nil {
				return false, err
			}
			value = pack(&it)
		}
		ttl := min(c.TTL.Milliseconds()+1, maxLifetime)
		if k.s.o.Clock != nil {
			ttl = max(ttl, injectedSlack)
		}
		args = append(args, c.Old.Revision, value, strconv.FormatInt(ttl, 10))
	}
	r, err := k.s.run(ctx, k.s.scripts.swap, args, len(changes), 0)
	if err != nil {
		return false, err
	}
	swapped, ok := r.Int(0)
	if !ok || r.Len() != 1 || swapped != 0 && swapped != 1 {
		return false, badReply(r)
	}
	return swapped == 1, nil
}

// Close closes the client, between the end of the calls that wait and that of the ones in flight.
func (k *kv) Close() error { return k.s.client.Close() }

// oneStep refuses keys that may be on several servers.
func (s *Store) oneStep(n int, key func(int) string) error {
	if s.cluster || s.anyList() {
		return nil
	}
	for i := 1; i < n; i++ {
		if tag(key(i)) != tag(key(0)) {
			return errApart
		}
	}
	return nil
}
