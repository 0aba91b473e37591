package goredis

import (
	"context"
	"errors"
	"sync"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
)

// maxPipeline is how many scripts go in one pipeline.
const maxPipeline = 256

// pipelines writes scripts to a node of a cluster together, for few keys share a slot, and with it a script:
// those that come while enough calls to the node are under way. Each node has a lane of its own, so that
// nobody waits for a node but those whose keys it has.
type pipelines struct {
	carrier engine.Carrier[*piped]

	mu     sync.RWMutex
	lanes  map[string]*engine.Lane[*piped] // by the nodes' addresses
	closed bool
}

// piped is a script that goes with others.
type piped struct {
	node *redis.Client
	cmd  *redis.Cmd
	trip *engine.Trip
}

func newPipelines() *pipelines {
	return &pipelines{
		carrier: engine.Carrier[*piped]{Most: maxPipeline, Fly: fly},
		lanes:   map[string]*engine.Lane[*piped]{},
	}
}

// fly writes scripts together. It is the node's pipeline and not the cluster's, which may give a script that it
// sent on, and lost, the error of the node that sent it on: that nothing ran.
func fly(ctx context.Context, calls []*piped, trip *engine.Trip) error {
	pipe := calls[0].node.Pipeline()
	for _, c := range calls {
		c.trip = trip
		pipe.Process(ctx, once{c.cmd})
	}
	_, err := pipe.Exec(ctx)
	return err
}

// piped sends a script to the node that has its first key, with others if some wait.
func (a *adapter) piped(ctx context.Context, args []any) (*redis.Cmd, error) {
	node, err := a.cluster.MasterForKey(ctx, args[3].(string))
	if err != nil {
		return a.alone(ctx, args) // which finds the same, or a node meanwhile
	}
	p := a.pipelines
	l := p.lane(node.Options().Addr)
	free, err := l.Enter()
	if err != nil {
		return nil, err
	}
	if free {
		defer func() { p.carrier.Leave(ctx, l, err) }()
		var cmd *redis.Cmd
		cmd, err = a.alone(ctx, args)
		return cmd, err
	}
	c := &piped{node: node, cmd: redis.NewCmd(ctx, args...)}
	if err := p.carrier.Join(ctx, l, c, 1); err != nil {
		return nil, err
	}
	var answer redis.Error
	switch err = c.cmd.Err(); {
	case err == nil:
		return c.cmd, nil
	case !errors.As(err, &answer):
		return nil, c.trip.Shared(a.classify(ctx, err))
	case sentOn(err):
		return a.alone(ctx, args) // nothing ran
	}
	return nil, a.classify(ctx, err)
}

// sentOn reports whether a node's reply names another.
func sentOn(err error) bool {
	_, moved := redis.IsMovedError(err)
	_, ask := redis.IsAskError(err)
	return moved || ask
}

func (p *pipelines) lane(addr string) *engine.Lane[*piped] {
	p.mu.RLock()
	l := p.lanes[addr]
	p.mu.RUnlock()
	if l == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		if l = p.lanes[addr]; l == nil {
			l = &engine.Lane[*piped]{}
			p.lanes[addr] = l
			if p.closed {
				l.Close()
			}
		}
	}
	return l
}

// close ends what waits. What is under way lands, or fails once the client is closed, see wait.
func (p *pipelines) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, l := range p.lanes {
		l.Close()
	}
}

func (p *pipelines) wait() { p.carrier.Wait() }
