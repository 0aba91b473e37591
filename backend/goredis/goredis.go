// Package goredis keeps limits in Redis through a go-redis client: a single server, Sentinel, or a
// Redis Cluster.
//
//	client := redis.NewClient(&redis.Options{Addr: "localhost:6379", ContextTimeoutEnabled: true})
//	store, err := goredis.New(client, nil)
//	limiter, err := quota.NewLimiter(store, limit, nil)
//
// A decision is one EVALSHA, made with the server's time. A denial and a peek write nothing.
//
// While four scripts to a server, or to a slot of a cluster, are under way, further charges and lists wait for the
// first of them and go together in the next, each decided by itself and in order. A caller's context bounds
// that wait: who leaves before the send is not charged, after it the outcome is unknown. Errors that several
// callers got from one call have a method RoundTrip, which tells policies so.
//
// On a cluster, where few keys share a slot, scripts to a node that come while four calls to it are under way are
// written together, as a pipeline of the node's client, which the hooks see that OnNewNode adds. Each is sent once all
// the same.
//
// # At most once
//
// The client is used as it is given. Its own retries, which would charge again where a reply was lost,
// do not apply to the store's calls; redirections of a cluster are followed, and a lost connection makes
// a cluster client look for the new master at once. Where the outcome of a call is unknown it fails with
// [quota.ErrIndeterminate]; a charge with an ID may then be repeated.
//
// # Clusters
//
// A ClusterClient asks the server for COMMAND to learn where commands go. Its user needs a right to that,
// or ClusterOptions.DisableRoutingPolicies, without which each refusal costs a round trip a decision.
//
// # Deadlines
//
// go-redis heeds a context's deadline while it waits for a reply only with ContextTimeoutEnabled, and
// cancellation never; otherwise its ReadTimeout is what bounds a call.
package goredis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"

	"github.com/fleetquota/fleetquota/backend/internal/engine"
	"github.com/fleetquota/fleetquota/quota"
	"github.com/fleetquota/fleetquota/quota/driver"
)

// Options change what New makes. The zero value, and nil, take the defaults.
type Options struct {
	// Prefix begins every key; "" is "quota:". Up to 64 printable ASCII characters, no space, no brace.
	Prefix string
	// Strict refuses lists of charges whose groups lie in different hash slots with quota.ErrCrossSlot,
	// on a single server too, so that development behaves as production does. Otherwise a single server
	// decides any list in one step, and a cluster decides such a list slot by slot; see Store.
	Strict bool
	// NoBatching sends every decision in a script of its own. Otherwise charges that come while four
	// scripts to their server, or to their slot of a cluster, are under way wait for the first of them, and go
	// together in the next, and scripts to a node of a cluster are written together in the same way: more
	// decisions a second under load, and no wait without.
	NoBatching bool
	// Notice is told what an operator should know, see [quota.Notice]; nil is nobody.
	Notice func(quota.Notice)
	// Clock replaces the server's time, for tests; nil is the server's time.
	Clock func() time.Time
}

// Store is a quota.Store in Redis. It is safe for concurrent use.
//
// On a cluster a list of charges whose groups lie in different slots is taken slot by slot, in parallel;
// where one denies, what the others granted is given back. Such decisions are marked Split. They never
// admit too much; a denied list may hold tokens for one round trip, and tokens whose return was lost
// come back by refill.
type Store struct {
	engine *engine.Store
}

var (
	_ quota.Store           = (*Store)(nil)
	_ driver.Graded         = (*Store)(nil)
	_ driver.HealthReporter = (*Store)(nil)
)

// Take decides one charge.
func (s *Store) Take(ctx context.Context, c quota.Charge) (quota.Decision, error) {
	return s.engine.Take(ctx, c)
}

// TakeAll decides a list of charges; on a cluster, slot by slot where it must, see Store.
func (s *Store) TakeAll(ctx context.Context, cs []quota.Charge, out []quota.Decision) error {
	return s.engine.TakeAll(ctx, cs, out)
}

// Atomicity says how far lists are decided in one step: on a cluster, and with Options.Strict, within one group.
func (s *Store) Atomicity() driver.Atomicity { return s.engine.Atomicity() }

// Health asks the server, or each master of a cluster, for its INFO, and tells Options.Notice of dangers to quotas:
// "eviction" of a policy other than noeviction, "evicted" of keys evicted since the last call, "version" of a
// server that is too old. It fails as a decision does.
func (s *Store) Health(ctx context.Context) (driver.Health, error) { return s.engine.Health(ctx) }

// Close ends the store: calls in flight end, later ones are quota.ErrClosed. It closes the client only where the
// store was made from a URL.
func (s *Store) Close() error { return s.engine.Close() }

