package calls

import (
	"maps"
	"sync"
	"sync/atomic"
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// Limits has a value for each of a bounded number of limits, by their names. The zero value has none. Methods may be called
// concurrently; Find takes no lock.
type Limits[V any] struct {
	all atomic.Pointer[map[unique.Handle[string]]*V] // a map does not change once it is here
	mu  sync.Mutex                                   // held while it is replaced
}

// Find returns the value of a valid limit, or nil.
func (l *Limits[V]) Find(limit *quota.Limit) *V {
	if all := l.all.Load(); all != nil {
		return (*all)[limit.Handle()]
	}
	return nil
}

// Add returns the value of a valid limit: a fresh one where it has none, or nil where most limits have theirs.
func (l *Limits[V]) Add(limit *quota.Limit, most int, fresh func() *V) *V {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := l.All()
	v := all[limit.Handle()]
	if v != nil || len(all) >= most {
		return v
	}
	v = fresh()
	grown := map[unique.Handle[string]]*V{limit.Handle(): v}
	maps.Copy(grown, all)
	l.all.Store(&grown)
	return v
}

// All returns the values by the limits' names. The map must not be changed.
func (l *Limits[V]) All() map[unique.Handle[string]]*V {
	if all := l.all.Load(); all != nil {
		return *all
	}
	return nil
}
