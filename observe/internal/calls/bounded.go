package calls

import (
	"maps"
	"sync"
	"sync/atomic"
)

// bounded has a value for each of a bounded number of keys. The zero value has none. Methods may be called concurrently; find and
// all take no lock.
type bounded[K comparable, V any] struct {
	kept atomic.Pointer[map[K]*V] // a map does not change once it is here
	mu   sync.Mutex               // held while it is replaced
}

// all returns the values by their keys. The map must not be changed.
func (b *bounded[K, V]) all() map[K]*V {
	if kept := b.kept.Load(); kept != nil {
		return *kept
	}
	return nil
}

// find returns the value of a key, or nil.
func (b *bounded[K, V]) find(key K) *V { return b.all()[key] }

// add returns the value of a key: a fresh one where it has none, or nil where most keys have theirs.
func (b *bounded[K, V]) add(key K, most int, fresh func() *V) *V {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := b.all()
	v := all[key]
	if v != nil || len(all) >= most {
		return v
	}
	v = fresh()
	grown := map[K]*V{key: v}
	maps.Copy(grown, all)
	b.kept.Store(&grown)
	return v
}
