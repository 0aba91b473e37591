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

// Reservations are the numbers of the reservations of a limiter. They are those of [quota.Charger.Reservations].
type Reservations = struct{ Open, Owed, Settled, Released, Lost, Lapsed int64 }

// OfReservations are the metrics of reservations.
var OfReservations = []struct {
	Name, Help string
	Counter    bool
	Of         func(Reservations) int64
}{
	{"reservations_open", "The reservations that no Settle or Release has finished.", false, func(r Reservations) int64 { return r.Open }},
	{"reservations_owed", "The finishes of reservations that the store could not take yet, and that are repeated.", false, func(r Reservations) int64 { return r.Owed }},
	{"reservations_settled", "The reservations that were settled.", true, func(r Reservations) int64 { return r.Settled }},
	{"reservations_released", "The reservations that were released.", true, func(r Reservations) int64 { return r.Released }},
	{"reservations_lost", "The reservations whose hold ended while they were open: others may take what they use.", true, func(r Reservations) int64 { return r.Lost }},
	{"reservations_lapsed", "The reservations that lapsed before the store could be told how they ended: what they used is not charged.", true, func(r Reservations) int64 { return r.Lapsed }},
}

// Reservations returns the numbers of all limiters that have reservations, added up.
func (w *Set) Reservations() (sum Reservations) {
	w.mu.Lock()
	limiters := slices.Clone(w.limiters)
	w.mu.Unlock()
	for _, l := range limiters {
		if l, ok := l.(interface{ Reservations() Reservations }); ok {
			n := l.Reservations()
			sum.Open += n.Open
			sum.Owed += n.Owed
			sum.Settled += n.Settled
			sum.Released += n.Released
			sum.Lost += n.Lost
			sum.Lapsed += n.Lapsed
		}
	}
	return sum
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
