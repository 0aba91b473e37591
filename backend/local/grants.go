package local

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fleetquota/fleetquota/quota"
)

// grants remembers the calls that were granted under a request id. Calls with ids run one at a time.
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

// once decides charges that carry an id, or repeats the decision that granted it.
func (g *grants) once(cs []quota.Charge, out []quota.Decision, s *Store) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := s.read()
	g.expire(now)
	id := grantID{quota.Group(cs[0].Key), cs[0].ID}
	if held := g.byID[id]; held != nil {
		if !slices.EqualFunc(held.charges, cs, quota.SameCharge) {
			return fmt.Errorf("local: %w: request id %q was granted to other charges; accepted: a new id", quota.ErrInvalid, cs[0].ID)
		}
		copy(out, held.decisions)
		for i := range out {
			out[i].Replayed = true
		}
		return nil
	}
	if int64(len(g.byID)) >= s.maxKeys {
		return fmt.Errorf("local: %w: %d request ids are remembered, which is all that MaxKeys allows", quota.ErrOverloaded, s.maxKeys)
	}
	if err := s.takeAll(cs, out); err != nil {
		return err
	}
	if !quota.Granted(out) || !slices.ContainsFunc(cs, func(c quota.Charge) bool { return c.Op != quota.OpPeek }) {
		return nil
	}
	held := &grant{id: grantID{strings.Clone(id.group), strings.Clone(id.id)}, at: now, charges: slices.Clone(cs), decisions: slices.Clone(out)}
	for i := range held.charges {
		held.charges[i].Key = strings.Clone(cs[i].Key)
	}
	if g.byID == nil {
		g.byID = make(map[grantID]*grant)
	}
	g.byID[held.id] = held
	g.queue = append(g.queue, held)
	return nil
}

func (g *grants) expire(now quota.Micros) {
	const window = quota.Micros(quota.IDWindow / time.Microsecond)
	n := 0
	for n < len(g.queue) && g.queue[n].at+window < now {
		delete(g.byID, g.queue[n].id)
		g.queue[n] = nil
		n++
	}
	g.queue = g.queue[n:]
}
