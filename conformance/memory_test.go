package conformance

import (
	"context"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// memory is a server in memory, as a KV: handles on one name of data share it, and it heeds the suite's clock.
type memory struct {
	mu   sync.Mutex
	data map[string]*shelf
}

type shelf struct {
	mu      sync.Mutex
	entries map[string]entry
	version int
}

type entry struct {
	value   string
	version int
	expires quota.Micros
}

func newMemory() *memory { return &memory{data: map[string]*shelf{}} }

// kv returns the KV of an opening.
func (m *memory) kv(o Opening) driver.KV {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data[o.Data] == nil {
		m.data[o.Data] = &shelf{entries: map[string]entry{}}
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	return &clocked{m.data[o.Data], o.Clock}
}

// open is a Harness.Open.
func (m *memory) open(t testing.TB, o Opening) quota.Store {
	s, err := driver.NewCAS(m.kv(o), nil)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// clocked is a KV: a shelf with a clock.
type clocked struct {
	*shelf
	clock func() time.Time
}

func (c *clocked) Load(_ context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := quota.Micros(c.clock().UnixMicro())
	out := make([]driver.Entry, len(keys))
	for i, k := range keys {
		out[i] = c.get(k, now)
	}
	return out, now, nil
}

func (s *shelf) get(key string, now quota.Micros) driver.Entry {
	e, ok := s.entries[key]
	if ok && e.expires <= now {
		delete(s.entries, key)
		e = entry{}
	}
	return driver.Entry{Key: key, Value: e.value, Revision: strconv.Itoa(e.version)}
}

func (c *clocked) Swap(_ context.Context, changes []driver.Change) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := quota.Micros(c.clock().UnixMicro())
	for _, change := range changes {
		if c.get(change.Old.Key, now) != change.Old {
			return false, nil
		}
	}
	for _, change := range changes {
		if change.Value == change.Old.Value {
			continue
		}
		c.version++
		c.entries[change.Old.Key] = entry{change.Value, c.version, now + quota.Micros(min(change.TTL, 1<<62)/time.Microsecond)}
		if change.Value == "" {
			delete(c.entries, change.Old.Key)
		}
	}
	return true, nil
}

// broken is a Harness.Fault: a connection that can be broken before a KV.
func (m *memory) broken(o *driver.Options) func(t testing.TB, o Opening) (quota.Store, func(Fault)) {
	return func(t testing.TB, opening Opening) (quota.Store, func(Fault)) {
		kv, set := FaultyKV(m.kv(opening), nil)
		s, err := driver.NewCAS(kv, o)
		if err != nil {
			t.Fatal(err)
		}
		return s, set
	}
}

func (m *memory) harness() Harness {
	return Harness{Name: "NewCAS over memory", Open: m.open, Fault: m.broken(nil)}
}
