package calls

import (
	"unique"

	"github.com/fleetquota/fleetquota/quota"
)

// Limits has a value for each of a bounded number of limits, by their names. The zero value has none. Methods may be called
// concurrently; Find takes no lock.
type Limits[V any] struct {
	named bounded[unique.Handle[string], V]
}

// Find returns the value of a valid limit, or nil.
func (l *Limits[V]) Find(limit *quota.Limit) *V { return l.named.find(limit.Handle()) }

// Add returns the value of a valid limit: a fresh one where it has none, or nil where most limits have theirs.
func (l *Limits[V]) Add(limit *quota.Limit, most int, fresh func() *V) *V {
	return l.named.add(limit.Handle(), most, fresh)
}

// All returns the values by the limits' names. The map must not be changed.
func (l *Limits[V]) All() map[unique.Handle[string]]*V { return l.named.all() }
