package goredis

import (
	"context"
	"errors"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// topologyTimeout bounds a question for the topology. A client of the caller's asks one node after the other, in random
// order.
const topologyTimeout = 3 * time.Second

// nodes says which node of a cluster has a slot. The client knows, once it has loaded the topology; until then it would
// load it for a caller, so it is not asked.
type nodes struct {
	loaded   atomic.Bool
	topology engine.Topology
	covered  atomic.Pointer[covered] // nil while it is not known
	survey   engine.Survey[*covered] // for a client of the caller's
	surveyor *surveyor               // of a client made from a URL, else nil
}

func newAdapter() *adapter {
	a := &adapter{life: make(chan struct{})}
	a.nodes.topology.Ask = a.askTopology
	a.repair.Do = a.leave
	return a
}

// Node returns the address of the master that has a slot.
func (a *adapter) Node(slot uint16) string {
	if a.cluster == nil {
		return ""
	}
	if !a.nodes.loaded.Load() {
		a.nodes.topology.Soon()
		return ""
	}
	if c := a.nodes.covered.Load(); c != nil && !c[slot] { // the client would name a node at random
		a.nodes.topology.Soon()
		return ""
	}
	node, err := a.cluster.MasterForKey(context.Background(), engine.SlotTags()[slot])
	if err != nil {
		return ""
	}
	return node.Options().Addr
}

// Refresh loads the topology.
func (a *adapter) Refresh(ctx context.Context) error {
	if a.cluster == nil {
		return nil
	}
	return a.nodes.topology.Refresh(ctx)
}

// Warm makes as many connections to a node as scripts to it go at a time.
func (a *adapter) Warm(ctx context.Context, name, key string) error {
	if a.cluster != nil && name == "" {
		return a.nodes.topology.Refresh(ctx)
	}
	node := a.named(ctx, name, key)
	if node == nil {
		return nil
	}
	return a.warm(ctx, node, key)
}

// warm makes connections to a node.
func (a *adapter) warm(ctx context.Context, node *redis.Client, key string) error {
	return engine.ConnectAll(warmConnections, func() error { return a.connect(ctx, node, key) })
}

// Ping makes a round trip to a node.
func (a *adapter) Ping(ctx context.Context, name, key string) error {
	if node := a.named(ctx, name, key); node != nil {
		return a.connect(ctx, node, key)
	}
	return nil
}

// named returns the client of the node of a name, which has a key. It is nil if the key's slot is another node's by now,
// which the next call sees.
func (a *adapter) named(ctx context.Context, name, key string) *redis.Client {
	if node := a.single.Load(); node != nil {
		return node
	}
	node, err := a.cluster.MasterForKey(ctx, key)
	if err != nil || node.Options().Addr != name {
		return nil
	}
	return node
}

// warmConnections is how many connections Warm makes.
const warmConnections = 4

// connect sees to a connection to a node. Connections in the pool that broke meanwhile are used up first.
func (a *adapter) connect(ctx context.Context, node *redis.Client, key string) error {
	most := int(node.PoolStats().IdleConns)
	for used := 0; ; used++ {
		cmd := redis.NewCmd(ctx, "get", key)
		err := node.Process(ctx, once{cmd})
		var answer redis.Error
		switch {
		case err == nil, err == redis.Nil:
			return nil
		case errors.As(err, &answer):
			return engine.WarmError(answer)
		}
		err = a.classify(ctx, err)
		if !engine.Broken(err) || used > most || ctx.Err() != nil {
			return err
		}
	}
}

// askTopology loads the topology at once, which ForEachMaster does; ReloadState would do so later.
func (a *adapter) askTopology() error {
	ctx, cancel := context.WithTimeout(context.Background(), topologyTimeout)
	defer cancel()
	var mu sync.Mutex
	masters := map[string]*redis.Client{}
	if err := a.cluster.ForEachMaster(ctx, func(_ context.Context, c *redis.Client) error {
		mu.Lock()
		defer mu.Unlock()
		masters[c.Options().Addr] = c
		return nil
	}); err != nil {
		return a.classify(ctx, err)
	}
	if a.nodes.surveyor == nil {
		a.askCovered(masters)
	}
	a.nodes.loaded.Store(true)
	return nil
}

// askCovered asks masters which slots have a node, which the client does not tell.
func (a *adapter) askCovered(masters map[string]*redis.Client) {
	c, err := a.nodes.survey.Ask(slices.Collect(maps.Keys(masters)), func(addr string) (*covered, error) {
		answer, err := masters[addr].Do(context.Background(), "CLUSTER", "SLOTS").Slice()
		if err != nil {
			return nil, err
		}
		slots, err := readSlots(answer, addr)
		if err != nil {
			return nil, err
		}
		return coveredBy(slots), nil
	})
	if err != nil {
		c = nil
	}
	a.nodes.covered.Store(c)
}

var (
	_ engine.Placer  = (*adapter)(nil)
	_ engine.Warmer  = (*adapter)(nil)
	_ engine.Bundler = (*adapter)(nil)
	_ engine.Scanner = (*adapter)(nil)
)