// New returns a store over a client, which stays the caller's to close. It sends nothing. Accepted are
// *redis.Client (a single server or Sentinel) and *redis.ClusterClient; a Ring, which would spread one
// quota over servers that do not know of each other, and wrappers, behind which retries cannot be
// seen, are quota.ErrInvalid.
func New(client redis.UniversalClient, o *Options) (*Store, error) {
	if o == nil {
		o = &Options{}
	}
	a := &adapter{client: client}
	cluster, heedsDeadline := false, false
	switch c := client.(type) {
	case *redis.Client:
		if c == nil {
			return nil, refused("a nil *redis.Client")
		}
		heedsDeadline = c.Options().ContextTimeoutEnabled
	case *redis.ClusterClient:
		if c == nil {
			return nil, refused("a nil *redis.ClusterClient")
		}
		if c.Options().MaxRedirects < 1 { // what the client makes of -1; of 0 it makes 3
			return nil, fmt.Errorf("goredis: %w: MaxRedirects is -1; accepted: 0, which is 3, or more, or no redirection would be followed", quota.ErrInvalid)
		}
		heedsDeadline = c.Options().ContextTimeoutEnabled
		a.cluster, cluster = c, true
		if !o.NoBatching {
			a.pipelines = newPipelines()
		}
	default:
		return nil, refused(fmt.Sprintf("a %T", client))
	}
	if !heedsDeadline && o.Notice != nil {
		o.Notice(quota.Notice{Name: "deadline", Text: "ContextTimeoutEnabled is off: calls are bounded by the client's ReadTimeout, not by their context"})
	}
	s, err := engine.New(a, cluster, engine.Options(*o))
	if err != nil {
		return nil, err
	}
	return &Store{engine: s}, nil
}

func refused(what string) error {
	return fmt.Errorf("goredis: %w: the client is %s; accepted: a *redis.Client or a *redis.ClusterClient", quota.ErrInvalid, what)
}

// adapter is an engine.Client.
type adapter struct {
	client    redis.UniversalClient
	cluster   *redis.ClusterClient // nil unless it is one
	pipelines *pipelines           // nil on a single server, and without batching
	owned     bool                 // Close closes the client
}

// once is a command that the client sends once: retries are for commands that change nothing.
type once struct{ *redis.Cmd }

func (once) NoRetry() bool { return true }

func (a *adapter) Do(ctx context.Context, args []any, _ int) (engine.Reply, error) {
	send := a.alone
	if a.pipelines != nil {
		send = a.piped
	}
	cmd, err := send(ctx, args)
	if err != nil {
		return nil, err
	}
	r, ok := cmd.Val().([]any)
	if !ok {
		return reply(nil), nil
	}
	return reply(r), nil
}

// alone sends a script by itself.
func (a *adapter) alone(ctx context.Context, args []any) (*redis.Cmd, error) {
	cmd := redis.NewCmd(ctx, args...)
	if err := a.client.Process(ctx, once{cmd}); err != nil {
		return nil, a.classify(ctx, err)
	}
	return cmd, nil
}

func (a *adapter) classify(ctx context.Context, err error) error {
	var answer redis.Error
	switch {
	case errors.As(err, &answer):
		if engine.IsNoScript(err) {
			return err
		}
		return engine.ReplyError(err)
	case errors.Is(err, redis.ErrPoolTimeout), errors.Is(err, redis.ErrPoolExhausted):
		return fmt.Errorf("redis: %w: %w", quota.ErrOverloaded, err)
	case errors.Is(err, redis.ErrClosed):
		return fmt.Errorf("redis: %w: %w", quota.ErrClosed, err)
	}
	if a.cluster != nil {
		// Without retries the client would not ask who the master is now. It does so in the background,
		// and not more often than it thinks right.
		a.cluster.ReloadState(ctx)
	}
	if end, set := ctx.Deadline(); set && errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(end) {
		err = fmt.Errorf("%w: %w", context.DeadlineExceeded, err) // the client does not tell it from its own timeouts
	}
	return engine.TransportError(err)
}

func (a *adapter) Info(ctx context.Context) ([]string, error) {
	var mu sync.Mutex
	var infos []string
	ask := func(ctx context.Context, c *redis.Client) error {
		info, err := c.Info(ctx).Result()
		mu.Lock()
		defer mu.Unlock()
		infos = append(infos, info)
		return err
	}
	var err error
	if a.cluster != nil {
		err = a.cluster.ForEachMaster(ctx, ask)
	} else {
		err = ask(ctx, a.client.(*redis.Client))
	}
	if err != nil {
		return nil, a.classify(ctx, err)
	}
	return infos, nil
}

func (a *adapter) Close() error {
	if a.pipelines != nil {
		a.pipelines.close()
		defer a.pipelines.wait()
	}
	if !a.owned {
		return nil
	}
	return a.client.Close()
}

// reply is an engine.Reply.
type reply []any

func (r reply) Len() int { return len(r) }

func (r reply) Int(i int) (int64, bool) {
	if i >= len(r) {
		return 0, false
	}
	n, ok := r[i].(int64)
	return n, ok
}

func (r reply) Text(i int) (string, bool) {
	if i >= len(r) {
		return "", false
	}
	if r[i] == nil {
		return "", true
	}
	s, ok := r[i].(string)
	return s, ok
}
