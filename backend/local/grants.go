package local

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// grants remembers the calls that were granted under a request id. Calls with ids run one at a time, under mu.
type grants struct {
	mu    sync.Mutex
	byID  map[grantID]*grant
	queue []*grant // oldest first
}

type grantID struct{ group, id string }

type grant struct {
	id        grantID
	at        quota.Micros
	charges   []quota.Charge
	decisions []quota.Decision
}

// once decides charges that carry an id, or repeats the decisions that granted the id.
func (g *grants) once(cs []quota.Charge, out []quota.Decision, s *Store) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := s.now()
	g.expire(now)
	id := grantID{quota.Group(cs[0].Key), cs[0].ID}
	held := g.byID[id]
	if held != nil && !held.over(now) {
		if !slices.EqualFunc(held.charges, cs, driver.SameCharge) {
			return fmt.Errorf("local: %w: request id %q was granted to other charges; accepted: a new id", quota.ErrInvalid, cs[0].ID)
		}
		copy(out, held.decisions)
		for i := range out {
			out[i].Replayed = true
		}
		return nil
	}
	if held == nil && int64(len(g.byID)) >= s.maxKeys {
		return fmt.Errorf("local: %w: the store is full: %d request ids are remembered; accepted: these ids, or a larger MaxKeys",
			quota.ErrOverloaded, s.maxKeys)
	}
	if err := s.takeAll(cs, out); err != nil {
		return err
	}
	if !quota.Granted(out) || driver.OnlyPeeks(cs) {
		return nil
	}
	// The texts are cloned: an id or a key may be a part of a larger string, which would stay in memory.
	held = &grant{
		id: grantID{strings.Clone(id.group), strings.Clone(id.id)}, at: max(now, out[0].At),
		charges: slices.Clone(cs), decisions: slices.Clone(out),
	}
	for i := range held.charges {
		held.charges[i].Key, held.charges[i].ID = strings.Clone(cs[i].Key), held.id.id
	}
	if g.byID == nil {
		g.byID = make(map[grantID]*grant)
	}
	g.byID[held.id] = held
	g.queue = append(g.queue, held)
	return nil
}

// over reports whether the grant may be forgotten.
func (g *grant) over(now quota.Micros) bool {
	return g.at+quota.Micros(quota.IDWindow/time.Microsecond) < now
}

// expire forgets up to 16 grants that are over: more than one call adds, and few enough that the call stays
// fast.
func (g *grants) expire(now quota.Micros) {
	n := 0
	for ; n < len(g.queue) && n < 16 && g.queue[n].over(now); n++ {
		if old := g.queue[n]; g.byID[old.id] == old { // else the id was granted again
			delete(g.byID, old.id)
		}
		g.queue[n] = nil
	}
	if g.queue = g.queue[n:]; len(g.queue) == 0 {
		g.byID, g.queue = nil, nil // a map never shrinks
	}
}
