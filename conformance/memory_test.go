package conformance

import (
	"context"
	"errors"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// memory is a server in memory, as a KV: handles on one name of data share it, it heeds the suite's clock, and it can be
// broken.
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

// open is a Harness.Open.
func (m *memory) open(t testing.TB, o Opening) quota.Store {
	s, _ := m.breakable(t, o, nil)
	return s
}

func (m *memory) breakable(t testing.TB, o Opening, options *driver.CASOptions) (quota.Store, *connection) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.data[o.Data] == nil {
		m.data[o.Data] = &shelf{entries: map[string]entry{}}
	}
	if o.Clock == nil {
		o.Clock = time.Now
	}
	c := &connection{shelf: m.data[o.Data], clock: o.Clock, thaw: make(chan struct{})}
	s, err := driver.NewCAS(c, options)
	if err != nil {
		t.Fatal(err)
	}
	return s, c
}

// connection is a KV.
type connection struct {
	*shelf
	clock func() time.Time

	broken sync.Mutex
	fault  Fault
	thaw   chan struct{} // closed when a frozen server thaws
}

func (c *connection) set(f Fault) {
	c.broken.Lock()
	defer c.broken.Unlock()
	if c.fault == Frozen && f != Frozen {
		close(c.thaw)
		c.thaw = make(chan struct{})
	}
	c.fault = f
}

var errBroken = errors.New("connection reset")

// meet returns the fate of a request: whether it is executed, and the error that comes instead of the reply.
func (c *connection) meet(ctx context.Context) (executed bool, err error) {
	c.broken.Lock()
	f, thaw := c.fault, c.thaw
	c.broken.Unlock()
	switch f {
	case Refused:
		return false, errBroken
	case LostReply:
		return true, errBroken
	case Frozen:
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-thaw:
		}
	}
	return true, nil
}

func (c *connection) Load(ctx context.Context, keys []string) ([]driver.Entry, quota.Micros, error) {
	if _, err := c.meet(ctx); err != nil {
		return nil, 0, err
	}
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

func (c *connection) Swap(ctx context.Context, changes []driver.Change) (bool, error) {
	executed, broken := c.meet(ctx)
	if !executed {
		return false, broken
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	now := quota.Micros(c.clock().UnixMicro())
	for _, change := range changes {
		if c.get(change.Old.Key, now) != change.Old {
			return false, broken
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
	return true, broken
}

func (m *memory) harness() Harness {
	return Harness{
		Name: "NewCAS over memory",
		Open: m.open,
		Fault: func(t testing.TB, o Opening) (quota.Store, func(Fault)) {
			s, c := m.breakable(t, o, nil)
			return s, c.set
		},
	}
}
