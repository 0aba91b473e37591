package goredis

import (
	"context"
	"errors"
	"sync"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// maxPipeline is how many scripts go in one pipeline.
const maxPipeline = 256

// pipelines writes scripts to a node of a cluster together: those that come while enough calls to the node
// are in flight. (Few keys share a slot, and with it a script.) Each node has a queue of its own, so that a
// caller waits only for the node that has its key.
type pipelines struct {
	batcher engine.Batcher[*piped]

	// mu guards the fields below. Whenever it is free: once closed, every queue is closed.
	mu     sync.RWMutex
	queues map[string]*engine.Queue[*piped] // by the nodes' addresses
	closed bool
}

// piped is a script that goes with others.
type piped struct {
	node      *redis.Client
	cmd       *redis.Cmd
	roundTrip any
}

func newPipelines() *pipelines {
	return &pipelines{
		batcher: engine.Batcher[*piped]{Max: maxPipeline, Send: sendPipeline},
		queues:  map[string]*engine.Queue[*piped]{},
	}
}

// sendPipeline writes scripts together. It uses the node's pipeline rather than the cluster's, which may give
// a script that it redirected, and lost, the error of the node that redirected it: that nothing ran. And it takes a
// connection that other calls use too: those that the client keeps for pipelines alone are not made ready with the node,
// and stay where they lead when the node is demoted.
func sendPipeline(ctx context.Context, calls []*piped, roundTrip any) error {
	conn := calls[0].node.Conn()
	defer conn.Close()
	pipe := conn.Pipeline()
	for _, c := range calls {
		c.roundTrip = roundTrip
		pipe.Process(ctx, once{c.cmd})
	}
	_, err := pipe.Exec(ctx)
	return err
}

// piped sends a script to the node that has its first key, with the scripts that wait for the node if any do.
func (a *adapter) piped(ctx context.Context, args []any) (cmd *redis.Cmd, err error) {
	node := a.single.Load()
	if node == nil {
		if node, err = a.cluster.MasterForKey(ctx, args[3].(string)); err != nil {
			return a.alone(ctx, args) // which finds the same, or a node meanwhile
		}
	}
	var waited *piped
	p := a.pipelines
	err = p.batcher.Do(ctx, p.queue(node.Options().Addr), 1,
		func() (err error) {
			cmd, err = a.alone(ctx, args)
			return err
		},
		func() *piped {
			waited = &piped{node: node, cmd: redis.NewCmd(ctx, args...)}
			return waited
		})
	if err != nil || waited == nil {
		return cmd, err
	}
	var answer redis.Error
	switch err := waited.cmd.Err(); {
	case err == nil, err == redis.Nil:
		return waited.cmd, nil
	case !errors.As(err, &answer):
		return nil, driver.WithRoundTrip(a.classify(ctx, err), waited.roundTrip)
	case a.cluster != nil && redirected(err):
		return a.alone(ctx, args) // nothing ran
	default:
		a.demotes(node, answer, args[3].(string))
		return nil, a.classify(ctx, err)
	}
}

// redirected reports whether a node's reply names another node.
func redirected(err error) bool {
	_, moved := redis.IsMovedError(err)
	_, ask := redis.IsAskError(err)
	return moved || ask
}

// queue returns the queue of a node.
func (p *pipelines) queue(addr string) *engine.Queue[*piped] {
	p.mu.RLock()
	q := p.queues[addr]
	p.mu.RUnlock()
	if q == nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		if q = p.queues[addr]; q == nil {
			q = &engine.Queue[*piped]{}
			p.queues[addr] = q
			if p.closed {
				q.Close()
			}
		}
	}
	return q
}

// close refuses the waiting scripts. A call in flight ends with its reply, or once the client is closed, see
// wait.
func (p *pipelines) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	for _, q := range p.queues {
		q.Close()
	}
}

// wait returns when no pipeline is in flight.
func (p *pipelines) wait() { p.batcher.Wait() }
