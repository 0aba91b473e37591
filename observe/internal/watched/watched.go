// Package watched reads the numbers of limiters and stores, for all packages of metrics alike.
package watched

import (
	"reflect"
	"slices"
	"sync"

	"github.com/fleetquota/fleetquota/backend"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// A Limiter is a [quota.Limiter] or [quota.Charger], or one of package fleetquota.
type Limiter interface {
	Store() quota.Store // with its policies
	Waiting() int
}

// Set is the limiters and stores whose numbers are read. The zero value is empty. Methods may be called concurrently.
type Set struct {
	mu       sync.Mutex
	limiters []Limiter
	stores   []quota.Store
}

// Add adds a limiter and its store, unless they are there.
func (w *Set) Add(l Limiter) {
	if limiter, ok := l.(*quota.Limiter); ok {
		l = limiter.Charger // limiters of one charger share its waiting callers
	}
	w.mu.Lock()
	add(&w.limiters, l)
	w.mu.Unlock()
	w.AddStore(l.Store())
}

// AddStore adds a store, with its policies, unless it is there.
func (w *Set) AddStore(s quota.Store) {
	w.mu.Lock()
	defer w.mu.Unlock()
	add(&w.stores, s)
}

// add adds a value to a list that does not have it.
func add[T any](list *[]T, v T) {
	same := func(known T) bool {
		return reflect.TypeOf(known) == reflect.TypeOf(v) && reflect.TypeOf(v).Comparable() && any(known) == any(v)
	}
	if !slices.ContainsFunc(*list, same) {
		*list = append(*list, v)
	}
}

// Stores returns the stores.
func (w *Set) Stores() []quota.Store {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.stores)
}

// Waiting returns how many callers wait now.
func (w *Set) Waiting() (n int) {
	w.mu.Lock()
	limiters := slices.Clone(w.limiters)
	w.mu.Unlock()
	for _, l := range limiters {
		n += l.Waiting()
	}
	return n
}

// maxNodes is how many nodes are told apart; further ones are "other".
const maxNodes = 256

// Readings returns the numbers of all stores, added up.
func (w *Set) Readings() (all []driver.Reading) {
	sums, nodes := map[driver.Reading]int64{}, map[string]bool{} // the sums by readings without a value
	for _, s := range w.Stores() {
		for _, r := range backend.Readings(s) {
			value := r.Value
			r.Value = 0
			if r.Metric.ByNode() && !nodes[r.Node] {
				if len(nodes) < maxNodes {
					nodes[r.Node] = true
				} else {
					r.Node = "other"
				}
			}
			sums[r] += value
		}
	}
	for r, value := range sums {
		r.Value = value
		all = append(all, r)
	}
	return all
}

// StoreName returns the store that a reading is of, as labels have it.
func StoreName(r driver.Reading) string {
	if r.Fallback {
		return "fallback"
	}
	return "primary"
}
