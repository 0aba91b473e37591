package conformance

import (
	"context"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// measured is a KV that remembers the largest that it was given.
type measured struct {
	driver.KV
	seen *sizes
}

type sizes struct {
	mu                  sync.Mutex
	key, value, entries int
	life                time.Duration
}

func (m measured) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	m.seen.mu.Lock()
	m.seen.entries = max(m.seen.entries, len(keys))
	m.seen.mu.Unlock()
	return m.KV.Load(ctx, keys)
}

func (m measured) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	m.seen.mu.Lock()
	for _, c := range changes {
		m.seen.key, m.seen.value, m.seen.life = max(m.seen.key, len(c.Old.Key)), max(m.seen.value, len(c.Value)), max(m.seen.life, c.TTL)
	}
	m.seen.mu.Unlock()
	return m.KV.Swap(ctx, changes)
}

// The suite gives a store the largest of everything that package driver says a store must bear.
func TestSizesAreReached(t *testing.T) {
	seen := &sizes{}
	m := newMemory()
	r, err := examine(t, Harness{Open: func(t testing.TB, o Opening) quota.Store {
		s, err := driver.NewCAS(measured{m.kv(o), seen}, nil)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}}, options{only: []string{"S1/largest states", "C1/largest keys"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range r.Results {
		if c.Outcome != Passed {
			t.Errorf("%s: got %s, want %s\n%s", c.Case, c.Outcome, Passed, c.Text)
		}
	}
	// A unit is not negative, nor is a number that tells the length: each has a byte less than the longest number.
	if least := driver.MaxStoredValue - 4; seen.value < least || seen.value > driver.MaxStoredValue {
		t.Errorf("longest value: got %d bytes, want %d to %d", seen.value, least, driver.MaxStoredValue)
	}
	if seen.key != driver.MaxStoredKey || seen.entries != driver.MaxEntries || seen.life != driver.MaxLifetime {
		t.Errorf("longest key, most entries and longest lifetime: got %d, %d and %v, want %d, %d and %v",
			seen.key, seen.entries, seen.life, driver.MaxStoredKey, driver.MaxEntries, driver.MaxLifetime)
	}
}
