package driver_test

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// memKV is the KV that tests run NewCAS on: a map with versions, whose entries go when their TTL has passed and not later. It
// has the time of its clock. The hooks make it fail.
type memKV struct {
	clock func() quota.Micros

	mu      sync.Mutex
	entries map[string]memEntry
	version int
	loads   int
	swaps   [][]driver.Change // as they came
	closed  int

	keep       bool                       // entries outlive their TTL
	beforeSwap func()                     // between Load and Swap, without the lock
	loadErr    error                      // returned by Load
	swapErr    error                      // returned by Swap, which applies nothing
	lostReply  error                      // returned by Swap, which applies
	deny       func([]driver.Change) bool // Swap reports not swapped
}

type memEntry struct {
	value   string
	version int
	expires quota.Micros
}

func newKV(clock func() quota.Micros) *memKV {
	return &memKV{clock: clock, entries: map[string]memEntry{}}
}

func (kv *memKV) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	kv.loads++
	now := kv.clock()
	if kv.loadErr != nil {
		return nil, 0, kv.loadErr
	}
	out := make([]driver.Entry, len(keys))
	for i, k := range keys {
		out[i] = kv.get(k, now)
	}
	return out, now, nil
}

func (kv *memKV) get(key string, now quota.Micros) driver.Entry {
	e, ok := kv.entries[key]
	if ok && e.expires <= now && !kv.keep {
		delete(kv.entries, key)
		e = memEntry{}
	}
	return driver.Entry{Key: key, Value: e.value, Revision: strconv.Itoa(e.version)}
}

func (kv *memKV) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	if kv.beforeSwap != nil {
		kv.beforeSwap()
	}
	kv.mu.Lock()
	defer kv.mu.Unlock()
	kv.swaps = append(kv.swaps, changes)
	if kv.swapErr != nil {
		return false, kv.swapErr
	}
	now := kv.clock()
	for _, c := range changes {
		if kv.get(c.Old.Key, now) != c.Old {
			return false, nil
		}
	}
	if kv.deny != nil && kv.deny(changes) {
		return false, nil
	}
	for _, c := range changes {
		if c.Value == c.Old.Value {
			continue
		}
		kv.version++
		if kv.entries[c.Old.Key] = (memEntry{c.Value, kv.version, now + quota.Micros(c.TTL/time.Microsecond)}); c.Value == "" {
			delete(kv.entries, c.Old.Key)
		}
	}
	if kv.lostReply != nil {
		err := kv.lostReply
		kv.lostReply = nil
		return false, err
	}
	return true, nil
}

// ListKeys lists in the order of the keys: the cursor is the last of the page before.
func (kv *memKV) ListKeys(ctx context.Context, prefix, cursor string, n int) (keys []string, next string, err error) {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	if kv.loadErr != nil {
		return nil, "", kv.loadErr
	}
	for key := range kv.entries {
		if strings.HasPrefix(key, prefix) && key > cursor {
			keys = append(keys, key)
		}
	}
	if slices.Sort(keys); len(keys) > n {
		return keys[:n], keys[n-1], nil
	}
	return keys, "", nil
}

// Close fails the second time, as a connection would.
func (kv *memKV) Close() error {
	if kv.closed++; kv.closed > 1 {
		return errors.New("closed twice")
	}
	return nil
}

func (kv *memKV) swapped() int {
	kv.mu.Lock()
	defer kv.mu.Unlock()
	return len(kv.swaps)
}
