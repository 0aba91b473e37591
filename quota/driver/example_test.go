package driver_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/algorithm"
	"github.com/fleetquota/fleetquota/backend/local"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// rows stands for a database with transactions; a real one also drops rows whose time to live has passed.
type rows struct {
	mu   sync.Mutex
	text map[string]string
}

func (r *rows) Load(_ context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	entries := make([]driver.Entry, len(keys))
	for i, key := range keys {
		entries[i] = driver.Entry{Key: key, Value: r.text[key]}
	}
	return entries, quota.Micros(time.Now().UnixMicro()), nil
}

func (r *rows) Swap(_ context.Context, changes []driver.Change) (bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, c := range changes {
		if r.text[c.Old.Key] != c.Old.Value {
			return false, nil
		}
	}
	for _, c := range changes {
		r.text[c.Old.Key] = c.Value
	}
	return true, nil
}

// A store of two methods has every algorithm, lists of charges and request ids.
func ExampleNewCAS() {
	store := quota.Must(driver.NewCAS(&rows{text: map[string]string{}}, nil))
	defer store.Close()
	limit := quota.NewLimit("jobs", algorithm.FixedWindow(10, 24*time.Hour))
	for range 2 {
		d, err := store.Charge(context.Background(), quota.Charge{Limit: limit, Key: "team-7", Cost: 6})
		fmt.Println(d.Allowed, d.Remaining, err)
	}
	// Output:
	// true 4 <nil>
	// false 4 <nil>
}

// A store with a lock of its own reads an item, applies the charge, and keeps the item if it changed.
func ExampleApplyOne() {
	limit := quota.NewLimit("jobs", algorithm.TokenBucket(10, 1, time.Minute))
	c := quota.Charge{Limit: limit, Key: "team-7/nightly", Cost: 6}
	var item driver.Item // as the store has it: no row, the zero item
	var d quota.Decision
	if err := driver.ApplyOne(&c, &item, 1_800_000_000_000_000, &d); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(d)
	if item.Write {
		fmt.Printf("%s = %s for %v\n", driver.AppendKey(nil, limit.Name(), c.Key), item.AppendText(nil), d.ResetAfter+driver.ExpirySlack)
	}
	// Output:
	// allowed by the store: charged 6, 4 of 10 left, whole after 6m0s, at 2027-01-15T08:00:00.000000Z
	// {team-7}/nightly:jobs = tb1:60000000:360000000:1800000000000000:1800000000000000 for 6m1s
}

// Optional interfaces of a store are found through the policies around it.
func ExampleFind() {
	var store quota.Store = local.New()
	_, ok := driver.Find[driver.HealthReporter](store)
	fmt.Println("has servers to ask:", ok)
	fmt.Println("returns by the deadline:", driver.IsPrompt(store))
	// Output:
	// has servers to ask: false
	// returns by the deadline: true
}

// One lost reply to a batch is one failure, for all callers whose charges it held.
func ExampleWithRoundTrip() {
	batch := new(struct{ charges int })
	lost := driver.Classify(errors.New("connection reset"), quota.ErrIndeterminate)
	a, b := driver.WithRoundTrip(lost, batch), driver.WithRoundTrip(lost, batch)
	first, _ := errors.AsType[driver.RoundTripError](a)
	second, _ := errors.AsType[driver.RoundTripError](b)
	fmt.Println(quota.Charged(a), first.RoundTrip() == second.RoundTrip())
	// Output: unknown true
}
