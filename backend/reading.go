package backend

import (
	"cmp"
	"slices"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Readings returns the numbers that a store, its policies and the stores inside tell of themselves: keys held, breakers open,
// tokens owed, and the others of [driver.Metric]. Those of one metric, node and server are added up, and those of a fallback's
// store are told apart. They come in a fixed order; of a limiter's store, pass limiter.Store().
//
//	for _, r := range backend.Readings(limiter.Store()) {
//		fmt.Println(r.Metric, r.Node, r.Value)
//	}
//
// Readings does no I/O, and may be called concurrently: each number is right at some moment of the call, and those of different
// metrics may be of different moments. The numbers of servers are those of the last [Health]. The result is nil for a nil store,
// and for one without numbers.
func Readings(s quota.Store) (all []driver.Reading) {
	sums := map[driver.Reading]int64{} // by readings without a value
	driver.Readings(s, func(r driver.Reading) {
		value := r.Value
		r.Value = 0
		sums[r] += value
	})
	for r, value := range sums {
		r.Value = value
		all = append(all, r)
	}
	slices.SortFunc(all, func(a, b driver.Reading) int {
		return cmp.Or(cmp.Compare(a.Metric, b.Metric), cmp.Compare(place(a), place(b)), cmp.Compare(a.Node, b.Node),
			cmp.Compare(a.Server, b.Server), cmp.Compare(a.Version, b.Version))
	})
	return all
}

// place returns the place of a reading among those of its metric.
func place(r driver.Reading) int {
	if r.Fallback {
		return 1
	}
	return 0
}
